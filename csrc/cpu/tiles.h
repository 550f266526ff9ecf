// Short rows, transposed into a tile, so that a lane is a row: vectors run across rows and no sum runs across lanes.
// What a row gives does not depend on which lane it is.
#pragma once

#include <algorithm>

#include "pieces.h"

namespace rk::cpu {

constexpr int64_t kTileClasses = 128;  // at most
constexpr int kTileRows = 32;          // more than the 16 that GCC would unroll instead of vectorising

// Column c of row k lies at [c * kTileRows + k].
template <class A>
using TileMatrix = A[kTileClasses * kTileRows];
template <class A>
using TileColumn = A[kTileRows];

// Elements of two vectors of four, counted through both.
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define RK_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#endif
#if !defined(RK_SHUFFLE)
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

// to[c * to_stride + k] = from[k * from_stride + c]
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

// Rows of `from`, `stride` elements apart, into the first lanes of a tile.
template <class A>
RK_MULTIVERSION static void rows_into_tile(const A* from, int64_t stride, int64_t rows, int64_t classes,
                                           A* __restrict__ to) {
  transpose_matrix(from, stride, rows, classes, to, kTileRows);
}

// The first lanes of a tile into adjacent rows.
template <class A>
RK_MULTIVERSION static void rows_out_of_tile(const A* from, int64_t rows, int64_t classes, A* __restrict__ to) {
  transpose_matrix(from, kTileRows, classes, rows, to, classes);
}

#undef RK_SHUFFLE

}  // namespace rk::cpu
