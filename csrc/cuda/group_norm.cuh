// Kernels of group_norm_backward and its derivative.  Formulas: math/group_norm.h.
//
// A unit of work is what one block sums over and then writes: one group of one sample where channels are planes; as many
// groups of one sample as 32 channels hold, at least one, where channels are innermost.  The second sweep finds a unit
// that fits the L2 cache there, so that device memory is read once: x and grad for the backward, and u for its
// derivative.  The sums of a channel are made in `slots`, each by one warp (planes) or one thread (innermost), and
// added in order: no atomics, the same bits on every run.  A second kernel adds the samples' shares of grad_weight.
#pragma once

#include <cstdint>

#include "../math/group_norm.h"
#include "layer_norm.cuh"

namespace rk::cuda {

constexpr std::int64_t kStretch = 1024;  // positions of a plane that a warp takes at a time
constexpr int kUnitThreads = 256, kUnitWarps = kUnitThreads / 32;
constexpr int kUnitGroups = 32;  // at most

template <class S>
struct GroupNormCall {
  using A = accumulation_t<S>;
  bool second;
  std::int64_t samples, channels, positions, groups;
  std::int64_t unit_groups, slots;
  const S *x, *g, *u;              // [N, C, S] in one layout; u: null if absent
  const A *weight, *a, *b;         // [C] or null
  const A *mean, *rstd;            // [N, groups]
  S *gg_grad, *grad_x;             // outputs or null
  A* sums;                         // [N, C, slots, 5]
  A *sample_weight, *sample_bias;  // [N, C] or null
  A *grad_weight, *grad_bias;      // [C] outputs or null

  __device__ __forceinline__ A weight_at(std::int64_t c) const { return weight ? weight[c] : A(1); }
  __device__ __forceinline__ A a_at(std::int64_t c) const { return a ? a[c] : A(0); }
  __device__ __forceinline__ A b_at(std::int64_t c) const { return b ? b[c] : A(0); }
};

// The innermost layout and the number of units and slots follow from the shape alone.
template <class S>
void set_units(GroupNormCall<S>& c, bool innermost) {
  const std::int64_t width = c.channels / c.groups;
  c.unit_groups = innermost && width < kStrip ? kStrip / width : 1;
  if (c.unit_groups > c.groups) c.unit_groups = c.groups;
  c.slots = innermost ? kUnitWarps : c.positions > 0 ? (c.positions + kStretch - 1) / kStretch : 1;
}

template <class A>
__device__ __forceinline__ void add_element(ChannelSums<A>& s, A x, A g, A u, A mean, A r) {
  const A xh = (x - mean) * r;
  s.g += g;
  s.gx += g * xh;
  s.u += u;
  s.ux += u * xh;
  s.ug += u * g;
}

template <class A>
__device__ __forceinline__ void put_sums(A* to, const ChannelSums<A>& s) {
  to[0] = s.g;
  to[1] = s.gx;
  to[2] = s.u;
  to[3] = s.ux;
  to[4] = s.ug;
}

// What the second sweep needs to know of a group.
template <class A>
struct GroupScalars {
  A mean, r;
  NormBends<A> bends;    // of the second derivative
  NormSlopes<A> slopes;  // of the first
};

// One group of one sample by one warp: from the channels' sums to the group's coefficients, in every lane, and to this
// sample's share of the gradients of weight and bias.
template <class S>
__device__ __forceinline__ GroupScalars<accumulation_t<S>> finish_group(const GroupNormCall<S>& c, std::int64_t sample,
                                                                        std::int64_t group) {
  using A = accumulation_t<S>;
  const unsigned lane = threadIdx.x % 32;
  const std::int64_t width = c.channels / c.groups, first = group * width;
  const auto sums_of = [&](std::int64_t channel) {
    const A* from = c.sums + (sample * c.channels + channel) * c.slots * 5;
    ChannelSums<A> s{};
    for (std::int64_t slot = 0; slot < c.slots; ++slot, from += 5) {
      s.g += from[0];
      s.gx += from[1];
      s.u += from[2];
      s.ux += from[3];
      s.ug += from[4];
    }
    return s;
  };
  NormSums<A> s{};
  for (std::int64_t j = lane; j < width; j += 32)
    sums_of(first + j).add_to(s, c.weight_at(first + j), c.a_at(first + j));
  s = {warp_sum(s.u), warp_sum(s.ux), warp_sum(s.g), warp_sum(s.gx), warp_sum(s.ug), warp_sum(s.ag), warp_sum(s.agx)};
  const A count = A(width * c.positions > 0 ? width * c.positions : 1);
  GroupScalars<A> k;
  k.mean = c.mean[sample * c.groups + group];
  k.r = c.rstd[sample * c.groups + group];
  k.slopes = norm_slopes(s.g, s.gx, k.r, count);
  k.bends = norm_bends(s, k.r, count);
  for (std::int64_t j = first + lane; j < first + width; j += 32) {
    const ChannelSums<A> channel = sums_of(j);
    if (c.sample_weight)
      c.sample_weight[sample * c.channels + j] = c.second ? channel.weight_bend(k.bends, k.r) : channel.gx;
    if (c.sample_bias) c.sample_bias[sample * c.channels + j] = channel.g;
  }
  return k;
}

template <class S>
__device__ __forceinline__ ChannelBends<accumulation_t<S>> bends_of(const GroupNormCall<S>& c,
                                                                    const GroupScalars<accumulation_t<S>>& k,
                                                                    std::int64_t channel) {
  using A = accumulation_t<S>;
  if (c.second) return channel_bends(k.bends, k.r, c.weight_at(channel), c.a_at(channel), c.b_at(channel));
  const ChannelSlopes<A> s = channel_slopes(k.slopes, c.weight_at(channel));
  return {A(0), A(0), A(0), A(0), s.g, s.x, s.one};
}

// Channels are planes: the block's warps share stretches of the group's planes.
template <class S>
__global__ void __launch_bounds__(kUnitThreads, 2) group_norm_planes_kernel(const GroupNormCall<S> c) {
  using A = accumulation_t<S>;
  __shared__ GroupScalars<A> scalars;
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const std::int64_t width = c.channels / c.groups;
  for (std::int64_t unit = blockIdx.x; unit < c.samples * c.groups; unit += gridDim.x) {
    const std::int64_t sample = unit / c.groups, group = unit % c.groups;
    const A mean = c.mean[unit], r = c.rstd[unit];
    // f(channel of all samples, slot, offset of the stretch, length)
    const auto for_stretches = [&](const auto& f) {
      for (std::int64_t i = warp; i < width * c.slots; i += kUnitWarps) {
        const std::int64_t channel = group * width + i / c.slots, slot = i % c.slots, begin = slot * kStretch;
        const std::int64_t rest = c.positions - begin;
        f(channel, slot, (sample * c.channels + channel) * c.positions + begin, rest < kStretch ? rest : kStretch);
      }
    };
    const auto run = [&](std::int64_t offset, std::int64_t n, const auto& f) {
      for_run(c.x + offset, c.g + offset, c.u ? c.u + offset : nullptr, n, lane, 32, n >= 32 * Vector<S>::kSize, f);
    };
    for_stretches([&](std::int64_t channel, std::int64_t slot, std::int64_t offset, std::int64_t n) {
      ChannelSums<A> s{};
      run(offset, n, [&](std::int64_t, int count, const auto& at) {
#pragma unroll
        for (int k = 0; k < count; ++k) {
          A x, g, u;
          at(k, x, g, u);
          add_element(s, x, g, u, mean, r);
        }
      });
      s = {warp_sum(s.g), warp_sum(s.gx), warp_sum(s.u), warp_sum(s.ux), warp_sum(s.ug)};
      if (lane == 0) put_sums(c.sums + ((sample * c.channels + channel) * c.slots + slot) * 5, s);
    });
    __syncthreads();
    if (warp == 0) {
      const GroupScalars<A> found = finish_group(c, sample, group);
      if (lane == 0) scalars = found;
    }
    __syncthreads();
    const GroupScalars<A> k = scalars;
    for_stretches([&](std::int64_t channel, std::int64_t, std::int64_t offset, std::int64_t n) {
      const ChannelBends<A> d = bends_of(c, k, channel);
      run(offset, n, [&](std::int64_t j, int count, const auto& at) {
        if (c.gg_grad)
          write_at(c.gg_grad + offset, j, count, [&](int i) {
            A x, g, u;
            at(i, x, g, u);
            return d.t_u * u + (d.t_x * ((x - mean) * r) + d.t_one);
          });
        if (c.grad_x)
          write_at(c.grad_x + offset, j, count, [&](int i) {
            A x, g, u;
            at(i, x, g, u);
            return d.x_u * u + (d.x_g * g + (d.x_x * ((x - mean) * r) + d.x_one));
          });
      });
    });
    __syncthreads();  // the shared scalars are written again
  }
}

// Channels are innermost: a thread takes one channel of a strip, a warp every kUnitWarps-th position.
template <class S>
__global__ void __launch_bounds__(kUnitThreads, 2) group_norm_rows_kernel(const GroupNormCall<S> c) {
  using A = accumulation_t<S>;
  __shared__ GroupScalars<A> scalars[kUnitGroups];
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const std::int64_t width = c.channels / c.groups, units = (c.groups + c.unit_groups - 1) / c.unit_groups;
  for (std::int64_t unit = blockIdx.x; unit < c.samples * units; unit += gridDim.x) {
    const std::int64_t sample = unit / units, first_group = unit % units * c.unit_groups;
    const std::int64_t rest = c.groups - first_group, groups = rest < c.unit_groups ? rest : c.unit_groups;
    const std::int64_t begin = first_group * width, end = begin + groups * width;
    const std::int64_t base = sample * c.positions * c.channels;
    for (std::int64_t channel = begin + lane; channel < end; channel += 32) {
      const std::int64_t row = sample * c.groups + channel / width;
      const A mean = c.mean[row], r = c.rstd[row];
      ChannelSums<A> s{};
      for (std::int64_t p = warp; p < c.positions; p += kUnitWarps) {
        const std::int64_t at = base + p * c.channels + channel;
        add_element(s, A(load(c.x[at])), A(load(c.g[at])), c.u ? A(load(c.u[at])) : A(0), mean, r);
      }
      put_sums(c.sums + ((sample * c.channels + channel) * c.slots + warp) * 5, s);
    }
    __syncthreads();
    for (std::int64_t i = warp; i < groups; i += kUnitWarps) {
      const GroupScalars<A> found = finish_group(c, sample, first_group + i);
      if (lane == 0) scalars[i] = found;
    }
    __syncthreads();
    for (std::int64_t channel = begin + lane; channel < end; channel += 32) {
      const GroupScalars<A> k = scalars[channel / width - first_group];
      const ChannelBends<A> d = bends_of(c, k, channel);
      for (std::int64_t p = warp; p < c.positions; p += kUnitWarps) {
        const std::int64_t at = base + p * c.channels + channel;
        const A xh = (A(load(c.x[at])) - k.mean) * k.r, u = c.u ? A(load(c.u[at])) : A(0);
        if (c.gg_grad) c.gg_grad[at] = store<S>(d.t_u * u + (d.t_x * xh + d.t_one));
        if (c.grad_x) c.grad_x[at] = store<S>(d.x_u * u + (d.x_g * A(load(c.g[at])) + (d.x_x * xh + d.x_one)));
      }
    }
    __syncthreads();
  }
}

template <class S>
cudaError_t launch_group_norm(bool innermost, const GroupNormCall<S>& c, cudaStream_t stream) {
  using A = accumulation_t<S>;
  const std::int64_t units = (c.groups + c.unit_groups - 1) / c.unit_groups;
  cudaError_t status = launch(innermost ? group_norm_rows_kernel<S> : group_norm_planes_kernel<S>,
                              grid_for(c.samples * units), dim3(kUnitThreads), 0, stream, c);
  if (status == cudaSuccess && c.grad_weight)
    status = launch_column_totals<A>(c.sample_weight, c.grad_weight, c.samples, c.channels, stream);
  if (status == cudaSuccess && c.grad_bias)
    status = launch_column_totals<A>(c.sample_bias, c.grad_bias, c.samples, c.channels, stream);
  return status;
}

}  // namespace rk::cuda
