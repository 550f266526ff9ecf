// GroupNorm where channels are innermost.  A block takes a strip of some groups' channels through all positions of a
// sample; a thread takes one vector of channels, whose sums and coefficients it keeps in registers, at every so many
// positions.  The second sweep runs backwards, through what the caches still hold: strips are as narrow as memory
// allows, and a multiprocessor takes one at a time.
#pragma once

#include <cstdint>
#include <type_traits>

#include "group_norm_call.cuh"

namespace rk::cuda {

constexpr int kStripThreads = 512;   // at most
constexpr int kStripChannels = 128;  // whose numbers fit shared memory; those of wider strips lie in device memory
constexpr int kChannelNumbers = 12;  // a channel: 5 sums, then its coefficients in their place
constexpr int kBatch = 2;            // positions that a thread reads at once
using Batch = std::integral_constant<int, kBatch>;
using Single = std::integral_constant<int, 1>;

// Eight numbers, as read_parameters takes a vector's.
template <class T>
struct Eight {
  using A = T;
  static constexpr int kSize = 8;
};

// Channels of a thread whose sums are added in one round: shared memory is for four.
template <class W>
constexpr int kAtATime = W::kSize < 4 ? W::kSize : 4;

template <bool kSecond, class S, class W>
__global__ void __launch_bounds__(kStripThreads, 1) group_norm_rows_kernel(const GroupNormCall<S> c) {
  using A = accumulation_t<S>;
  constexpr int V = W::kSize, kSums = Sums<kSecond, A>::kCount, kRound = kAtATime<W>;
  RK_DYNAMIC_SHARED(A, memory);  // [kRound * kSums, threads]
  __shared__ __align__(16) A table[kStripChannels * kChannelNumbers];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = c.threads / 32;
  const int width = static_cast<int>(c.width);
  const int column = threadIdx.x % c.lanes, first = threadIdx.x / c.lanes, step = c.threads / c.lanes;
  for (std::int64_t unit = blockIdx.x; unit < c.samples * c.strips; unit += gridDim.x) {
    const std::int64_t sample = c.by_strips.quotient(unit), strip = unit - sample * c.strips, begin = strip * c.strip;
    const int channels = static_cast<int>(c.channels - begin < c.strip ? c.channels - begin : c.strip);
    const std::int64_t base = sample * c.positions * c.channels + begin;
    const std::int64_t first_row = sample * c.groups + strip * c.strip_groups;  // of mean and rstd
    const auto row_of = [&](int channel) { return first_row + c.by_width.quotient(static_cast<unsigned>(channel)); };
    A* const numbers = channels <= kStripChannels ? table : c.scratch + (sample * c.channels + begin) * kChannelNumbers;

    // The vectors at some positions, `rows` elements apart.
    const std::int64_t rows = step * c.channels;
    const auto read = [&](auto& to, const S* from) {
#pragma unroll
      for (W& vector : to) {
        vector = read_vector<W>(from);
        from += rows;
      }
    };
    const auto read_all = [&](auto& x, auto& g, auto& u, std::int64_t at) {
      read(x, c.x + at);
      read(g, c.g + at);
      if (kSecond && c.u)
        read(u, c.u + at);
      else
#pragma unroll
        for (W& vector : u) vector = W{};
    };

    // The sums of a column's threads: first those of one place in all warps, then a warp's, in a tree.
    for (int pass = 0; pass < channels; pass += c.lanes * V) {
      const int channel = pass + column * V;
      const bool there = channel < channels;
      Sums<kSecond, A> s[V];
      if (there) {
        A mean[V];
        int group = static_cast<int>(c.by_width.quotient(static_cast<unsigned>(channel))), next = (group + 1) * width;
#pragma unroll
        for (int k = 0; k < V; ++k) {
          if (channel + k == next) {
            ++group;
            next += width;
          }
          mean[k] = c.mean[first_row + group];
        }
        const auto add = [&](auto count, std::int64_t at) {
          constexpr int kCount = decltype(count)::value;
          W x[kCount], g[kCount], u[kCount];
          read_all(x, g, u, at);
#pragma unroll
          for (int i = 0; i < kCount; ++i)
#pragma unroll
            for (int k = 0; k < V; ++k) s[k].add(x[i][k] - mean[k], g[i][k], u[i][k]);
        };
        std::int64_t at = base + channel + first * c.channels, p = first;
        for (; p + step < c.positions; p += kBatch * step, at += kBatch * rows) add(Batch{}, at);
        if (p < c.positions) add(Single{}, at);
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
    for (int from = warp * width; from < channels; from += warps * width) {
      const A r = c.rstd[row_of(from)], mean = c.mean[row_of(from)];
      const auto sums_of = [&](int channel) {
        Sums<kSecond, A> s;
#pragma unroll
        for (int n = 0; n < kSums; ++n) s.sums[n] = numbers[channel * kChannelNumbers + n];
        return s.of_channel(r);
      };
      GroupSums<kSecond, A> s;
      for (int j = from + lane; j < from + width; j += 32)
        s.add(sums_of(j), c.weight_at(begin + j), kSecond ? c.a_at(begin + j) : A(0));
#pragma unroll
      for (A& sum : s.sums) sum = warp_sum(sum);
      const GroupScalars<kSecond, A> scalars(s, r, c.average);
      for (int j = from + lane; j < from + width; j += 32) {
        const ChannelSums<A> own = sums_of(j);
        const std::int64_t at = sample * c.channels + begin + j;
        if (c.sample_weight) c.sample_weight[at] = scalars.grad_weight(own);
        if (c.sample_bias) c.sample_bias[at] = own.g;
        const ChannelBends<A> d = scalars.of_channel(c.weight_at(begin + j), kSecond ? c.a_at(begin + j) : A(0),
                                                     kSecond ? c.b_at(begin + j) : A(0));
        // Of x - mean in the place of xh.
        const A coefficients[8] = {d.x_g, d.x_x * r, d.x_one, d.x_u, d.t_u, d.t_x * r, d.t_one, mean};
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
        A from[8];
        read_parameters<Eight<A>>(from, numbers + (channel + k) * kChannelNumbers, A(0));
        d[k] = {from[4], from[5], from[6], from[3], from[0], from[1], from[2]};
        mean[k] = from[7];
      }
      const auto write = [&](auto count, std::int64_t at) {
        constexpr int kCount = decltype(count)::value;
        W x[kCount], g[kCount], u[kCount];
        read_all(x, g, u, at);
#pragma unroll
        for (int i = 0; i < kCount; ++i, at += rows) {
          A gg_grad[V], grad_x[V];
#pragma unroll
          for (int k = 0; k < V; ++k) {
            gg_grad[k] = gg_grad_of(d[k], x[i][k] - mean[k], u[i][k]);
            grad_x[k] = grad_x_of<kSecond>(d[k], x[i][k] - mean[k], g[i][k], u[i][k]);
          }
          if (kSecond && c.gg_grad) write_vector<W>(c.gg_grad + at, gg_grad);
          if (c.grad_x) write_vector<W>(c.grad_x + at, grad_x);
        }
      };
      std::int64_t left = ((c.positions - 1 - first) >> (31 - __clz(step))) + 1,  // step is a power of two

          at = base + channel + (first + (left - 1) * step) * c.channels;
      if (left % kBatch) {
        write(Single{}, at);
        --left;
        at -= rows;
      }
      for (at -= rows; left > 0; left -= kBatch, at -= kBatch * rows) write(Batch{}, at);
    }
    __syncthreads();  // the numbers are written again
  }
}

// Shares out rows of channels of whole vectors of V elements.
template <class S>
void set_strips(GroupNormCall<S>& c, int V) {
  const std::int64_t size = static_cast<std::int64_t>(sizeof(S)), blocks = kRowBlocks / 2 * 9 / 10;
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
  c.strip_groups = c.width > 0 ? c.strip / c.width : 0;
  c.strips = c.strip > 0 ? (c.channels + c.strip - 1) / c.strip : 0;
  c.by_strips = Divider::of(c.strips);
  c.lanes = 1;
  while (c.lanes < 32 && c.lanes * V < c.strip) c.lanes *= 2;
  c.threads = 32;
  while (c.threads < kStripThreads && c.threads / c.lanes * 8 < c.positions) c.threads *= 2;  // eight vectors a thread
}

template <class S, class W>
cudaError_t launch_rows(const GroupNormCall<S>& c, cudaStream_t stream) {
  using A = accumulation_t<S>;
  const int sums = c.second ? Sums<true, A>::kCount : Sums<false, A>::kCount;
  return launch(c.second ? group_norm_rows_kernel<true, S, W> : group_norm_rows_kernel<false, S, W>,
                grid_for(c.samples * c.strips), dim3(c.threads), sizeof(A) * kAtATime<W> * sums * c.threads, stream, c);
}

}  // namespace rk::cuda
