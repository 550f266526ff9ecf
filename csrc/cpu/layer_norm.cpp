// layer_norm_backward and its derivative on the CPU, RMSNorm included.  Formulas: math/layer_norm.h.
//
// A row is summed over and then written while it lies in the cache: each tensor moves once.  Sums down the columns are
// made for chunks of rows of fixed size, and the chunks' sums are added in order: the same bits for every number of
// threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "../layer_norm_arguments.h"
#include "../math/layer_norm.h"
#include "norm_sums.h"
#include "pieces.h"

namespace rk::cpu {
namespace {

// What a piece of a row is read from; a null gg_weight and gg_bias are both absent, or neither.
template <class A>
struct NormPiece {
  const A *x, *g, *u, *weight, *gg_weight, *gg_bias;
  int64_t n;
  A mean, r;

  RK_HOST_DEVICE A normalized(int64_t j) const { return (x[j] - mean) * r; }
};

// += the sums of w g, w g xh and, if kSecond, of u, u xh, u w g
template <bool kSecond, class A>
RK_MULTIVERSION void add_sums(const NormPiece<A>& p, const A* w, double* totals) {
  norm_sums(NormRow<kSecond, true, A>{p.x, p.g, p.u, w, p.mean, p.r}, p.n, totals);
}

template <class A>
RK_MULTIVERSION void write_slopes(const NormPiece<A>& p, NormSlopes<A> c, A* __restrict__ out) {
  for (int64_t j = 0; j < p.n; ++j) out[j] = c.x_g * (p.weight[j] * p.g[j]) + (c.x_x * p.normalized(j) + c.x_one);
}

template <class A>
RK_MULTIVERSION void write_bends(const NormPiece<A>& p, NormBends<A> c, A* __restrict__ out) {
  if (p.gg_weight) {
    for (int64_t j = 0; j < p.n; ++j)
      out[j] =
          c.x_u * p.u[j] + (c.x_g * p.weight[j] + p.r * p.gg_weight[j]) * p.g[j] + (c.x_x * p.normalized(j) + c.x_one);
  } else {
    for (int64_t j = 0; j < p.n; ++j)
      out[j] = c.x_u * p.u[j] + c.x_g * (p.weight[j] * p.g[j]) + (c.x_x * p.normalized(j) + c.x_one);
  }
}

// gg_grad = w t + a xh + b
template <class A>
RK_MULTIVERSION void write_gg_grad(const NormPiece<A>& p, NormBends<A> c, A* __restrict__ out) {
  if (p.gg_weight) {
    for (int64_t j = 0; j < p.n; ++j)
      out[j] = p.weight[j] * (p.r * p.u[j] + (c.t_x * p.normalized(j) + c.t_one)) +
               (p.gg_weight[j] * p.normalized(j) + p.gg_bias[j]);
  } else {
    for (int64_t j = 0; j < p.n; ++j) out[j] = p.weight[j] * (p.r * p.u[j] + (c.t_x * p.normalized(j) + c.t_one));
  }
}

// += g t
template <class A>
RK_MULTIVERSION void add_weight_bends(const NormPiece<A>& p, NormBends<A> c, A* __restrict__ totals) {
  for (int64_t j = 0; j < p.n; ++j) totals[j] += p.g[j] * (p.r * p.u[j] + (c.t_x * p.normalized(j) + c.t_one));
}

// += g xh
template <class A>
RK_MULTIVERSION void add_weight_slopes(const NormPiece<A>& p, A* __restrict__ totals) {
  for (int64_t j = 0; j < p.n; ++j) totals[j] += p.g[j] * p.normalized(j);
}

template <class A>
RK_MULTIVERSION void add_to(A* __restrict__ totals, const A* from, int64_t n) {
  for (int64_t j = 0; j < n; ++j) totals[j] += from[j];
}

struct LayerNormArguments {
  ScalarType dtype;
  int64_t item;  // bytes of a stored element
  int64_t rows, cols, cotangents;
  const void* x;                                            // [rows, cols]
  const void *g, *u;                                        // [cotangents, rows, cols]; u of absent gg_x is null
  const void *weight, *gg_weight, *gg_bias, *ones, *zeros;  // [cols], accumulation type; null: absent
  const void *mean, *rstd;                                  // [rows], accumulation type
  void *gg_grad, *grad_x;  // like g, and like x or (of the first backward) g; null: not needed
  int64_t chunk_rows, chunks;
  void *partial_weight, *partial_bias;  // [chunks, cols] zeros, or null
  bool streamed;                        // outputs go past the caches
};

// The two matrices and three vectors of a row, and the outputs, from column `begin` on, in the accumulation type.
template <class A>
class Row {
 public:
  // Of the cotangents and what is like them, the k-th.
  Row(const LayerNormArguments& a, int64_t row, int64_t k)
      : a_(a), row_(row), row_of_k_(k * a.rows + row), direct_(a.item == sizeof(A)), loaded_(-1) {}

  NormPiece<A> piece(int64_t begin) {
    const int64_t n = std::min(a_.cols - begin, kPiece);
    if (!direct_ && loaded_ != begin) {
      read_piece(a_.dtype, at(a_.x, row_, begin), x_, n);
      read_piece(a_.dtype, at(a_.g, row_of_k_, begin), g_, n);
      if (a_.u) read_piece(a_.dtype, at(a_.u, row_of_k_, begin), u_, n);
      loaded_ = begin;
    }
    const A* zeros = static_cast<const A*>(a_.zeros);
    return {direct_ ? static_cast<const A*>(at(a_.x, row_, begin)) : x_,
            direct_ ? static_cast<const A*>(at(a_.g, row_of_k_, begin)) : g_,
            !a_.u     ? zeros
            : direct_ ? static_cast<const A*>(at(a_.u, row_of_k_, begin))
                      : u_,
            vector(a_.weight ? a_.weight : a_.ones, begin),
            vector(a_.gg_weight, begin),
            vector(a_.gg_bias, begin),
            n,
            a_.mean ? static_cast<const A*>(a_.mean)[row_] : A(0),
            static_cast<const A*>(a_.rstd)[row_]};
  }

  // Lets f fill [begin, begin + n) of the k-th row.
  template <class F>
  void write(void* out, int64_t begin, int64_t n, const F& f) {
    write(out, row_of_k_, begin, n, f);
  }
  // Of the row that there is once for all cotangents.
  template <class F>
  void write_once(void* out, int64_t begin, int64_t n, const F& f) {
    write(out, row_, begin, n, f);
  }

 private:
  template <class F>
  void write(void* out, int64_t row, int64_t begin, int64_t n, const F& f) {
    char* to = static_cast<char*>(out) + (row * a_.cols + begin) * a_.item;
    if (direct_ && !a_.streamed) return f(reinterpret_cast<A*>(to));
    f(out_);
    direct_ ? stream_piece(out_, to, n * a_.item) : write_piece(a_.dtype, out_, to, n);
  }
  const void* at(const void* base, int64_t row, int64_t begin) const {
    return static_cast<const char*>(base) + (row * a_.cols + begin) * a_.item;
  }
  static const A* vector(const void* base, int64_t begin) {
    return base ? static_cast<const A*>(base) + begin : nullptr;
  }

  const LayerNormArguments& a_;
  int64_t row_, row_of_k_;
  bool direct_;
  int64_t loaded_;
  alignas(64) A x_[kPiece], g_[kPiece], u_[kPiece], out_[kPiece];
};

template <class F>
void for_pieces(const LayerNormArguments& a, const F& f) {
  for (int64_t begin = 0; begin < a.cols; begin += kPiece) f(begin);
}

template <class A>
A* column_totals(void* partial, const LayerNormArguments& a, int64_t row, int64_t begin) {
  return partial ? static_cast<A*>(partial) + row / a.chunk_rows * a.cols + begin : nullptr;
}

template <class A>
void backward_row(const LayerNormArguments& a, int64_t i, int64_t k) {
  Row<A> row(a, i, k);
  double sums[2] = {};
  if (a.grad_x)
    for_pieces(a, [&](int64_t begin) {
      const NormPiece<A> p = row.piece(begin);
      add_sums<false>(p, p.weight, sums);
    });
  const double r = double(static_cast<const A*>(a.rstd)[i]);
  const NormSlopes<double> d = norm_slopes(a.mean ? sums[0] : 0.0, sums[1], r, double(a.cols));
  const NormSlopes<A> c{A(d.x_g), A(d.x_x), A(d.x_one)};
  for_pieces(a, [&](int64_t begin) {
    const NormPiece<A> p = row.piece(begin);
    if (a.grad_x) row.write(a.grad_x, begin, p.n, [&](A* out) { write_slopes(p, c, out); });
    if (a.partial_weight) add_weight_slopes(p, column_totals<A>(a.partial_weight, a, i, begin));
    if (a.partial_bias) add_to(column_totals<A>(a.partial_bias, a, i, begin), p.g, p.n);
  });
}

template <class A>
NormBends<A> bends_of(const LayerNormArguments& a, int64_t i, Row<A>& row) {
  double sums[7] = {};
  for_pieces(a, [&](int64_t begin) {
    const NormPiece<A> p = row.piece(begin);
    add_sums<true>(p, p.weight, sums);
    if (p.gg_weight) add_sums<false>(p, p.gg_weight, sums + 5);
  });
  if (!a.mean) sums[0] = sums[2] = sums[5] = 0;  // of h, u, a g
  const double r = double(static_cast<const A*>(a.rstd)[i]);
  const NormBends<double> d = norm_bends<double>(
      {.u = sums[2], .ux = sums[3], .g = sums[0], .gx = sums[1], .ug = sums[4], .ag = sums[5], .agx = sums[6]}, r,
      double(a.cols));
  return {A(d.t_x), A(d.t_one), A(d.x_u), A(d.x_g), A(d.x_x), A(d.x_one)};
}

template <class A>
void double_backward_row(const LayerNormArguments& a, int64_t i) {
  Row<A> row(a, i, 0);
  const NormBends<A> c = bends_of(a, i, row);
  for_pieces(a, [&](int64_t begin) {
    const NormPiece<A> p = row.piece(begin);
    if (a.gg_grad) row.write(a.gg_grad, begin, p.n, [&](A* out) { write_gg_grad(p, c, out); });
    if (a.grad_x) row.write(a.grad_x, begin, p.n, [&](A* out) { write_bends(p, c, out); });
    if (a.partial_weight) add_weight_bends(p, c, column_totals<A>(a.partial_weight, a, i, begin));
  });
}

// Several cotangents: their rows lie in the cache from the sums to the sweep that adds up grad_x.
template <class A>
void double_backward_rows(const LayerNormArguments& a, int64_t i, NormBends<A>* bends) {
  for (int64_t k = 0; k < a.cotangents; ++k) {
    Row<A> row(a, i, k);
    bends[k] = bends_of(a, i, row);
  }
  alignas(64) A sum[kPiece], part[kPiece];
  for_pieces(a, [&](int64_t begin) {
    const int64_t n = std::min(a.cols - begin, kPiece);
    std::fill(sum, sum + n, A(0));
    for (int64_t k = 0; k < a.cotangents; ++k) {
      Row<A> row(a, i, k);
      const NormPiece<A> p = row.piece(begin);
      if (a.gg_grad) row.write(a.gg_grad, begin, n, [&](A* out) { write_gg_grad(p, bends[k], out); });
      if (a.partial_weight) add_weight_bends(p, bends[k], column_totals<A>(a.partial_weight, a, i, begin));
      if (!a.grad_x) continue;
      write_bends(p, bends[k], part);
      add_to(sum, part, n);
    }
    if (a.grad_x) Row<A>(a, i, 0).write_once(a.grad_x, begin, n, [&](A* out) { std::copy(sum, sum + n, out); });
  });
}

// Chunks of rows, one thread each; their sums lie in `partial`.
template <class F>
void run_chunks(const LayerNormArguments& a, const F& f) {
  const int64_t cost = a.chunk_rows * a.cols * a.cotangents;
  torch::stable::parallel_for(0, a.chunks, rows_per_thread(cost), [&](int64_t begin, int64_t end) {
    f(begin * a.chunk_rows, std::min(a.rows, end * a.chunk_rows));
    finish_streams();
  });
}

template <class A>
void run_backward(const LayerNormArguments& a) {
  run_chunks(a, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t k = 0; k < a.cotangents; ++k) backward_row<A>(a, row, k);
  });
}

template <class A>
void run_double_backward(const LayerNormArguments& a) {
  run_chunks(a, [&](int64_t begin, int64_t end) {
    if (a.cotangents == 1) {
      for (int64_t row = begin; row < end; ++row) double_backward_row<A>(a, row);
    } else {
      std::vector<NormBends<A>> bends(a.cotangents);
      for (int64_t row = begin; row < end; ++row) double_backward_rows<A>(a, row, bends.data());
    }
  });
}

// The tensors of one call, in the form that the rows read.
class LayerNormTensors {
 public:
  LayerNormArguments a{};

  LayerNormTensors(int64_t cotangents, const Tensor& x, const Tensor& grad, const std::optional<Tensor>& mean,
                   const Tensor& rstd, const std::optional<Tensor>& weight, bool sums_columns)
      : x_(torch::stable::contiguous(x)), grad_(grad) {
    a.cotangents = cotangents;
    a.dtype = x.scalar_type();
    a.item = item_size(a.dtype);
    a.rows = x.size(0);
    a.cols = x.size(1);
    constexpr int64_t least = 1024;  // bytes of a row that is worth to be written so
    a.streamed = grad.numel() * a.item >= kStreamedBytes && a.cols * a.item >= least;
    // A chunk's sums cost a row of their own, so a chunk is many rows where these are short.
    constexpr int64_t elements = 65536;
    a.chunk_rows = sums_columns ? std::clamp<int64_t>(elements / std::max<int64_t>(a.cols, 1), 4, 64) : 1;
    a.chunk_rows = std::max<int64_t>(a.chunk_rows / std::max<int64_t>(cotangents, 1), 1);
    a.chunks = (a.rows + a.chunk_rows - 1) / a.chunk_rows;
    a.x = x_.data_ptr();
    a.g = keep(grad);
    a.rstd = keep(rstd);
    a.mean = keep(mean);
    a.weight = keep(weight);
    if (!weight) a.ones = filled(1);
  }

  const void* keep(const Tensor& t) {
    kept_.push_back(torch::stable::contiguous(t));
    return kept_.back().data_ptr();
  }
  const void* keep(const std::optional<Tensor>& t) { return t ? keep(*t) : nullptr; }

  // A vector [cols] of one number.
  const void* filled(double value) {
    kept_.push_back(torch::stable::new_empty(x_, {a.cols}, accumulation_type(a.dtype)));
    torch::stable::fill_(kept_.back(), value);
    return kept_.back().data_ptr();
  }

  // Like x, or like the cotangents.
  Tensor matrix(bool needed, bool of_cotangents, void*& data) {
    Tensor out = torch::stable::new_empty(x_, !needed ? std::vector<int64_t>{0} : sizes_of(of_cotangents ? grad_ : x_));
    data = needed ? out.data_ptr() : nullptr;
    return out;
  }

  // Room for the sums of every chunk.
  void make_partial(bool needed, void*& data) {
    if (!needed) return;
    kept_.push_back(torch::stable::new_zeros(x_, {a.chunks, a.cols}, accumulation_type(a.dtype)));
    data = kept_.back().data_ptr();
  }

  Tensor total(bool needed, const void* partial) {
    Tensor out = torch::stable::new_empty(x_, {needed ? a.cols : 0}, accumulation_type(a.dtype));
    if (!needed) return out;
    visit_accumulation(a.dtype, [&]<class A>(A) {
      add_rows_in_double(a.chunks, a.cols, static_cast<const A*>(partial), pointer<A>(out));
    });
    return out;
  }

 private:
  Tensor x_, grad_;
  std::vector<Tensor> kept_;
};

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(Tensor grad, Tensor x, std::optional<Tensor> weight,
                                                       std::optional<Tensor> mean, Tensor rstd, bool need_x,
                                                       bool need_weight, bool need_bias) {
  const std::optional<Tensor> none;
  const char* op = "layer_norm_backward";
  const int64_t cotangents = check_layer_norm(op, none, none, none, grad, x, weight, mean, rstd);
  check_several(op, cotangents, need_weight || need_bias);
  LayerNormTensors t(cotangents, x, grad, mean, rstd, weight, need_weight || need_bias);
  LayerNormArguments& a = t.a;
  Tensor grad_x = t.matrix(need_x, true, a.grad_x);
  t.make_partial(need_weight, a.partial_weight);
  t.make_partial(need_bias, a.partial_bias);
  visit_accumulation(a.dtype, [&]<class A>(A) { run_backward<A>(a); });
  return {grad_x, t.total(need_weight, a.partial_weight), t.total(need_bias, a.partial_bias)};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_double_backward(std::optional<Tensor> gg_x,
                                                              std::optional<Tensor> gg_weight,
                                                              std::optional<Tensor> gg_bias, Tensor grad, Tensor x,
                                                              std::optional<Tensor> weight, std::optional<Tensor> mean,
                                                              Tensor rstd, bool need_grad, bool need_x,
                                                              bool need_weight) {
  const int64_t cotangents =
      check_layer_norm("layer_norm_double_backward", gg_x, gg_weight, gg_bias, grad, x, weight, mean, rstd);
  LayerNormTensors t(cotangents, x, grad, mean, rstd, weight, need_weight);
  LayerNormArguments& a = t.a;
  a.u = t.keep(gg_x);
  if (!gg_x || gg_weight || gg_bias) a.zeros = t.filled(0);
  if (gg_weight || gg_bias) {
    a.gg_weight = gg_weight ? t.keep(gg_weight) : a.zeros;
    a.gg_bias = gg_bias ? t.keep(gg_bias) : a.zeros;
  }
  Tensor gg_grad = t.matrix(need_grad, true, a.gg_grad), grad_x = t.matrix(need_x, false, a.grad_x);
  t.make_partial(need_weight, a.partial_weight);
  visit_accumulation(a.dtype, [&]<class A>(A) { run_double_backward<A>(a); });
  return {gg_grad, grad_x, t.total(need_weight, a.partial_weight)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(robustkern, CPU, m) {
  m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
  m.impl("layer_norm_double_backward", TORCH_BOX(&layer_norm_double_backward));
}

}  // namespace rk::cpu
