// row_norm on the CPU.  Formulas: math/row_norm.h.  A row is worked on in chunks of fixed size, so that the order of
// additions, and with it every bit of the result, depends on the row alone: neither on the batch nor on the number of
// threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "../math/row_norm.h"
#include "../row_norm_arguments.h"
#include "pieces.h"

namespace rk::cpu {
namespace {

// What a row contributes to each of its columns.
template <class A>
struct RowScalars {
  A n, grad, s, ties, p;  // norm, its cotangent, directional derivative, entries sharing the maximum, exponent
};

// Whether the second derivative is zero everywhere.
constexpr bool is_flat(Norm norm) { return norm == Norm::kL1 || norm == Norm::kInf; }

// f<norm>()
template <class F>
auto visit_norm(Norm norm, const F& f) {
  switch (norm) {
    case Norm::kL1: return f.template operator()<Norm::kL1>();
    case Norm::kL2: return f.template operator()<Norm::kL2>();
    case Norm::kSquaredL2: return f.template operator()<Norm::kSquaredL2>();
    case Norm::kInf: return f.template operator()<Norm::kInf>();
    default: return f.template operator()<Norm::kP>();
  }
}

// The sum of the terms; of the maximum norm the largest.
template <Norm kNorm, class A>
RK_MULTIVERSION A terms(const A* a, int64_t n, A p) {
  const auto term = [=](int64_t j) RK_INLINE_LAMBDA { return RowNorm<kNorm, A>::term(a[j], p); };
  return kNorm == Norm::kInf ? max_over<A>(n, A(0), term) : sum_over<A>(n, term);
}

template <class A>
RK_MULTIVERSION A ties(const A* a, int64_t n, A norm) {
  return sum_over<A>(n, [=](int64_t j) RK_INLINE_LAMBDA { return absolute(a[j]) == norm ? A(1) : A(0); });
}

// out_j = grad * slope_j
template <Norm kNorm, class A>
RK_MULTIVERSION void slopes(const A* __restrict__ a, A* __restrict__ out, int64_t n, const RowScalars<A>& r) {
  for (int64_t j = 0; j < n; ++j) out[j] = r.grad * RowNorm<kNorm, A>::slope(a[j], r.n, r.p, r.ties);
}

// sum_j v_j slope_j
template <Norm kNorm, class A>
RK_MULTIVERSION A directional(const A* a, const A* v, int64_t n, const RowScalars<A>& r) {
  return sum_over<A>(
      n, [=](int64_t j) RK_INLINE_LAMBDA { return v[j] * RowNorm<kNorm, A>::slope(a[j], r.n, r.p, r.ties); });
}

// out_j = grad * bend_j
template <Norm kNorm, class A>
RK_MULTIVERSION void bends(const A* __restrict__ a, const A* __restrict__ v, A* __restrict__ out, int64_t n,
                           const RowScalars<A>& r) {
  for (int64_t j = 0; j < n; ++j) out[j] = r.grad * RowNorm<kNorm, A>::bend(a[j], v[j], r.s, r.n, r.p);
}

template <class A>
RK_MULTIVERSION void multiply(const A* from, const A* w, A* to, int64_t n) {
  for (int64_t j = 0; j < n; ++j) to[j] = from[j] * w[j];
}

template <class A>
RK_MULTIVERSION void multiply(const A* from, A w, A* to, int64_t n) {
  for (int64_t j = 0; j < n; ++j) to[j] = from[j] * w;
}

constexpr int64_t kChunk = 16384;  // columns a unit of work takes: with its output well inside a core's L2 cache

struct RowNormArguments {
  Norm norm;
  ScalarType dtype;
  int64_t item;  // bytes of a stored element
  double p;
  int64_t rows, cols, chunks;
  const void *x, *gg_x;           // [rows, cols]
  int64_t x_stride, gg_x_stride;  // elements between rows
  const void *grad, *norms;       // [rows], accumulation type
  const void* weights;            // [entries] or none: `run` columns share an entry, and the entries repeat
  int64_t run, entries;
  double *partial, *ties;  // [rows, chunks]
  void* per_row;           // [rows] output, accumulation type
  void* out;               // [rows, cols] output
};

double row_total(const double* partial, const RowNormArguments& a, int64_t row) {
  double total = 0;
  for (int64_t c = 0; c < a.chunks; ++c) total += partial[row * a.chunks + c];
  return total;
}

double larger(double total, double value) {
  return value > total || is_nan(value) ? value : total;  // once NaN, a total stays NaN
}

// to[j] = from[j] * the weight of column begin + j; `from` may be `to`.
template <class A>
void multiply_by_weight(const RowNormArguments& a, const A* from, A* to, int64_t begin, int64_t end) {
  const A* weights = static_cast<const A*>(a.weights);
  for (int64_t j = begin, n; j < end; from += n, to += n, j += n) {
    if (a.run == 1) {
      n = std::min(end - j, a.entries - j % a.entries);
      multiply(from, weights + j % a.entries, to, n);
    } else {
      n = std::min(end, (j / a.run + 1) * a.run) - j;
      multiply(from, weights[j / a.run % a.entries], to, n);
    }
  }
}

template <class A>
bool stored_as(const RowNormArguments& a) {
  return a.item == sizeof(A);
}

// Columns [begin, end) times their weights, in the accumulation type.  Where the row itself is just that, nothing is
// copied.
template <class A>
const A* weighted(const RowNormArguments& a, const void* base, int64_t offset, int64_t begin, int64_t end, A* buffer) {
  const char* from = static_cast<const char*>(base) + (offset + begin) * a.item;
  const A* values = reinterpret_cast<const A*>(from);
  if (!stored_as<A>(a)) {
    read_piece(a.dtype, from, buffer, end - begin);
    values = buffer;
  }
  if (!a.weights) return values;
  multiply_by_weight(a, values, buffer, begin, end);
  return buffer;
}

// Column j of the output row = its weight * what f(piece) leaves in piece[j].
template <class A, class F>
void write_weighted(const RowNormArguments& a, int64_t row, int64_t begin, int64_t end, const F& f) {
  char* to = static_cast<char*>(a.out) + (row * a.cols + begin) * a.item;
  alignas(64) A buffer[kPiece];
  A* piece = stored_as<A>(a) ? reinterpret_cast<A*>(to) : buffer;
  f(piece);
  if (a.weights) multiply_by_weight<A>(a, piece, piece, begin, end);
  if (piece == buffer) write_piece(a.dtype, buffer, to, end - begin);
}

template <class F>
void for_pieces(int64_t begin, int64_t end, const F& f) {
  for (; begin < end; begin += kPiece) f(begin, std::min(end, begin + kPiece));
}

template <class F>
void for_chunk(const RowNormArguments& a, int64_t chunk, const F& f) {
  for_pieces(chunk * kChunk, std::min(a.cols, (chunk + 1) * kChunk), f);
}

template <class A>
void value_unit(const RowNormArguments& a, int64_t row, int64_t chunk) {
  double total = 0;
  alignas(64) A buffer[kPiece];
  for_chunk(a, chunk, [&](int64_t begin, int64_t end) {
    const A* v = weighted(a, a.x, row * a.x_stride, begin, end, buffer);
    const double part = visit_norm(a.norm, [&]<Norm kNorm>() { return terms<kNorm>(v, end - begin, A(a.p)); });
    total = a.norm == Norm::kInf ? larger(total, part) : total + part;
  });
  a.partial[row * a.chunks + chunk] = total;
}

// m ||a / m||_p with m = max |a|: a second and third look at the few rows that need it.
template <Norm kNorm, class A>
double scaled_norm(const RowNormArguments& a, int64_t row) {
  alignas(64) A buffer[kPiece];
  double m = 0, total = 0;
  for_pieces(0, a.cols, [&](int64_t begin, int64_t end) {
    const A* v = weighted(a, a.x, row * a.x_stride, begin, end, buffer);
    m = larger(m, terms<Norm::kInf>(v, end - begin, A(a.p)));
  });
  if (m > 0 && m <= std::numeric_limits<double>::max())
    for_pieces(0, a.cols, [&](int64_t begin, int64_t end) {
      const A* v = weighted(a, a.x, row * a.x_stride, begin, end, buffer);
      for (int64_t j = 0; j < end - begin; ++j) total += RowNorm<kNorm, double>::term(v[j] / m, a.p);
    });
  return finish_scaled<kNorm, double>(total, m, a.p);
}

template <class A>
void finish_row(const RowNormArguments& a, int64_t row) {
  double n = a.norm == Norm::kInf ? 0 : row_total(a.partial, a, row);
  const bool safe = in_safe_range(A(n), A(a.cols));
  switch (a.norm) {
    case Norm::kInf:
      for (int64_t c = 0; c < a.chunks; ++c) n = larger(n, a.partial[row * a.chunks + c]);
      break;
    case Norm::kL2: n = safe ? RowNorm<Norm::kL2, double>::finish(n, a.p) : scaled_norm<Norm::kL2, A>(a, row); break;
    case Norm::kP: n = safe ? RowNorm<Norm::kP, double>::finish(n, a.p) : scaled_norm<Norm::kP, A>(a, row); break;
    default: break;
  }
  static_cast<A*>(a.per_row)[row] = A(n);
}

// How many entries share the maximum.
template <class A>
void ties_unit(const RowNormArguments& a, int64_t row, int64_t chunk) {
  const A n = static_cast<const A*>(a.norms)[row];
  alignas(64) A buffer[kPiece];
  double total = 0;
  for_chunk(a, chunk, [&](int64_t begin, int64_t end) {
    total += ties(weighted(a, a.x, row * a.x_stride, begin, end, buffer), end - begin, n);
  });
  a.ties[row * a.chunks + chunk] = total;
}

template <class A>
RowScalars<A> scalars_of(const RowNormArguments& a, int64_t row) {
  const A ties = a.norm == Norm::kInf ? A(row_total(a.ties, a, row)) : A(1);
  return {static_cast<const A*>(a.norms)[row], static_cast<const A*>(a.grad)[row], A(0), ties, A(a.p)};
}

template <class A>
void backward_unit(const RowNormArguments& a, int64_t row, int64_t chunk) {
  const RowScalars<A> r = scalars_of<A>(a, row);
  alignas(64) A buffer[kPiece];
  for_chunk(a, chunk, [&](int64_t begin, int64_t end) {
    const A* v = weighted(a, a.x, row * a.x_stride, begin, end, buffer);
    write_weighted<A>(a, row, begin, end, [&](A* out) {
      visit_norm(a.norm, [&]<Norm kNorm>() { slopes<kNorm>(v, out, end - begin, r); });
    });
  });
}

// s = sum_k v_k slope(a_k)
template <class A>
void directional_unit(const RowNormArguments& a, int64_t row, int64_t chunk) {
  const RowScalars<A> r = scalars_of<A>(a, row);
  alignas(64) A x_buffer[kPiece], v_buffer[kPiece];
  double total = 0;
  for_chunk(a, chunk, [&](int64_t begin, int64_t end) {
    const A* x = weighted(a, a.x, row * a.x_stride, begin, end, x_buffer);
    const A* v = weighted(a, a.gg_x, row * a.gg_x_stride, begin, end, v_buffer);
    total += visit_norm(a.norm, [&]<Norm kNorm>() { return directional<kNorm>(x, v, end - begin, r); });
  });
  a.partial[row * a.chunks + chunk] = total;
}

template <class A>
void bend_unit(const RowNormArguments& a, int64_t row, int64_t chunk) {
  RowScalars<A> r = scalars_of<A>(a, row);
  r.s = A(row_total(a.partial, a, row));
  if (chunk == 0) static_cast<A*>(a.per_row)[row] = r.s;
  if (is_flat(a.norm)) return;
  alignas(64) A x_buffer[kPiece], v_buffer[kPiece];
  for_chunk(a, chunk, [&](int64_t begin, int64_t end) {
    const A* x = weighted(a, a.x, row * a.x_stride, begin, end, x_buffer);
    const A* v = weighted(a, a.gg_x, row * a.gg_x_stride, begin, end, v_buffer);
    write_weighted<A>(a, row, begin, end, [&](A* out) {
      visit_norm(a.norm, [&]<Norm kNorm>() {
        if constexpr (!is_flat(kNorm)) bends<kNorm>(x, v, out, end - begin, r);
      });
    });
  });
}

// What a pass over the chunks of a row does.  A step that needs whole-row sums comes in a later pass than the step that
// makes them.
enum Step : int { kValue = 1, kFinish = 2, kTies = 4, kBackward = 8, kDirectional = 16, kBend = 32 };

template <class A>
void run_unit(const RowNormArguments& a, int step, int64_t row, int64_t chunk) {
  switch (step) {
    case kValue: return value_unit<A>(a, row, chunk);
    case kFinish: return chunk == 0 ? finish_row<A>(a, row) : void();
    case kTies: return ties_unit<A>(a, row, chunk);
    case kBackward: return backward_unit<A>(a, row, chunk);
    case kDirectional: return directional_unit<A>(a, row, chunk);
    case kBend: return bend_unit<A>(a, row, chunk);
  }
}

// Enough rows: each is one thread's, which finds it in its cache on the second pass.  Few long rows: their chunks are
// shared, pass by pass.  The additions are the same either way.
template <class A>
void run_passes(const RowNormArguments& a, std::initializer_list<int> passes) {
  const int64_t threads = torch::stable::get_num_threads(), shared_out_evenly = 4 * threads;
  if (a.chunks == 1 || a.rows >= shared_out_evenly) {
    torch::stable::parallel_for(0, a.rows, rows_per_thread(a.cols), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        for (int step : passes)
          for (int64_t chunk = 0; chunk < a.chunks; ++chunk) run_unit<A>(a, step, row, chunk);
    });
    return;
  }
  for (int step : passes)
    torch::stable::parallel_for(0, a.rows * a.chunks, rows_per_thread(kChunk), [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) run_unit<A>(a, step, unit / a.chunks, unit % a.chunks);
    });
}

void run(const RowNormArguments& a, std::initializer_list<int> passes) {
  visit_accumulation(a.dtype, [&]<class A>(A) { run_passes<A>(a, passes); });
}

// The tensors of one call, in the form that the units read.
class RowNormTensors {
 public:
  RowNormArguments a{};

  RowNormTensors(const char* op, const Tensor& x, const std::optional<Tensor>& weight, int64_t inner, double p,
                 bool squared)
      : x_(with_dense_rows(x)) {
    check_matrix(op, "x", x);
    check_weight(op, weight, inner, x);
    a.norm = norm_kind(op, p, squared);
    a.dtype = x.scalar_type();
    a.item = item_size(a.dtype);
    a.p = p;
    a.rows = x.size(0);
    a.cols = x.size(1);
    a.chunks = std::max<int64_t>(1, (a.cols + kChunk - 1) / kChunk);
    a.x = x_.data_ptr();
    a.x_stride = x_.stride(0);
    partial_.resize(a.rows * a.chunks);
    a.partial = partial_.data();
    if (a.norm == Norm::kInf) ties_.resize(a.rows * a.chunks);
    a.ties = ties_.data();
    if (weight && a.dtype == ScalarType::Double)
      set_weight(*weight, inner, weights_double_);
    else if (weight)
      set_weight(*weight, inner, weights_);
  }

  void set_gg_x(const Tensor& gg_x) {
    gg_x_ = with_dense_rows(gg_x);
    a.gg_x = gg_x_->data_ptr();
    a.gg_x_stride = gg_x_->stride(0);
  }
  void set_grad(const Tensor& grad, const Tensor& norm) {
    grad_ = torch::stable::contiguous(grad);
    norm_ = torch::stable::contiguous(norm);
    a.grad = grad_->data_ptr();
    a.norms = norm_->data_ptr();
  }

 private:
  template <class A>
  void set_weight(const Tensor& weight, int64_t inner, std::vector<A>& expanded) {
    constexpr int64_t short_run = 64;  // runs shorter than this are written out, one weight a column
    weight_ = torch::stable::contiguous(weight);
    const A* w = pointer<A>(weight_);
    a.weights = w;
    a.entries = weight.size(0);
    a.run = inner;
    if (inner < short_run) {
      const int64_t period = a.entries * inner, repeats = std::max<int64_t>(1, std::min(kPiece, a.cols) / period);
      expanded.resize(period * repeats);
      for (size_t j = 0; j < expanded.size(); ++j) expanded[j] = w[j / inner % a.entries];
      a.weights = expanded.data();
      a.entries = period * repeats;
      a.run = 1;
    }
  }

  Tensor x_;
  std::optional<Tensor> gg_x_, grad_, norm_, weight_;
  std::vector<double> partial_, ties_, weights_double_;
  std::vector<float> weights_;
};

Tensor row_norm(Tensor x, std::optional<Tensor> weight, int64_t inner, double p, bool squared) {
  RowNormTensors t("row_norm", x, weight, inner, p, squared);
  Tensor norm = torch::stable::new_empty(x, {x.size(0)}, accumulation_type(x.scalar_type()));
  t.a.per_row = norm.data_ptr();
  run(t.a, {kValue, kFinish});
  return norm;
}

Tensor row_norm_backward(Tensor grad, Tensor x, Tensor norm, std::optional<Tensor> weight, int64_t inner, double p,
                         bool squared) {
  const char* op = "row_norm_backward";
  RowNormTensors t(op, x, weight, inner, p, squared);
  check_tensor(op, "grad", grad, {x.size(0)}, accumulation_type(x.scalar_type()), x);
  check_tensor(op, "norm", norm, {x.size(0)}, accumulation_type(x.scalar_type()), x);
  Tensor grad_x = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  t.set_grad(grad, norm);
  t.a.out = grad_x.data_ptr();
  if (t.a.norm == Norm::kInf)
    run(t.a, {kTies, kBackward});
  else
    run(t.a, {kBackward});
  return grad_x;
}

std::tuple<Tensor, Tensor> row_norm_double_backward(Tensor gg_x, Tensor grad, Tensor x, Tensor norm,
                                                    std::optional<Tensor> weight, int64_t inner, double p,
                                                    bool squared) {
  const char* op = "row_norm_double_backward";
  RowNormTensors t(op, x, weight, inner, p, squared);
  const ScalarType accumulation = accumulation_type(x.scalar_type());
  check_tensor(op, "gg_x", gg_x, {x.size(0), x.size(1)}, x.scalar_type(), x);
  check_tensor(op, "grad", grad, {x.size(0)}, accumulation, x);
  check_tensor(op, "norm", norm, {x.size(0)}, accumulation, x);
  const bool flat = is_flat(t.a.norm);
  Tensor gg_grad = torch::stable::new_empty(x, {x.size(0)}, accumulation);
  Tensor grad_x = flat ? torch::stable::new_empty(x, {0}) : torch::stable::new_empty(x, {x.size(0), x.size(1)});
  t.set_gg_x(gg_x);
  t.set_grad(grad, norm);
  t.a.per_row = gg_grad.data_ptr();
  t.a.out = grad_x.data_ptr();
  if (t.a.norm == Norm::kInf)
    run(t.a, {kTies, kDirectional, kBend});
  else
    run(t.a, {kDirectional, kBend});
  return {gg_grad, grad_x};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(robustkern, CPU, m) {
  m.impl("row_norm", TORCH_BOX(&row_norm));
  m.impl("row_norm_backward", TORCH_BOX(&row_norm_backward));
  m.impl("row_norm_double_backward", TORCH_BOX(&row_norm_double_backward));
}

}  // namespace rk::cpu
