// softmax_cross_entropy with few classes: a tile of rows, transposed, so that a lane is a row.
#pragma once

#include <algorithm>

#include "../math/softmax_cross_entropy.h"
#include "tiles.h"

namespace rk::cpu {

template <class A>
struct Tile {
  alignas(64) TileMatrix<A> z, t, u, out;  // logits, probabilities, cotangent of grad_logits, result
  TileColumn<A> y;                         // the class, where there are no probabilities
  TileColumn<A> max, log_sum, grad, per_row, total_q;
  int64_t classes;
};

template <bool kSoft, class A>
RK_HOST_DEVICE A tile_q(const Tile<A>& w, Smoothing<A> s, int64_t c, int k) {
  if constexpr (kSoft) return s.q(w.t[c * kTileRows + k]);
  return w.y[k] == A(c) ? s.q(A(1)) : s.floor;
}

// per_row = loss
template <bool kSoft, class A>
RK_MULTIVERSION static void tile_value(Tile<A>& w, Smoothing<A> s, A inverse_t) {
  A max[kTileRows], sum[kTileRows] = {}, total_q[kTileRows] = {}, gap[kTileRows] = {};
  for (int k = 0; k < kTileRows; ++k) max[k] = w.z[k];
  for (int64_t c = 1; c < w.classes; ++c)
    for (int k = 0; k < kTileRows; ++k) {
      const A v = w.z[c * kTileRows + k];
      max[k] = (v > max[k]) | is_nan(v) ? v : max[k];
    }
  for (int k = 0; k < kTileRows; ++k) max[k] *= inverse_t;
  for (int64_t c = 0; c < w.classes; ++c)
    for (int k = 0; k < kTileRows; ++k) {
      const A scaled = w.z[c * kTileRows + k] * inverse_t, q = tile_q<kSoft>(w, s, c, k);
      sum[k] += exp_nonpositive(scaled - max[k]);
      gap[k] += cross_entropy_term(q, max[k] - scaled);
      total_q[k] += q;
    }
  for (int k = 0; k < kTileRows; ++k) {
    const A log_sum = log_from_one(sum[k]);
    w.max[k] = max[k];
    w.log_sum[k] = log_sum;
    w.per_row[k] = cross_entropy_value(log_sum, total_q[k], gap[k]);
  }
}

template <bool kSoft, class A>
RK_HOST_DEVICE void tile_total_q(Tile<A>& w, Smoothing<A> s) {
  for (int k = 0; k < kTileRows; ++k) w.total_q[k] = kSoft ? A(0) : s.keep + s.floor * A(w.classes);
  if constexpr (kSoft)
    for (int64_t c = 0; c < w.classes; ++c)
      for (int k = 0; k < kTileRows; ++k) w.total_q[k] += s.q(w.t[c * kTileRows + k]);
}

// out = grad_logits
template <bool kSoft, class A>
RK_MULTIVERSION static void tile_backward(Tile<A>& w, Smoothing<A> s, A inverse_t) {
  tile_total_q<kSoft>(w, s);
  for (int64_t c = 0; c < w.classes; ++c)
    for (int k = 0; k < kTileRows; ++k) {
      const A p = softmax_probability(w.z[c * kTileRows + k] * inverse_t, w.max[k], w.log_sum[k]);
      const A q = tile_q<kSoft>(w, s, c, k);
      w.out[c * kTileRows + k] = w.grad[k] * cross_entropy_slope(p, q, w.total_q[k], inverse_t);
    }
}

// per_row = gg_grad, out = grad_logits.  Sums in double: gg_grad is the difference of two of them.
template <bool kSoft, class A>
RK_MULTIVERSION static void tile_double_backward(Tile<A>& w, Smoothing<A> s, A inverse_t) {
  double mean_u[kTileRows] = {}, dot_qu[kTileRows] = {};
  tile_total_q<kSoft>(w, s);
  for (int64_t c = 0; c < w.classes; ++c)
    for (int k = 0; k < kTileRows; ++k) {
      const A p = softmax_probability(w.z[c * kTileRows + k] * inverse_t, w.max[k], w.log_sum[k]);
      const A u = w.u[c * kTileRows + k];
      w.out[c * kTileRows + k] = p;
      mean_u[k] += double(p) * double(u);
      dot_qu[k] += double(tile_q<kSoft>(w, s, c, k)) * double(u);
    }
  A mean[kTileRows];
  for (int k = 0; k < kTileRows; ++k) {
    w.per_row[k] = A((double(w.total_q[k]) * mean_u[k] - dot_qu[k]) * double(inverse_t));
    mean[k] = A(mean_u[k]);
  }
  for (int64_t c = 0; c < w.classes; ++c)
    for (int k = 0; k < kTileRows; ++k) {
      const A p = w.out[c * kTileRows + k], u = w.u[c * kTileRows + k];
      w.out[c * kTileRows + k] = w.grad[k] * cross_entropy_bend(p, u, mean[k], w.total_q[k], inverse_t);
    }
}

}  // namespace rk::cpu
