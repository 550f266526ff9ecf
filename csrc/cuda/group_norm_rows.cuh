// GroupNorm where channels are innermost.  A block takes a strip of some groups' channels through all positions of a
// sample; a thread takes one vector of channels, whose sums and coefficients it keeps in registers, at every so many
// positions.  The second sweep runs backwards, through what the caches still hold: strips are as narrow as memory
// allows, and a multiprocessor takes one at a time.
#pragma once

#include <cstdint>

#include "group_norm_call.cuh"

namespace rk::cuda {

constexpr int kStripThreads = 512;   // at most
constexpr int kStripChannels = 128;  // whose numbers fit shared memory; those of wider strips lie in device memory
constexpr int kChannelNumbers = 12;  // a channel: 5 sums, then its coefficients in their place
constexpr int kBatch = 2;            // positions that a thread reads at once

// Channels of a thread whose sums are added in one round: shared memory is for four.
template <class W>
constexpr int kAtATime = W::kSize < 4 ? W::kSize : 4;

template <bool kSecond, class S, class W>
__global__ void __launch_bounds__(kStripThreads, 1) group_norm_rows_kernel(const GroupNormCall<S> c) {
  using A = accumulation_t<S>;
  constexpr int V = W::kSize, kSums = Sums<kSecond, A>::kCount, kRound = kAtATime<W>;
  RK_DYNAMIC_SHARED(A, memory);  // [kRound * kSums, threads]
  __shared__ A table[kStripChannels * kChannelNumbers];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = c.threads / 32;
  const int column = threadIdx.x % c.lanes, first = threadIdx.x / c.lanes, step = c.threads / c.lanes;
  for (std::int64_t unit = blockIdx.x; unit < c.samples * c.strips; unit += gridDim.x) {
    const std::int64_t sample = unit / c.strips, begin = (unit - sample * c.strips) * c.strip;
    const int channels = static_cast<int>(c.channels - begin < c.strip ? c.channels - begin : c.strip);
    const std::int64_t first_group = begin / c.width, base = sample * c.positions * c.channels + begin;
    const auto group_of = [&](int channel) { return sample * c.groups + first_group + c.by_width.quotient(channel); };
    A* const numbers = channels <= kStripChannels ? table : c.scratch + (sample * c.channels + begin) * kChannelNumbers;

    const auto read = [&](W(&to)[kBatch], const S* from, std::int64_t p) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        to[i] = p + i * step < c.positions ? read_vector<W>(from + (p + i * step) * c.channels) : W{};
    };
    const auto read_all = [&](W(&x)[kBatch], W(&g)[kBatch], W(&u)[kBatch], std::int64_t at, std::int64_t p) {
      read(x, c.x + at, p);
      read(g, c.g + at, p);
      if (kSecond && c.u)
        read(u, c.u + at, p);
      else
#pragma unroll
        for (int i = 0; i < kBatch; ++i) u[i] = W{};
    };

    // The sums of a column's threads: first those of one place in all warps, then a warp's, in a tree.
    for (int pass = 0; pass < channels; pass += c.lanes * V) {
      const int channel = pass + column * V;
      const bool there = channel < channels;
      Sums<kSecond, A> s[V];
      if (there) {
        A mean[V];
#pragma unroll
        for (int k = 0; k < V; ++k) mean[k] = c.mean[group_of(channel + k)];
        for (std::int64_t p = first; p < c.positions; p += kBatch * step) {
          W x[kBatch], g[kBatch], u[kBatch];
          read_all(x, g, u, base + channel, p);
#pragma unroll
          for (int i = 0; i < kBatch; ++i)
#pragma unroll
            for (int k = 0; k < V; ++k) s[k].add(x[i][k] - mean[k], g[i][k], u[i][k]);
        }
      }
#pragma unroll
      for (int k = 0; k < V; k += kRound) {
#pragma unroll
        for (int i = 0; i < kRound * kSums; ++i) memory[i * c.threads + threadIdx.x] = s[k + i / kSums].sums[i % kSums];
        __syncthreads();
        for (int i = warp; i < kRound * kSums; i += warps) {
          A sum = 0;
#pragma unroll 4
          for (int w = 0; w < warps; ++w) sum += memory[i * c.threads + w * 32 + lane];
#pragma unroll
          for (int d = 16; d; d /= 2)
            if (d >= c.lanes) sum += __shfl_xor_sync(0xffffffffu, sum, d);
          const int to = pass + lane * V + k + i / kSums;
          if (lane < c.lanes && to < channels) numbers[to * kChannelNumbers + i % kSums] = sum;
        }
        __syncthreads();  // memory is written again, and the numbers are read
      }
    }

    // A warp takes a group, from its channels' sums to their coefficients.
    for (int from = warp * static_cast<int>(c.width); from < channels; from += warps * static_cast<int>(c.width)) {
      const A r = c.rstd[group_of(from)];
      const auto sums_of = [&](int channel) {
        Sums<kSecond, A> s;
#pragma unroll
        for (int n = 0; n < kSums; ++n) s.sums[n] = numbers[channel * kChannelNumbers + n];
        return s.of_channel(r);
      };
      GroupSums<kSecond, A> s;
      for (int j = from + lane; j < from + c.width; j += 32)
        s.add(sums_of(j), c.weight_at(begin + j), kSecond ? c.a_at(begin + j) : A(0));
#pragma unroll
      for (A& sum : s.sums) sum = warp_sum(sum);
      const GroupScalars<kSecond, A> scalars(s, r, c.inverse);
      for (int j = from + lane; j < from + c.width; j += 32) {
        const ChannelSums<A> own = sums_of(j);
        const std::int64_t at = sample * c.channels + begin + j;
        if (c.sample_weight) c.sample_weight[at] = scalars.grad_weight(own);
        if (c.sample_bias) c.sample_bias[at] = own.g;
        const ChannelBends<A> d = scalars.of_channel(c.weight_at(begin + j), kSecond ? c.a_at(begin + j) : A(0),
                                                     kSecond ? c.b_at(begin + j) : A(0));
        // Of x - mean in the place of xh.
        const A coefficients[8] = {d.x_g, d.x_x * r, d.x_one, d.x_u, d.t_u, d.t_x * r, d.t_one, c.mean[group_of(from)]};
#pragma unroll
        for (int n = 0; n < 8; ++n) numbers[j * kChannelNumbers + n] = coefficients[n];
      }
    }
    __syncthreads();

    for (int pass = 0; pass < channels; pass += c.lanes * V) {
      const int channel = pass + column * V;
      if (channel >= channels || first >= c.positions) continue;
      ChannelBends<A> d[V];
      A mean[V];
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const A* const from = numbers + (channel + k) * kChannelNumbers;
        d[k] = {from[4], from[5], from[6], from[3], from[0], from[1], from[2]};
        mean[k] = from[7];
      }
      const std::int64_t stride = kBatch * step;
      for (std::int64_t p = first + (c.positions - 1 - first) / stride * stride; p >= 0; p -= stride) {
        W x[kBatch], g[kBatch], u[kBatch];
        read_all(x, g, u, base + channel, p);
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          if (p + i * step >= c.positions) continue;
          const std::int64_t at = base + channel + (p + i * step) * c.channels;
          A gg_grad[V], grad_x[V];
#pragma unroll
          for (int k = 0; k < V; ++k) {
            gg_grad[k] = gg_grad_of(d[k], x[i][k] - mean[k], u[i][k]);
            grad_x[k] = grad_x_of<kSecond>(d[k], x[i][k] - mean[k], g[i][k], u[i][k]);
          }
          if (kSecond && c.gg_grad) write_vector<W>(c.gg_grad + at, gg_grad);
          if (c.grad_x) write_vector<W>(c.grad_x + at, grad_x);
        }
      }
    }
    __syncthreads();  // the numbers are written again
  }
}

// Shares out rows of channels of whole vectors of V elements.
template <class S>
void set_strips(GroupNormCall<S>& c, int V) {
  const std::int64_t size = static_cast<std::int64_t>(sizeof(S)), blocks = kRowBlocks / 2;
  // A strip is 64 bytes of a row; 32 if that gives too few, or more than the cache holds; more where positions are few.
  constexpr std::int64_t tensors = 3, cached = 32 << 20;
  std::int64_t bytes = 64;
  if (c.samples * (c.channels * size / bytes) < blocks || tensors * bytes * c.positions * blocks > cached) bytes = 32;
  while (bytes < 32 * V * size && bytes * c.positions < 4096) bytes *= 2;
  std::int64_t unit = c.width > 0 ? c.width : 1;  // the least that is whole groups and whole vectors
  while (unit % V && c.width > 0) unit += c.width;
  const std::int64_t wanted = bytes / size;
  c.strip = (wanted + unit - 1) / unit * unit;
  if (c.strip > c.channels) c.strip = c.channels;
  c.strips = c.strip > 0 ? (c.channels + c.strip - 1) / c.strip : 0;
  c.lanes = 1;
  while (c.lanes < 32 && c.lanes * V < c.strip) c.lanes *= 2;
  c.threads = 32;
  while (c.threads < kStripThreads && c.threads / c.lanes < c.positions) c.threads *= 2;
}

template <class S, class W>
cudaError_t launch_rows(const GroupNormCall<S>& c, cudaStream_t stream) {
  using A = accumulation_t<S>;
  const int sums = c.second ? Sums<true, A>::kCount : Sums<false, A>::kCount;
  return launch(c.second ? group_norm_rows_kernel<true, S, W> : group_norm_rows_kernel<false, S, W>,
                grid_for(c.samples * c.strips), dim3(c.threads), sizeof(A) * kAtATime<W> * sums * c.threads,
                stream, c);
}

}  // namespace rk::cuda
