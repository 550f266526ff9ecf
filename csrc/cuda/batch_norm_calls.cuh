// What the kernels of batch_norm_double_backward for both layouts share: the call, what they do with 16 bytes of each
// tensor, and the kernel between the sweeps.
#pragma once

#include <cstdint>

#include "../math/batch_norm.h"
#include "reduce.cuh"
#include "words.cuh"

namespace rk::cuda {

constexpr int kBatchNormThreads = 256;
constexpr int kBatchNormSums = 5;

// How much one block takes, and how many there are.  The order of sums follows from it, so that it is the same for
// every device: two blocks for each of an H200's 132 multiprocessors are resident at once and keep its memory busy;
// more would only add partial sums.
struct BatchNormLimits {
  std::int64_t share_vectors = 2048;  // along: of each tensor, in a share, at least
  std::int64_t blocks = 2 * 132;      // shares of a channel along, or blocks across, at most
  std::int64_t block_rows = 2048;     // across: so few rows belong to one block, which needs no second launch
};

template <class S>
struct BatchNormCall {
  using A = rk::accumulation_t<S>;
  std::int64_t images, channels, inner;  // [N, C, S]; "across" if S = 1
  const S *u, *g, *x;                    // u null: zero; x null: nothing depends on it
  S *grad, *grad_x;                      // or null
  std::int64_t cotangents;               // K: u, g and grad are [K, N, C, S]
  const A *weight, *a, *b, *mean, *invstd;
  A* grad_weight;  // or null
  bool training;

  // From here on by arrange().  Rows across are folded until they are whole vectors; `columns` are those of a folded
  // row.
  std::int64_t elements;                   // N C S
  std::int64_t columns;                    // along: C
  std::int64_t vectors;                    // of a plane of S elements, or of a folded row
  std::int64_t items;                      // along: vectors of a channel; across: folded rows that are whole
  std::int64_t shares;                     // of a channel's items, one block each
  std::int64_t share;                      // items in each
  bool edges;                              // along: planes that begin or end within a vector
  int threads_log2;                        // along: of a block's threads
  std::int64_t planes_step, vectors_step;  // along: planes, and vectors beyond, in as many vectors as there are threads
  std::int64_t strips;                     // across: blocks next to each other
  int wide, height;                        // across: threads next to each other, and rows that a block takes at once
  bool fused;                              // one block sees all of a channel
  A* partial;                              // [K, columns, 5, shares]
  A* coefficients;                         // [4 + 3 K, columns]

  // The call for one of the cotangents.  Under fixed statistics grad_x, then zero, is the first one's to write.
  __device__ __forceinline__ BatchNormCall one_of(std::int64_t k) const {
    BatchNormCall c = *this;
    if (c.u) c.u += k * elements;
    c.g += k * elements;
    if (c.grad) c.grad += k * elements;
    if (k > 0) c.grad_x = nullptr;
    c.partial += k * columns * kBatchNormSums * shares;
    return c;
  }
  __device__ __forceinline__ A* partial_of(std::int64_t column, int sum) const {
    return partial + (column * kBatchNormSums + sum) * shares;
  }
  // Before those of each cotangent: mean, grad_u, and, of all cotangents together, x_x and x_1.
  __device__ __forceinline__ A* coefficients_of_all(int i) const { return coefficients + i * columns; }
  // x_u, x_g, grad_1
  __device__ __forceinline__ A* coefficients_of(std::int64_t k, int i) const {
    return coefficients + (4 + 3 * k + i) * columns;
  }
};

template <class S>
bool is_across(const BatchNormCall<S>& c) {
  return c.inner == 1;
}

// A grid with a block for each of the shares of `neighbours`: channels along, strips of them across.
template <class S>
dim3 sweep_grid(const BatchNormCall<S>& c, std::int64_t neighbours, std::int64_t cotangents) {
  const auto at_most = [](std::int64_t n, std::int64_t most) { return static_cast<unsigned>(n < most ? n : most); };
  return dim3(at_most(neighbours, 2147483647), at_most(c.shares, 65535), at_most(cotangents, 65535));
}

// Calls body(neighbour, share, cotangent) for what the block works on.  Neighbouring blocks take neighbouring channels,
// which may have lines of the cache in common.
template <bool kBackwards, class S, class Body>
__device__ __forceinline__ void for_shares(const BatchNormCall<S>& c, std::int64_t neighbours, std::int64_t cotangents,
                                           const Body& body) {
  for (std::int64_t k = blockIdx.z; k < cotangents; k += gridDim.z)
    for (std::int64_t share = blockIdx.y; share < c.shares; share += gridDim.y)
      for (std::int64_t i = blockIdx.x; i < neighbours; i += gridDim.x)
        body(kBackwards ? neighbours - 1 - i : i, kBackwards ? c.shares - 1 - share : share, k);
}

// 16 bytes of each tensor that is read.
template <class S>
struct BatchNormWords {
  Words<S> u, g, x;

  // Elements from `low` to `high`; the others are there as well if kAligned, and zero if not.
  template <bool kAligned>
  __device__ __forceinline__ static Words<S> some(const S* from, int low, int high) {
    if constexpr (kAligned) return load_words<true>(from);
    S elements[Words<S>::kSize] = {};
#pragma unroll
    for (int k = 0; k < Words<S>::kSize; ++k)
      if (k >= low && k < high) elements[k] = from[k];
    Words<S> result;
    memcpy(&result, elements, sizeof(result));
    return result;
  }
  template <bool kAligned>
  __device__ __forceinline__ static BatchNormWords at(const BatchNormCall<S>& c, std::int64_t offset, int low = 0,
                                                      int high = Words<S>::kSize) {
    BatchNormWords w{};
    if (c.u) w.u = some<kAligned>(c.u + offset, low, high);
    w.g = some<kAligned>(c.g + offset, low, high);
    if (c.x) w.x = some<kAligned>(c.x + offset, low, high);
    return w;
  }
};

// Zeros in the place of what the vector has of other planes.
template <class S>
__device__ __forceinline__ void clear_others(BatchNormWords<S>& w, int low, int high) {
  constexpr int n = Words<S>::kPerWord;
  std::uint32_t keep[4] = {};
#pragma unroll
  for (int k = 0; k < 4 * n; ++k)
    if (k >= low && k < high) keep[k / n] |= n == 2 ? 0xffffu << 16 * (k % 2) : 0xffffffffu;
  for (Words<S>* words : {&w.u, &w.g, &w.x}) {
    words->raw.x &= keep[0];
    words->raw.y &= keep[1];
    words->raw.z &= keep[2];
    words->raw.w &= keep[3];
  }
}

// Nobody here reads a result again, so it gives way in the caches to what will be.
template <bool kAligned, class S>
__device__ __forceinline__ void store_result(S* to, const Words<S>& words, int low = 0, int high = Words<S>::kSize) {
  if (kAligned && low == 0 && high == Words<S>::kSize) {
    __stcs(reinterpret_cast<uint4*>(to), words.raw);
    return;
  }
  S elements[Words<S>::kSize];
  memcpy(static_cast<void*>(elements), &words, sizeof(words));
#pragma unroll
  for (int k = 0; k < Words<S>::kSize; ++k)
    if (k >= low && k < high) to[k] = elements[k];
}

// Of one channel.  With fixed statistics only sum u g is needed.
template <bool kTraining, class A>
__device__ __forceinline__ void add_to_sums(A (&sums)[kBatchNormSums], A u, A g, A d) {
  sums[2] += u * g;
  if constexpr (kTraining) {
    sums[0] += u;
    sums[1] += g;
    sums[3] += u * d;
    sums[4] += g * d;
  }
}

// What the results are made of, for one channel.  The coefficient of x - mean in grad is that of g in grad_x.
template <class A>
struct ChannelCoefficients {
  A mean, grad_u, x_g, grad_1, x_u, x_x, x_1;

  __device__ __forceinline__ ChannelCoefficients() {}
  __device__ __forceinline__ ChannelCoefficients(const BatchNormCoefficients<A>& w, A mean)
      : mean(mean), grad_u(w.grad_u), x_g(w.x_g), grad_1(w.grad_1), x_u(w.x_u), x_x(w.x_x), x_1(w.x_1) {}
  __device__ __forceinline__ A grad(A u, A d) const { return grad_u * u + (x_g * d + grad_1); }
  __device__ __forceinline__ A grad_x(A u, A g, A d) const { return x_u * u + (x_g * g + (x_x * d + x_1)); }
};

// The mean that is subtracted: without x, x - mean is zero.
template <class S>
__device__ __forceinline__ rk::accumulation_t<S> center_of(const BatchNormCall<S>& c, std::int64_t channel) {
  return c.x ? c.mean[channel] : rk::accumulation_t<S>(0);
}

// sums: of u, g, u g, u (x - mean), g (x - mean).
template <class S>
__device__ __forceinline__ BatchNormCoefficients<rk::accumulation_t<S>> coefficients_from(
    const BatchNormCall<S>& c, std::int64_t channel, const rk::accumulation_t<S> (&sums)[kBatchNormSums]) {
  using A = rk::accumulation_t<S>;
  const A r = c.invstd[channel];
  return batch_norm_coefficients<A>({sums[0], sums[1], sums[2], sums[3] * r, sums[4] * r}, A(c.images) * A(c.inner),
                                    c.weight ? c.weight[channel] : A(1), r, c.a ? c.a[channel] : A(0),
                                    c.b ? c.b[channel] : A(0), c.training);
}

// Sums over the block; the threads below kBatchNormSums have one each.
template <class A>
__device__ __forceinline__ A block_sums(A (&sums)[kBatchNormSums]) {
  __shared__ A parts[32][kBatchNormSums];
  const unsigned warps = blockDim.x / 32;
#pragma unroll
  for (int i = 0; i < kBatchNormSums; ++i) sums[i] = warp_sum(sums[i]);
  __syncthreads();  // parts may still be read from the sums before
#pragma unroll
  for (int i = 0; i < kBatchNormSums; ++i)
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32][i] = sums[i];
  __syncthreads();
  A total = 0;
  if (threadIdx.x < kBatchNormSums)
    for (unsigned warp = 0; warp < warps; ++warp) total += parts[warp][threadIdx.x];
  return total;
}

// Between the sweeps, one block a channel: its sums over shares, its coefficients, grad_weight.
template <class S>
__global__ void __launch_bounds__(kBatchNormThreads) batch_norm_coefficients_kernel(const BatchNormCall<S> call) {
  using A = rk::accumulation_t<S>;
  __shared__ A totals[kBatchNormSums];
  for (std::int64_t channel = blockIdx.x; channel < call.channels; channel += gridDim.x) {
    A weight = 0, x_x = 0, x_1 = 0;
    for (std::int64_t k = 0; k < call.cotangents; ++k) {
      const auto c = call.one_of(k);
      A sums[kBatchNormSums] = {};
      for (std::int64_t column = channel; column < c.columns; column += c.channels)
        for (std::int64_t share = threadIdx.x; share < c.shares; share += blockDim.x)
#pragma unroll
          for (int s = 0; s < kBatchNormSums; ++s) sums[s] += c.partial_of(column, s)[share];
      const A total = block_sums(sums);
      if (threadIdx.x < kBatchNormSums) totals[threadIdx.x] = total;
      __syncwarp();
      if (threadIdx.x != 0) continue;
      const auto w = coefficients_from(c, channel, totals);
      weight += w.weight;
      x_x += w.x_x;
      x_1 += w.x_1;
      for (std::int64_t column = channel; column < c.columns; column += c.channels) {
        c.coefficients_of(k, 0)[column] = w.x_u;
        c.coefficients_of(k, 1)[column] = w.x_g;
        c.coefficients_of(k, 2)[column] = w.grad_1;
        if (k > 0) continue;
        c.coefficients_of_all(0)[column] = c.mean[channel];
        c.coefficients_of_all(1)[column] = w.grad_u;
      }
    }
    if (threadIdx.x != 0) continue;
    for (std::int64_t column = channel; column < call.columns; column += call.channels) {
      call.coefficients_of_all(2)[column] = x_x;
      call.coefficients_of_all(3)[column] = x_1;
    }
    if (call.grad_weight) call.grad_weight[channel] = weight;
  }
}

template <class S>
cudaError_t launch_coefficients(const BatchNormCall<S>& c, cudaStream_t stream) {
  const std::int64_t rounded = (c.shares + 31) / 32 * 32;
  const dim3 block(static_cast<unsigned>(rounded < kBatchNormThreads ? rounded : kBatchNormThreads));
  return launch(batch_norm_coefficients_kernel<S>, grid_for(c.channels), block, 0, stream, c);
}

}  // namespace rk::cuda
