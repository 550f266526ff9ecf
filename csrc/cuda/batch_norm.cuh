// Kernels of batch_norm_double_backward.  Formulas: math/batch_norm.h.
//
// Two sweeps: five sums a channel, then the results; between them one small kernel turns sums into coefficients.  With
// fixed statistics the coefficients are known beforehand, and the first sweep writes the results as well.  Data lie as
// runs of adjacent elements: "along", [N, C, S], a run is one channel of one image; "across", [P, C], a run is a row of
// all channels.  Blocks take fixed shares of the data and sum as trees: the same bits on every run, no atomics.
// Of K cotangents the first sweep goes through one after the other; the second reads x once for all, and grad_x is summed
// in registers: 5 K + 2 elements for each element of x, and K times x.
#pragma once

#include <cstdint>

#include "../math/batch_norm.h"
#include "reduce.cuh"
#include "vector.cuh"

namespace rk::cuda {

constexpr int kBatchNormThreads = 256;
constexpr int kBatchNormSums = 5, kBatchNormCoefficients = 7;

template <class S>
struct BatchNormCall {
  using A = accumulation_t<S>;
  std::int64_t images, channels, inner;  // [N, C, S]; "across" if S = 1
  const S *u, *g, *x;                    // u null: zero; x null: nothing depends on it
  S *grad, *grad_x;                      // or null
  std::int64_t cotangents;               // K: u, g and grad are [K, N, C, S]
  const A *weight, *a, *b, *mean, *invstd;
  A* grad_weight;  // or null
  bool training;
  std::int64_t shares;  // of a channel's data, one block each
  A* partial;           // [K, shares, 5, C]
  A* coefficients;      // [K, 7, C]

  // The call for one of the cotangents.  Under fixed statistics grad_x, then zero, is the first one's to write.
  __device__ __forceinline__ BatchNormCall one_of(std::int64_t k) const {
    const std::int64_t offset = k * images * channels * inner;
    BatchNormCall c = *this;
    if (c.u) c.u += offset;
    c.g += offset;
    if (c.grad) c.grad += offset;
    if (k > 0) c.grad_x = nullptr;
    c.partial += k * shares * kBatchNormSums * channels;
    c.coefficients += k * kBatchNormCoefficients * channels;
    return c;
  }
};

template <class S>
__host__ __device__ __forceinline__ bool is_across(const BatchNormCall<S>& c) {
  return c.inner == 1;
}

// Elements of a run that a share takes at once, and how the data divide into shares.
template <class S>
std::int64_t batch_norm_shares(const BatchNormCall<S>& c) {
  constexpr std::int64_t elements = 16384;  // of one channel, in a share along; rows times a vector across
  if (is_across(c)) return (c.images + 511) / 512;
  const std::int64_t images = elements / c.inner > 0 ? elements / c.inner : 1;
  return (c.images + images - 1) / images;
}

template <class S>
__host__ __device__ __forceinline__ std::int64_t share_begin(const BatchNormCall<S>& c, std::int64_t share) {
  return c.images * share / c.shares;
}

template <class A>
struct ChannelSums {
  BatchNormSums<A> s;
  __device__ __forceinline__ void add(A u, A g, A d) {
    s.u += u;
    s.g += g;
    s.ug += u * g;
    s.ux += u * d;
    s.gx += g * d;
  }
};

template <class S>
__device__ __forceinline__ BatchNormCoefficients<accumulation_t<S>> coefficients_of(
    const BatchNormCall<S>& c, std::int64_t channel, const BatchNormSums<accumulation_t<S>>& sums) {
  using A = accumulation_t<S>;
  return batch_norm_coefficients<A>(sums, A(c.images) * A(c.inner), c.weight ? c.weight[channel] : A(1),
                                    c.invstd[channel], c.a ? c.a[channel] : A(0), c.b ? c.b[channel] : A(0),
                                    c.training);
}

template <class S>
__device__ __forceinline__ void write_results(const BatchNormCall<S>& c, int k,
                                              const BatchNormCoefficients<accumulation_t<S>>& w, accumulation_t<S> u,
                                              accumulation_t<S> g, accumulation_t<S> d, Vector<S>& grad,
                                              Vector<S>& grad_x) {
  if (c.grad) grad.element[k] = store<S>(w.grad_u * u + (c.x ? w.grad_x * d : accumulation_t<S>(0)) + w.grad_1);
  if (c.grad_x) grad_x.element[k] = store<S>(w.x_u * u + (w.x_g * g + (w.x_x * d + w.x_1)));
}

template <class S>
__device__ __forceinline__ void read_part(const S* from, Vector<S>& to, int count) {
  if (count == Vector<S>::kSize)
    to = load_vector(from, is_aligned(from));
  else
#pragma unroll
    for (int k = 0; k < Vector<S>::kSize; ++k)
      if (k < count) to.element[k] = from[k];
}

// Part of a run: `count` elements from `offset` on, read at once where they are aligned.
template <class S>
struct RunPart {
  using A = accumulation_t<S>;
  Vector<S> u, g, x;
  int count;
  bool has_u, has_x;

  __device__ __forceinline__ RunPart(const BatchNormCall<S>& c, std::int64_t offset, std::int64_t left)
      : count(left < Vector<S>::kSize ? static_cast<int>(left) : Vector<S>::kSize), has_u(c.u), has_x(c.x) {
    if (has_u) read_part(c.u + offset, u, count);
    read_part(c.g + offset, g, count);
    if (has_x) read_part(c.x + offset, x, count);
  }
  __device__ __forceinline__ A u_at(int k) const { return has_u ? load(u.element[k]) : A(0); }
  __device__ __forceinline__ A g_at(int k) const { return load(g.element[k]); }
  __device__ __forceinline__ A d_at(int k, A mean) const { return has_x ? load(x.element[k]) - mean : A(0); }
};

template <class S>
__device__ __forceinline__ void store_part(S* to, const Vector<S>& v, int count) {
  if (!to) return;
  if (count == Vector<S>::kSize)
    store_vector(to, v, is_aligned(to));
  else
#pragma unroll
    for (int k = 0; k < Vector<S>::kSize; ++k)
      if (k < count) to[k] = v.element[k];
}

template <class S, bool kTraining>
__global__ void __launch_bounds__(kBatchNormThreads, 2) batch_norm_sums_along_kernel(const BatchNormCall<S> call) {
  using A = accumulation_t<S>;
  constexpr int V = Vector<S>::kSize;
  const std::int64_t parts = (call.inner + V - 1) / V, blocks = call.channels * call.shares;
  for (std::int64_t block = blockIdx.x; block < call.cotangents * blocks; block += gridDim.x) {
    const auto c = call.one_of(block / blocks);
    const std::int64_t channel = block % blocks / c.shares, share = block % c.shares;
    const std::int64_t first = share_begin(c, share), last = share_begin(c, share + 1);
    const A mean = c.mean[channel], r = c.invstd[channel];
    [[maybe_unused]] BatchNormCoefficients<A> fixed;
    if constexpr (!kTraining) fixed = coefficients_of(c, channel, BatchNormSums<A>{});
    ChannelSums<A> sums;

    for (std::int64_t i = threadIdx.x; i < (last - first) * parts; i += blockDim.x) {
      const std::int64_t image = first + i / parts, j = i % parts * V;
      const std::int64_t offset = (image * c.channels + channel) * c.inner + j;
      const RunPart<S> part(c, offset, c.inner - j);
      Vector<S> grad, grad_x;
#pragma unroll
      for (int k = 0; k < V; ++k) {
        if (k >= part.count) break;
        const A u = part.u_at(k), g = part.g_at(k), d = part.d_at(k, mean);
        sums.add(u, g, d);
        if constexpr (!kTraining) write_results(c, k, fixed, u, g, d, grad, grad_x);
      }
      if constexpr (!kTraining) {
        store_part(c.grad ? c.grad + offset : nullptr, grad, part.count);
        store_part(c.grad_x ? c.grad_x + offset : nullptr, grad_x, part.count);
      }
    }
    const A u = block_sum(sums.s.u), g = block_sum(sums.s.g), ug = block_sum(sums.s.ug);
    const A ux = block_sum(sums.s.ux) * r, gx = block_sum(sums.s.gx) * r;
    if (threadIdx.x != 0) continue;
    A* const to = c.partial + share * kBatchNormSums * c.channels + channel;
    to[0] = u;
    to[c.channels] = g;
    to[2 * c.channels] = ug;
    to[3 * c.channels] = ux;
    to[4 * c.channels] = gx;
  }
}

// Threads: x walks along the channels, a vector each, y over rows.
template <class S, bool kTraining>
__global__ void __launch_bounds__(kBatchNormThreads, kTraining ? 2 : 1)
    batch_norm_sums_across_kernel(const BatchNormCall<S> call) {
  using A = accumulation_t<S>;
  constexpr int V = Vector<S>::kSize;
  __shared__ A shared[kBatchNormThreads * V];
  const std::int64_t strips = (call.channels + std::int64_t(blockDim.x) * V - 1) / (std::int64_t(blockDim.x) * V);
  const std::int64_t blocks = strips * call.shares;
  for (std::int64_t block = blockIdx.x; block < call.cotangents * blocks; block += gridDim.x) {
    const auto c = call.one_of(block / blocks);
    const std::int64_t share = block % blocks / strips, channel = (block % strips * blockDim.x + threadIdx.x) * V;
    const std::int64_t first = share_begin(c, share), last = share_begin(c, share + 1), left = c.channels - channel;
    const int width = left < 0 ? 0 : left < V ? static_cast<int>(left) : V;
    A mean[V];
    [[maybe_unused]] BatchNormCoefficients<A> fixed[V];
    ChannelSums<A> sums[V];
#pragma unroll
    for (int k = 0; k < V; ++k) {
      if (k >= width) break;
      mean[k] = c.mean[channel + k];
      if constexpr (!kTraining) fixed[k] = coefficients_of(c, channel + k, BatchNormSums<A>{});
    }
    for (std::int64_t row = first + threadIdx.y; width > 0 && row < last; row += blockDim.y) {
      const std::int64_t offset = row * c.channels + channel;
      const RunPart<S> part(c, offset, left);
      Vector<S> grad, grad_x;
#pragma unroll
      for (int k = 0; k < V; ++k) {
        if (k >= part.count) break;
        const A u = part.u_at(k), g = part.g_at(k), d = part.d_at(k, mean[k]);
        sums[k].add(u, g, d);
        if constexpr (!kTraining) write_results(c, k, fixed[k], u, g, d, grad, grad_x);
      }
      if constexpr (!kTraining) {
        store_part(c.grad ? c.grad + offset : nullptr, grad, part.count);
        store_part(c.grad_x ? c.grad_x + offset : nullptr, grad_x, part.count);
      }
    }
#pragma unroll
    for (int i = 0; i < kBatchNormSums; ++i) {
      __syncthreads();  // shared may still be read
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const auto& s = sums[k].s;
        const A value = i == 0 ? s.u : i == 1 ? s.g : i == 2 ? s.ug : i == 3 ? s.ux : s.gx;
        shared[(threadIdx.y * blockDim.x + threadIdx.x) * V + k] = value;
      }
      for (unsigned half = blockDim.y / 2; half; half /= 2) {
        __syncthreads();
        if (threadIdx.y < half)
          for (int k = 0; k < V; ++k)
            shared[(threadIdx.y * blockDim.x + threadIdx.x) * V + k] +=
                shared[((threadIdx.y + half) * blockDim.x + threadIdx.x) * V + k];
      }
      if (threadIdx.y == 0)
        for (int k = 0; k < width; ++k)
          c.partial[(share * kBatchNormSums + i) * c.channels + channel + k] =
              shared[threadIdx.x * V + k] * (i >= 3 ? c.invstd[channel + k] : A(1));
    }
  }
}

// One warp a channel.
template <class S>
__global__ void __launch_bounds__(kBatchNormThreads, 2) batch_norm_coefficients_kernel(const BatchNormCall<S> call) {
  using A = accumulation_t<S>;
  const std::int64_t warps = blockDim.x / 32;
  for (std::int64_t channel = blockIdx.x * warps + threadIdx.x / 32; channel < call.channels;
       channel += gridDim.x * warps) {
    A weight = 0;
    for (std::int64_t k = 0; k < call.cotangents; ++k) {
      const auto c = call.one_of(k);
      A totals[kBatchNormSums] = {};
      for (std::int64_t share = threadIdx.x % 32; share < c.shares; share += 32)
#pragma unroll
        for (int i = 0; i < kBatchNormSums; ++i)
          totals[i] += c.partial[(share * kBatchNormSums + i) * c.channels + channel];
#pragma unroll
      for (int i = 0; i < kBatchNormSums; ++i) totals[i] = warp_sum(totals[i]);
      if (threadIdx.x % 32 != 0) continue;
      const auto w = coefficients_of(c, channel, {totals[0], totals[1], totals[2], totals[3], totals[4]});
      const A values[kBatchNormCoefficients] = {w.grad_u, w.grad_x, w.grad_1, w.x_u, w.x_g, w.x_x, w.x_1};
#pragma unroll
      for (int i = 0; i < kBatchNormCoefficients; ++i) c.coefficients[i * c.channels + channel] = values[i];
      weight += w.weight;
    }
    if (call.grad_weight && threadIdx.x % 32 == 0) call.grad_weight[channel] = weight;
  }
}

template <class S>
__device__ __forceinline__ BatchNormCoefficients<accumulation_t<S>> stored_coefficients(const BatchNormCall<S>& c,
                                                                                        std::int64_t channel) {
  const auto* w = c.coefficients + channel;
  const std::int64_t n = c.channels;
  return {w[0], w[n], w[2 * n], w[3 * n], w[4 * n], w[5 * n], w[6 * n], accumulation_t<S>(0)};
}

template <class S, bool kAcross>
__global__ void __launch_bounds__(kBatchNormThreads, 2) batch_norm_apply_kernel(const BatchNormCall<S> c) {
  using A = accumulation_t<S>;
  constexpr int V = Vector<S>::kSize;
  const std::int64_t length = kAcross ? c.channels : c.inner, runs = kAcross ? c.images : c.images * c.channels;
  const std::int64_t parts = (length + V - 1) / V, step = std::int64_t(gridDim.x) * blockDim.x;
  for (std::int64_t i = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < runs * parts; i += step) {
    const std::int64_t run = i / parts, j = i % parts * V, offset = run * length + j;
    const RunPart<S> part(c, offset, length - j);
    std::int64_t channel = kAcross ? j : run % c.channels;
    auto w = stored_coefficients(c, channel);
    A mean = c.mean[channel];
    Vector<S> grad, grad_x;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      if (k >= part.count) break;
      if (kAcross && k > 0) {
        w = stored_coefficients(c, ++channel);
        mean = c.mean[channel];
      }
      write_results(c, k, w, part.u_at(k), part.g_at(k), part.d_at(k, mean), grad, grad_x);
    }
    store_part(c.grad ? c.grad + offset : nullptr, grad, part.count);
    store_part(c.grad_x ? c.grad_x + offset : nullptr, grad_x, part.count);
  }
}

// The second sweep of several cotangents, under the statistics of the batch.
template <class S, bool kAcross>
__global__ void __launch_bounds__(kBatchNormThreads, 2) batch_norm_apply_several_kernel(const BatchNormCall<S> call) {
  using A = accumulation_t<S>;
  constexpr int V = Vector<S>::kSize;
  const std::int64_t length = kAcross ? call.channels : call.inner;
  const std::int64_t runs = kAcross ? call.images : call.images * call.channels, parts = (length + V - 1) / V;
  const std::int64_t step = std::int64_t(gridDim.x) * blockDim.x;
  for (std::int64_t i = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < runs * parts; i += step) {
    const std::int64_t run = i / parts, j = i % parts * V, offset = run * length + j;
    const std::int64_t channel = kAcross ? j : run % call.channels;
    const int count = length - j < V ? static_cast<int>(length - j) : V;
    Vector<S> x;
    A d[V], sum[V];
    read_part(call.x + offset, x, count);
#pragma unroll
    for (int e = 0; e < V; ++e) {
      sum[e] = 0;
      if (e < count) d[e] = load(x.element[e]) - call.mean[kAcross ? channel + e : channel];
    }
    for (std::int64_t k = 0; k < call.cotangents; ++k) {
      const auto c = call.one_of(k);
      Vector<S> u, g, grad;
      if (c.u) read_part(c.u + offset, u, count);
      read_part(c.g + offset, g, count);
      auto w = stored_coefficients(c, channel);
#pragma unroll
      for (int e = 0; e < V; ++e) {
        if (e >= count) break;
        if (kAcross && e > 0) w = stored_coefficients(c, channel + e);
        const A v = c.u ? load(u.element[e]) : A(0);
        if (c.grad) grad.element[e] = store<S>(w.grad_u * v + w.grad_x * d[e] + w.grad_1);
        sum[e] += w.x_u * v + (w.x_g * load(g.element[e]) + (w.x_x * d[e] + w.x_1));
      }
      store_part(c.grad ? c.grad + offset : nullptr, grad, count);
    }
    if (!call.grad_x) continue;
#pragma unroll
    for (int e = 0; e < V; ++e)
      if (e < count) x.element[e] = store<S>(sum[e]);
    store_part(call.grad_x + offset, x, count);
  }
}

template <class S>
cudaError_t launch_batch_norm(const BatchNormCall<S>& c, cudaStream_t stream) {
  constexpr int V = Vector<S>::kSize;
  const dim3 flat(kBatchNormThreads);
  const bool across = is_across(c);
  cudaError_t status = cudaSuccess;
  if (across) {
    unsigned wide = 1;
    while (wide < 32 && wide * V < c.channels) wide *= 2;
    const std::int64_t strips = (c.channels + wide * V - 1) / (wide * V);
    const dim3 grid = grid_for(c.cotangents * strips * c.shares), block(wide, kBatchNormThreads / wide);
    status = c.training ? launch(batch_norm_sums_across_kernel<S, true>, grid, block, 0, stream, c)
                        : launch(batch_norm_sums_across_kernel<S, false>, grid, block, 0, stream, c);
  } else {
    const dim3 grid = grid_for(c.cotangents * c.channels * c.shares);
    status = c.training ? launch(batch_norm_sums_along_kernel<S, true>, grid, flat, 0, stream, c)
                        : launch(batch_norm_sums_along_kernel<S, false>, grid, flat, 0, stream, c);
  }
  if (status != cudaSuccess) return status;
  constexpr int warps = kBatchNormThreads / 32;
  status = launch(batch_norm_coefficients_kernel<S>, grid_for((c.channels + warps - 1) / warps), flat, 0, stream, c);
  if (status != cudaSuccess || !c.training || (!c.grad && !c.grad_x)) return status;
  const std::int64_t length = across ? c.channels : c.inner, runs = across ? c.images : c.images * c.channels;
  const dim3 grid = grid_for((runs * ((length + V - 1) / V) + kBatchNormThreads - 1) / kBatchNormThreads);
  if (c.cotangents > 1)
    return across ? launch(batch_norm_apply_several_kernel<S, true>, grid, flat, 0, stream, c)
                  : launch(batch_norm_apply_several_kernel<S, false>, grid, flat, 0, stream, c);
  return across ? launch(batch_norm_apply_kernel<S, true>, grid, flat, 0, stream, c)
                : launch(batch_norm_apply_kernel<S, false>, grid, flat, 0, stream, c);
}

}  // namespace rk::cuda
