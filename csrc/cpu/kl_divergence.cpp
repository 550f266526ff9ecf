// kl_divergence on the CPU.  Formulas: math/kl_divergence.h.  A row of few classes is a lane of a tile.  A longer one is
// worked by one thread in pieces that stay in its L1 cache, so that it is read from memory once, whatever the number of
// sweeps over it; sums across pieces run in double.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "../arguments/kl_divergence.h"
#include "../math/kl_divergence.h"
#include "logits.h"

namespace rk::cpu {
namespace {

// One piece of one row: the first logits, what both say, the cotangents of both gradients.
template <class A>
struct KlPiece {
  const A *a, *p, *q, *d, *u, *v;
  int64_t n;
};

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

// sum of p e
template <class A>
A kl_mean(const KlPiece<A>& w, A top) {
  return vector_sum<A>(w.n, [=](int64_t j) RK_INLINE_LAMBDA { return w.p[j] * (w.d[j] - top); });
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

// Few classes: a tile of rows, transposed, so that a lane is a row.
template <class A>
struct KlTile {
  alignas(64) TileMatrix<A> a, b, d;        // logits, which become gradients; d, in the backward passes e
  TileMatrix<A> u, v;                       // cotangents of both gradients; for the value p and q
  A statistics[kKlStatistics * kTileRows];  // as columns
  TileColumn<A> grad, per_row;
  int64_t classes;
  A inverse_t;
  bool needs_q;  // backward: q's gradient is wanted, or has a cotangent

  RK_HOST_DEVICE KlRow<A> row(int k) const {
    return {statistics[k],
            statistics[kTileRows + k],
            statistics[2 * kTileRows + k],
            statistics[3 * kTileRows + k],
            statistics[4 * kTileRows + k],
            statistics[5 * kTileRows + k],
            inverse_t};
  }
};

// f(i, k) for every entry i of a tile, whose lane is k.
template <class F>
RK_HOST_DEVICE void for_entries(int64_t classes, const F& f) {
  for (int64_t c = 0; c < classes; ++c)
    for (int k = 0; k < kTileRows; ++k) f(c * kTileRows + k, k);
}

// max and log sum exp of z / T; p = exp(z / T - max), to be multiplied by inverse_sum
template <class A>
RK_HOST_DEVICE void kl_tile_measure(const A* z, int64_t classes, A inverse_t, A* max_of, A* log_sum_of, A* p,
                                    A* inverse_sum) {
  A max[kTileRows], sum[kTileRows] = {};
  tile_max(z, classes, inverse_t, max);
  for_entries(classes, [&](int64_t i, int k) RK_INLINE_LAMBDA {
    const A e = exp_nonpositive(z[i] * inverse_t - max[k]);
    p[i] = e;
    sum[k] += e;
  });
  for (int k = 0; k < kTileRows; ++k) {
    max_of[k] = max[k];
    log_sum_of[k] = log_from_one(sum[k]);
    inverse_sum[k] = A(1) / sum[k];
  }
}

// statistics, and per_row = value
template <class A>
RK_MULTIVERSION void kl_tile_value(KlTile<A>& w) {
  const A least = -std::numeric_limits<A>::infinity();
  A inverse_p[kTileRows], inverse_q[kTileRows], sum[kTileRows] = {}, mean_e[kTileRows] = {}, top[kTileRows];
  kl_tile_measure(w.a, w.classes, w.inverse_t, w.statistics, w.statistics + kTileRows, w.u, inverse_p);
  kl_tile_measure(w.b, w.classes, w.inverse_t, w.statistics + 2 * kTileRows, w.statistics + 3 * kTileRows, w.v,
                  inverse_q);
  for (int k = 0; k < kTileRows; ++k) top[k] = least;
  for_entries(w.classes, [&](int64_t i, int k) RK_INLINE_LAMBDA {
    const KlRow<A> r = w.row(k);
    const KlPoint<A> point(r, w.a[i], w.b[i], w.u[i] * inverse_p[k], w.v[i] * inverse_q[k]);
    w.u[i] = point.p;
    w.v[i] = point.q;
    w.d[i] = point.d;
    top[k] = larger(top[k], kl_is_top(r, w.a[i]) ? point.d : least);
  });
  // A loop of its own: with the choices of KlPoint and kl_term in one, GCC finds no vectors.
  for_entries(w.classes, [&](int64_t i, int k) RK_INLINE_LAMBDA { sum[k] += kl_term(w.u[i], w.v[i], w.d[i]); });
  for_entries(w.classes, [&](int64_t i, int k) RK_INLINE_LAMBDA { mean_e[k] += w.u[i] * (w.d[i] - top[k]); });
  for (int k = 0; k < kTileRows; ++k) {
    w.statistics[4 * kTileRows + k] = top[k];
    w.statistics[5 * kTileRows + k] = mean_e[k];
    w.per_row[k] = sum[k];
  }
}

// a, b = grad_p, grad_q; b only if kQ, which saves an exponential
template <bool kQ, class A>
RK_MULTIVERSION void kl_tile_backward(KlTile<A>& w) {
  for_entries(w.classes, [&](int64_t i, int k) RK_INLINE_LAMBDA {
    const KlRow<A> r = w.row(k);
    const KlPoint<A> point(r, w.a[i], w.b[i]);
    w.a[i] = w.grad[k] * kl_slope_p(point.p, point.d - r.d_top, r.mean_e, w.inverse_t);
    if constexpr (kQ) w.b[i] = w.grad[k] * kl_slope_q(point.p, point.q, w.inverse_t);
  });
}

// per_row = gg_grad; a, b = grad_p, grad_q; v is read, and b written, only if kQ
template <bool kQ, class A>
RK_MULTIVERSION void kl_tile_double_backward(KlTile<A>& w) {
  A u_p[kTileRows] = {}, v_q[kTileRows] = {}, v_difference[kTileRows] = {};
  A cross[kTileRows] = {};
  for_entries(w.classes, [&](int64_t i, int k) RK_INLINE_LAMBDA {
    const KlRow<A> r = w.row(k);
    const KlPoint<A> point(r, w.a[i], w.b[i]);
    const A e = point.d - r.d_top;
    w.a[i] = point.p;
    w.d[i] = e;
    u_p[k] += point.p * w.u[i];
    if constexpr (kQ) {
      w.b[i] = point.q;
      v_q[k] += point.q * w.v[i];
      v_difference[k] += (point.q - point.p) * w.v[i];
    }
  });
  const auto sums = [&](int k) RK_INLINE_LAMBDA -> KlSums<A> {
    return {w.row(k).mean_e, u_p[k], v_q[k] - v_difference[k], v_q[k], cross[k]};
  };
  for_entries(w.classes,
              [&](int64_t i, int k) RK_INLINE_LAMBDA { cross[k] += kl_cross_term(w.a[i], w.d[i], w.u[i], sums(k)); });
  for_entries(w.classes, [&](int64_t i, int k) RK_INLINE_LAMBDA {
    const A p = w.a[i], v = kQ ? w.v[i] : A(0);
    w.a[i] = w.grad[k] * kl_bend_p(p, w.d[i], w.u[i], v, sums(k), w.inverse_t);
    if constexpr (kQ) w.b[i] = w.grad[k] * kl_bend_q(p, w.b[i], w.u[i], v, sums(k), w.inverse_t);
  });
  for (int k = 0; k < kTileRows; ++k) w.per_row[k] = (cross[k] + v_difference[k]) * w.inverse_t;
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
  A* statistics = nullptr;  // [rows, kKlStatistics]
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
    const auto read = [&](int64_t begin, int64_t n) { return logits.read(first + begin, n, b.a); };
    max = row_max(c.classes, r.inverse_t, read);
    double sum = 0;
    for_pieces(c.classes, [&](int64_t begin, int64_t n) { sum += sum_exp(read(begin, n), n, r.inverse_t, max); });
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
  const A least = -std::numeric_limits<A>::infinity();
  double sum = 0;
  A top = least;
  w.sweep([&](int64_t, const KlPiece<A>& piece) {
    const KlRow<A> r = w.r;
    const A *a = piece.a, *p = piece.p, *q = piece.q, *d = piece.d;
    sum += vector_sum<A>(piece.n, [=](int64_t j) RK_INLINE_LAMBDA { return kl_term(p[j], q[j], d[j]); });
    const auto of_top = [=](int64_t j) RK_INLINE_LAMBDA { return kl_is_top(r, a[j]) ? d[j] : least; };
    top = larger(top, vector_max<A>(piece.n, least, of_top));
  });
  double mean_e = 0;
  w.sweep([&](int64_t, const KlPiece<A>& piece) { mean_e += kl_mean(piece, top); });
  A* const statistics = c.statistics + kKlStatistics * row;
  statistics[0] = w.r.p_max;
  statistics[1] = w.r.p_log_sum;
  statistics[2] = w.r.q_max;
  statistics[3] = w.r.q_log_sum;
  statistics[4] = top;
  statistics[5] = A(mean_e);
  c.per_row[row] = A(sum);
}

template <class A>
Row<A> measured_row(const KlArguments<A>& c, int64_t row, Buffers<A>& b) {
  Row<A> w(c, b, row);
  const A* const statistics = c.statistics + kKlStatistics * row;
  w.r = {statistics[0], statistics[1], statistics[2], statistics[3], statistics[4], statistics[5], w.r.inverse_t};
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
  const A grad = c.grad[row];
  write(c, w, [&](const KlPiece<A>& piece, A* grad_p, A* grad_q) {
    kl_slopes(piece, grad, w.r.d_top, w.r.mean_e, w.r.inverse_t, grad_p, grad_q);
  });
}

template <class A>
void double_backward_row(const KlArguments<A>& c, int64_t row, Buffers<A>& b) {
  Row<A> w = measured_row(c, row, b);
  double u_p = 0, v_q = 0, v_difference = 0, cross = 0;
  w.sweep([&](int64_t, const KlPiece<A>& piece) {
    u_p += dot(piece.p, piece.u, piece.n);
    v_q += dot(piece.q, piece.v, piece.n);
    // The difference first, since the two sums nearly agree where the predictions do.
    const A *p = piece.p, *q = piece.q, *v = piece.v;
    v_difference += vector_sum<A>(piece.n, [=](int64_t j) RK_INLINE_LAMBDA { return (q[j] - p[j]) * v[j]; });
  });
  KlSums<A> sums{w.r.mean_e, A(u_p), A(v_q - v_difference), A(v_q), A(0)};
  w.sweep([&](int64_t, const KlPiece<A>& piece) {
    const A *p = piece.p, *d = piece.d, *u = piece.u, top = w.r.d_top;
    const auto term = [=](int64_t j) RK_INLINE_LAMBDA { return kl_cross_term(p[j], d[j] - top, u[j], sums); };
    cross += vector_sum<A>(piece.n, term);
  });
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
