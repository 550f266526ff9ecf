// Registers as values, between memory and sums.
#pragma once

#include "half.h"
#include "simd.h"

namespace rk::cpu {

// The numbers that an AVX2 register holds.  Written out, because gcc unrolls a loop over lanes with several sums in it and
// then finds no vectors in what is left.
template <class A>
struct LanesOf {
  typedef A type __attribute__((vector_size(32)));
};
template <class A>
using Lanes = typename LanesOf<A>::type;
template <class A>
inline constexpr int kLanes = 32 / sizeof(A);

template <class A>
RK_HOST_DEVICE void load_lanes(Lanes<A>& to, const A* from) {
  std::memcpy(&to, from, sizeof to);
}

// The first n < kLanes lanes, zeros behind them.
template <class S>
RK_HOST_DEVICE void load_lanes(Lanes<accumulation_t<S>>& to, const S* from, std::int64_t n) {
  accumulation_t<S> padded[kLanes<accumulation_t<S>>] = {};
  for (std::int64_t k = 0; k < n; ++k) padded[k] = load(from[k]);
  std::memcpy(&to, padded, sizeof to);
}

// Two registers of adjacent elements.  Of BFloat16, one holds the first of every two, the other the second, so that
// nothing is shuffled between a register of 16-bit numbers and two of floats.
template <class A>
RK_HOST_DEVICE void load_two(Lanes<A>& first, Lanes<A>& second, const A* from) {
  load_lanes<A>(first, from);
  load_lanes<A>(second, from + kLanes<A>);
}
typedef std::uint32_t Words __attribute__((vector_size(32)));
RK_HOST_DEVICE void load_two(Lanes<float>& first, Lanes<float>& second, const BFloat16* from) {
  Words pairs;
  std::memcpy(&pairs, from, sizeof pairs);
  const Words low = pairs << 16, high = pairs & 0xffff0000u;
  std::memcpy(&first, &low, sizeof low);
  std::memcpy(&second, &high, sizeof high);
}
RK_HOST_DEVICE void round_to_bfloat16(Words& upper_halves, const Lanes<float>& v) {  // to nearest, ties to even
  Words bits;
  std::memcpy(&bits, &v, sizeof bits);
  const Words rounded = bits + 0x7fffu + ((bits >> 16) & 1u), nan = bits | 0x400000u;
  upper_halves = v == v ? rounded : nan;
}
RK_HOST_DEVICE void store_two(BFloat16* to, const Lanes<float>& first, const Lanes<float>& second) {
  Words low, high;
  round_to_bfloat16(low, first);
  round_to_bfloat16(high, second);
  const Words pairs = (low >> 16) | (high & 0xffff0000u);
  std::memcpy(to, &pairs, sizeof pairs);
}

template <class A>
RK_HOST_DEVICE A horizontal_sum(const Lanes<A>& lanes) {
  A sum = (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
  if constexpr (kLanes<A> == 8) sum += (lanes[4] + lanes[6]) + (lanes[5] + lanes[7]);
  return sum;
}

// All lanes of two vectors, in double: no addition waits for more than three others.
template <class A>
RK_HOST_DEVICE double horizontal_sum_in_double(const Lanes<A>& a, const Lanes<A>& b) {
  constexpr int L = kLanes<A>;
  double sum[L];
  for (int k = 0; k < L; ++k) sum[k] = double(a[k]) + double(b[k]);
  for (int half = L / 2; half; half /= 2)
    for (int k = 0; k < half; ++k) sum[k] += sum[k + half];
  return sum[0];
}

}  // namespace rk::cpu
