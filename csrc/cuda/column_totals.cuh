// Sums down the columns of a matrix, or of two of one shape, in a single launch: the last step of gradients that rows
// share.  Rows are added in an order that depends on their number alone.
#pragma once

#include <cstdint>

#include "words.cuh"

namespace rk::cuda {

constexpr int kTotalColumns = 8;  // a block's: 32 bytes of a row, the least that memory gives
constexpr int kTotalThreads = 256;

template <class A>
struct ColumnTotals {
  std::int64_t rows, cols;
  const A* from[2];  // [rows, cols]
  A* to[2];          // [cols]; the second or null
};

template <class A>
__global__ void __launch_bounds__(kTotalThreads) column_totals_kernel(const ColumnTotals<A> c) {
  constexpr int kSlices = kTotalThreads / kTotalColumns, kWarps = kTotalThreads / 32;
  __shared__ A parts[kWarps][kTotalColumns];
  const int column = threadIdx.x % kTotalColumns, slice = threadIdx.x / kTotalColumns;
  const std::int64_t strips = (c.cols + kTotalColumns - 1) / kTotalColumns;
  for (std::int64_t unit = blockIdx.x; unit < (c.to[1] ? 2 : 1) * strips; unit += gridDim.x) {
    const bool second = unit >= strips;
    const A* const from = second ? c.from[1] : c.from[0];
    A* const to = second ? c.to[1] : c.to[0];
    const std::int64_t j = (second ? unit - strips : unit) * kTotalColumns + column;
    A sum = 0;
    if (j < c.cols) {
#pragma unroll 8
      for (std::int64_t row = slice; row < c.rows; row += kSlices) sum += from[row * c.cols + j];
    }
#pragma unroll
    for (int d = 16; d >= kTotalColumns; d /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
    if (threadIdx.x % 32 < kTotalColumns) parts[threadIdx.x / 32][column] = sum;
    __syncthreads();
    if (slice == 0 && j < c.cols) {
#pragma unroll
      for (int warp = 1; warp < kWarps; ++warp) sum += parts[warp][column];
      to[j] = sum;
    }
    __syncthreads();  // the shared parts are written again
  }
}

// out_i = the sums of from_i: [rows, cols], for each out_i that is there; of no rows zeros.
template <class A>
cudaError_t launch_column_totals(const A* from_0, A* out_0, const A* from_1, A* out_1, std::int64_t rows,
                                 std::int64_t cols, cudaStream_t stream) {
  ColumnTotals<A> c{rows, cols, {}, {}};
  int matrices = 0;
  const auto add = [&](const A* from, A* out) {
    if (!out) return;
    c.from[matrices] = from;
    c.to[matrices++] = out;
  };
  add(from_0, out_0);
  add(from_1, out_1);
  const std::int64_t strips = (cols + kTotalColumns - 1) / kTotalColumns;
  return launch(column_totals_kernel<A>, grid_for(matrices * strips), dim3(kTotalThreads), 0, stream, c);
}

}  // namespace rk::cuda
