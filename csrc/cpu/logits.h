// What softmax_cross_entropy and kl_divergence do with a row of logits z, or a tile of them, at a temperature T.
#pragma once

#include "tiles.h"

namespace rk::cpu {

template <class A>
A sum_exp(const A* z, int64_t n, A inverse_t, A max) {
  return vector_sum<A>(n, [=](int64_t j) RK_INLINE_LAMBDA { return exp_nonpositive(z[j] * inverse_t - max); });
}

template <class A>
A dot(const A* a, const A* b, int64_t n) {
  return vector_sum<A>(n, [=](int64_t j) RK_INLINE_LAMBDA { return a[j] * b[j]; });
}

// max_c z_c / T of a row, whose pieces are read(begin, n).
template <class A, class Read>
A row_max(int64_t classes, A inverse_t, const Read& read) {
  const A least = -std::numeric_limits<A>::infinity();
  A max = least;
  for_pieces(classes, [&](int64_t begin, int64_t n) {
    const A* const z = read(begin, n);
    max = larger(max, vector_max<A>(n, least, [=](int64_t j) RK_INLINE_LAMBDA { return z[j]; }));
  });
  return max * inverse_t;
}

// The same of every row of a tile.
template <class A>
RK_HOST_DEVICE void tile_max(const A* z, int64_t classes, A inverse_t, A* max) {
  for (int k = 0; k < kTileRows; ++k) max[k] = z[k];
  for (int64_t c = 1; c < classes; ++c)
    for (int k = 0; k < kTileRows; ++k) max[k] = larger(max[k], z[c * kTileRows + k]);
  for (int k = 0; k < kTileRows; ++k) max[k] *= inverse_t;
}

}  // namespace rk::cpu
