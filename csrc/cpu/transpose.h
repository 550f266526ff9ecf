// Transposition of small matrices that lie in the cache.
#pragma once

#include <algorithm>

#include "lanes.h"

namespace rk::cpu {

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define RK_HAS_SHUFFLES
#endif
#endif

// Elements of two vectors of four, counted through both.
#ifdef RK_HAS_SHUFFLES
#define RK_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define RK_SHUFFLE(a, b, i, j, k, l) \
  Four<A> { a[i], b[j - 4], a[k], b[l - 4] }
#endif

// Four elements, written out as a vector: GCC finds none in a transposition.
template <class A>
struct FourOf {
  typedef A type __attribute__((vector_size(4 * sizeof(A))));
};
template <class A>
using Four = typename FourOf<A>::type;

// A block of 4 x 4.
template <class A>
RK_HOST_DEVICE void transpose_block(const A* from, int64_t from_stride, A* to, int64_t to_stride) {
  Four<A> a, b, c, d;
  std::memcpy(&a, from, sizeof a);
  std::memcpy(&b, from + from_stride, sizeof a);
  std::memcpy(&c, from + 2 * from_stride, sizeof a);
  std::memcpy(&d, from + 3 * from_stride, sizeof a);
  const Four<A> ac_low = RK_SHUFFLE(a, c, 0, 4, 1, 5), ac_high = RK_SHUFFLE(a, c, 2, 6, 3, 7);
  const Four<A> bd_low = RK_SHUFFLE(b, d, 0, 4, 1, 5), bd_high = RK_SHUFFLE(b, d, 2, 6, 3, 7);
  a = RK_SHUFFLE(ac_low, bd_low, 0, 4, 1, 5);
  b = RK_SHUFFLE(ac_low, bd_low, 2, 6, 3, 7);
  c = RK_SHUFFLE(ac_high, bd_high, 0, 4, 1, 5);
  d = RK_SHUFFLE(ac_high, bd_high, 2, 6, 3, 7);
  std::memcpy(to, &a, sizeof a);
  std::memcpy(to + to_stride, &b, sizeof a);
  std::memcpy(to + 2 * to_stride, &c, sizeof a);
  std::memcpy(to + 3 * to_stride, &d, sizeof a);
}

#undef RK_SHUFFLE

// to[c * to_stride + k] = from[k * from_stride + c], of matrices of few rows or columns.
template <class A>
RK_HOST_DEVICE void transpose_matrix(const A* from, int64_t from_stride, int64_t rows, int64_t columns, A* to,
                                     int64_t to_stride) {
  if (rows >= 4 && columns >= 4) {
    // The last block in either direction may overlap the one before it.
    for (int64_t i = 0; i < rows; i += 4)
      for (int64_t j = 0; j < columns; j += 4) {
        const int64_t k = std::min(i, rows - 4), c = std::min(j, columns - 4);
        transpose_block(from + k * from_stride + c, from_stride, to + c * to_stride + k, to_stride);
      }
    return;
  }
  for (int64_t k = 0; k < rows; ++k)
    for (int64_t c = 0; c < columns; ++c) to[c * to_stride + k] = from[k * from_stride + c];
}

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

// The same for larger matrices, as many rows and columns at a time as a register has lanes.
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
