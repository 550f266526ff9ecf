// kl_divergence on the CPU.  Formulas: math/kl_divergence.h.  Rows of few classes are worked many at a time
// (kl_divergence_tiles.h).  A longer row is worked by one thread in pieces that stay in its L1 cache, so that it is read
// from memory once, whatever the number of sweeps over it; sums across pieces run in double.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "../arguments/kl_divergence.h"
#include "../math/kl_divergence.h"
#include "elements.h"
#include "kl_divergence_tiles.h"

namespace rk::cpu {
namespace {

// One piece of one row: the first logits, what both say, the cotangents of both gradients.
template <class A>
struct KlPiece {
  const A *a, *p, *q, *d, *u, *v;
  int64_t n;
};

template <class A>
RK_MULTIVERSION A kl_largest(const A* z, int64_t n) {
  return max_over<A>(n, -std::numeric_limits<A>::infinity(), [=](int64_t j) RK_INLINE_LAMBDA { return z[j]; });
}

template <class A>
RK_MULTIVERSION A kl_sum_exp(const A* z, int64_t n, A inverse_t, A max) {
  return sum_over<A>(n, [=](int64_t j) RK_INLINE_LAMBDA { return exp_nonpositive(z[j] * inverse_t - max); });
}

template <class A>
RK_MULTIVERSION void kl_points(const A* a, const A* b, int64_t n, KlRow<A> r, A* __restrict__ p, A* __restrict__ q,
                               A* __restrict__ d) {
  for (int64_t j = 0; j < n; ++j) {
    const KlPoint<A> point(r, a[j], b[j]);
    p[j] = point.p;
    q[j] = point.q;
    d[j] = point.d;
  }
}

template <class A>
RK_MULTIVERSION A kl_sum(const KlPiece<A>& w) {
  const A *p = w.p, *q = w.q, *d = w.d;
  return sum_over<A>(w.n, [=](int64_t j) RK_INLINE_LAMBDA { return kl_term(p[j], q[j], d[j]); });
}

template <class A>
RK_MULTIVERSION A kl_dot(const A* a, const A* b, int64_t n) {
  return sum_over<A>(n, [=](int64_t j) RK_INLINE_LAMBDA { return a[j] * b[j]; });
}

// the largest d of p's first choices
template <class A>
RK_MULTIVERSION A kl_top(const A* a, const A* d, int64_t n, KlRow<A> r) {
  const A least = -std::numeric_limits<A>::infinity();
  return max_over<A>(n, least, [=](int64_t j) RK_INLINE_LAMBDA { return kl_is_top(r, a[j]) ? d[j] : least; });
}

// sum of p e
template <class A>
RK_MULTIVERSION A kl_mean(const KlPiece<A>& w, A top) {
  const A *p = w.p, *d = w.d;
  return sum_over<A>(w.n, [=](int64_t j) RK_INLINE_LAMBDA { return p[j] * (d[j] - top); });
}

// sum of (q - p) v: the difference first, since the two sums nearly agree where the predictions do
template <class A>
RK_MULTIVERSION A kl_dot_difference(const KlPiece<A>& w) {
  const A *p = w.p, *q = w.q, *v = w.v;
  return sum_over<A>(w.n, [=](int64_t j) RK_INLINE_LAMBDA { return (q[j] - p[j]) * v[j]; });
}

template <class A>
RK_MULTIVERSION A kl_cross(const KlPiece<A>& w, A top, KlSums<A> s) {
  const A *p = w.p, *d = w.d, *u = w.u;
  return sum_over<A>(w.n, [=](int64_t j) RK_INLINE_LAMBDA { return kl_cross_term(p[j], d[j] - top, u[j], s); });
}

template <class A>
RK_MULTIVERSION void kl_slopes(const KlPiece<A>& w, A grad, A top, A mean_e, A inverse_t, A* __restrict__ grad_p,
                               A* __restrict__ grad_q) {
  const A *p = w.p, *q = w.q, *d = w.d;
  for (int64_t j = 0; j < w.n; ++j) {
    grad_p[j] = grad * kl_slope_p(p[j], d[j] - top, mean_e, inverse_t);
    grad_q[j] = grad * kl_slope_q(p[j], q[j], inverse_t);
  }
}

template <class A>
RK_MULTIVERSION void kl_bends(const KlPiece<A>& w, A grad, A top, KlSums<A> s, A inverse_t, A* __restrict__ grad_p,
                              A* __restrict__ grad_q) {
  const A *p = w.p, *q = w.q, *d = w.d, *u = w.u, *v = w.v;
  for (int64_t j = 0; j < w.n; ++j) {
    grad_p[j] = grad * kl_bend_p(p[j], d[j] - top, u[j], v[j], s, inverse_t);
    grad_q[j] = grad * kl_bend_q(p[j], q[j], u[j], v[j], s, inverse_t);
  }
}

template <class A>
struct Buffers {
  Buffer<A> a, b, p, q, d, u, v, grad_p, grad_q;
};

template <class A>
struct KlArguments {
  Input p_logits, q_logits, u, v;  // [rows, classes]
  int64_t rows, classes;
  double inverse_t;
  const A* grad = nullptr;  // [rows]
  A* statistics = nullptr;  // [rows, 5]
  A* per_row = nullptr;     // [rows]
  Output out_p, out_q;      // [rows, classes]

  KlArguments(const KlTensors& t, double temperature)
      : p_logits(t.p), q_logits(t.q), rows(t.p.size(0)), classes(t.p.size(1)), inverse_t(1.0 / temperature) {}
};

template <class A>
struct Row {
  const KlArguments<A>& c;
  Buffers<A>& b;
  int64_t first;  // element
  KlRow<A> r{};
  KlPiece<A> piece{};  // the last one read

  Row(const KlArguments<A>& call, Buffers<A>& buffers, int64_t row) : c(call), b(buffers), first(row * call.classes) {
    r.inverse_t = A(call.inverse_t);
  }

  // max and log sum exp of z / T
  void measure(const Input& logits, A& max, A& log_sum) {
    max = -std::numeric_limits<A>::infinity();
    for_pieces(c.classes, [&](int64_t begin, int64_t n) {
      const A m = kl_largest(logits.read(first + begin, n, b.a), n);
      max = m > max || is_nan(m) ? m : max;
    });
    max *= r.inverse_t;
    double sum = 0;
    for_pieces(c.classes, [&](int64_t begin, int64_t n) {
      sum += kl_sum_exp(logits.read(first + begin, n, b.a), n, r.inverse_t, max);
    });
    log_sum = A(std::log(sum));
  }

  // f(begin, piece) for the pieces of the row
  template <class F>
  void sweep(const F& f) {
    for_pieces(c.classes, [&](int64_t begin, int64_t n) {
      if (piece.n == 0 || c.classes > kPiece) read(begin, n);  // a short row is still there from the last sweep
      f(begin, piece);
    });
  }

 private:
  void read(int64_t begin, int64_t n) {
    const A* const a = c.p_logits.read(first + begin, n, b.a);
    kl_points(a, c.q_logits.read(first + begin, n, b.b), n, r, b.p.element, b.q.element, b.d.element);
    piece = {a, b.p.element, b.q.element, b.d.element, cotangent(c.u, begin, n, b.u), cotangent(c.v, begin, n, b.v), n};
  }

  const A* cotangent(const Input& t, int64_t begin, int64_t n, Buffer<A>& buffer) const {
    if (t) return t.read(first + begin, n, buffer);
    std::fill_n(buffer.element, n, A(0));
    return buffer.element;
  }
};

template <class A>
void value_row(const KlArguments<A>& c, int64_t row, Buffers<A>& b) {
  Row<A> w(c, b, row);
  w.measure(c.p_logits, w.r.p_max, w.r.p_log_sum);
  w.measure(c.q_logits, w.r.q_max, w.r.q_log_sum);
  double sum = 0;
  A top = -std::numeric_limits<A>::infinity();
  w.sweep([&](int64_t, const KlPiece<A>& piece) {
    sum += kl_sum(piece);
    const A d = kl_top(piece.a, piece.d, piece.n, w.r);
    top = d > top || is_nan(d) ? d : top;
  });
  A* const statistics = c.statistics + kKlStatistics * row;
  statistics[0] = w.r.p_max;
  statistics[1] = w.r.p_log_sum;
  statistics[2] = w.r.q_max;
  statistics[3] = w.r.q_log_sum;
  statistics[4] = top;
  c.per_row[row] = A(sum);
}

template <class A>
Row<A> measured_row(const KlArguments<A>& c, int64_t row, Buffers<A>& b) {
  Row<A> w(c, b, row);
  const A* const statistics = c.statistics + kKlStatistics * row;
  w.r = {statistics[0], statistics[1], statistics[2], statistics[3], statistics[4], w.r.inverse_t};
  return w;
}

// f(piece, grad_p, grad_q) writes both gradients of a piece.
template <class A, class F>
void write(const KlArguments<A>& c, Row<A>& w, const F& f) {
  w.sweep([&](int64_t begin, const KlPiece<A>& piece) {
    f(piece, c.out_p.open(w.first + begin, w.b.grad_p), c.out_q.open(w.first + begin, w.b.grad_q));
    c.out_p.close(w.first + begin, piece.n, w.b.grad_p);
    c.out_q.close(w.first + begin, piece.n, w.b.grad_q);
  });
}

template <class A>
void backward_row(const KlArguments<A>& c, int64_t row, Buffers<A>& b) {
  Row<A> w = measured_row(c, row, b);
  double mean_e = 0;
  w.sweep([&](int64_t, const KlPiece<A>& piece) { mean_e += kl_mean(piece, w.r.d_top); });
  const A grad = c.grad[row];
  write(c, w, [&](const KlPiece<A>& piece, A* grad_p, A* grad_q) {
    kl_slopes(piece, grad, w.r.d_top, A(mean_e), w.r.inverse_t, grad_p, grad_q);
  });
}

template <class A>
void double_backward_row(const KlArguments<A>& c, int64_t row, Buffers<A>& b) {
  Row<A> w = measured_row(c, row, b);
  double mean_e = 0, u_p = 0, v_q = 0, v_difference = 0, cross = 0;
  w.sweep([&](int64_t, const KlPiece<A>& piece) {
    mean_e += kl_mean(piece, w.r.d_top);
    u_p += kl_dot(piece.p, piece.u, piece.n);
    v_q += kl_dot(piece.q, piece.v, piece.n);
    v_difference += kl_dot_difference(piece);
  });
  KlSums<A> sums{A(mean_e), A(u_p), A(v_q - v_difference), A(v_q), A(0)};
  w.sweep([&](int64_t, const KlPiece<A>& piece) { cross += kl_cross(piece, w.r.d_top, sums); });
  sums.cross = A(cross);
  const A grad = c.grad[row];
  c.per_row[row] = A((cross + v_difference) * c.inverse_t);
  write(c, w, [&](const KlPiece<A>& piece, A* grad_p, A* grad_q) {
    kl_bends(piece, grad, w.r.d_top, sums, w.r.inverse_t, grad_p, grad_q);
  });
}

enum class Order { kValue, kBackward, kDoubleBackward };

template <class A>
void run_tile(const KlArguments<A>& c, Order order, int64_t first, int64_t rows, KlTile<A>& tile) {
  const auto fill = [&](const Input& from, A* to) {
    if (from)
      fill_tile(from, c.classes, c.classes, first, rows, to);
    else
      std::fill_n(to, c.classes * kTileRows, A(0));
  };
  A* const statistics = c.statistics + kKlStatistics * first;
  fill(c.p_logits, tile.a);
  fill(c.q_logits, tile.b);
  if (order != Order::kValue) {
    std::fill_n(tile.statistics, kKlStatistics * kTileRows, A(0));
    rows_into_tile(statistics, kKlStatistics, rows, kKlStatistics, tile.statistics);
    std::fill_n(tile.grad, kTileRows, A(0));
    std::copy_n(c.grad + first, rows, tile.grad);
  }
  switch (order) {
    case Order::kValue:
      kl_tile_value(tile);
      rows_out_of_tile(tile.statistics, rows, kKlStatistics, statistics);
      break;
    case Order::kBackward: tile.needs_q ? kl_tile_backward<true>(tile) : kl_tile_backward<false>(tile); break;
    case Order::kDoubleBackward:
      fill(c.u, tile.u);
      if (tile.needs_q) fill(c.v, tile.v);
      tile.needs_q ? kl_tile_double_backward<true>(tile) : kl_tile_double_backward<false>(tile);
      break;
  }
  if (order != Order::kBackward) std::copy_n(tile.per_row, rows, c.per_row + first);
  if (c.out_p) write_tile(c.out_p, c.classes, first, rows, tile.a);
  if (c.out_q) write_tile(c.out_q, c.classes, first, rows, tile.b);
}

template <class A>
void run_tiles(const KlArguments<A>& c, Order order) {
  const int64_t tiles = (c.rows + kTileRows - 1) / kTileRows;
  torch::stable::parallel_for(0, tiles, rows_per_thread(4 * kTileRows * c.classes), [&](int64_t begin, int64_t end) {
    KlTile<A> tile;
    tile.classes = c.classes;
    tile.inverse_t = A(c.inverse_t);
    tile.needs_q = c.out_q || c.v;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * kTileRows;
      run_tile(c, order, first, std::min<int64_t>(kTileRows, c.rows - first), tile);
    }
  });
}

template <class A>
void run(const KlArguments<A>& c, Order order) {
  if (c.classes <= kTileClasses) return run_tiles(c, order);
  torch::stable::parallel_for(0, c.rows, rows_per_thread(4 * c.classes), [&](int64_t begin, int64_t end) {
    Buffers<A> buffers;
    for (int64_t row = begin; row < end; ++row) switch (order) {
        case Order::kValue: value_row(c, row, buffers); break;
        case Order::kBackward: backward_row(c, row, buffers); break;
        case Order::kDoubleBackward: double_backward_row(c, row, buffers); break;
      }
  });
}

std::tuple<Tensor, Tensor> kl_divergence(Tensor p_logits, Tensor q_logits, double temperature) {
  const KlTensors t("kl_divergence", p_logits, q_logits, temperature);
  Tensor value = t.new_rows(), statistics = t.new_statistics();
  visit_accumulation(t.accumulation(), [&]<class A>(A) {
    KlArguments<A> c(t, temperature);
    c.per_row = pointer<A>(value);
    c.statistics = pointer<A>(statistics);
    run(c, Order::kValue);
  });
  return {value, statistics};
}

std::tuple<Tensor, Tensor> kl_divergence_backward(Tensor grad, Tensor p_logits, Tensor q_logits, Tensor statistics,
                                                  double temperature, bool need_p, bool need_q) {
  const KlTensors t("kl_divergence_backward", p_logits, q_logits, temperature);
  const Tensor g = t.per_row(grad), s = t.saved(statistics);
  Tensor grad_p = t.new_logits(need_p), grad_q = t.new_logits(need_q);
  visit_accumulation(t.accumulation(), [&]<class A>(A) {
    KlArguments<A> c(t, temperature);
    c.grad = pointer<A>(g);
    c.statistics = pointer<A>(s);
    c.out_p = Output(grad_p, need_p);
    c.out_q = Output(grad_q, need_q);
    run(c, Order::kBackward);
  });
  return {grad_p, grad_q};
}

std::tuple<Tensor, Tensor, Tensor> kl_divergence_double_backward(std::optional<Tensor> u, std::optional<Tensor> v,
                                                                 Tensor grad, Tensor p_logits, Tensor q_logits,
                                                                 Tensor statistics, double temperature, bool need_p,
                                                                 bool need_q) {
  const KlTensors t("kl_divergence_double_backward", p_logits, q_logits, temperature);
  const Tensor g = t.per_row(grad), s = t.saved(statistics);
  const auto dense_u = t.cotangent("u", u), dense_v = t.cotangent("v", v);
  Tensor gg_grad = t.new_rows(), grad_p = t.new_logits(need_p), grad_q = t.new_logits(need_q);
  visit_accumulation(t.accumulation(), [&]<class A>(A) {
    KlArguments<A> c(t, temperature);
    c.u = Input(dense_u);
    c.v = Input(dense_v);
    c.grad = pointer<A>(g);
    c.statistics = pointer<A>(s);
    c.per_row = pointer<A>(gg_grad);
    c.out_p = Output(grad_p, need_p);
    c.out_q = Output(grad_q, need_q);
    run(c, Order::kDoubleBackward);
  });
  return {gg_grad, grad_p, grad_q};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(robustkern, CPU, m) {
  m.impl("kl_divergence", TORCH_BOX(&kl_divergence));
  m.impl("kl_divergence_backward", TORCH_BOX(&kl_divergence_backward));
  m.impl("kl_divergence_double_backward", TORCH_BOX(&kl_divergence_double_backward));
}

}  // namespace rk::cpu
