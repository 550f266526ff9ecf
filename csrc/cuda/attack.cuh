// What the kernels of attack_step and attack_start have in common: slabs of rows, rounding inwards.
#pragma once

#include <cstdint>
#include <cstring>

#include "../math/attack_step.h"
#include "column_table.cuh"
#include "divisor.cuh"
#include "words.cuh"

namespace rk::cuda {

// All elements in slabs of whole rows, fewer than 2^31 elements each, so that indices within one have 32 bits.
struct Slabs {
  std::int64_t rows, slab_rows;
  std::uint32_t columns;

  Slabs(std::int64_t rows_, std::uint32_t columns_)
      : rows(rows_), slab_rows(most(columns_) < rows_ ? most(columns_) : rows_), columns(columns_) {}
  std::int64_t count() const { return (rows + slab_rows - 1) / slab_rows; }
  std::int64_t most_elements() const { return slab_rows * columns; }

  __device__ __forceinline__ std::int64_t first_row() const { return blockIdx.y * slab_rows; }
  // Rows of this block's slab.
  __device__ __forceinline__ std::uint32_t rows_here() const {
    const std::int64_t left = rows - first_row();
    return static_cast<std::uint32_t>(left < slab_rows ? left : slab_rows);
  }

 private:
  static std::int64_t most(std::uint32_t columns) { return 2147483647 / columns; }  // at least 1
};

// [low, high], 0 <= low, with ends that S stores: what is rounded within them stays there.
template <class S>
__device__ __forceinline__ Interval<accumulation_t<S>> stored_ends(Interval<accumulation_t<S>> to) {
  if constexpr (std::is_same_v<S, __nv_bfloat16>)
    return {__uint_as_float((__float_as_uint(to.low) + 0xffffu) & 0xffff0000u),
            __uint_as_float(__float_as_uint(to.high) & 0xffff0000u)};
  else if constexpr (std::is_same_v<S, __half>)
    return {load(__float2half_ru(to.low)), load(__float2half_rd(to.high))};
  else
    return to;
}

// The nearest number that S stores within [low, high], 0 <= low: the bits of numbers that are not negative count steps.
template <class S>
__device__ __forceinline__ accumulation_t<S> stored_between(accumulation_t<S> v, Interval<accumulation_t<S>> to) {
  if constexpr (sizeof(S) == 2) {
    S s = store<S>(v);
    const float back = load(s);
    std::uint16_t bits;
    std::memcpy(&bits, &s, sizeof bits);
    bits = static_cast<std::uint16_t>(bits + (back < to.low ? 1 : 0) - (back > to.high ? 1 : 0));
    std::memcpy(static_cast<void*>(&s), &bits, sizeof bits);
    return load(s);
  } else {
    return v;
  }
}

// The nearest number that S stores between v, 0 <= v, and x, a number of S: v rounded towards x.
template <class S>
__device__ __forceinline__ accumulation_t<S> stored_towards(accumulation_t<S> v, accumulation_t<S> x) {
  if constexpr (std::is_same_v<S, __nv_bfloat16>) {
    const std::uint32_t up = v < x ? 0xffffu : 0u;
    return __uint_as_float((__float_as_uint(v) + up) & 0xffff0000u);
  } else {
    return stored_between<S>(v, between(v, x));
  }
}

// The same of a vector.
template <class S>
__device__ __forceinline__ Words<S> words_towards(accumulation_t<S> (&v)[Words<S>::kSize],
                                                  const accumulation_t<S> (&x)[Words<S>::kSize]) {
  if constexpr (std::is_same_v<S, __nv_bfloat16>) {
    std::uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // of each, the upper half
      const std::uint32_t low = __float_as_uint(v[2 * i]) + (v[2 * i] < x[2 * i] ? 0xffffu : 0u);
      const std::uint32_t high = __float_as_uint(v[2 * i + 1]) + (v[2 * i + 1] < x[2 * i + 1] ? 0xffffu : 0u);
      words[i] = low >> 16 | (high & 0xffff0000u);
    }
    return {make_uint4(words[0], words[1], words[2], words[3])};
  } else {
#pragma unroll
    for (int k = 0; k < Words<S>::kSize; ++k) v[k] = stored_towards<S>(v[k], x[k]);
    return Words<S>::of(v);
  }
}

}  // namespace rk::cuda
