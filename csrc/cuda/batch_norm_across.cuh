// BatchNorm where channels are innermost: rows of C elements, one of each channel.
//
// A thread keeps the same channels, one vector of them, with their sums and coefficients in registers, and walks over
// rows.  Rows that are not whole vectors are folded: f rows one behind the other are whole vectors, and are taken for
// one row of `columns` = f C, in which every channel has f columns.  A last row that is not whole is taken apart.
//
// The second sweep runs backwards, and finds in the L2 cache what the first has read last.  Channels cannot go in
// groups that fit into the cache, since a few of each row are less than the memory moves at once.  If there are so few
// rows that a block takes all of one vector of channels, one launch does both sweeps.
#pragma once

#include "batch_norm_calls.cuh"

namespace rk::cuda {

constexpr int kBatchNormFusedThreads = 512;

// Where a thread works: `column` is its first one, of `channel`, and `row` its first row among those of a block.
template <class S>
struct RowsPlace {
  std::int64_t column, channel, first, last;  // rows of the share
  int row;
  bool active, has_rest;  // has_rest: of the last row, not whole

  __device__ __forceinline__ RowsPlace(const BatchNormCall<S>& c, std::int64_t strip, std::int64_t share) {
    const int thread = threadIdx.x;
    row = thread / c.wide;
    const std::int64_t vector = strip * c.wide + (thread - row * c.wide), end = (share + 1) * c.share;
    active = row < c.height && vector < c.vectors;
    column = vector * Words<S>::kSize;
    channel = c.columns == c.channels ? column : column % c.channels;
    first = share * c.share;
    last = end < c.items ? end : c.items;
    has_rest = active && row == 0 && share + 1 == c.shares && c.items * c.columns + column < c.elements;
  }

  // Calls body(k, channel) for the thread's columns.
  template <class Body>
  __device__ __forceinline__ void for_channels(const BatchNormCall<S>& c, const Body& body) const {
    std::int64_t at = channel;
#pragma unroll
    for (int k = 0; k < Words<S>::kSize; ++k) {
      body(k, at);
      if (++at == c.channels) at = 0;
    }
  }
};

// Calls body for offsets of the thread's vectors in the rows of a share: arrays of kAtOnce of them, then single ones.
template <int kAtOnce, bool kBackwards, class S, class Body>
__device__ __forceinline__ void for_vectors_across(const BatchNormCall<S>& c, const RowsPlace<S>& place,
                                                   const Body& body) {
  const std::int64_t first = place.first + place.row;
  if (!place.active || first >= place.last) return;
  std::int64_t left = (place.last - first + c.height - 1) / c.height;
  const std::int64_t forwards = c.height * c.columns, step = kBackwards ? -forwards : forwards;
  std::int64_t offset = first * c.columns + place.column + (kBackwards ? (left - 1) * forwards : 0);
  for (; left >= kAtOnce; left -= kAtOnce) {
    std::int64_t at[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i, offset += step) at[i] = offset;
    body(at);
  }
  for (; left > 0; --left, offset += step) {
    const std::int64_t at[1] = {offset};
    body(at);
  }
}

// Calls body(offset, count) for the thread's part of the last row, if that is not whole.
template <class S, class Body>
__device__ __forceinline__ void for_rest_across(const BatchNormCall<S>& c, const RowsPlace<S>& place,
                                                const Body& body) {
  if (!place.has_rest) return;
  const std::int64_t offset = c.items * c.columns + place.column, left = c.elements - offset;
  body(offset, left < Words<S>::kSize ? static_cast<int>(left) : Words<S>::kSize);
}

template <bool kAligned, bool kTraining, class S, class A>
__device__ __forceinline__ void write_across(const BatchNormCall<S>& c,
                                             const ChannelCoefficients<A> (&of_channel)[Words<S>::kSize],
                                             const BatchNormWords<S>& w, std::int64_t offset,
                                             int count = Words<S>::kSize) {
  constexpr int V = Words<S>::kSize;
  A grad[V], grad_x[V];
#pragma unroll
  for (int k = 0; k < V; ++k) {
    const A d = w.x[k] - of_channel[k].mean;
    grad[k] = of_channel[k].grad(w.u[k], d);
    grad_x[k] = kTraining ? of_channel[k].grad_x(w.u[k], w.g[k], d) : of_channel[k].x_g * w.g[k];
  }
  if (c.grad) store_result<kAligned>(c.grad + offset, Words<S>::of(grad), 0, count);
  if (c.grad_x) store_result<kAligned>(c.grad_x + offset, Words<S>::of(grad_x), 0, count);
}

// The first sweep of a share.  With fixed statistics it writes the results as well.
template <bool kAligned, bool kTraining, int kAtOnce, class S, class A>
__device__ __forceinline__ void sum_across(const BatchNormCall<S>& c, const RowsPlace<S>& place,
                                           A (&sums)[Words<S>::kSize][kBatchNormSums]) {
  constexpr int V = Words<S>::kSize;
  A mean[V];
  [[maybe_unused]] ChannelCoefficients<A> of_channel[V];
  place.for_channels(c, [&](int k, std::int64_t channel) {
    mean[k] = place.active ? center_of(c, channel) : A(0);
    if constexpr (!kTraining)
      if (place.active) of_channel[k] = {coefficients_from(c, channel, sums[k]), mean[k]};  // sums: zero
  });
  const auto take = [&](const BatchNormWords<S>& w, int count) {
#pragma unroll
    for (int k = 0; k < V; ++k)
      if (k < count) add_to_sums<kTraining>(sums[k], w.u[k], w.g[k], w.x[k] - mean[k]);
  };
  for_vectors_across<kAtOnce, false>(c, place, [&]<int N>(const std::int64_t (&at)[N]) {
    BatchNormWords<S> w[N];
#pragma unroll
    for (int i = 0; i < N; ++i) w[i] = BatchNormWords<S>::template at<kAligned>(c, at[i]);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      take(w[i], V);
      if constexpr (!kTraining) write_across<kAligned, false>(c, of_channel, w[i], at[i]);
    }
  });
  for_rest_across(c, place, [&](std::int64_t offset, int count) {
    const auto w = BatchNormWords<S>::template at<false>(c, offset, 0, count);
    take(w, count);
    if constexpr (!kTraining) write_across<false, false>(c, of_channel, w, offset, count);
  });
}

// The second sweep of a share.
template <bool kAligned, int kAtOnce, class S, class A>
__device__ __forceinline__ void apply_across(const BatchNormCall<S>& c, const RowsPlace<S>& place,
                                             const ChannelCoefficients<A> (&of_channel)[Words<S>::kSize]) {
  for_rest_across(c, place, [&](std::int64_t offset, int count) {
    const auto w = BatchNormWords<S>::template at<false>(c, offset, 0, count);
    write_across<false, true>(c, of_channel, w, offset, count);
  });
  for_vectors_across<kAtOnce, true>(c, place, [&]<int N>(const std::int64_t (&at)[N]) {
    BatchNormWords<S> w[N];
#pragma unroll
    for (int i = 0; i < N; ++i) w[i] = BatchNormWords<S>::template at<kAligned>(c, at[i]);
#pragma unroll
    for (int i = 0; i < N; ++i) write_across<kAligned, true>(c, of_channel, w[i], at[i]);
  });
}

// Adds up the sums of the threads that hold the same columns: total(i, column) for the block's columns, by any thread.
// First as many threads as there are for a column add every so many rows, then one thread adds theirs.
template <int kThreads, class A, int V, class Take>
__device__ __forceinline__ void columns_total(A (&sums)[V][kBatchNormSums], int wide, int height, bool counts,
                                              const Take& take) {
  __shared__ A rows[kThreads * V];
  __shared__ A parts[kBatchNormSums][kThreads];
  const int thread = threadIdx.x, columns = wide * V, helpers = kThreads / columns;
#pragma unroll
  for (int i = 0; i < kBatchNormSums; ++i) {
    __syncthreads();  // rows and parts may still be read
    if (counts)
#pragma unroll
      for (int k = 0; k < V; ++k) rows[thread * V + k] = sums[k][i];
    __syncthreads();
    A total = 0;
    if (thread < helpers * columns)
      for (int at = thread; at < height * columns; at += helpers * columns) total += rows[at];
    parts[i][thread] = total;
  }
  __syncthreads();
  for (int at = thread; at < kBatchNormSums * columns; at += kThreads) {
    const int i = at / columns, column = at - i * columns;
    A total = 0;
    for (int helper = 0; helper < helpers; ++helper) total += parts[i][helper * columns + column];
    take(i, column, total);
  }
}

template <class S, bool kAligned, bool kTraining>
__global__ void __launch_bounds__(kBatchNormThreads, 2) batch_norm_sums_across_kernel(const BatchNormCall<S> call) {
  using A = rk::accumulation_t<S>;
  constexpr int V = Words<S>::kSize;
  for_shares<false>(call, call.strips, call.cotangents, [&](std::int64_t strip, std::int64_t share, std::int64_t k) {
    const auto c = call.one_of(k);
    const RowsPlace<S> place(c, strip, share);
    A sums[V][kBatchNormSums] = {};
    sum_across<kAligned, kTraining, kTraining ? 2 : 1>(c, place, sums);
    columns_total<kBatchNormThreads>(sums, c.wide, c.height, place.row < c.height, [&](int i, int column, A total) {
      const std::int64_t at = strip * c.wide * V + column;
      if (at < c.columns) c.partial_of(at, i)[share] = total;
    });
  });
}

// `to`: a thread's columns of a row of coefficients.
template <class A, int V>
__device__ __forceinline__ void load_columns(A (&to)[V], const A* from) {
  constexpr int n = 16 / sizeof(A);
#pragma unroll
  for (int i = 0; i < V; i += n) {
    const auto words = load_words<true>(from + i);
#pragma unroll
    for (int k = 0; k < n; ++k) to[i + k] = words[k];
  }
}

// The second sweep of one cotangent.
template <class S, bool kAligned>
__global__ void __launch_bounds__(kBatchNormThreads, 2) batch_norm_apply_across_kernel(const BatchNormCall<S> c) {
  using A = rk::accumulation_t<S>;
  constexpr int V = Words<S>::kSize;
  for_shares<true>(c, c.strips, 1, [&](std::int64_t strip, std::int64_t share, std::int64_t) {
    const RowsPlace<S> place(c, strip, share);
    if (!place.active) return;
    A values[7][V];
#pragma unroll
    for (int i = 0; i < 7; ++i)
      load_columns(values[i], (i < 4 ? c.coefficients_of_all(i) : c.coefficients_of(0, i - 4)) + place.column);
    ChannelCoefficients<A> of_channel[V];
#pragma unroll
    for (int k = 0; k < V; ++k) {
      of_channel[k].mean = values[0][k];
      of_channel[k].grad_u = values[1][k];
      of_channel[k].x_x = values[2][k];
      of_channel[k].x_1 = values[3][k];
      of_channel[k].x_u = values[4][k];
      of_channel[k].x_g = values[5][k];
      of_channel[k].grad_1 = values[6][k];
    }
    apply_across<kAligned, 2>(c, place, of_channel);
  });
}

// Both sweeps, if a block takes all rows.
template <class S, bool kAligned>
__global__ void __launch_bounds__(kBatchNormFusedThreads, 1) batch_norm_fused_across_kernel(const BatchNormCall<S> c) {
  using A = rk::accumulation_t<S>;
  constexpr int V = Words<S>::kSize;
  __shared__ A totals[V][kBatchNormSums];
  __shared__ ChannelCoefficients<A> shared[V];
  for (std::int64_t strip = blockIdx.x; strip < c.strips; strip += gridDim.x) {
    const RowsPlace<S> place(c, strip, 0);
    A sums[V][kBatchNormSums] = {};
    sum_across<kAligned, true, 2>(c, place, sums);
    columns_total<kBatchNormFusedThreads>(sums, c.wide, c.height, true,
                                          [&](int i, int column, A total) { totals[column][i] = total; });
    __syncthreads();
    if (threadIdx.x < V) {
      const std::int64_t channel = strip * V + threadIdx.x;
      const auto w = coefficients_from(c, channel, totals[threadIdx.x]);
      shared[threadIdx.x] = {w, c.mean[channel]};
      if (c.grad_weight) c.grad_weight[channel] = w.weight;
    }
    __syncthreads();
    ChannelCoefficients<A> of_channel[V];
#pragma unroll
    for (int k = 0; k < V; ++k) of_channel[k] = shared[k];
    if (c.grad || c.grad_x) apply_across<kAligned, 2>(c, place, of_channel);
  }
}

// The second sweep of several cotangents: x is read once, and grad_x summed in registers, for kRows rows at a time.
template <class S, bool kAligned>
__global__ void __launch_bounds__(kBatchNormThreads, 2)
    batch_norm_apply_several_across_kernel(const BatchNormCall<S> c) {
  using A = rk::accumulation_t<S>;
  constexpr int V = Words<S>::kSize;
  const auto apply = [&]<bool kWhole, int N>(std::bool_constant<kWhole>, std::int64_t column,
                                             const std::int64_t (&at)[N], int count) {
    A mean[V], grad_u[V], x_x[V], sum[N][V];
    load_columns(mean, c.coefficients_of_all(0) + column);
    load_columns(grad_u, c.coefficients_of_all(1) + column);
    Words<S> x[N];
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = BatchNormWords<S>::template some<kWhole>(c.x + at[i], 0, count);
    load_columns(x_x, c.coefficients_of_all(2) + column);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      load_columns(sum[i], c.coefficients_of_all(3) + column);
#pragma unroll
      for (int e = 0; e < V; ++e) sum[i][e] += x_x[e] * (x[i][e] - mean[e]);
    }
    for (std::int64_t k = 0; k < c.cotangents; ++k) {
      Words<S> u[N], g[N];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        u[i] = {};
        if (c.u) u[i] = BatchNormWords<S>::template some<kWhole>(c.u + k * c.elements + at[i], 0, count);
        g[i] = BatchNormWords<S>::template some<kWhole>(c.g + k * c.elements + at[i], 0, count);
      }
      A x_u[V], x_g[V], grad_1[V];
      load_columns(x_u, c.coefficients_of(k, 0) + column);
      load_columns(x_g, c.coefficients_of(k, 1) + column);
      load_columns(grad_1, c.coefficients_of(k, 2) + column);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        A grad[V];
#pragma unroll
        for (int e = 0; e < V; ++e) {
          sum[i][e] += x_u[e] * u[i][e] + x_g[e] * g[i][e];
          grad[e] = grad_u[e] * u[i][e] + (x_g[e] * (x[i][e] - mean[e]) + grad_1[e]);
        }
        if (c.grad) store_result<kWhole>(c.grad + k * c.elements + at[i], Words<S>::of(grad), 0, count);
      }
    }
    if (!c.grad_x) return;
#pragma unroll
    for (int i = 0; i < N; ++i) store_result<kWhole>(c.grad_x + at[i], Words<S>::of(sum[i]), 0, count);
  };
  for_shares<true>(c, c.strips, 1, [&](std::int64_t strip, std::int64_t share, std::int64_t) {
    const RowsPlace<S> place(c, strip, share);
    for_rest_across(c, place, [&](std::int64_t offset, int count) {
      const std::int64_t at[1] = {offset};
      apply(std::false_type{}, place.column, at, count);
    });
    for_vectors_across<2, true>(c, place,
                                [&](const auto& at) { apply(std::bool_constant<kAligned>{}, place.column, at, V); });
  });
}

// How the data divide.
template <class S>
void arrange_across(BatchNormCall<S>& c, const BatchNormLimits& limits) {
  constexpr std::int64_t V = Words<S>::kSize, rows_at_least = 4;  // of a thread in a share
  std::int64_t fold = 1;
  while (fold * c.channels % V != 0) fold *= 2;
  c.columns = fold * c.channels;
  c.vectors = c.columns / V;
  c.items = c.images / fold;
  c.fused = c.training && c.cotangents == 1 && fold == 1 && c.items <= limits.block_rows;
  c.strips = c.fused ? c.vectors : (c.vectors + 31) / 32;
  c.wide = static_cast<int>((c.vectors + c.strips - 1) / c.strips);
  c.height = (c.fused ? kBatchNormFusedThreads : kBatchNormThreads) / c.wide;
  const std::int64_t shares = c.strips < limits.blocks ? limits.blocks / c.strips : 1;
  const std::int64_t least = (c.items + shares - 1) / shares, rows = c.height * rows_at_least;
  c.share = c.fused ? c.items : least > rows ? least : rows;
  c.shares = c.items > c.share ? (c.items + c.share - 1) / c.share : 1;
}

template <class S, bool kAligned>
cudaError_t launch_across(const BatchNormCall<S>& c, cudaStream_t stream) {
  const dim3 block(kBatchNormThreads);
  if (c.fused)
    return launch(batch_norm_fused_across_kernel<S, kAligned>, grid_for(c.strips), dim3(kBatchNormFusedThreads), 0,
                  stream, c);
  const dim3 grid = sweep_grid(c, c.strips, 1), all = sweep_grid(c, c.strips, c.cotangents);
  cudaError_t status = c.training ? launch(batch_norm_sums_across_kernel<S, kAligned, true>, all, block, 0, stream, c)
                                  : launch(batch_norm_sums_across_kernel<S, kAligned, false>, all, block, 0, stream, c);
  const bool results = c.training && (c.grad || c.grad_x);
  if (status == cudaSuccess && (results || c.grad_weight)) status = launch_coefficients(c, stream);
  if (status != cudaSuccess || !results) return status;
  return c.cotangents > 1 ? launch(batch_norm_apply_several_across_kernel<S, kAligned>, grid, block, 0, stream, c)
                          : launch(batch_norm_apply_across_kernel<S, kAligned>, grid, block, 0, stream, c);
}

}  // namespace rk::cuda
