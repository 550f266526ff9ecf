// BatchNorm where the elements of a channel lie next to each other: [N, C, S], planes of S elements.
//
// A block takes a share of one channel: vectors of 16 bytes, counted through its planes.  Planes need not begin or end
// with a vector: vectors lie as from the first element of the tensor on, and of those at an edge only the plane's own
// elements count.  Elements behind the tensor's last whole vector are added one by one.
//
// The second sweep runs backwards, and finds in the L2 cache what the first has read last.  Groups of channels that fit
// into the cache, through both sweeps one after the other, would move five tensors instead of eight; but L2 gives them
// back little faster than memory does, and each group costs two launches more than that saves.
//
// A channel of one share needs one launch.  Otherwise every block of the second sweep adds up its channel's few partial
// sums itself, for one cotangent; several have a kernel between.
#pragma once

#include "batch_norm_calls.cuh"

namespace rk::cuda {

// 16 bytes that a thread works on: those elements from `low` to `high` that belong to the plane.
struct PlaneVector {
  std::int64_t offset;
  int low, high;
};

// Where a thread stands in its share.  Steps of as many vectors as there are threads, without a division each.
template <class S, bool kBackwards>
class PlaneWalk {
 public:
  __device__ __forceinline__ PlaneWalk(const BatchNormCall<S>& c, std::int64_t channel, std::int64_t item) : c_(c) {
    const std::int64_t image = item / c.vectors;
    vector_ = item - image * c.vectors;
    plane_ = (image * c.channels + channel) * c.inner;
  }
  __device__ __forceinline__ PlaneVector next() {
    constexpr int V = Words<S>::kSize;
    PlaneVector at{plane_ + vector_ * V, 0, V};
    if (c_.edges) {
      const int phase = static_cast<int>(plane_) & (V - 1);
      at.offset -= phase;
      const std::int64_t left = plane_ + c_.inner - at.offset;
      at.low = vector_ == 0 ? phase : 0;
      at.high = left < V ? static_cast<int>(left) : V;
      if (left <= 0 || at.offset + V > c_.elements) at = {0, 0, 0};
    }
    if constexpr (kBackwards) {
      vector_ -= c_.vectors_step;
      plane_ -= c_.planes_step * c_.channels * c_.inner;
      if (vector_ < 0) vector_ += c_.vectors, plane_ -= c_.channels * c_.inner;
    } else {
      vector_ += c_.vectors_step;
      plane_ += c_.planes_step * c_.channels * c_.inner;
      if (vector_ >= c_.vectors) vector_ -= c_.vectors, plane_ += c_.channels * c_.inner;
    }
    return at;
  }

 private:
  const BatchNormCall<S>& c_;
  std::int64_t vector_, plane_;
};

// Calls body for the thread's vectors of a share, arrays of kAtOnce of them and then single ones.
template <int kAtOnce, bool kBackwards, class S, class Body>
__device__ __forceinline__ void for_vectors_along(const BatchNormCall<S>& c, std::int64_t channel, std::int64_t share,
                                                  const Body& body) {
  const int threads = 1 << c.threads_log2;
  const std::int64_t first = share * c.share + threadIdx.x, end = (share + 1) * c.share;
  const std::int64_t last = end < c.items ? end : c.items;
  std::int64_t left = first < last ? (last - first + threads - 1) >> c.threads_log2 : 0;
  if (left == 0) return;
  PlaneWalk<S, kBackwards> walk(c, channel, kBackwards ? first + (left - 1) * threads : first);
  for (; left >= kAtOnce; left -= kAtOnce) {
    PlaneVector at[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) at[i] = walk.next();
    body(at);
  }
  for (; left > 0; --left) {
    const PlaneVector at[1] = {walk.next()};
    body(at);
  }
}

// Calls body with the offset of an element of the channel that is in no whole vector, if the thread has one.
template <class S, class Body>
__device__ __forceinline__ void for_rest_along(const BatchNormCall<S>& c, std::int64_t channel, std::int64_t share,
                                               const Body& body) {
  const std::int64_t rest = c.elements & (Words<S>::kSize - 1), offset = c.elements - rest + threadIdx.x;
  if (share + 1 == c.shares && threadIdx.x < rest && offset / c.inner % c.channels == channel) body(offset);
}

template <bool kAligned, bool kTraining, class S>
__device__ __forceinline__ void write_along(const BatchNormCall<S>& c,
                                            const ChannelCoefficients<rk::accumulation_t<S>>& of_channel,
                                            const BatchNormWords<S>& w, const PlaneVector& at) {
  using A = rk::accumulation_t<S>;
  constexpr int V = Words<S>::kSize;
  A grad[V], grad_x[V];
#pragma unroll
  for (int k = 0; k < V; ++k) {
    const A d = w.x[k] - of_channel.mean;
    grad[k] = of_channel.grad(w.u[k], d);
    grad_x[k] = kTraining ? of_channel.grad_x(w.u[k], w.g[k], d) : of_channel.x_g * w.g[k];
  }
  if (c.grad) store_result<kAligned>(c.grad + at.offset, Words<S>::of(grad), at.low, at.high);
  if (c.grad_x) store_result<kAligned>(c.grad_x + at.offset, Words<S>::of(grad_x), at.low, at.high);
}

// One element, by the same formulas.
template <bool kTraining, class S>
__device__ __forceinline__ void write_one(const BatchNormCall<S>& c,
                                          const ChannelCoefficients<rk::accumulation_t<S>>& of_channel,
                                          std::int64_t offset) {
  const auto w = BatchNormWords<S>::template at<false>(c, offset, 0, 1);
  write_along<false, kTraining>(c, of_channel, w, {offset, 0, 1});
}

// The first sweep of a share.  With fixed statistics it writes the results as well.
template <bool kAligned, bool kTraining, class S>
__device__ __forceinline__ void sum_along(const BatchNormCall<S>& c, std::int64_t channel, std::int64_t share,
                                          rk::accumulation_t<S> (&sums)[kBatchNormSums]) {
  using A = rk::accumulation_t<S>;
  const A mean = center_of(c, channel);
  [[maybe_unused]] ChannelCoefficients<A> of_channel;
  if constexpr (!kTraining) of_channel = {coefficients_from(c, channel, sums), mean};  // sums: zero
  for_vectors_along<2, false>(c, channel, share, [&]<int N>(const PlaneVector(&at)[N]) {
    BatchNormWords<S> w[N];
#pragma unroll
    for (int i = 0; i < N; ++i) w[i] = BatchNormWords<S>::template at<kAligned>(c, at[i].offset, at[i].low, at[i].high);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (kAligned && c.edges && (at[i].low > 0 || at[i].high < Words<S>::kSize))
        clear_others(w[i], at[i].low, at[i].high);
#pragma unroll
      for (int k = 0; k < Words<S>::kSize; ++k) add_to_sums<kTraining>(sums, w[i].u[k], w[i].g[k], w[i].x[k] - mean);
      if constexpr (!kTraining) write_along<kAligned, false>(c, of_channel, w[i], at[i]);
    }
  });
  for_rest_along(c, channel, share, [&](std::int64_t offset) {
    const auto w = BatchNormWords<S>::template at<false>(c, offset, 0, 1);
    add_to_sums<kTraining>(sums, w.u[0], w.g[0], w.x[0] - mean);
    if constexpr (!kTraining) write_one<false>(c, of_channel, offset);
  });
}

// The second sweep of a share.
template <bool kAligned, class S>
__device__ __forceinline__ void apply_along(const BatchNormCall<S>& c, std::int64_t channel, std::int64_t share,
                                            const ChannelCoefficients<rk::accumulation_t<S>>& of_channel) {
  for_vectors_along<2, true>(c, channel, share, [&]<int N>(const PlaneVector(&at)[N]) {
    BatchNormWords<S> w[N];
#pragma unroll
    for (int i = 0; i < N; ++i) w[i] = BatchNormWords<S>::template at<kAligned>(c, at[i].offset, at[i].low, at[i].high);
#pragma unroll
    for (int i = 0; i < N; ++i) write_along<kAligned, true>(c, of_channel, w[i], at[i]);
  });
  for_rest_along(c, channel, share, [&](std::int64_t offset) { write_one<true>(c, of_channel, offset); });
}

// Coefficients for the whole block, from sums that its first threads hold.
template <class S>
__device__ __forceinline__ ChannelCoefficients<rk::accumulation_t<S>> coefficients_along(const BatchNormCall<S>& c,
                                                                                         std::int64_t channel,
                                                                                         std::int64_t share,
                                                                                         rk::accumulation_t<S> total) {
  using A = rk::accumulation_t<S>;
  __shared__ A totals[kBatchNormSums];
  __shared__ A shared[7];
  if (threadIdx.x < kBatchNormSums) totals[threadIdx.x] = total;
  __syncwarp();
  if (threadIdx.x == 0) {
    const auto w = coefficients_from(c, channel, totals);
    const A values[7] = {w.grad_u, w.x_g, w.grad_1, w.x_u, w.x_x, w.x_1, c.mean[channel]};
#pragma unroll
    for (int i = 0; i < 7; ++i) shared[i] = values[i];
    if (share == 0 && c.grad_weight) c.grad_weight[channel] = w.weight;
  }
  __syncthreads();
  ChannelCoefficients<A> of_channel;
  of_channel.grad_u = shared[0];
  of_channel.x_g = shared[1];
  of_channel.grad_1 = shared[2];
  of_channel.x_u = shared[3];
  of_channel.x_x = shared[4];
  of_channel.x_1 = shared[5];
  of_channel.mean = shared[6];
  return of_channel;
}

template <class S, bool kAligned, bool kTraining>
__global__ void __launch_bounds__(kBatchNormThreads, 3) batch_norm_sums_along_kernel(const BatchNormCall<S> call) {
  using A = rk::accumulation_t<S>;
  for_shares<false>(call, call.channels, call.cotangents,
                    [&](std::int64_t channel, std::int64_t share, std::int64_t k) {
                      const auto c = call.one_of(k);
                      A sums[kBatchNormSums] = {};
                      sum_along<kAligned, kTraining>(c, channel, share, sums);
                      const A total = block_sums(sums);
                      if (threadIdx.x < kBatchNormSums) c.partial_of(channel, threadIdx.x)[share] = total;
                    });
}

// The second sweep of one cotangent.
template <class S, bool kAligned>
__global__ void __launch_bounds__(kBatchNormThreads, 3) batch_norm_apply_along_kernel(const BatchNormCall<S> c) {
  using A = rk::accumulation_t<S>;
  for_shares<true>(c, c.channels, 1, [&](std::int64_t channel, std::int64_t share, std::int64_t) {
    A sums[kBatchNormSums] = {};
    for (std::int64_t j = threadIdx.x; j < c.shares; j += blockDim.x)
#pragma unroll
      for (int s = 0; s < kBatchNormSums; ++s) sums[s] += c.partial_of(channel, s)[j];
    const A total = block_sums(sums);
    apply_along<kAligned>(c, channel, share, coefficients_along(c, channel, share, total));
  });
}

// Both sweeps of a channel of one share.
template <class S, bool kAligned>
__global__ void __launch_bounds__(kBatchNormThreads, 3) batch_norm_fused_along_kernel(const BatchNormCall<S> c) {
  using A = rk::accumulation_t<S>;
  for (std::int64_t channel = blockIdx.x; channel < c.channels; channel += gridDim.x) {
    A sums[kBatchNormSums] = {};
    sum_along<kAligned, true>(c, channel, 0, sums);
    const A total = block_sums(sums);
    apply_along<kAligned>(c, channel, 0, coefficients_along(c, channel, 0, total));
  }
}

// The second sweep of several cotangents: x is read once, and grad_x summed in registers.
template <class S, bool kAligned>
__global__ void __launch_bounds__(kBatchNormThreads, 3)
    batch_norm_apply_several_along_kernel(const BatchNormCall<S> c) {
  using A = rk::accumulation_t<S>;
  constexpr int V = Words<S>::kSize;
  const auto apply = [&]<bool kWhole>(std::bool_constant<kWhole>, std::int64_t channel, const PlaneVector& at) {
    const A mean = c.coefficients_of_all(0)[channel], grad_u = c.coefficients_of_all(1)[channel];
    const A x_x = c.coefficients_of_all(2)[channel], x_1 = c.coefficients_of_all(3)[channel];
    const auto x = BatchNormWords<S>::template some<kWhole>(c.x + at.offset, at.low, at.high);
    A sum[V];
#pragma unroll
    for (int e = 0; e < V; ++e) sum[e] = x_x * (x[e] - mean) + x_1;
#pragma unroll 2
    for (std::int64_t k = 0; k < c.cotangents; ++k) {
      const std::int64_t offset = k * c.elements + at.offset;
      Words<S> u{};
      if (c.u) u = BatchNormWords<S>::template some<kWhole>(c.u + offset, at.low, at.high);
      const auto g = BatchNormWords<S>::template some<kWhole>(c.g + offset, at.low, at.high);
      const A x_u = c.coefficients_of(k, 0)[channel], x_g = c.coefficients_of(k, 1)[channel];
      const A grad_1 = c.coefficients_of(k, 2)[channel];
      A grad[V];
#pragma unroll
      for (int e = 0; e < V; ++e) {
        sum[e] += x_u * u[e] + x_g * g[e];
        grad[e] = grad_u * u[e] + (x_g * (x[e] - mean) + grad_1);
      }
      if (c.grad) store_result<kWhole>(c.grad + offset, Words<S>::of(grad), at.low, at.high);
    }
    if (c.grad_x) store_result<kWhole>(c.grad_x + at.offset, Words<S>::of(sum), at.low, at.high);
  };
  for_shares<true>(c, c.channels, 1, [&](std::int64_t channel, std::int64_t share, std::int64_t) {
    for_vectors_along<1, true>(
        c, channel, share, [&](const PlaneVector(&at)[1]) { apply(std::bool_constant<kAligned>{}, channel, at[0]); });
    for_rest_along(c, channel, share,
                   [&](std::int64_t offset) { apply(std::false_type{}, channel, PlaneVector{offset, 0, 1}); });
  });
}

// How the data divide.
template <class S>
void arrange_along(BatchNormCall<S>& c, const BatchNormLimits& limits) {
  constexpr std::int64_t V = Words<S>::kSize;
  c.columns = c.channels;
  c.edges = c.inner % V != 0;
  c.vectors = c.edges ? (c.inner + V - 2) / V + 1 : c.inner / V;
  c.items = c.images * c.vectors;
  const std::int64_t least = (c.items + limits.blocks - 1) / limits.blocks;
  c.share = least > limits.share_vectors ? least : limits.share_vectors;
  c.shares = (c.items + c.share - 1) / c.share;
  c.fused = c.shares == 1 && c.training && c.cotangents == 1;
  // Threads of a small channel load two vectors each, at once.
  c.threads_log2 = 8;
  while (c.fused && c.threads_log2 > 5 && c.items <= 1 << c.threads_log2) --c.threads_log2;
  c.planes_step = (1 << c.threads_log2) / c.vectors;
  c.vectors_step = (1 << c.threads_log2) % c.vectors;
}

template <class S, bool kAligned>
cudaError_t launch_along(const BatchNormCall<S>& c, cudaStream_t stream) {
  const dim3 block(1u << c.threads_log2);
  if (c.fused) return launch(batch_norm_fused_along_kernel<S, kAligned>, grid_for(c.channels), block, 0, stream, c);
  const dim3 grid = sweep_grid(c, c.channels, 1), all = sweep_grid(c, c.channels, c.cotangents);
  cudaError_t status = c.training ? launch(batch_norm_sums_along_kernel<S, kAligned, true>, all, block, 0, stream, c)
                                  : launch(batch_norm_sums_along_kernel<S, kAligned, false>, all, block, 0, stream, c);
  const bool results = c.training && (c.grad || c.grad_x);
  if (status == cudaSuccess && (results ? c.cotangents > 1 : c.grad_weight != nullptr))
    status = launch_coefficients(c, stream);
  if (status != cudaSuccess || !results) return status;
  return c.cotangents > 1 ? launch(batch_norm_apply_several_along_kernel<S, kAligned>, grid, block, 0, stream, c)
                          : launch(batch_norm_apply_along_kernel<S, kAligned>, grid, block, 0, stream, c);
}

}  // namespace rk::cuda
