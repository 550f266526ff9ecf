// Kernels of row_norm.  Formulas: math/row_norm.h.
//
// B rows, N columns; a unit of work is a chunk of kChunk columns of one row, one block each.  Rows of one chunk need
// one launch per call, longer rows a second one, between which the chunks' sums lie in `partial`.  Bytes: x once for
// the value; x and the result once for the backward; x, u and the result once for the double backward of rows of one
// chunk (longer rows read x and u twice).
#pragma once

#include <cstdint>

#include "../math/row_norm.h"
#include "reduce.cuh"
#include "vector.cuh"

namespace rk::cuda {

constexpr std::int64_t kChunk = 16384;

template <class S>
struct RowNormCall {
  using A = accumulation_t<S>;
  Norm norm;
  A p;
  std::int64_t rows, cols, chunks;
  const S *x, *u;                   // [rows, cols]
  std::int64_t x_stride, u_stride;  // elements between rows
  const A *grad, *norms;            // [rows]
  const A* weight;                  // [channels] or null: `inner` adjacent columns share an entry
  std::int64_t inner, channels;
  A *partial, *ties;  // [rows, chunks], for rows of several chunks
  A* per_row;         // [rows] output
  S* out;             // [rows, cols] output
};

// The weights of one chunk's columns.  One division finds the first of a vector, counting finds the others.
template <class A>
struct ChunkWeights {
  const A* weight;              // [channels] or null
  std::uint32_t channels, run;  // columns that share an entry; more than a chunk holds counts as just that many
  std::uint32_t channel, left;  // of the chunk's first column, and how many columns of its run the chunk holds

  struct Iterator {
    const A* weight;
    std::uint32_t channels, run, channel, left;

    __device__ __forceinline__ A next() {
      if (!weight) return A(1);
      if (left == 0) {
        left = run;
        if (++channel == channels) channel = 0;
      }
      --left;
      return weight[channel];
    }
  };

  template <class S>
  __device__ __forceinline__ ChunkWeights(const RowNormCall<S>& c, std::int64_t begin) : weight(c.weight) {
    if (!weight) return;
    const std::int64_t whole = begin / c.inner, rest = c.inner - begin % c.inner;
    channels = static_cast<std::uint32_t>(c.channels);
    run = static_cast<std::uint32_t>(c.inner < kChunk ? c.inner : kChunk);
    channel = static_cast<std::uint32_t>(whole % c.channels);
    left = static_cast<std::uint32_t>(rest < kChunk ? rest : kChunk);
  }

  __device__ __forceinline__ Iterator at(std::int64_t column) const {
    if (!weight) return {nullptr, 0, 0, 0, 0};
    const std::uint32_t j = static_cast<std::uint32_t>(column);
    if (j < left) return {weight, channels, run, channel, left - j};
    const std::uint32_t beyond = j - left, runs = beyond / run;
    return {weight, channels, run, (channel + 1 + runs) % channels, run - (beyond - runs * run)};
  }
};

template <class S>
struct Unit {
  std::int64_t row, chunk, columns;
  const S *x, *u;
  S* out;
  ChunkWeights<accumulation_t<S>> weights;

  __device__ __forceinline__ Unit(const RowNormCall<S>& c, std::int64_t row_, std::int64_t chunk_)
      : row(row_),
        chunk(chunk_),
        columns(c.cols - chunk * kChunk < kChunk ? c.cols - chunk * kChunk : kChunk),
        x(c.x + row * c.x_stride + chunk * kChunk),
        u(c.u + row * c.u_stride + chunk * kChunk),
        out(c.out + row * c.cols + chunk * kChunk),
        weights(c, chunk * kChunk) {}
  __device__ __forceinline__ Unit(const RowNormCall<S>& c, std::int64_t unit)
      : Unit(c, unit / c.chunks, unit % c.chunks) {}
};

// One thread's share of the sum (maximum for Linf) of term(a_j / scale) over a unit.
template <Norm kNorm, class S>
__device__ __forceinline__ accumulation_t<S> thread_terms(const RowNormCall<S>& c, const Unit<S>& u,
                                                          accumulation_t<S> scale) {
  using A = accumulation_t<S>;
  A total = 0;
  read(u.x, u.columns, u.weights, [&](A w, A v) {
    const A term = RowNorm<kNorm, A>::term(w * v / scale, c.p);
    total = kNorm == Norm::kInf ? Maximum{}(total, term) : total + term;
  });
  return total;
}

template <Norm kNorm, class A>
__device__ __forceinline__ A block_total(A total) {
  return kNorm == Norm::kInf ? block_max(total, A(0)) : block_sum(total);
}

// A row's sum over its chunks, in every thread.
template <Norm kNorm, class S>
__device__ __forceinline__ accumulation_t<S> row_total(const accumulation_t<S>* partial, const RowNormCall<S>& c,
                                                       std::int64_t row) {
  using A = accumulation_t<S>;
  A total = 0;
  for (std::int64_t k = threadIdx.x; k < c.chunks; k += blockDim.x) {
    const A part = partial[row * c.chunks + k];
    total = kNorm == Norm::kInf ? Maximum{}(total, part) : total + part;
  }
  return block_total<kNorm>(total);
}

// The same over a whole row by one block, for the few rows whose terms overflowed or vanished.
template <Norm kNorm, class S>
__device__ __forceinline__ accumulation_t<S> scaled_total(const RowNormCall<S>& c, std::int64_t row,
                                                          accumulation_t<S> scale) {
  accumulation_t<S> total = 0;
  for (std::int64_t chunk = 0; chunk < c.chunks; ++chunk) {
    const accumulation_t<S> part = thread_terms<kNorm>(c, Unit<S>(c, row, chunk), scale);
    total = kNorm == Norm::kInf ? Maximum{}(total, part) : total + part;
  }
  return block_total<kNorm>(total);
}

// From the sum of terms to the norm.
template <Norm kNorm, class S>
__device__ __forceinline__ void finish_row(const RowNormCall<S>& c, std::int64_t row, accumulation_t<S> total) {
  using A = accumulation_t<S>;
  A n = RowNorm<kNorm, A>::finish(total, c.p);
  if constexpr (kNeedsRangeCheck<kNorm>) {
    if (!in_safe_range(total, A(c.cols))) {
      const A m = scaled_total<Norm::kInf>(c, row, A(1));
      const A scaled = m > A(0) && m <= Limits<A>::largest ? scaled_total<kNorm>(c, row, m) : A(0);
      n = finish_scaled<kNorm>(scaled, m, c.p);
    }
  }
  if (threadIdx.x == 0) c.per_row[row] = n;
}

template <Norm kNorm, class S>
__global__ void __launch_bounds__(256, 2) row_norm_kernel(const RowNormCall<S> c) {
  using A = accumulation_t<S>;
  for (std::int64_t unit = blockIdx.x; unit < c.rows * c.chunks; unit += gridDim.x) {
    const Unit<S> u(c, unit);
    const A total = block_total<kNorm>(thread_terms<kNorm>(c, u, A(1)));
    if (c.chunks == 1)
      finish_row<kNorm>(c, u.row, total);
    else if (threadIdx.x == 0)
      c.partial[unit] = total;
  }
}

template <Norm kNorm, class S>
__global__ void __launch_bounds__(256, 2) row_norm_finish_kernel(const RowNormCall<S> c) {
  for (std::int64_t row = blockIdx.x; row < c.rows; row += gridDim.x)
    finish_row<kNorm>(c, row, row_total<kNorm>(c.partial, c, row));
}

// How many of some columns share the row's maximum, in every thread.
template <class S>
__device__ __forceinline__ accumulation_t<S> block_ties(const RowNormCall<S>& c, const Unit<S>& u) {
  using A = accumulation_t<S>;
  const A n = c.norms[u.row];
  A count = 0;
  read(u.x, u.columns, u.weights, [&](A w, A v) { count += absolute(w * v) == n ? A(1) : A(0); });
  return block_sum(count);
}

template <class S>
__global__ void __launch_bounds__(256, 2) row_norm_ties_kernel(const RowNormCall<S> c) {
  for (std::int64_t unit = blockIdx.x; unit < c.rows * c.chunks; unit += gridDim.x) {
    const accumulation_t<S> count = block_ties(c, Unit<S>(c, unit));
    if (threadIdx.x == 0) c.ties[unit] = count;
  }
}

template <Norm kNorm, class S>
__device__ __forceinline__ accumulation_t<S> ties_of_row(const RowNormCall<S>& c, const Unit<S>& u) {
  if constexpr (kNorm != Norm::kInf) return accumulation_t<S>(1);
  return c.chunks == 1 ? block_ties(c, u) : row_total<Norm::kL1>(c.ties, c, u.row);
}

template <Norm kNorm, class S>
__global__ void __launch_bounds__(256, 2) row_norm_backward_kernel(const RowNormCall<S> c) {
  using A = accumulation_t<S>;
  for (std::int64_t unit = blockIdx.x; unit < c.rows * c.chunks; unit += gridDim.x) {
    const Unit<S> u(c, unit);
    const A n = c.norms[u.row], grad = c.grad[u.row], p = c.p, ties = ties_of_row<kNorm>(c, u);
    transform(u.x, u.out, u.columns, u.weights,
              [&](A w, A v) { return grad * w * RowNorm<kNorm, A>::slope(w * v, n, p, ties); });
  }
}

// s = sum_k v_k slope(a_k) over the unit's columns, in every thread
template <Norm kNorm, class S>
__device__ __forceinline__ accumulation_t<S> block_directional(const RowNormCall<S>& c, const Unit<S>& u) {
  using A = accumulation_t<S>;
  const A n = c.norms[u.row], p = c.p, ties = ties_of_row<kNorm>(c, u);
  A total = 0;
  read(u.x, u.u, u.columns, u.weights,
       [&](A w, A v, A u_j) { total += w * u_j * RowNorm<kNorm, A>::slope(w * v, n, p, ties); });
  return block_sum(total);
}

template <Norm kNorm, class S>
__global__ void __launch_bounds__(256, 2) row_norm_directional_kernel(const RowNormCall<S> c) {
  for (std::int64_t unit = blockIdx.x; unit < c.rows * c.chunks; unit += gridDim.x) {
    const accumulation_t<S> s = block_directional<kNorm>(c, Unit<S>(c, unit));
    if (threadIdx.x == 0) c.partial[unit] = s;
  }
}

template <Norm kNorm, class S>
__global__ void __launch_bounds__(256, 2) row_norm_double_backward_kernel(const RowNormCall<S> c) {
  using A = accumulation_t<S>;
  for (std::int64_t unit = blockIdx.x; unit < c.rows * c.chunks; unit += gridDim.x) {
    const Unit<S> u(c, unit);
    const A s = c.chunks == 1 ? block_directional<kNorm>(c, u) : row_total<Norm::kL1>(c.partial, c, u.row);
    if (u.chunk == 0 && threadIdx.x == 0) c.per_row[u.row] = s;
    if constexpr (kNorm != Norm::kL1 && kNorm != Norm::kInf) {
      const A n = c.norms[u.row], grad = c.grad[u.row], p = c.p;
      transform(u.x, u.u, u.out, u.columns, u.weights,
                [&](A w, A v, A u_j) { return grad * w * RowNorm<kNorm, A>::bend(w * v, w * u_j, s, n, p); });
    }
  }
}

// Launches one call; c.partial (and c.ties for Linf) must hold rows * chunks numbers when chunks > 1.
template <Norm kNorm, class S>
cudaError_t launch_row_norm(Order order, const RowNormCall<S>& c, cudaStream_t stream) {
  const dim3 block(threads_for<S>(c.cols < kChunk ? c.cols : kChunk)), units = grid_for(c.rows * c.chunks);
  const bool several = c.chunks > 1;
  cudaError_t status = cudaSuccess;
  if (order == Order::kValue) {
    status = launch(row_norm_kernel<kNorm, S>, units, block, 0, stream, c);
    if (several && status == cudaSuccess)
      status = launch(row_norm_finish_kernel<kNorm, S>, grid_for(c.rows), block, 0, stream, c);
    return status;
  }
  if (several && kNorm == Norm::kInf) status = launch(row_norm_ties_kernel<S>, units, block, 0, stream, c);
  if (status != cudaSuccess) return status;
  if (order == Order::kBackward) return launch(row_norm_backward_kernel<kNorm, S>, units, block, 0, stream, c);
  if (several) status = launch(row_norm_directional_kernel<kNorm, S>, units, block, 0, stream, c);
  if (status != cudaSuccess) return status;
  return launch(row_norm_double_backward_kernel<kNorm, S>, units, block, 0, stream, c);
}

template <class S>
cudaError_t launch_row_norm(Order order, const RowNormCall<S>& c, cudaStream_t stream) {
  switch (c.norm) {
    case Norm::kL1: return launch_row_norm<Norm::kL1>(order, c, stream);
    case Norm::kL2: return launch_row_norm<Norm::kL2>(order, c, stream);
    case Norm::kSquaredL2: return launch_row_norm<Norm::kSquaredL2>(order, c, stream);
    case Norm::kInf: return launch_row_norm<Norm::kInf>(order, c, stream);
    default: return launch_row_norm<Norm::kP>(order, c, stream);
  }
}

}  // namespace rk::cuda
