// Short rows, transposed into a tile, so that a lane is a row: vectors run across rows and no sum runs across lanes.
// What a row gives does not depend on which lane it is.
#pragma once

#include <algorithm>

#include "elements.h"
#include "transpose.h"

namespace rk::cpu {

constexpr int64_t kTileClasses = 128;  // at most
constexpr int kTileRows = 32;          // more than the 16 that GCC would unroll instead of vectorising

// Column c of row k lies at [c * kTileRows + k].
template <class A>
using TileMatrix = A[kTileClasses * kTileRows];
template <class A>
using TileColumn = A[kTileRows];

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

// Rows [first, first + rows), `stride` elements apart, into a tile; lanes without a row are zero.
template <class A>
void fill_tile(const Input& from, int64_t stride, int64_t columns, int64_t first, int64_t rows, A* to) {
  if (rows < kTileRows) std::fill_n(to, columns * kTileRows, A(0));
  if (from.holds<A>()) return rows_into_tile(from.at<A>(first * stride), stride, rows, columns, to);
  A buffer[kTileClasses * kTileRows];
  const int64_t at_once = stride == columns ? rows : 1;
  for (int64_t k = 0; k < rows; k += at_once) from.copy((first + k) * stride, at_once * columns, buffer + k * columns);
  rows_into_tile(buffer, columns, rows, columns, to);
}

// A tile into adjacent rows [first, first + rows).
template <class A>
void write_tile(const Output& to, int64_t columns, int64_t first, int64_t rows, const A* from) {
  Buffer<A> buffer;
  const int64_t at_once = std::min<int64_t>(kTileRows, kPiece / columns);
  for (int64_t k = 0; k < rows; k += at_once) {
    const int64_t n = std::min(at_once, rows - k);
    to.write((first + k) * columns, n * columns, buffer,
             [&](A* piece) { rows_out_of_tile(from + k, n, columns, piece); });
  }
}

}  // namespace rk::cpu
