// kl_divergence with few classes: a tile of rows, transposed, so that a lane is a row.
#pragma once

#include "../math/kl_divergence.h"
#include "tiles.h"

namespace rk::cpu {

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
            inverse_t};
  }
};

// max and log sum exp of z / T; p = exp(z / T - max), to be multiplied by inverse_sum
template <class A>
RK_HOST_DEVICE void kl_tile_measure(const A* z, int64_t classes, A inverse_t, A* max_of, A* log_sum_of, A* p,
                                    A* inverse_sum) {
  A max[kTileRows], sum[kTileRows] = {};
  for (int k = 0; k < kTileRows; ++k) max[k] = z[k];
  for (int64_t c = 1; c < classes; ++c)
    for (int k = 0; k < kTileRows; ++k) {
      const A value = z[c * kTileRows + k];
      max[k] = (value > max[k]) | is_nan(value) ? value : max[k];
    }
  for (int k = 0; k < kTileRows; ++k) max[k] *= inverse_t;
  for (int64_t c = 0; c < classes; ++c)
    for (int k = 0; k < kTileRows; ++k) {
      const A e = exp_nonpositive(z[c * kTileRows + k] * inverse_t - max[k]);
      p[c * kTileRows + k] = e;
      sum[k] += e;
    }
  for (int k = 0; k < kTileRows; ++k) {
    max_of[k] = max[k];
    log_sum_of[k] = log_from_one(sum[k]);
    inverse_sum[k] = A(1) / sum[k];
  }
}

// statistics, and per_row = value
template <class A>
RK_MULTIVERSION static void kl_tile_value(KlTile<A>& w) {
  const A least = -std::numeric_limits<A>::infinity();
  A inverse_p[kTileRows], inverse_q[kTileRows], sum[kTileRows] = {}, top[kTileRows];
  kl_tile_measure(w.a, w.classes, w.inverse_t, w.statistics, w.statistics + kTileRows, w.u, inverse_p);
  kl_tile_measure(w.b, w.classes, w.inverse_t, w.statistics + 2 * kTileRows, w.statistics + 3 * kTileRows, w.v,
                  inverse_q);
  for (int k = 0; k < kTileRows; ++k) top[k] = least;
  for (int64_t c = 0; c < w.classes; ++c)
    for (int k = 0; k < kTileRows; ++k) {
      const KlRow<A> r = w.row(k);
      const int64_t i = c * kTileRows + k;
      const KlPoint<A> point(r, w.a[i], w.b[i], w.u[i] * inverse_p[k], w.v[i] * inverse_q[k]);
      w.u[i] = point.p;
      w.v[i] = point.q;
      w.d[i] = point.d;
      const A d = kl_is_top(r, w.a[i]) ? point.d : least;
      top[k] = (d > top[k]) | is_nan(d) ? d : top[k];
    }
  // A loop of its own: with the choices of KlPoint and kl_term in one, GCC finds no vectors.
  for (int64_t c = 0; c < w.classes; ++c)
    for (int k = 0; k < kTileRows; ++k) {
      const int64_t i = c * kTileRows + k;
      sum[k] += kl_term(w.u[i], w.v[i], w.d[i]);
    }
  for (int k = 0; k < kTileRows; ++k) {
    w.statistics[4 * kTileRows + k] = top[k];
    w.per_row[k] = sum[k];
  }
}

// a, b = grad_p, grad_q; b only if kQ, which saves an exponential
template <bool kQ, class A>
RK_MULTIVERSION static void kl_tile_backward(KlTile<A>& w) {
  A mean_e[kTileRows] = {};
  for (int64_t c = 0; c < w.classes; ++c)
    for (int k = 0; k < kTileRows; ++k) {
      const KlRow<A> r = w.row(k);
      const int64_t i = c * kTileRows + k;
      const KlPoint<A> point(r, w.a[i], w.b[i]);
      w.a[i] = point.p;
      if constexpr (kQ) w.b[i] = point.q;
      const A e = point.d - r.d_top;
      w.d[i] = e;
      mean_e[k] += point.p * e;
    }
  for (int64_t c = 0; c < w.classes; ++c)
    for (int k = 0; k < kTileRows; ++k) {
      const int64_t i = c * kTileRows + k;
      const A p = w.a[i];
      w.a[i] = w.grad[k] * kl_slope_p(p, w.d[i], mean_e[k], w.inverse_t);
      if constexpr (kQ) w.b[i] = w.grad[k] * kl_slope_q(p, w.b[i], w.inverse_t);
    }
}

// per_row = gg_grad; a, b = grad_p, grad_q; v is read, and b written, only if kQ
template <bool kQ, class A>
RK_MULTIVERSION static void kl_tile_double_backward(KlTile<A>& w) {
  A mean_e[kTileRows] = {}, u_p[kTileRows] = {}, v_q[kTileRows] = {}, v_difference[kTileRows] = {};
  A cross[kTileRows] = {};
  for (int64_t c = 0; c < w.classes; ++c)
    for (int k = 0; k < kTileRows; ++k) {
      const KlRow<A> r = w.row(k);
      const int64_t i = c * kTileRows + k;
      const KlPoint<A> point(r, w.a[i], w.b[i]);
      const A e = point.d - r.d_top;
      w.a[i] = point.p;
      w.d[i] = e;
      mean_e[k] += point.p * e;
      u_p[k] += point.p * w.u[i];
      if constexpr (kQ) {
        w.b[i] = point.q;
        v_q[k] += point.q * w.v[i];
        v_difference[k] += (point.q - point.p) * w.v[i];
      }
    }
  const auto sums = [&](int k) RK_INLINE_LAMBDA -> KlSums<A> {
    return {mean_e[k], u_p[k], v_q[k] - v_difference[k], v_q[k], cross[k]};
  };
  for (int64_t c = 0; c < w.classes; ++c)
    for (int k = 0; k < kTileRows; ++k) {
      const int64_t i = c * kTileRows + k;
      cross[k] += kl_cross_term(w.a[i], w.d[i], w.u[i], sums(k));
    }
  for (int64_t c = 0; c < w.classes; ++c)
    for (int k = 0; k < kTileRows; ++k) {
      const int64_t i = c * kTileRows + k;
      const A p = w.a[i], v = kQ ? w.v[i] : A(0);
      w.a[i] = w.grad[k] * kl_bend_p(p, w.d[i], w.u[i], v, sums(k), w.inverse_t);
      if constexpr (kQ) w.b[i] = w.grad[k] * kl_bend_q(p, w.b[i], w.u[i], v, sums(k), w.inverse_t);
    }
  for (int k = 0; k < kTileRows; ++k) w.per_row[k] = (cross[k] + v_difference[k]) * w.inverse_t;
}

}  // namespace rk::cpu
