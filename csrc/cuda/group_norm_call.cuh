// What the kernels of group_norm_backward and its derivative share: their arguments, and what an element adds to the sums
// of its channel and gets from its coefficients.
#pragma once

#include <cstdint>

#include "../math/group_norm.h"
#include "layer_norm_rows.cuh"

namespace rk::cuda {

// Division by a number that the host knows.
struct Divider {
  std::int64_t divisor;
  std::uint64_t inverse;  // 2^64 / divisor, rounded up; 0 for 1

  static Divider of(std::int64_t divisor) {
    return {divisor, divisor > 1 ? ~std::uint64_t{0} / static_cast<std::uint64_t>(divisor) + 1 : 0};
  }
  __device__ __forceinline__ unsigned quotient(unsigned x) const {
    return inverse ? static_cast<unsigned>(__umul64hi(x, inverse)) : x;
  }
  __device__ __forceinline__ std::int64_t quotient(std::int64_t x) const {
    return x >> 32 ? x / divisor : quotient(static_cast<unsigned>(x));
  }
};

template <class S>
struct GroupNormCall {
  using A = accumulation_t<S>;
  bool second;
  std::int64_t samples, channels, positions, groups;
  std::int64_t width;                        // channels of a group
  std::int64_t strip, strip_groups, strips;  // channels are innermost: of a strip; strips of a sample
  int lanes;                                 // that share a piece of a plane, or a row of a strip
  int slots, slot_vectors, pieces;           // channels are planes: pieces of a plane, their vectors, pieces of a group
  int threads;                               // of a block
  Divider by_width, by_slots, by_strips, by_groups;
  Mean<A> average;                 // over a group
  const S *x, *g, *u;              // [N, C, S] in one layout; u: null if absent
  const A *weight, *a, *b;         // [C] or null
  const A *mean, *rstd;            // [N, groups]
  S *gg_grad, *grad_x;             // outputs or null
  A* scratch;                      // of scratch_size numbers
  A *sample_weight, *sample_bias;  // [N, C] or null
  A *grad_weight, *grad_bias;      // [C] outputs or null

  __device__ __forceinline__ A weight_at(std::int64_t c) const { return weight ? weight[c] : A(1); }
  __device__ __forceinline__ A a_at(std::int64_t c) const { return a ? a[c] : A(0); }
  __device__ __forceinline__ A b_at(std::int64_t c) const { return b ? b[c] : A(0); }
};

// Sums of a channel's elements, of x - mean in the place of xh: multiplied by r at the end.
template <bool kSecond, class A>
struct Sums {
  static constexpr int kCount = kSecond ? 5 : 2;
  A sums[kCount] = {};

  __device__ __forceinline__ void add(A d, A g, A u) {
    sums[0] += g;
    sums[1] += g * d;
    if constexpr (kSecond) {
      sums[2] += u;
      sums[3] += u * d;
      sums[4] += u * g;
    }
  }
  __device__ __forceinline__ ChannelSums<A> of_channel(A r) const {
    if constexpr (kSecond)
      return {sums[0], r * sums[1], sums[2], r * sums[3], sums[4]};
    else
      return {sums[0], r * sums[1], A(0), A(0), A(0)};
  }
};

// A group's sums as an array, for reductions, and from its means to coefficients.
template <bool kSecond, class A>
struct GroupSums {
  static constexpr int kCount = kSecond ? 7 : 2;
  A sums[kCount] = {};

  __device__ __forceinline__ void add(const ChannelSums<A>& channel, A weight, A a) {
    sums[0] += weight * channel.g;
    sums[1] += weight * channel.gx;
    if constexpr (kSecond) {
      sums[2] += channel.u;
      sums[3] += channel.ux;
      sums[4] += weight * channel.ug;
      sums[5] += a * channel.g;
      sums[6] += a * channel.gx;
    }
  }
  __device__ __forceinline__ NormSlopes<A> slopes(A r, const Mean<A>& average) const {
    return norm_slopes(average(sums[0]), average(sums[1]), r, A(1));
  }
  __device__ __forceinline__ NormBends<A> bends(A r, const Mean<A>& average) const {
    if constexpr (kSecond)
      return norm_bends(NormSums<A>{average(sums[2]), average(sums[3]), average(sums[0]), average(sums[1]),
                                    average(sums[4]), average(sums[5]), average(sums[6])},
                        r, A(1));
    else
      return {};
  }
};

// What the results of a channel's elements, and of its parameters, need to know of the group.
template <bool kSecond, class A>
struct GroupScalars {
  A r;
  NormBends<A> bends;
  NormSlopes<A> slopes;

  __device__ __forceinline__ GroupScalars(const GroupSums<kSecond, A>& sums, A rstd, const Mean<A>& average)
      : r(rstd), bends(sums.bends(rstd, average)), slopes(sums.slopes(rstd, average)) {}

  __device__ __forceinline__ ChannelBends<A> of_channel(A weight, A a, A b) const {
    if constexpr (kSecond) return channel_bends(bends, r, weight, a, b);
    const ChannelSlopes<A> s = channel_slopes(slopes, weight);
    return {A(0), A(0), A(0), A(0), s.g, s.x, s.one};
  }
  __device__ __forceinline__ A grad_weight(const ChannelSums<A>& channel) const {
    return kSecond ? channel.weight_bend(bends, r) : channel.gx;
  }
};

template <class A>
__device__ __forceinline__ A gg_grad_of(const ChannelBends<A>& c, A xh, A u) {
  return c.t_u * u + (c.t_x * xh + c.t_one);
}

template <bool kSecond, class A>
__device__ __forceinline__ A grad_x_of(const ChannelBends<A>& c, A xh, A g, A u) {
  const A first = c.x_g * g + (c.x_x * xh + c.x_one);
  return kSecond ? c.x_u * u + first : first;
}

}  // namespace rk::cuda
