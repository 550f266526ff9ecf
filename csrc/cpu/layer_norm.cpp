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

#include "../arguments/layer_norm.h"
#include "../math/layer_norm.h"
#include "elements.h"
#include "norm_sums.h"

namespace rk::cpu {
namespace {

// What a piece of a row is read from; a null a and b are both absent, or neither.
template <class A>
struct NormPiece {
  const A *x, *g, *u, *weight, *a, *b;
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
  if (p.a) {
    for (int64_t j = 0; j < p.n; ++j)
      out[j] = c.x_u * p.u[j] + (c.x_g * p.weight[j] + p.r * p.a[j]) * p.g[j] + (c.x_x * p.normalized(j) + c.x_one);
  } else {
    for (int64_t j = 0; j < p.n; ++j)
      out[j] = c.x_u * p.u[j] + c.x_g * (p.weight[j] * p.g[j]) + (c.x_x * p.normalized(j) + c.x_one);
  }
}

// gg_grad = w t + a xh + b
template <class A>
RK_MULTIVERSION void write_gg_grad(const NormPiece<A>& p, NormBends<A> c, A* __restrict__ out) {
  if (p.a) {
    for (int64_t j = 0; j < p.n; ++j)
      out[j] = p.weight[j] * (p.r * p.u[j] + (c.t_x * p.normalized(j) + c.t_one)) + (p.a[j] * p.normalized(j) + p.b[j]);
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

// The tensors of a call; vectors are in the accumulation type.
template <class A>
class LayerNormArguments {
 public:
  int64_t rows, cols, cotangents;
  Input x;                                                        // [rows, cols]
  Input g, u;                                                     // [cotangents, rows, cols]; u of absent u is null
  const A *weight, *a = nullptr, *b = nullptr, *zeros = nullptr;  // [cols]
  const A *mean, *rstd;                                           // [rows]; without mean RMSNorm
  Output gg_grad, grad_x;                                         // like g, and like x or (of the first backward) g
  int64_t chunk_rows, chunks;
  A *partial_weight = nullptr, *partial_bias = nullptr;  // [chunks, cols] zeros, or null

  LayerNormArguments(int64_t number, const Tensor& like_x, const Tensor& grad, const std::optional<Tensor>& m,
                     const Tensor& r, const std::optional<Tensor>& w, bool sums_columns)
      : rows(like_x.size(0)), cols(like_x.size(1)), cotangents(number), like_x_(like_x) {
    constexpr int64_t least = 1024;  // bytes of a row worth writing past the caches
    streamed_ = Output::is_large(grad) && cols * item_size(grad.scalar_type()) >= least;
    // A chunk's sums cost a row of their own, so a chunk is many rows where these are short.
    constexpr int64_t elements = 65536;
    chunk_rows = sums_columns ? std::clamp<int64_t>(elements / std::max<int64_t>(cols, 1), 4, 64) : 1;
    chunk_rows = std::max<int64_t>(chunk_rows / std::max<int64_t>(cotangents, 1), 1);
    chunks = (rows + chunk_rows - 1) / chunk_rows;
    x = Input(keep(like_x));
    g = Input(keep(grad));
    rstd = pointer<A>(keep(r));
    mean = m ? pointer<A>(keep(*m)) : nullptr;
    weight = w ? pointer<A>(keep(*w)) : filled(1);
  }

  const Tensor& keep(const Tensor& t) { return kept_.emplace_back(torch::stable::contiguous(t)); }

  // A vector [cols] of one number.
  const A* filled(double value) {
    Tensor out = torch::stable::new_empty(like_x_, {cols}, accumulation_type(like_x_.scalar_type()));
    torch::stable::fill_(out, value);
    return pointer<A>(keep(out));
  }

  Tensor result(bool needed, const Tensor& like, Output& out) const {
    Tensor t = torch::stable::new_empty(like, needed ? sizes_of(like) : std::vector<int64_t>{0});
    out = Output(t, needed, streamed_);
    return t;
  }

  // Room for the sums of every chunk.
  A* make_partial(bool needed) {
    if (!needed) return nullptr;
    return pointer<A>(
        keep(torch::stable::new_zeros(like_x_, {chunks, cols}, accumulation_type(like_x_.scalar_type()))));
  }

  Tensor total(bool needed, const A* partial) const {
    Tensor out = torch::stable::new_empty(like_x_, {needed ? cols : 0}, accumulation_type(like_x_.scalar_type()));
    if (needed) add_rows_in_double(chunks, cols, partial, pointer<A>(out));
    return out;
  }

 private:
  Tensor like_x_;
  bool streamed_;
  std::vector<Tensor> kept_;
};

// The two matrices and three vectors of a row, and the outputs, in the accumulation type.
template <class A>
class Row {
 public:
  // Of the cotangents and what is like them, the k-th.
  Row(const LayerNormArguments<A>& a, int64_t row, int64_t k) : a_(a), row_(row), row_of_k_(k * a.rows + row) {}

  // Columns [begin, begin + n).
  NormPiece<A> piece(int64_t begin, int64_t n) {
    if (read_ != begin) {
      x_ = a_.x.read(row_ * a_.cols + begin, n, x_buffer_);
      g_ = a_.g.read(row_of_k_ * a_.cols + begin, n, g_buffer_);
      u_ = a_.u ? a_.u.read(row_of_k_ * a_.cols + begin, n, u_buffer_) : a_.zeros;
      read_ = begin;
    }
    const auto from = [begin](const A* v) { return v ? v + begin : nullptr; };
    return {x_, g_, u_, a_.weight + begin, from(a_.a), from(a_.b), n, a_.mean ? a_.mean[row_] : A(0), a_.rstd[row_]};
  }

  // Lets f fill [begin, begin + n) of the k-th row.
  template <class F>
  void write(const Output& out, int64_t begin, int64_t n, const F& f) {
    out.write(row_of_k_ * a_.cols + begin, n, out_buffer_, f);
  }

 private:
  const LayerNormArguments<A>& a_;
  int64_t row_, row_of_k_, read_ = -1;
  const A *x_, *g_, *u_;
  Buffer<A> x_buffer_, g_buffer_, u_buffer_, out_buffer_;
};

template <class A>
A* column_totals(A* partial, const LayerNormArguments<A>& a, int64_t row, int64_t begin) {
  return partial + row / a.chunk_rows * a.cols + begin;
}

template <class A>
void backward_row(const LayerNormArguments<A>& a, int64_t i, int64_t k) {
  Row<A> row(a, i, k);
  double sums[2] = {};
  if (a.grad_x)
    for_pieces(a.cols, [&](int64_t begin, int64_t n) {
      const NormPiece<A> p = row.piece(begin, n);
      add_sums<false>(p, p.weight, sums);
    });
  const NormSlopes<double> d = norm_slopes(a.mean ? sums[0] : 0.0, sums[1], double(a.rstd[i]), double(a.cols));
  const NormSlopes<A> c{A(d.x_g), A(d.x_x), A(d.x_one)};
  for_pieces(a.cols, [&](int64_t begin, int64_t n) {
    const NormPiece<A> p = row.piece(begin, n);
    if (a.grad_x) row.write(a.grad_x, begin, n, [&](A* out) { write_slopes(p, c, out); });
    if (a.partial_weight) add_weight_slopes(p, column_totals(a.partial_weight, a, i, begin));
    if (a.partial_bias) add_to(column_totals(a.partial_bias, a, i, begin), p.g, n);
  });
}

template <class A>
NormBends<A> bends_of(const LayerNormArguments<A>& a, int64_t i, Row<A>& row) {
  double sums[7] = {};
  for_pieces(a.cols, [&](int64_t begin, int64_t n) {
    const NormPiece<A> p = row.piece(begin, n);
    add_sums<true>(p, p.weight, sums);
    if (p.a) add_sums<false>(p, p.a, sums + 5);
  });
  if (!a.mean) sums[0] = sums[2] = sums[5] = 0;  // of h, u, a g
  const NormBends<double> d = norm_bends<double>(
      {.u = sums[2], .ux = sums[3], .g = sums[0], .gx = sums[1], .ug = sums[4], .ag = sums[5], .agx = sums[6]},
      double(a.rstd[i]), double(a.cols));
  return {A(d.t_x), A(d.t_one), A(d.x_u), A(d.x_g), A(d.x_x), A(d.x_one)};
}

template <class A>
void double_backward_row(const LayerNormArguments<A>& a, int64_t i) {
  Row<A> row(a, i, 0);
  const NormBends<A> c = bends_of(a, i, row);
  for_pieces(a.cols, [&](int64_t begin, int64_t n) {
    const NormPiece<A> p = row.piece(begin, n);
    if (a.gg_grad) row.write(a.gg_grad, begin, n, [&](A* out) { write_gg_grad(p, c, out); });
    if (a.grad_x) row.write(a.grad_x, begin, n, [&](A* out) { write_bends(p, c, out); });
    if (a.partial_weight) add_weight_bends(p, c, column_totals(a.partial_weight, a, i, begin));
  });
}

// Several cotangents: their rows lie in the cache from the sums to the sweep that adds up grad_x.
template <class A>
void double_backward_rows(const LayerNormArguments<A>& a, int64_t i, NormBends<A>* bends) {
  for (int64_t k = 0; k < a.cotangents; ++k) {
    Row<A> row(a, i, k);
    bends[k] = bends_of(a, i, row);
  }
  alignas(64) A sum[kPiece], part[kPiece];
  for_pieces(a.cols, [&](int64_t begin, int64_t n) {
    std::fill(sum, sum + n, A(0));
    for (int64_t k = 0; k < a.cotangents; ++k) {
      Row<A> row(a, i, k);
      const NormPiece<A> p = row.piece(begin, n);
      if (a.gg_grad) row.write(a.gg_grad, begin, n, [&](A* out) { write_gg_grad(p, bends[k], out); });
      if (a.partial_weight) add_weight_bends(p, bends[k], column_totals(a.partial_weight, a, i, begin));
      if (!a.grad_x) continue;
      write_bends(p, bends[k], part);
      add_to(sum, part, n);
    }
    if (a.grad_x) Row<A>(a, i, 0).write(a.grad_x, begin, n, [&](A* out) { std::copy(sum, sum + n, out); });
  });
}

// f(begin, end) for chunks of rows, one thread each; their sums lie in `partial`.
template <class A, class F>
void run_chunks(const LayerNormArguments<A>& a, const F& f) {
  const int64_t cost = a.chunk_rows * a.cols * a.cotangents;
  torch::stable::parallel_for(0, a.chunks, rows_per_thread(cost), [&](int64_t begin, int64_t end) {
    f(begin * a.chunk_rows, std::min(a.rows, end * a.chunk_rows));
    finish_streams();
  });
}

using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;

ThreeTensors layer_norm_backward(Tensor grad, Tensor x, std::optional<Tensor> weight, std::optional<Tensor> mean,
                                 Tensor rstd, bool need_x, bool need_weight, bool need_bias) {
  const std::optional<Tensor> none;
  const char* op = "layer_norm_backward";
  const int64_t cotangents = check_layer_norm(op, none, none, none, grad, x, weight, mean, rstd);
  check_several(op, cotangents, need_weight || need_bias);
  return visit_accumulation(x.scalar_type(), [&]<class A>(A) -> ThreeTensors {
    LayerNormArguments<A> call(cotangents, x, grad, mean, rstd, weight, need_weight || need_bias);
    const Tensor grad_x = call.result(need_x, grad, call.grad_x);
    call.partial_weight = call.make_partial(need_weight);
    call.partial_bias = call.make_partial(need_bias);
    run_chunks(call, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        for (int64_t k = 0; k < cotangents; ++k) backward_row(call, row, k);
    });
    return {grad_x, call.total(need_weight, call.partial_weight), call.total(need_bias, call.partial_bias)};
  });
}

ThreeTensors layer_norm_double_backward(std::optional<Tensor> u, std::optional<Tensor> a, std::optional<Tensor> b,
                                        Tensor grad, Tensor x, std::optional<Tensor> weight, std::optional<Tensor> mean,
                                        Tensor rstd, bool need_grad, bool need_x, bool need_weight) {
  const int64_t cotangents = check_layer_norm("layer_norm_double_backward", u, a, b, grad, x, weight, mean, rstd);
  return visit_accumulation(x.scalar_type(), [&]<class A>(A) -> ThreeTensors {
    LayerNormArguments<A> call(cotangents, x, grad, mean, rstd, weight, need_weight);
    if (u) call.u = Input(call.keep(*u));
    if (!u || a || b) call.zeros = call.filled(0);
    if (a || b) {
      call.a = a ? pointer<A>(call.keep(*a)) : call.zeros;
      call.b = b ? pointer<A>(call.keep(*b)) : call.zeros;
    }
    const Tensor gg_grad = call.result(need_grad, grad, call.gg_grad), grad_x = call.result(need_x, x, call.grad_x);
    call.partial_weight = call.make_partial(need_weight);
    run_chunks(call, [&](int64_t begin, int64_t end) {
      std::vector<NormBends<A>> bends(cotangents);
      for (int64_t row = begin; row < end; ++row)
        cotangents == 1 ? double_backward_row(call, row) : double_backward_rows(call, row, bends.data());
    });
    return {gg_grad, grad_x, call.total(need_weight, call.partial_weight)};
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(robustkern, CPU, m) {
  m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
  m.impl("layer_norm_double_backward", TORCH_BOX(&layer_norm_double_backward));
}

}  // namespace rk::cpu
