// LayerNorm's rows too long for registers: a block sums over a row and then writes it, from its end backwards, through
// what the caches still hold.  The sums down the columns have a kernel of their own, which reads everything again.
#pragma once

#include <cstdint>

#include "layer_norm_rows.cuh"

namespace rk::cuda {

// f(column) for a thread's vectors of a row, forwards or backwards.
template <int V, class F>
__device__ __forceinline__ void for_vectors(std::int64_t cols, const F& f) {
#pragma unroll 2
  for (std::int64_t j = std::int64_t{threadIdx.x} * V; j < cols; j += kRowThreads * V) f(j);
}
template <int V, class F>
__device__ __forceinline__ void for_vectors_backwards(std::int64_t cols, const F& f) {
  const std::int64_t first = std::int64_t{threadIdx.x} * V, step = kRowThreads * V;
  if (first >= cols) return;
#pragma unroll 2
  for (std::int64_t j = first + (cols - 1 - first) / step * step; j >= 0; j -= step) f(j);
}

template <class S, class W>
__global__ void __launch_bounds__(kRowThreads, 2) layer_norm_long_backward_kernel(const LayerNormCall<S> c) {
  using A = accumulation_t<S>;
  constexpr int V = W::kSize;
  TeamSums<A, SlopeSums<A>::kCount> team(kRowThreads);
  for (std::int64_t at = blockIdx.x; at < c.cotangents * c.rows; at += gridDim.x) {
    const std::int64_t row = at % c.rows;
    const S *const from_x = c.x + row * c.cols, *const from_g = c.g + at * c.cols;
    const A mean = c.mean ? c.mean[row] : A(0), r = c.rstd[row];
    SlopeSums<A> s;
    for_vectors<V>(c.cols, [&](std::int64_t j) {
      const W x = read_vector<W>(from_x + j), g = read_vector<W>(from_g + j);
      A w[V];
      read_parameters<W>(w, c.weight ? c.weight + j : nullptr, A(1));
#pragma unroll
      for (int k = 0; k < V; ++k) s.add(x[k] - mean, g[k], w[k]);
    });
    team.add_up(s.sums);
    const NormSlopes<A> d = s.slopes(c.mean, r, c.average);
    for_vectors_backwards<V>(c.cols, [&](std::int64_t j) {
      const W x = read_vector<W>(from_x + j), g = read_vector<W>(from_g + j);
      A w[V], grad_x[V];
      read_parameters<W>(w, c.weight ? c.weight + j : nullptr, A(1));
#pragma unroll
      for (int k = 0; k < V; ++k) grad_x[k] = d.x_g * (w[k] * g[k]) + (d.x_x * ((x[k] - mean) * r) + d.x_one);
      write_vector<W>(c.grad_x + at * c.cols + j, grad_x);
    });
  }
}

// Several cotangents: one after the other for the sums, whose coefficients lie in device memory, and together for the
// results, so that grad_x is summed in registers.
template <class S, class W>
__global__ void __launch_bounds__(kRowThreads, 2) layer_norm_long_double_backward_kernel(const LayerNormCall<S> c) {
  using A = accumulation_t<S>;
  constexpr int V = W::kSize;
  TeamSums<A, BendSums<A, true>::kCount> team(kRowThreads);
  for (std::int64_t row = blockIdx.x; row < c.rows; row += gridDim.x) {
    const S* const from_x = c.x + row * c.cols;
    const A mean = c.mean ? c.mean[row] : A(0), r = c.rstd[row];
    for (std::int64_t i = 0; i < c.cotangents; ++i) {
      const std::int64_t from = (i * c.rows + row) * c.cols;
      BendSums<A, true> s;
      for_vectors<V>(c.cols, [&](std::int64_t j) {
        const W x = read_vector<W>(from_x + j), g = read_vector<W>(c.g + from + j);
        W u{};
        if (c.u) u = read_vector<W>(c.u + from + j);
        A w[V], a[V];
        read_parameters<W>(w, c.weight ? c.weight + j : nullptr, A(1));
        read_parameters<W>(a, c.a ? c.a + j : nullptr, A(0));
#pragma unroll
        for (int k = 0; k < V; ++k) s.add(x[k] - mean, g[k], u[k], w[k], a[k]);
      });
      team.add_up(s.sums);
      if (threadIdx.x == 0) c.bends[i * c.rows + row] = s.bends(c.mean, r, c.average);
    }
    __syncthreads();
    if (!c.gg_grad && !c.grad_x) continue;
    for_vectors_backwards<V>(c.cols, [&](std::int64_t j) {
      const W x = read_vector<W>(from_x + j);
      A w[V], a[V], b[V], sum[V] = {};
      read_parameters<W>(w, c.weight ? c.weight + j : nullptr, A(1));
      read_parameters<W>(a, c.a ? c.a + j : nullptr, A(0));
      read_parameters<W>(b, c.b ? c.b + j : nullptr, A(0));
      for (std::int64_t i = 0; i < c.cotangents; ++i) {
        const std::int64_t from = (i * c.rows + row) * c.cols + j;
        const W g = read_vector<W>(c.g + from);
        W u{};
        if (c.u) u = read_vector<W>(c.u + from);
        const NormBends<A> d = c.bends[i * c.rows + row];
        A gg_grad[V];
#pragma unroll
        for (int k = 0; k < V; ++k) {
          const BendResult<A> result = bend<true>(d, (x[k] - mean) * r, r, g[k], u[k], w[k], a[k], b[k]);
          gg_grad[k] = result.gg_grad;
          sum[k] += result.grad_x;
        }
        if (c.gg_grad) write_vector<W>(c.gg_grad + from, gg_grad);
      }
      if (c.grad_x) write_vector<W>(c.grad_x + row * c.cols + j, sum);
    });
  }
}

// partial_weight[chunk] = sum over the chunk's rows of g t, or of g xh in the first backward; partial_bias of g.  A warp
// takes every kRowWarps-th row of a chunk, a thread one vector of it.
template <class S, class W>
__global__ void __launch_bounds__(kRowThreads, 2) layer_norm_columns_kernel(const LayerNormCall<S> c, bool second) {
  using A = accumulation_t<S>;
  constexpr int V = W::kSize;
  __shared__ A parts[kRowWarps][2 * V][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const std::int64_t strips = (c.cols + 32 * V - 1) / (32 * V);
  for (std::int64_t unit = blockIdx.x; unit < strips * c.chunks; unit += gridDim.x) {
    const std::int64_t chunk = unit / strips, j = (unit % strips * 32 + lane) * V;
    const std::int64_t first = chunk * c.chunk_rows,
                       last = first + c.chunk_rows < c.rows ? first + c.chunk_rows : c.rows;
    A sums[2 * V] = {};
    if (j < c.cols)
      for (std::int64_t row = first + warp; row < last; row += kRowWarps) {
        const A mean = c.mean ? c.mean[row] : A(0), r = c.rstd[row];
        const W x = read_vector<W>(c.x + row * c.cols + j);
        for (std::int64_t i = 0; i < c.cotangents; ++i) {
          const std::int64_t at = i * c.rows + row;
          const W g = read_vector<W>(c.g + at * c.cols + j);
          W u{};
          if (c.u) u = read_vector<W>(c.u + at * c.cols + j);
          const A t_x = second ? c.bends[at].t_x : A(1), t_one = second ? c.bends[at].t_one : A(0);
#pragma unroll
          for (int k = 0; k < V; ++k) {
            sums[k] += g[k] * (r * u[k] + (t_x * ((x[k] - mean) * r) + t_one));
            sums[V + k] += g[k];
          }
        }
      }
#pragma unroll
    for (int k = 0; k < 2 * V; ++k) parts[warp][k][lane] = sums[k];
    __syncthreads();
    if (warp < 2 && j < c.cols) {
      A* const to = warp == 0 ? c.partial_weight : c.partial_bias;
      if (to)
#pragma unroll
        for (int k = 0; k < V; ++k) {
          A sum = 0;
#pragma unroll
          for (int i = 0; i < kRowWarps; ++i) sum += parts[i][warp * V + k][lane];
          to[chunk * c.cols + j + k] = sum;
        }
    }
    __syncthreads();  // the shared sums are written again
  }
}

template <class S, class W>
cudaError_t launch_long_rows(bool second, const LayerNormCall<S>& c, cudaStream_t stream) {
  const dim3 block(kRowThreads);
  cudaError_t status = cudaSuccess;
  if (second)
    status = launch(layer_norm_long_double_backward_kernel<S, W>, grid_for(c.rows), block, 0, stream, c);
  else if (c.grad_x)
    status = launch(layer_norm_long_backward_kernel<S, W>, grid_for(c.cotangents * c.rows), block, 0, stream, c);
  if (status == cudaSuccess && (c.partial_weight || c.partial_bias)) {
    const std::int64_t strips = (c.cols + 32 * W::kSize - 1) / (32 * W::kSize);
    status = launch(layer_norm_columns_kernel<S, W>, grid_for(strips * c.chunks), block, 0, stream, c, second);
  }
  return status;
}

}  // namespace rk::cuda
