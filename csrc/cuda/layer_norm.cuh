// Kernels of layer_norm_backward and its derivative, RMSNorm included.  Formulas: math/layer_norm.h.
//
// A block sums over a row and then writes it; the second sweep finds the row in the L1 or L2 cache, so device memory is
// read once: x, grad and the result for the backward, and u and another result for its derivative.  Sums down the
// columns are made on the way, for the chunk of rows that a block takes, in shared memory, where each thread owns its
// columns; another kernel adds the chunks in order: no atomics, the same bits on every run.  Rows too long for that have
// a kernel for the chunks' sums, which reads everything again.
//
// Several cotangents of one x: a block takes its row with all of them, one after the other for the sums, whose
// coefficients it leaves in device memory, and together for the results, so that grad_x is summed in registers.
#pragma once

#include <cstdint>
#include <type_traits>

#include "layer_norm_rows.cuh"

namespace rk::cuda {

constexpr int kStrip = 32;                        // columns: 64 bytes or more of a row, side by side
constexpr int kStripRows = 8;                     // threads that share a column
constexpr std::int64_t kSharedBytes = 32 * 1024;  // of sums down the columns

template <class S>
__global__ void __launch_bounds__(256, 2) layer_norm_backward_kernel(const LayerNormCall<S> c) {
  using A = accumulation_t<S>;
  RK_DYNAMIC_SHARED(A, memory);
  const ColumnSums<S> weights(memory, c.sums_in_block && c.partial_weight, c.cols);
  const ColumnSums<S> biases(weights.sums ? memory + c.cols : memory, c.sums_in_block && c.partial_bias, c.cols);
  const auto start = [&] {
    weights.clear();
    biases.clear();
  };
  const auto end = [&](std::int64_t chunk) {
    weights.write(c.partial_weight, chunk);
    biases.write(c.partial_bias, chunk);
  };
  const auto work_on = [&](std::int64_t i, std::int64_t row) {
    const A mean = c.mean ? c.mean[row] : A(0), r = c.rstd[row];
    A sum_g = 0, sum_gx = 0;
    for_row(c, i, row, [&](std::int64_t j, int count, const auto& at) {
#pragma unroll
      for (int k = 0; k < count; ++k) {
        A x, g, u;
        at(k, x, g, u);
        const A xh = (x - mean) * r, h = c.weight_at(j + k) * g;
        sum_g += h;
        sum_gx += h * xh;
        weights.add(j, count, k, g * xh);
        biases.add(j, count, k, g);
      }
    });
    sum_g = c.mean ? block_sum(sum_g) : A(0);
    const NormSlopes<A> s = norm_slopes(sum_g, block_sum(sum_gx), r, A(c.cols));
    for_row(c, i, row, [&](std::int64_t j, int count, const auto& at) {
      write_at(c.grad_x + (i * c.rows + row) * c.cols, j, count, [&](int k) {
        A x, g, u;
        at(k, x, g, u);
        return s.x_g * (c.weight_at(j + k) * g) + (s.x_x * ((x - mean) * r) + s.x_one);
      });
    });
  };
  const auto work = [&](std::int64_t row) {
    for (std::int64_t i = 0; i < c.cotangents; ++i) work_on(i, row);
  };
  for_chunks(c, start, work, end);
}

// The coefficients of a row, known to every thread of its block.
template <class S>
__device__ __forceinline__ NormBends<accumulation_t<S>> sum_bends(const LayerNormCall<S>& c, std::int64_t i,
                                                                  std::int64_t row) {
  using A = accumulation_t<S>;
  const A mean = c.mean ? c.mean[row] : A(0), r = c.rstd[row];
  NormSums<A> s{};
  for_row(c, i, row, [&](std::int64_t j, int count, const auto& at) {
#pragma unroll
    for (int k = 0; k < count; ++k) {
      A x, g, u;
      at(k, x, g, u);
      const A xh = (x - mean) * r, h = c.weight_at(j + k) * g, ag = c.a_at(j + k) * g;
      s.u += u;
      s.ux += u * xh;
      s.g += h;
      s.gx += h * xh;
      s.ug += u * h;
      s.ag += ag;
      s.agx += ag * xh;
    }
  });
  s.ux = block_sum(s.ux);
  s.gx = block_sum(s.gx);
  s.ug = block_sum(s.ug);
  s.u = c.mean ? block_sum(s.u) : A(0);
  s.g = c.mean ? block_sum(s.g) : A(0);
  if (c.a) s.agx = block_sum(s.agx);
  s.ag = c.mean && c.a ? block_sum(s.ag) : A(0);
  const NormBends<A> d = norm_bends(s, r, A(c.cols));
  if (c.t && threadIdx.x == 0) {
    c.t[2 * (i * c.rows + row)] = d.t_x;
    c.t[2 * (i * c.rows + row) + 1] = d.t_one;
  }
  return d;
}

template <class S>
__global__ void __launch_bounds__(256, 2) layer_norm_double_backward_kernel(const LayerNormCall<S> c) {
  using A = accumulation_t<S>;
  RK_DYNAMIC_SHARED(A, memory);
  const ColumnSums<S> weights(memory, c.sums_in_block && c.partial_weight, c.cols);
  const auto work = [&](std::int64_t row) {
    const A mean = c.mean ? c.mean[row] : A(0), r = c.rstd[row];
    const NormBends<A> d = sum_bends(c, 0, row);
    if (!c.gg_grad && !c.grad_x && !weights.sums) return;
    for_row(c, 0, row, [&](std::int64_t j, int count, const auto& at) {
      if (c.gg_grad)
        write_at(c.gg_grad + row * c.cols, j, count, [&](int k) {
          A x, g, u;
          at(k, x, g, u);
          const A xh = (x - mean) * r;
          return c.weight_at(j + k) * (r * u + (d.t_x * xh + d.t_one)) + (c.a_at(j + k) * xh + c.b_at(j + k));
        });
      if (c.grad_x)
        write_at(c.grad_x + row * c.cols, j, count, [&](int k) {
          A x, g, u;
          at(k, x, g, u);
          return d.x_u * u + (d.x_g * c.weight_at(j + k) + r * c.a_at(j + k)) * g +
                 (d.x_x * ((x - mean) * r) + d.x_one);
        });
      if (weights.sums)
#pragma unroll
        for (int k = 0; k < count; ++k) {
          A x, g, u;
          at(k, x, g, u);
          weights.add(j, count, k, g * (r * u + (d.t_x * ((x - mean) * r) + d.t_one)));
        }
    });
  };
  for_chunks(c, [&] { weights.clear(); }, work, [&](std::int64_t chunk) { weights.write(c.partial_weight, chunk); });
}

// The same of several cotangents; the sums down the columns are left to layer_norm_columns_kernel.
template <class S>
__global__ void __launch_bounds__(256, 2) layer_norm_several_kernel(const LayerNormCall<S> c) {
  using A = accumulation_t<S>;
  constexpr int V = Vector<S>::kSize;
  const std::int64_t vectors = c.cols / V;
  for (std::int64_t row = blockIdx.x; row < c.rows; row += gridDim.x) {
    const A mean = c.mean ? c.mean[row] : A(0), r = c.rstd[row];
    for (std::int64_t i = 0; i < c.cotangents; ++i) {
      const NormBends<A> d = sum_bends(c, i, row);
      if (threadIdx.x == 0) c.bends[i * c.rows + row] = d;
    }
    __syncthreads();
    if (!c.gg_grad && !c.grad_x) continue;
    // `count` elements from j on, a vector or one
    const auto write = [&](std::int64_t j, auto count) {
      constexpr int kCount = decltype(count)::value;
      const S* const x = c.x + row * c.cols + j;
      A xh[kCount], sum[kCount];
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        xh[k] = (load(x[k]) - mean) * r;
        sum[k] = A(0);
      }
      for (std::int64_t i = 0; i < c.cotangents; ++i) {
        const NormBends<A> d = c.bends[i * c.rows + row];
        const std::int64_t from = (i * c.rows + row) * c.cols;
        for_run<S>(c.x + row * c.cols + j, c.g + from + j, c.u ? c.u + from + j : nullptr, kCount, 0, 1, kCount == V,
                   [&](std::int64_t, int, const auto& at) {
                     A gg_grad[kCount];
#pragma unroll
                     for (int k = 0; k < kCount; ++k) {
                       A x_k, g, u;
                       at(k, x_k, g, u);
                       gg_grad[k] = c.weight_at(j + k) * (r * u + (d.t_x * xh[k] + d.t_one));
                       sum[k] += d.x_u * u + d.x_g * c.weight_at(j + k) * g + (d.x_x * xh[k] + d.x_one);
                     }
                     if (c.gg_grad) write_at(c.gg_grad + from, j, kCount, [&](int k) { return gg_grad[k]; });
                   });
      }
      if (c.grad_x) write_at(c.grad_x + row * c.cols, j, kCount, [&](int k) { return sum[k]; });
    };
    for (std::int64_t v = threadIdx.x; v < vectors; v += blockDim.x) write(v * V, std::integral_constant<int, V>{});
    for (std::int64_t j = vectors * V + threadIdx.x; j < c.cols; j += blockDim.x)
      write(j, std::integral_constant<int, 1>{});
  }
}

// partial_weight[chunk] = sum over the chunk's rows of g t, or of g xh where there is no t; partial_bias of g.
template <class S>
__global__ void __launch_bounds__(kStrip* kStripRows) layer_norm_columns_kernel(const LayerNormCall<S> c) {
  using A = accumulation_t<S>;
  __shared__ A weights[kStripRows][kStrip], biases[kStripRows][kStrip];
  const int lane = threadIdx.x % kStrip, slice = threadIdx.x / kStrip;
  const std::int64_t strips = (c.cols + kStrip - 1) / kStrip;
  for (std::int64_t unit = blockIdx.x; unit < strips * c.chunks; unit += gridDim.x) {
    const std::int64_t chunk = unit / strips, j = unit % strips * kStrip + lane;
    const std::int64_t begin = chunk * c.chunk_rows,
                       end = begin + c.chunk_rows < c.rows ? begin + c.chunk_rows : c.rows;
    A weight = 0, bias = 0;
    if (j < c.cols) {
      for (std::int64_t row = begin + slice; row < end; row += kStripRows) {
        const A mean = c.mean ? c.mean[row] : A(0), r = c.rstd[row], xh = (load(c.x[row * c.cols + j]) - mean) * r;
        for (std::int64_t i = 0; i < c.cotangents; ++i) {
          const std::int64_t row_of_i = i * c.rows + row, at = row_of_i * c.cols + j;
          const A g = load(c.g[at]), u = c.u ? A(load(c.u[at])) : A(0);
          weight += g * (c.t ? r * u + (c.t[2 * row_of_i] * xh + c.t[2 * row_of_i + 1]) : xh);
          bias += g;
        }
      }
    }
    weights[slice][lane] = weight;
    biases[slice][lane] = bias;
    __syncthreads();
    if (slice == 0 && j < c.cols) {
      for (int k = 1; k < kStripRows; ++k) {
        weight += weights[k][lane];
        bias += biases[k][lane];
      }
      if (c.partial_weight) c.partial_weight[chunk * c.cols + j] = weight;
      if (c.partial_bias) c.partial_bias[chunk * c.cols + j] = bias;
    }
    __syncthreads();  // the shared sums are written again
  }
}

// out[j] = sum over `rows` rows of from[., j]: a block for a strip of columns.
template <class A>
__global__ void __launch_bounds__(kStrip* kStripRows)
    column_totals_kernel(const A* from, A* out, std::int64_t rows, std::int64_t cols) {
  __shared__ A sums[kStripRows][kStrip];
  const int lane = threadIdx.x % kStrip, slice = threadIdx.x / kStrip;
  for (std::int64_t strip = blockIdx.x; strip < (cols + kStrip - 1) / kStrip; strip += gridDim.x) {
    const std::int64_t j = strip * kStrip + lane;
    A sum = 0;
    if (j < cols)
      for (std::int64_t row = slice; row < rows; row += kStripRows) sum += from[row * cols + j];
    sums[slice][lane] = sum;
    __syncthreads();
    if (slice == 0 && j < cols) {
      for (int k = 1; k < kStripRows; ++k) sum += sums[k][lane];
      out[j] = sum;
    }
    __syncthreads();
  }
}

template <class A>
cudaError_t launch_column_totals(const A* from, A* out, std::int64_t rows, std::int64_t cols, cudaStream_t stream) {
  return launch(column_totals_kernel<A>, grid_for((cols + kStrip - 1) / kStrip), dim3(kStrip * kStripRows), 0, stream,
                from, out, rows, cols);
}

// How rows are shared out, from the shape alone and from what is wanted.
template <class S>
void set_chunks(LayerNormCall<S>& c, bool rows_written, bool sums_weight, bool sums_bias) {
  using A = accumulation_t<S>;
  const std::int64_t arrays = (sums_weight ? 1 : 0) + (sums_bias ? 1 : 0);
  c.sums_in_block = rows_written && c.cotangents == 1 && arrays > 0 &&
                    arrays * c.cols * static_cast<std::int64_t>(sizeof(A)) <= kSharedBytes;
  c.chunk_rows = c.rows / 1024;  // chunks enough for a large device, and rows enough to make a chunk's sums cheap
  c.chunk_rows = c.chunk_rows < 4 ? 4 : c.chunk_rows > 64 ? 64 : c.chunk_rows;
  if (arrays == 0) c.chunk_rows = 1;
  c.chunks = (c.rows + c.chunk_rows - 1) / c.chunk_rows;
}

// After set_chunks; c.partial_* must hold chunks * cols numbers where c.grad_* is wanted, c.t two numbers a row where
// c.grad_weight is wanted from the second derivative.
template <class S>
cudaError_t launch_layer_norm(bool second, const LayerNormCall<S>& c, cudaStream_t stream) {
  using A = accumulation_t<S>;
  LayerNormCall<S> rows = c;
  if (!c.sums_in_block) {
    rows.chunk_rows = 1;
    rows.chunks = c.rows;
  }
  const std::size_t arrays = (c.grad_weight ? 1 : 0) + (c.grad_bias ? 1 : 0);
  const std::size_t shared = c.sums_in_block ? arrays * c.cols * sizeof(A) : 0;
  const dim3 block(threads_for<S>(c.cols)), grid = grid_for(rows.chunks), strip(kStrip * kStripRows);
  cudaError_t status = cudaSuccess;
  if (second && c.cotangents != 1)
    status = launch(layer_norm_several_kernel<S>, grid, block, 0, stream, rows);
  else if (second)
    status = launch(layer_norm_double_backward_kernel<S>, grid, block, shared, stream, rows);
  else if (c.grad_x)
    status = launch(layer_norm_backward_kernel<S>, grid, block, shared, stream, rows);
  if (status == cudaSuccess && arrays > 0 && !c.sums_in_block) {
    const std::int64_t strips = (c.cols + kStrip - 1) / kStrip;
    status = launch(layer_norm_columns_kernel<S>, grid_for(strips * c.chunks), strip, 0, stream, c);
  }
  if (status == cudaSuccess && c.grad_weight)
    status = launch_column_totals<A>(c.partial_weight, c.grad_weight, c.chunks, c.cols, stream);
  if (status == cudaSuccess && c.grad_bias)
    status = launch_column_totals<A>(c.partial_bias, c.grad_bias, c.chunks, c.cols, stream);
  return status;
}

}  // namespace rk::cuda
