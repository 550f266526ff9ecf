// row_norm on the CPU.  Formulas: math/row_norm.h.  A row is worked on in chunks of fixed size, so that the order of
// additions, and with it every bit of the result, depends on the row alone: neither on the batch nor on the number of
// threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "../math/row_norm.h"
#include "../arguments/row_norm.h"
#include "elements.h"

namespace rk::cpu {
namespace {

// What a row contributes to each of its columns.
template <class A>
struct RowScalars {
  A n, grad, s, ties, p;  // norm, its cotangent, directional derivative, entries sharing the maximum, exponent
};

// Whether the second derivative is zero everywhere.
constexpr bool is_flat(Norm norm) { return norm == Norm::kL1 || norm == Norm::kInf; }

// f<norm>(p), with whole exponents as WholeExponent: a few products in the place of a logarithm and an exponential.
template <class A, class F>
auto visit_norm(Norm norm, A p, const F& f) {
  switch (norm) {
    case Norm::kL1: return f.template operator()<Norm::kL1>(p);
    case Norm::kL2: return f.template operator()<Norm::kL2>(p);
    case Norm::kSquaredL2: return f.template operator()<Norm::kSquaredL2>(p);
    case Norm::kInf: return f.template operator()<Norm::kInf>(p);
    default: break;
  }
  if (p == std::floor(p) && p > A(1) && p <= A(7)) return f.template operator()<Norm::kP>(WholeExponent{int(p)});
  return f.template operator()<Norm::kP>(p);
}

// What slope and bend divide by: gcc finds no vectors where a power is taken of a quotient or zero.
template <Norm kNorm, class A>
auto divisor(A n) {
  if constexpr (kNorm == Norm::kP)
    return NonzeroDivisor<A>(n);
  else
    return n;
}

// The sum of the terms; of the maximum norm the largest.
template <Norm kNorm, class A, class P>
A terms(const A* a, int64_t n, P p) {
  const auto term = [=](int64_t j) RK_INLINE_LAMBDA { return RowNorm<kNorm, A>::term(a[j], p); };
  if constexpr (kNorm == Norm::kInf) return vector_max<A>(n, A(0), term);
  return vector_sum<A>(n, term);
}

template <class A, class Each>
void multiply(const A* from, Each w, A* to, int64_t n) {
  vector_loop(n, [=](int64_t j) RK_INLINE_LAMBDA { to[j] = from[j] * entry(w, j); });
}

constexpr int64_t kChunk = 16384;  // columns a unit of work takes: with its output well inside a core's L2 cache

// The tensors of a call; numbers per row and weights are in the accumulation type.
template <class A>
class RowNormArguments {
 public:
  Norm norm;
  double p;
  int64_t rows, cols, chunks;
  InputRows x, u;                             // [rows, cols]
  const A *grad = nullptr, *norms = nullptr;  // [rows]
  const A* weights = nullptr;                 // [entries] or none: `run` columns share an entry, and the entries repeat
  int64_t run, entries;
  double *partial, *ties;  // [rows, chunks]
  A* per_row = nullptr;    // [rows] output
  Output out;              // [rows, cols] output

  RowNormArguments(Norm kind, double exponent, const Tensor& values, const std::optional<Tensor>& weight, int64_t inner)
      : norm(kind), p(exponent), rows(values.size(0)), cols(values.size(1)) {
    chunks = std::max<int64_t>(1, (cols + kChunk - 1) / kChunk);
    x = InputRows(keep(with_dense_rows(values)));
    partial_.resize(rows * chunks);
    partial = partial_.data();
    if (norm == Norm::kInf) ties_.resize(rows * chunks);
    ties = ties_.data();
    if (weight) set_weight(pointer<A>(keep(torch::stable::contiguous(*weight))), weight->size(0), inner);
  }
  RowNormArguments(const RowNormArguments&) = delete;

  const Tensor& keep(const Tensor& t) { return kept_.emplace_back(t); }

  void set_grad(const Tensor& grad_of_norm, const Tensor& value) {
    grad = pointer<A>(keep(torch::stable::contiguous(grad_of_norm)));
    norms = pointer<A>(keep(torch::stable::contiguous(value)));
  }

 private:
  void set_weight(const A* weight, int64_t count, int64_t inner) {
    constexpr int64_t short_run = 64;  // runs shorter than this are written out, one weight a column
    weights = weight;
    entries = count;
    run = inner;
    if (inner < short_run) {
      const int64_t period = count * inner, repeats = std::max<int64_t>(1, std::min(kPiece, cols) / period);
      for (int64_t j = 0; j < period * repeats; ++j) weights_.push_back(weight[j / inner % count]);
      weights = weights_.data();
      entries = period * repeats;
      run = 1;
    }
  }

  std::vector<Tensor> kept_;
  std::vector<double> partial_, ties_;
  std::vector<A> weights_;
};

template <class A>
double row_total(const double* partial, const RowNormArguments<A>& a, int64_t row) {
  double total = 0;
  for (int64_t c = 0; c < a.chunks; ++c) total += partial[row * a.chunks + c];
  return total;
}

// to[j] = from[j] * the weight of column begin + j; `from` may be `to`.
template <class A>
void multiply_by_weight(const RowNormArguments<A>& a, const A* from, A* to, int64_t begin, int64_t count) {
  for (int64_t j = begin, end = begin + count, n; j < end; from += n, to += n, j += n) {
    if (a.run == 1) {
      n = std::min(end - j, a.entries - j % a.entries);
      multiply(from, a.weights + j % a.entries, to, n);
    } else {
      n = std::min(end, (j / a.run + 1) * a.run) - j;
      multiply(from, a.weights[j / a.run % a.entries], to, n);
    }
  }
}

// Columns [begin, begin + n) of a row times their weights, in the accumulation type.  Where the row itself is just that,
// nothing is copied.
template <class A>
const A* weighted(const RowNormArguments<A>& a, const InputRows& rows, int64_t row, int64_t begin, int64_t n,
                  Buffer<A>& buffer) {
  const A* values = rows.read(row, begin, n, buffer);
  if (!a.weights) return values;
  multiply_by_weight(a, values, buffer.element, begin, n);
  return buffer.element;
}

// Column j of the output row = its weight * what f(piece) leaves in piece[j].
template <class A, class F>
void write_weighted(const RowNormArguments<A>& a, int64_t row, int64_t begin, int64_t n, const F& f) {
  Buffer<A> buffer;
  a.out.write(row * a.cols + begin, n, buffer, [&](A* piece) {
    f(piece);
    if (a.weights) multiply_by_weight<A>(a, piece, piece, begin, n);
  });
}

// f(begin, n) for the pieces of a chunk.
template <class A, class F>
void for_chunk(const RowNormArguments<A>& a, int64_t chunk, const F& f) {
  const int64_t first = chunk * kChunk;
  for_pieces(std::min(a.cols - first, kChunk), [&](int64_t begin, int64_t n) { f(first + begin, n); });
}

// What follows are passes over the chunks of a row.  One that needs whole-row sums comes after the one that makes them.

template <class A>
void sum_terms(const RowNormArguments<A>& a, int64_t row, int64_t chunk) {
  double total = 0;
  Buffer<A> buffer;
  for_chunk(a, chunk, [&](int64_t begin, int64_t n) {
    const A* v = weighted(a, a.x, row, begin, n, buffer);
    const double part = visit_norm(a.norm, A(a.p), [&]<Norm kNorm>(auto p) { return terms<kNorm>(v, n, p); });
    total = a.norm == Norm::kInf ? larger(total, part) : total + part;
  });
  a.partial[row * a.chunks + chunk] = total;
}

// m ||a / m||_p with m = max |a|: a second and third look at the few rows that need it.
template <Norm kNorm, class A>
double scaled_norm(const RowNormArguments<A>& a, int64_t row) {
  Buffer<A> buffer;
  double m = 0, total = 0;
  for_pieces(a.cols, [&](int64_t begin, int64_t n) {
    m = larger<double>(m, terms<Norm::kInf>(weighted(a, a.x, row, begin, n, buffer), n, A(a.p)));
  });
  if (m > 0 && m <= std::numeric_limits<double>::max())
    for_pieces(a.cols, [&](int64_t begin, int64_t n) {
      const A* v = weighted(a, a.x, row, begin, n, buffer);
      for (int64_t j = 0; j < n; ++j) total += RowNorm<kNorm, double>::term(v[j] / m, a.p);
    });
  return finish_scaled<kNorm, double>(total, m, a.p);
}

template <class A>
void finish_norm(const RowNormArguments<A>& a, int64_t row, int64_t chunk) {
  if (chunk) return;
  double n = a.norm == Norm::kInf ? 0 : row_total(a.partial, a, row);
  const bool safe = in_safe_range(A(n), A(a.cols));
  switch (a.norm) {
    case Norm::kInf:
      for (int64_t c = 0; c < a.chunks; ++c) n = larger(n, a.partial[row * a.chunks + c]);
      break;
    case Norm::kL2: n = safe ? RowNorm<Norm::kL2, double>::finish(n, a.p) : scaled_norm<Norm::kL2>(a, row); break;
    case Norm::kP: n = safe ? RowNorm<Norm::kP, double>::finish(n, a.p) : scaled_norm<Norm::kP>(a, row); break;
    default: break;
  }
  a.per_row[row] = A(n);
}

// How many entries share the maximum.
template <class A>
void count_ties(const RowNormArguments<A>& a, int64_t row, int64_t chunk) {
  Buffer<A> buffer;
  double total = 0;
  for_chunk(a, chunk, [&](int64_t begin, int64_t n) {
    const A *x = weighted(a, a.x, row, begin, n, buffer), norm = a.norms[row];
    total += vector_sum<A>(n, [=](int64_t j) RK_INLINE_LAMBDA { return absolute(x[j]) == norm ? A(1) : A(0); });
  });
  a.ties[row * a.chunks + chunk] = total;
}

template <class A>
RowScalars<A> scalars_of(const RowNormArguments<A>& a, int64_t row) {
  const A ties = a.norm == Norm::kInf ? A(row_total(a.ties, a, row)) : A(1);
  return {a.norms[row], a.grad[row], A(0), ties, A(a.p)};
}

template <class A>
void write_slopes(const RowNormArguments<A>& a, int64_t row, int64_t chunk) {
  const RowScalars<A> r = scalars_of(a, row);
  Buffer<A> buffer;
  for_chunk(a, chunk, [&](int64_t begin, int64_t n) {
    const A* x = weighted(a, a.x, row, begin, n, buffer);
    write_weighted(a, row, begin, n, [&](A* out) {
      visit_norm(a.norm, r.p, [&]<Norm kNorm>(auto p) {
        const auto norm = divisor<kNorm>(r.n), ties = divisor<kNorm>(r.ties);
        vector_write(
            n, out, [=](int64_t j) RK_INLINE_LAMBDA { return r.grad * RowNorm<kNorm, A>::slope(x[j], norm, p, ties); });
      });
    });
  });
}

// s = sum_k v_k slope(a_k)
template <class A>
void sum_directional(const RowNormArguments<A>& a, int64_t row, int64_t chunk) {
  const RowScalars<A> r = scalars_of(a, row);
  Buffer<A> x_buffer, v_buffer;
  double total = 0;
  for_chunk(a, chunk, [&](int64_t begin, int64_t n) {
    const A* x = weighted(a, a.x, row, begin, n, x_buffer);
    const A* v = weighted(a, a.u, row, begin, n, v_buffer);
    total += visit_norm(a.norm, r.p, [&]<Norm kNorm>(auto p) {
      const auto norm = divisor<kNorm>(r.n), ties = divisor<kNorm>(r.ties);
      const auto term = [=](int64_t j)
                            RK_INLINE_LAMBDA { return v[j] * RowNorm<kNorm, A>::slope(x[j], norm, p, ties); };
      return vector_sum<A>(n, term);
    });
  });
  a.partial[row * a.chunks + chunk] = total;
}

template <class A>
void write_bends(const RowNormArguments<A>& a, int64_t row, int64_t chunk) {
  RowScalars<A> r = scalars_of(a, row);
  r.s = A(row_total(a.partial, a, row));
  if (chunk == 0) a.per_row[row] = r.s;
  if (is_flat(a.norm)) return;
  Buffer<A> x_buffer, v_buffer;
  for_chunk(a, chunk, [&](int64_t begin, int64_t n) {
    const A* x = weighted(a, a.x, row, begin, n, x_buffer);
    const A* v = weighted(a, a.u, row, begin, n, v_buffer);
    write_weighted(a, row, begin, n, [&](A* out) {
      visit_norm(a.norm, r.p, [&]<Norm kNorm>(auto p) {
        if constexpr (!is_flat(kNorm)) {
          const auto norm = divisor<kNorm>(r.n);
          vector_write(n, out, [=](int64_t j) RK_INLINE_LAMBDA {
            return r.grad * RowNorm<kNorm, A>::bend(x[j], v[j], r.s, norm, p);
          });
        }
      });
    });
  });
}

// Enough rows: each is one thread's, which finds it in its cache on the second pass.  Few long rows: their chunks are
// shared, pass by pass.  The additions are the same either way.
template <auto... kPasses, class A>
void run(const RowNormArguments<A>& a) {
  const int64_t threads = torch::stable::get_num_threads(), shared_out_evenly = 4 * threads;
  const auto for_chunks = [&](int64_t row, const auto& pass) {
    for (int64_t chunk = 0; chunk < a.chunks; ++chunk) pass(row, chunk);
  };
  const auto share = [&](const auto& pass) {
    torch::stable::parallel_for(0, a.rows * a.chunks, rows_per_thread(kChunk), [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) pass(unit / a.chunks, unit % a.chunks);
    });
  };
  if (a.chunks == 1 || a.rows >= shared_out_evenly)
    torch::stable::parallel_for(0, a.rows, rows_per_thread(a.cols), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        (for_chunks(row, [&](int64_t r, int64_t chunk) { kPasses(a, r, chunk); }), ...);
    });
  else
    (share([&](int64_t row, int64_t chunk) { kPasses(a, row, chunk); }), ...);
}

Norm checked_norm(const char* op, const Tensor& x, const std::optional<Tensor>& weight, int64_t inner, double p,
                  bool squared) {
  check_matrix(op, "x", x);
  check_weight(op, weight, inner, x);
  return norm_kind(op, p, squared);
}

Tensor row_norm(Tensor x, std::optional<Tensor> weight, int64_t inner, double p, bool squared) {
  const Norm norm = checked_norm("row_norm", x, weight, inner, p, squared);
  Tensor value = torch::stable::new_empty(x, {x.size(0)}, accumulation_type(x.scalar_type()));
  visit_accumulation(x.scalar_type(), [&]<class A>(A) {
    RowNormArguments<A> a(norm, p, x, weight, inner);
    a.per_row = pointer<A>(value);
    run<sum_terms<A>, finish_norm<A>>(a);
  });
  return value;
}

Tensor row_norm_backward(Tensor grad, Tensor x, Tensor norm, std::optional<Tensor> weight, int64_t inner, double p,
                         bool squared) {
  const char* op = "row_norm_backward";
  const Norm kind = checked_norm(op, x, weight, inner, p, squared);
  check_tensor(op, "grad", grad, {x.size(0)}, accumulation_type(x.scalar_type()), x);
  check_tensor(op, "norm", norm, {x.size(0)}, accumulation_type(x.scalar_type()), x);
  Tensor grad_x = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  visit_accumulation(x.scalar_type(), [&]<class A>(A) {
    RowNormArguments<A> a(kind, p, x, weight, inner);
    a.set_grad(grad, norm);
    a.out = Output(grad_x, true, false);
    kind == Norm::kInf ? run<count_ties<A>, write_slopes<A>>(a) : run<write_slopes<A>>(a);
  });
  return grad_x;
}

std::tuple<Tensor, Tensor> row_norm_double_backward(Tensor u, Tensor grad, Tensor x, Tensor norm,
                                                    std::optional<Tensor> weight, int64_t inner, double p,
                                                    bool squared) {
  const char* op = "row_norm_double_backward";
  const Norm kind = checked_norm(op, x, weight, inner, p, squared);
  const ScalarType accumulation = accumulation_type(x.scalar_type());
  check_tensor(op, "u", u, {x.size(0), x.size(1)}, x.scalar_type(), x);
  check_tensor(op, "grad", grad, {x.size(0)}, accumulation, x);
  check_tensor(op, "norm", norm, {x.size(0)}, accumulation, x);
  Tensor gg_grad = torch::stable::new_empty(x, {x.size(0)}, accumulation);
  Tensor grad_x =
      is_flat(kind) ? torch::stable::new_empty(x, {0}) : torch::stable::new_empty(x, {x.size(0), x.size(1)});
  visit_accumulation(x.scalar_type(), [&]<class A>(A) {
    RowNormArguments<A> a(kind, p, x, weight, inner);
    a.u = InputRows(a.keep(with_dense_rows(u)));
    a.set_grad(grad, norm);
    a.per_row = pointer<A>(gg_grad);
    a.out = Output(grad_x, true, false);
    kind == Norm::kInf ? run<count_ties<A>, sum_directional<A>, write_bends<A>>(a)
                       : run<sum_directional<A>, write_bends<A>>(a);
  });
  return {gg_grad, grad_x};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(robustkern, CPU, m) {
  m.impl("row_norm", TORCH_BOX(&row_norm));
  m.impl("row_norm_backward", TORCH_BOX(&row_norm_backward));
  m.impl("row_norm_double_backward", TORCH_BOX(&row_norm_double_backward));
}

}  // namespace rk::cpu
