// Kernels of layer_norm_backward and its derivative, RMSNorm included.  Formulas: math/layer_norm.h.
//
// A block sums over a row and then writes it; the second sweep finds the row in the L1 or L2 cache, so device memory is
// read once: x, grad and the result for the backward, and gg_x and another result for its derivative.  Sums down the
// columns are made on the way, for the chunk of rows that a block takes, in shared memory, where each thread owns its
// columns; another kernel adds the chunks in order: no atomics, the same bits on every run.  Rows too long for that have
// a kernel for the chunks' sums, which reads everything again.
#pragma once

#include <cstdint>

#include "../math/layer_norm.h"
#include "reduce.cuh"
#include "vector.cuh"

namespace rk::cuda {

constexpr int kStrip = 32;                        // columns: 64 bytes or more of a row, side by side
constexpr int kStripRows = 8;                     // threads that share a column
constexpr std::int64_t kSharedBytes = 32 * 1024;  // of sums down the columns

template <class S>
struct LayerNormCall {
  using A = accumulation_t<S>;
  std::int64_t rows, cols, chunk_rows, chunks;
  bool sums_in_block;                     // down the columns
  const S *x, *g, *u;                     // [rows, cols]; u: null if absent
  const A *weight, *gg_weight, *gg_bias;  // [cols] or null
  const A *mean, *rstd;                   // [rows]; mean: null for RMSNorm
  S *gg_grad, *grad_x;                    // [rows, cols] outputs or null
  A* t;                                   // [rows, 2] coefficients t_x, t_one, from the row kernel to the column kernel
  A *partial_weight, *partial_bias;       // [chunks, cols] or null
  A *grad_weight, *grad_bias;             // [cols] outputs or null

  __device__ __forceinline__ A w(std::int64_t j) const { return weight ? weight[j] : A(1); }
  __device__ __forceinline__ A a(std::int64_t j) const { return gg_weight ? gg_weight[j] : A(0); }
  __device__ __forceinline__ A b(std::int64_t j) const { return gg_bias ? gg_bias[j] : A(0); }
};

// `threads` threads share n adjacent elements: f(j, count, at) for element j and, where they are taken in vectors, the
// count - 1 after it; at(k, x, g, u) gives those of element j + k, u = 0 where it is absent.  A thread gets the same
// elements wherever they lie.
template <class S, class F>
__device__ __forceinline__ void for_run(const S* x, const S* g, const S* u, std::int64_t n, unsigned thread,
                                        unsigned threads, bool in_vectors, const F& f) {
  using A = accumulation_t<S>;
  constexpr int V = Vector<S>::kSize;
  const std::int64_t vectors = in_vectors ? n / V : 0;
  for (std::int64_t v = thread; v < vectors; v += threads) {
    const Vector<S> x_v = load_vector(x + v * V, is_aligned(x)), g_v = load_vector(g + v * V, is_aligned(g));
    Vector<S> u_v{};
    if (u) u_v = load_vector(u + v * V, is_aligned(u));
    f(v * V, V, [&](int k, A& x_j, A& g_j, A& u_j) {
      x_j = load(x_v.element[k]);
      g_j = load(g_v.element[k]);
      u_j = u ? A(load(u_v.element[k])) : A(0);
    });
  }
  for (std::int64_t j = vectors * V + thread; j < n; j += threads)
    f(j, 1, [&](int, A& x_j, A& g_j, A& u_j) {
      x_j = load(x[j]);
      g_j = load(g[j]);
      u_j = u ? A(load(u[j])) : A(0);
    });
}

// The threads of a block share a row.
template <class S, class F>
__device__ __forceinline__ void for_row(const LayerNormCall<S>& c, std::int64_t row, const F& f) {
  const std::int64_t at = row * c.cols;
  for_run(c.x + at, c.g + at, c.u ? c.u + at : nullptr, c.cols, threadIdx.x, blockDim.x, true, f);
}

// Writes `count` (a vector, or one) results at out + j.
template <class S, class F>
__device__ __forceinline__ void write_at(S* out, std::int64_t j, int count, const F& value) {
  constexpr int V = Vector<S>::kSize;
  if (count == V) {
    Vector<S> v;
#pragma unroll
    for (int k = 0; k < V; ++k) v.element[k] = store<S>(value(k));
    store_vector(out + j, v, is_aligned(out));
  } else {
    for (int k = 0; k < count; ++k) out[j + k] = store<S>(value(k));
  }
}

// Sums down the columns of a chunk of rows.  A thread adds to the columns whose elements for_row gives it, and to no
// others: nothing to synchronise.  The elements of a vector lie `vectors` apart, so that threads meet different banks.
template <class S>
struct ColumnSums {
  using A = accumulation_t<S>;
  static constexpr int V = Vector<S>::kSize;
  A* sums;  // [cols] in shared memory, or null
  std::int64_t cols, vectors;

  __device__ __forceinline__ ColumnSums(A* memory, bool wanted, std::int64_t columns)
      : sums(wanted ? memory : nullptr), cols(columns), vectors(columns / V) {}

  template <class F>
  __device__ __forceinline__ void for_own(const F& f) const {
    if (!sums) return;
    for (std::int64_t v = threadIdx.x; v < vectors; v += blockDim.x)
      for (int k = 0; k < V; ++k) f(sums[k * vectors + v], v * V + k);
    for (std::int64_t j = vectors * V + threadIdx.x; j < cols; j += blockDim.x) f(sums[j], j);
  }
  __device__ __forceinline__ void clear() const {
    for_own([](A& sum, std::int64_t) { sum = A(0); });
  }
  __device__ __forceinline__ void write(A* to, std::int64_t chunk) const {
    for_own([&](A& sum, std::int64_t j) { to[chunk * cols + j] = sum; });
  }
  // Element j + k of `count` that for_row gave at j.
  __device__ __forceinline__ void add(std::int64_t j, int count, int k, A value) const {
    if (sums) sums[count == V ? k * vectors + j / V : j] += value;
  }
};

// f(row) for the rows of a block's chunks, between start(chunk) and end(chunk).
template <class S, class Start, class F, class End>
__device__ __forceinline__ void for_chunks(const LayerNormCall<S>& c, const Start& start, const F& f, const End& end) {
  for (std::int64_t chunk = blockIdx.x; chunk < c.chunks; chunk += gridDim.x) {
    const std::int64_t first = chunk * c.chunk_rows,
                       last = first + c.chunk_rows < c.rows ? first + c.chunk_rows : c.rows;
    start();
    for (std::int64_t row = first; row < last; ++row) f(row);
    end(chunk);
  }
}

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
  const auto work = [&](std::int64_t row) {
    const A mean = c.mean ? c.mean[row] : A(0), r = c.rstd[row];
    A sum_g = 0, sum_gx = 0;
    for_row(c, row, [&](std::int64_t j, int count, const auto& at) {
#pragma unroll
      for (int k = 0; k < count; ++k) {
        A x, g, u;
        at(k, x, g, u);
        const A xh = (x - mean) * r, h = c.w(j + k) * g;
        sum_g += h;
        sum_gx += h * xh;
        weights.add(j, count, k, g * xh);
        biases.add(j, count, k, g);
      }
    });
    sum_g = c.mean ? block_sum(sum_g) : A(0);
    const NormSlopes<A> s = norm_slopes(sum_g, block_sum(sum_gx), r, A(c.cols));
    for_row(c, row, [&](std::int64_t j, int count, const auto& at) {
      write_at(c.grad_x + row * c.cols, j, count, [&](int k) {
        A x, g, u;
        at(k, x, g, u);
        return s.x_g * (c.w(j + k) * g) + (s.x_x * ((x - mean) * r) + s.x_one);
      });
    });
  };
  for_chunks(c, start, work, end);
}

template <class S>
__global__ void __launch_bounds__(256, 2) layer_norm_double_backward_kernel(const LayerNormCall<S> c) {
  using A = accumulation_t<S>;
  RK_DYNAMIC_SHARED(A, memory);
  const ColumnSums<S> weights(memory, c.sums_in_block && c.partial_weight, c.cols);
  const auto work = [&](std::int64_t row) {
    const A mean = c.mean ? c.mean[row] : A(0), r = c.rstd[row];
    NormSums<A> s{};
    for_row(c, row, [&](std::int64_t j, int count, const auto& at) {
#pragma unroll
      for (int k = 0; k < count; ++k) {
        A x, g, u;
        at(k, x, g, u);
        const A xh = (x - mean) * r, h = c.w(j + k) * g, ag = c.a(j + k) * g;
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
    if (c.gg_weight) s.agx = block_sum(s.agx);
    s.ag = c.mean && c.gg_weight ? block_sum(s.ag) : A(0);
    const NormBends<A> d = norm_bends(s, r, A(c.cols));
    if (c.t && threadIdx.x == 0) {
      c.t[2 * row] = d.t_x;
      c.t[2 * row + 1] = d.t_one;
    }
    if (!c.gg_grad && !c.grad_x && !weights.sums) return;
    for_row(c, row, [&](std::int64_t j, int count, const auto& at) {
      if (c.gg_grad)
        write_at(c.gg_grad + row * c.cols, j, count, [&](int k) {
          A x, g, u;
          at(k, x, g, u);
          const A xh = (x - mean) * r;
          return c.w(j + k) * (r * u + (d.t_x * xh + d.t_one)) + (c.a(j + k) * xh + c.b(j + k));
        });
      if (c.grad_x)
        write_at(c.grad_x + row * c.cols, j, count, [&](int k) {
          A x, g, u;
          at(k, x, g, u);
          return d.x_u * u + (d.x_g * c.w(j + k) + r * c.a(j + k)) * g + (d.x_x * ((x - mean) * r) + d.x_one);
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
        const std::int64_t at = row * c.cols + j;
        const A mean = c.mean ? c.mean[row] : A(0), r = c.rstd[row], g = load(c.g[at]), xh = (load(c.x[at]) - mean) * r;
        const A u = c.u ? A(load(c.u[at])) : A(0);
        weight += g * (c.t ? r * u + (c.t[2 * row] * xh + c.t[2 * row + 1]) : xh);
        bias += g;
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
  c.sums_in_block =
      rows_written && arrays > 0 && arrays * c.cols * static_cast<std::int64_t>(sizeof(A)) <= kSharedBytes;
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
  if (second)
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
