// Kernels of row_norm.  Formulas: math/row_norm.h.
//
// B rows, N columns; a unit of work is a chunk of one row, which one block holds in registers.  Bytes: x once for the
// value; x and the result once for the backward; x, u and the result once for the double backward.  Rows of several
// chunks leave the chunks' sums in `partial`, and a second launch adds them; where the double backward needs the row's
// sum before it can write (L2 and Lp), a queue (row_queue.cuh) takes it through both passes while the L2 cache holds it.
#pragma once

#include <cstdint>

#include "../math/row_norm.h"
#include "column_table.cuh"
#include "held.cuh"
#include "reduce.cuh"
#include "row_queue.cuh"
#include "words.cuh"

namespace rk::cuda {

// What a thread holds of each tensor, in vectors; fewer where a power is many instructions an element.
template <Norm kNorm>
inline constexpr int kRowVectors = kNorm == Norm::kP ? 2 : 4;
constexpr unsigned kRowThreads = 256;
template <class S>
std::int64_t row_chunk(Norm norm) {
  return std::int64_t{kRowThreads} * Words<S>::kSize * (norm == Norm::kP ? 2 : 4);
}

template <class S>
struct RowNormCall {
  using A = accumulation_t<S>;
  Norm norm;
  A p;
  std::int64_t rows, cols, chunks;
  const S *x, *u;                   // [rows, cols]
  std::int64_t x_stride, u_stride;  // elements between rows
  const A *grad, *norms;            // [rows]
  ColumnTable<A> weights;           // number null: none
  A *partial, *ties;                // [rows, chunks], for rows of several chunks
  std::uint32_t* queue;             // [RowQueue::words(rows)], likewise
  A* per_row;                       // [rows] output
  S* out;                           // [rows, cols] output
  bool aligned;                     // all rows of x, u and out
};

template <Norm kNorm_, class S, int kVectors_ = kRowVectors<kNorm_>, unsigned kThreads = 0>
struct Unit {
  static constexpr Norm kNorm = kNorm_;
  static constexpr int kVectors = kVectors_;
  using Row = Held<S, kVectors, kThreads>;  // a thread's share
  static constexpr std::int64_t kChunk = std::int64_t{kRowThreads} * Words<S>::kSize * kVectors;
  std::int64_t row, chunk, begin;  // of its columns
  std::uint32_t columns;
  const S *x, *u;
  S* out;

  __device__ __forceinline__ Unit(const RowNormCall<S>& c, std::int64_t row_, std::int64_t chunk_)
      : row(row_),
        chunk(chunk_),
        begin(chunk * kChunk),
        columns(static_cast<std::uint32_t>(c.cols - begin < kChunk ? c.cols - begin : kChunk)),
        x(c.x + row * c.x_stride + begin),
        u(c.u + row * c.u_stride + begin),
        out(c.out + row * c.cols + begin) {}
};

// f(unit) for this block's units: a grid is rows, or chunks x rows (unit_grid).
template <Norm kNorm, class S, class F>
__device__ __forceinline__ void for_units(const RowNormCall<S>& c, const F& f) {
  const bool several = c.chunks > 1;
  const std::int64_t first = several ? blockIdx.y : blockIdx.x, step = several ? gridDim.y : gridDim.x;
#pragma unroll 1
  for (std::int64_t row = first; row < c.rows; row += step) f(Unit<kNorm, S>(c, row, several ? blockIdx.x : 0));
}

template <class S>
dim3 unit_grid(const RowNormCall<S>& c) {
  if (c.chunks == 1) return grid_for(c.rows);
  return dim3(static_cast<unsigned>(c.chunks), static_cast<unsigned>(c.rows < 65535 ? c.rows : 65535));
}

// f(i, k, w) for every element of a thread's vectors, w its column's weight.  Columns beyond the row, whose elements are
// zeros, have the weight 1.  kOnce: one piece of code, with weights or without.
template <bool kOnce, class S, class AnyUnit, class F>
__device__ __forceinline__ void for_weights(const RowNormCall<S>& c, const AnyUnit& u, const F& f) {
  using A = accumulation_t<S>;
  constexpr int V = Words<S>::kSize;
  if (!kOnce && !c.weights.number) {
#pragma unroll
    for (int i = 0; i < AnyUnit::kVectors; ++i)
#pragma unroll
      for (int k = 0; k < V; ++k) f(i, k, A(1));
    return;
  }
  typename ColumnTable<A>::Cursor start{};
  if (c.weights.wide) start = c.weights.far(u.begin);
#pragma unroll
  for (int i = 0; i < AnyUnit::kVectors; ++i) {
    const std::uint32_t j = AnyUnit::Row::first(i);
    A w[V];
#pragma unroll
    for (int k = 0; k < V; ++k) w[k] = A(1);
    if (c.weights.number && j < u.columns)
      (c.weights.wide ? start.after(j) : c.weights.at(static_cast<std::uint32_t>(u.begin) + j)).fill(w);
#pragma unroll
    for (int k = 0; k < V; ++k) f(i, k, k < AnyUnit::Row::left(i, u.columns) ? w[k] : A(1));
  }
}

// f(p, i, k, w) likewise, with p as a whole number where it is a small one.
template <class S, class AnyUnit, class F>
__device__ __forceinline__ void for_columns(const RowNormCall<S>& c, const AnyUnit& u, const F& f) {
  using A = accumulation_t<S>;
  if constexpr (AnyUnit::kNorm == Norm::kP) {
    if (c.p <= A(7) && c.p == std::floor(c.p)) {
      const WholeExponent p{static_cast<int>(c.p)};
      for_weights<false>(c, u, [&](int i, int k, A w) { f(p, i, k, w); });
    } else {
      for_weights<true>(c, u, [&](int i, int k, A w) { f(c.p, i, k, w); });
    }
  } else {
    for_weights<false>(c, u, [&](int i, int k, A w) { f(c.p, i, k, w); });
  }
}

template <Norm kNorm, class A>
__device__ __forceinline__ A joined(A total, A term) {
  return kNorm == Norm::kInf ? Maximum{}(total, term) : total + term;
}
template <Norm kNorm, class A>
__device__ __forceinline__ A block_total(A total) {
  return kNorm == Norm::kInf ? block_max(total, A(0)) : block_sum(total);
}

// One thread's share of the sum (maximum for Linf) of term(a_j) over a unit.
template <Norm kNorm, class S>
__device__ __forceinline__ accumulation_t<S> thread_terms(const RowNormCall<S>& c, const Unit<kNorm, S>& u) {
  using A = accumulation_t<S>;
  typename Unit<kNorm, S>::Row x;
  x.load(u.x, u.columns, c.aligned);
  A total = 0;
  for_columns(c, u, [&](auto p, int i, int k, A w) {
    total = joined<kNorm>(total, RowNorm<kNorm, A>::term(w * x.words[i][k], p));
  });
  return total;
}

// A row's sum over its chunks, in every thread.
template <Norm kNorm, class S>
__device__ __forceinline__ accumulation_t<S> row_total(const accumulation_t<S>* partial, const RowNormCall<S>& c,
                                                       std::int64_t row) {
  using A = accumulation_t<S>;
  A total = 0;
  for (std::int64_t k = threadIdx.x; k < c.chunks; k += blockDim.x)
    total = joined<kNorm>(total, __ldcg(partial + row * c.chunks + k));
  return block_total<kNorm>(total);
}

// The sum of term(a_j / scale) over a whole row by one block, for the few rows whose terms overflowed or vanished.
template <Norm kNorm, class S>
__device__ __forceinline__ accumulation_t<S> scaled_total(const RowNormCall<S>& c, std::int64_t row,
                                                          accumulation_t<S> scale) {
  using A = accumulation_t<S>;
  A total = 0;
#pragma unroll 1
  for (std::int64_t j = threadIdx.x; j < c.cols; j += blockDim.x) {
    const A w = c.weights.number ? c.weights.far(j).next() : A(1);
    total = joined<kNorm>(total, RowNorm<kNorm, A>::term(w * load(c.x[row * c.x_stride + j]) / scale, c.p));
  }
  return block_total<kNorm>(total);
}

// From the sum of terms to the norm.
template <Norm kNorm, class S>
__device__ __forceinline__ void finish_row(const RowNormCall<S>& c, std::int64_t row, accumulation_t<S> total) {
  using A = accumulation_t<S>;
  if constexpr (kNeedsRangeCheck<kNorm>) {
    if (!in_safe_range(total, A(c.cols))) {
      const A m = scaled_total<Norm::kInf>(c, row, A(1));
      const A scaled = m > A(0) && m <= Limits<A>::largest ? scaled_total<kNorm>(c, row, m) : A(0);
      if (threadIdx.x == 0) c.per_row[row] = finish_scaled<kNorm>(scaled, m, c.p);
      return;
    }
  }
  if (threadIdx.x == 0) c.per_row[row] = RowNorm<kNorm, A>::finish(total, c.p);
}

template <Norm kNorm, class S>
__global__ void __launch_bounds__(kRowThreads, 2) row_norm_kernel(const RowNormCall<S> c) {
  using A = accumulation_t<S>;
  for_units<kNorm>(c, [&](const Unit<kNorm, S>& u) {
    const A total = block_total<kNorm>(thread_terms(c, u));
    if (c.chunks == 1)
      finish_row<kNorm>(c, u.row, total);
    else if (threadIdx.x == 0)
      c.partial[u.row * c.chunks + u.chunk] = total;
  });
}

template <Norm kNorm, class S>
__global__ void __launch_bounds__(kRowThreads, 2) row_norm_finish_kernel(const RowNormCall<S> c) {
  for (std::int64_t row = blockIdx.x; row < c.rows; row += gridDim.x)
    finish_row<kNorm>(c, row, row_total<kNorm>(c.partial, c, row));
}

// How many of some columns share the row's maximum, in every thread.
template <class S>
__device__ __forceinline__ accumulation_t<S> block_ties(const RowNormCall<S>& c, const Unit<Norm::kInf, S>& u,
                                                        const typename Unit<Norm::kInf, S>::Row& x) {
  using A = accumulation_t<S>;
  const A n = c.norms[u.row];
  A count = 0;
  for_weights<false>(c, u, [&](int i, int k, A w) { count += absolute(w * x.words[i][k]) == n ? A(1) : A(0); });
  return block_sum(count);
}

template <class S>
__global__ void __launch_bounds__(kRowThreads, 2) row_norm_ties_kernel(const RowNormCall<S> c) {
  for_units<Norm::kInf>(c, [&](const Unit<Norm::kInf, S>& u) {
    typename Unit<Norm::kInf, S>::Row x;
    x.load(u.x, u.columns, c.aligned);
    const accumulation_t<S> count = block_ties(c, u, x);
    if (threadIdx.x == 0) c.ties[u.row * c.chunks + u.chunk] = count;
  });
}

template <Norm kNorm, class S>
__device__ __forceinline__ accumulation_t<S> ties_of_row(const RowNormCall<S>& c, const Unit<kNorm, S>& u,
                                                         const typename Unit<kNorm, S>::Row& x) {
  if constexpr (kNorm == Norm::kInf)
    return c.chunks == 1 ? block_ties(c, u, x) : row_total<Norm::kL1>(c.ties, c, u.row);
  else
    return accumulation_t<S>(1);
}

// The numbers of a row that its elements are divided by.
template <class A>
struct RowDivisors {
  SharedDivisor<A> n, ties;
  template <class S>
  __device__ __forceinline__ RowDivisors(const RowNormCall<S>& c, std::int64_t row, A t) : n(c.norms[row]), ties(t) {}
};

template <Norm kNorm, class S>
__global__ void __launch_bounds__(kRowThreads, 2) row_norm_backward_kernel(const RowNormCall<S> c) {
  using A = accumulation_t<S>;
  for_units<kNorm>(c, [&](const Unit<kNorm, S>& u) {
    typename Unit<kNorm, S>::Row x;
    x.load(u.x, u.columns, c.aligned);
    const RowDivisors<A> row(c, u.row, ties_of_row<kNorm>(c, u, x));
    const A grad = c.grad[u.row];
    A result[Words<S>::kSize];
    for_columns(c, u, [&](auto p, int i, int k, A w) {
      result[k] = grad * w * RowNorm<kNorm, A>::slope(w * x.words[i][k], row.n, p, row.ties);
      if (k == Words<S>::kSize - 1) x.words[i] = Words<S>::of(result);
    });
    x.store(u.out, u.columns, c.aligned);
  });
}

// s = sum_k v_k slope(a_k) over the unit's columns, in every thread
template <class S, class AnyUnit>
__device__ __forceinline__ accumulation_t<S> block_directional(const RowNormCall<S>& c, const AnyUnit& u,
                                                               const typename AnyUnit::Row& x,
                                                               const typename AnyUnit::Row& u_row,
                                                               const RowDivisors<accumulation_t<S>>& row) {
  constexpr Norm kNorm = AnyUnit::kNorm;
  using A = accumulation_t<S>;
  A total = 0;
  for_columns(c, u, [&](auto p, int i, int k, A w) {
    total += w * u_row.words[i][k] * RowNorm<kNorm, A>::slope(w * x.words[i][k], row.n, p, row.ties);
  });
  return block_sum(total);
}

// grad_x of a unit, in the place of x.
template <class S, class AnyUnit>
__device__ __forceinline__ void bend_unit(const RowNormCall<S>& c, const AnyUnit& u, typename AnyUnit::Row& x,
                                          typename AnyUnit::Row& u_row, const RowDivisors<accumulation_t<S>>& row,
                                          accumulation_t<S> s) {
  constexpr Norm kNorm = AnyUnit::kNorm;
  using A = accumulation_t<S>;
  const A grad = c.grad[u.row];
  if constexpr (kNorm != Norm::kL2) x.begin_pass();  // its slopes are there if this block has added them up
  u_row.begin_pass();
  A result[Words<S>::kSize];
  for_columns(c, u, [&](auto p, int i, int k, A w) {
    result[k] = grad * w * RowNorm<kNorm, A>::bend(w * x.words[i][k], w * u_row.words[i][k], s, row.n, p);
    if (k == Words<S>::kSize - 1) x.words[i] = Words<S>::of(result);
  });
  x.store(u.out, u.columns, c.aligned);
}

template <Norm kNorm>
inline constexpr bool kHasBend = kNorm != Norm::kL1 && kNorm != Norm::kInf;
template <Norm kNorm>
inline constexpr bool kBendNeedsSum = kHasBend<kNorm> && kNorm != Norm::kSquaredL2;

// Whole rows, or units whose results need no sum.
template <Norm kNorm, class S>
__global__ void __launch_bounds__(kRowThreads, 2) row_norm_double_backward_kernel(const RowNormCall<S> c) {
  using A = accumulation_t<S>;
  for_units<kNorm>(c, [&](const Unit<kNorm, S>& u) {
    typename Unit<kNorm, S>::Row x, u_row;
    x.load(u.x, u.columns, c.aligned);
    u_row.load(u.u, u.columns, c.aligned);
    const RowDivisors<A> row(c, u.row, ties_of_row<kNorm>(c, u, x));
    const A s = block_directional(c, u, x, u_row, row);
    if (threadIdx.x == 0) (c.chunks == 1 ? c.per_row + u.row : c.partial + u.row * c.chunks + u.chunk)[0] = s;
    if constexpr (kHasBend<kNorm>) bend_unit(c, u, x, u_row, row, s);
  });
}

// s of rows of several chunks.
template <class S>
__global__ void __launch_bounds__(kRowThreads, 2) row_norm_total_kernel(const RowNormCall<S> c) {
  for (std::int64_t row = blockIdx.x; row < c.rows; row += gridDim.x) {
    const accumulation_t<S> s = row_total<Norm::kL1>(c.partial, c, row);
    if (threadIdx.x == 0) c.per_row[row] = s;
  }
}

// More vectors of 16 bits, whose sums take longer to join.
template <Norm kNorm, class S>
using QueuedUnit = Unit<kNorm, S, sizeof(S) == 2 && kNorm == Norm::kL2 ? 8 : kRowVectors<kNorm>, kRowThreads>;

// c.chunks: of queued units.
template <Norm kNorm, class S>
__global__ void __launch_bounds__(kRowThreads, sizeof(S) == 2 ? 2 : 3)
    row_norm_queue_kernel(const RowNormCall<S> c, const RowQueue q) {
  using A = accumulation_t<S>;
  using Queued = QueuedUnit<kNorm, S>;
  typename Queued::Row x, u_row;
  const auto load = [&](std::uint32_t row, std::uint32_t chunk) {
    const Queued u(c, row, chunk);
    x.load(u.x, u.columns, c.aligned);
    u_row.load(u.u, u.columns, c.aligned);
    return u;
  };
  run_queue(
      q,
      [&](std::uint32_t row, std::uint32_t chunk) {
        const Queued u = load(row, chunk);
        const A s = block_directional(c, u, x, u_row, RowDivisors<A>(c, row, A(1)));
        if (threadIdx.x == 0) c.partial[row * q.chunks + chunk] = s;
      },
      [&](std::uint32_t row) {
        const A s = row_total<Norm::kL1>(c.partial, c, row);
        if (threadIdx.x == 0) c.per_row[row] = s;
      },
      [&](std::uint32_t row, std::uint32_t chunk) { load(row, chunk); },
      [&](std::uint32_t row, std::uint32_t chunk) {
        bend_unit(c, Queued(c, row, chunk), x, u_row, RowDivisors<A>(c, row, A(1)), __ldcg(c.per_row + row));
      });
}

// Launches one call; c.partial (and c.ties for Linf) must hold rows * chunks numbers when chunks > 1.
template <Norm kNorm, class S>
cudaError_t launch_row_norm(Order order, const RowNormCall<S>& c, cudaStream_t stream) {
  const dim3 block(threads_to_hold<S, kRowVectors<kNorm>>(c.cols, kRowThreads)), units = unit_grid(c);
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
  if constexpr (kBendNeedsSum<kNorm>) {
    if (several) {
      const std::int64_t bytes = 2 * c.cols * static_cast<std::int64_t>(sizeof(S));
      RowNormCall<S> queued = c;
      queued.chunks = (c.cols + QueuedUnit<kNorm, S>::kChunk - 1) / QueuedUnit<kNorm, S>::kChunk;
      const RowQueue queue(c.rows, queued.chunks, RowQueue::group_of(bytes), c.queue);
      status = clear_queue(c.queue, c.rows, stream);
      if (status != cudaSuccess) return status;
      return launch(row_norm_queue_kernel<kNorm, S>, queue_grid(queue), dim3(kRowThreads), 0, stream, queued, queue);
    }
  }
  status = launch(row_norm_double_backward_kernel<kNorm, S>, units, block, 0, stream, c);
  if (several && status == cudaSuccess)
    status = launch(row_norm_total_kernel<S>, grid_for(c.rows), dim3(kRowThreads), 0, stream, c);
  return status;
}

template <class S>
cudaError_t launch_row_norm(Order order, RowNormCall<S> c, cudaStream_t stream) {
  c.aligned = c.cols % Words<S>::kSize == 0 && aligned<S>(c.x_stride, c.x) && aligned<S>(c.u_stride, c.u) &&
              aligned<S>(c.cols, static_cast<const S*>(c.out));
  switch (c.norm) {
    case Norm::kL1: return launch_row_norm<Norm::kL1>(order, c, stream);
    case Norm::kL2: return launch_row_norm<Norm::kL2>(order, c, stream);
    case Norm::kSquaredL2: return launch_row_norm<Norm::kSquaredL2>(order, c, stream);
    case Norm::kInf: return launch_row_norm<Norm::kInf>(order, c, stream);
    default: return launch_row_norm<Norm::kP>(order, c, stream);
  }
}

}  // namespace rk::cuda
