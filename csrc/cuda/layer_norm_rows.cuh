// What the kernels of layer_norm_backward and its derivative share: their arguments, and how the threads of a block go
// over a row and sum down the columns.
#pragma once

#include <cstdint>

#include "../math/layer_norm.h"
#include "reduce.cuh"
#include "vector.cuh"

namespace rk::cuda {

template <class S>
struct LayerNormCall {
  using A = accumulation_t<S>;
  std::int64_t rows, cols, cotangents = 1, chunk_rows, chunks;
  bool sums_in_block;                // down the columns
  const S* x;                        // [rows, cols]
  const S *g, *u;                    // [cotangents, rows, cols]; u: null if absent
  const A *weight, *a, *b;           // [cols] or null
  const A *mean, *rstd;              // [rows]; mean: null for RMSNorm
  S *gg_grad, *grad_x;               // outputs or null: like g, and like x or (of the first backward) g
  A* t;                              // [cotangents, rows, 2]: t_x, t_one, from the row kernel to the column kernel
  NormBends<A>* bends;               // [cotangents, rows] if there are several
  A *partial_weight, *partial_bias;  // [chunks, cols] or null
  A *grad_weight, *grad_bias;        // [cols] outputs or null

  __device__ __forceinline__ A weight_at(std::int64_t j) const { return weight ? weight[j] : A(1); }
  __device__ __forceinline__ A a_at(std::int64_t j) const { return a ? a[j] : A(0); }
  __device__ __forceinline__ A b_at(std::int64_t j) const { return b ? b[j] : A(0); }
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

// The threads of a block share a row; of the cotangents, the i-th.
template <class S, class F>
__device__ __forceinline__ void for_row(const LayerNormCall<S>& c, std::int64_t i, std::int64_t row, const F& f) {
  const std::int64_t at = (i * c.rows + row) * c.cols;
  for_run(c.x + row * c.cols, c.g + at, c.u ? c.u + at : nullptr, c.cols, threadIdx.x, blockDim.x, true, f);
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

}  // namespace rk::cuda
