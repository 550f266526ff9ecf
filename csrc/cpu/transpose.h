// Transposition of small matrices that lie in the cache.
#pragma once

#include "lanes.h"

namespace rk::cpu {

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define RK_HAS_SHUFFLES
#endif
#endif

#ifdef RK_HAS_SHUFFLES

// Rows become columns: pairs of rows are interleaved within halves of a register, then pairs of pairs, then halves.
RK_HOST_DEVICE void transpose_lanes(Lanes<float> (&r)[8]) {
  Lanes<float> s[8];
  for (int k = 0; k < 8; k += 2) {
    s[k] = __builtin_shufflevector(r[k], r[k + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    s[k + 1] = __builtin_shufflevector(r[k], r[k + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int k = 0; k < 8; k += 4)
    for (int i = 0; i < 2; ++i) {
      r[k + 2 * i] = __builtin_shufflevector(s[k + i], s[k + i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      r[k + 2 * i + 1] = __builtin_shufflevector(s[k + i], s[k + i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int k = 0; k < 4; ++k) {
    s[k] = __builtin_shufflevector(r[k], r[k + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    s[k + 4] = __builtin_shufflevector(r[k], r[k + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
  for (int k = 0; k < 8; ++k) r[k] = s[k];
}

RK_HOST_DEVICE void transpose_lanes(Lanes<double> (&r)[4]) {
  Lanes<double> s[4];
  for (int k = 0; k < 4; k += 2) {
    s[k] = __builtin_shufflevector(r[k], r[k + 1], 0, 4, 2, 6);
    s[k + 1] = __builtin_shufflevector(r[k], r[k + 1], 1, 5, 3, 7);
  }
  for (int k = 0; k < 2; ++k) {
    r[k] = __builtin_shufflevector(s[k], s[k + 2], 0, 1, 4, 5);
    r[k + 2] = __builtin_shufflevector(s[k], s[k + 2], 2, 3, 6, 7);
  }
}

#endif

// to[j][i] = from[i][j] for i < rows, j < cols
template <class A>
RK_MULTIVERSION static void transpose(const A* __restrict__ from, std::int64_t stride, A* __restrict__ to,
                                      std::int64_t to_stride, std::int64_t rows, std::int64_t cols) {
  std::int64_t whole_rows = 0, whole_cols = 0;
#ifdef RK_HAS_SHUFFLES
  constexpr int L = kLanes<A>;
  whole_rows = rows / L * L;
  whole_cols = cols / L * L;
  for (std::int64_t i = 0; i < whole_rows; i += L)
    for (std::int64_t j = 0; j < whole_cols; j += L) {
      Lanes<A> tile[L];
      for (int k = 0; k < L; ++k) load_lanes<A>(tile[k], from + (i + k) * stride + j);
      transpose_lanes(tile);
      for (int k = 0; k < L; ++k) std::memcpy(to + (j + k) * to_stride + i, &tile[k], sizeof tile[k]);
    }
#endif
  for (std::int64_t i = 0; i < rows; ++i)
    for (std::int64_t j = i < whole_rows ? whole_cols : 0; j < cols; ++j) to[j * to_stride + i] = from[i * stride + j];
}

}  // namespace rk::cpu
