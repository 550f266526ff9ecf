// Adjacent elements of a row that a block keeps in registers, so that it needs memory once for several passes.
#pragma once

#include <cstdint>

#include "words.cuh"

namespace rk::cuda {

// kVectors vectors a thread, blockDim.x vectors apart, which kThreads says if it is known.  A thread gets the same elements
// wherever they lie.
template <class S, int kVectors, unsigned kThreads = 0>
struct Held {
  static constexpr int V = Words<S>::kSize;
  Words<S> words[kVectors];

  // All loads are under way before the first is used.  `aligned`: at once, and `count` a multiple of V.
  __device__ __forceinline__ void load(const S* from, std::uint32_t count, bool aligned) {
    if (aligned) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        words[i] = {make_uint4(0, 0, 0, 0)};
        if (first(i) < count) words[i] = load_words<true>(from + first(i));
      }
    } else {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) words[i] = load_some_words(from + first(i), left(i, count));
    }
  }
  __device__ __forceinline__ void zero() {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) words[i] = {make_uint4(0, 0, 0, 0)};
  }
  // Begins another pass.  As far as the compiler knows, the words are others then: numbers that the pass before has made
  // of them, twice as many registers in 16 bits, are not kept beside them.
  __device__ __forceinline__ void begin_pass() {
    if constexpr (sizeof(S) == 4) return;
    const std::uint32_t zero = gridDim.z - 1;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      words[i].raw.x ^= zero;
      words[i].raw.y ^= zero;
      words[i].raw.z ^= zero;
      words[i].raw.w ^= zero;
    }
  }
  __device__ __forceinline__ void store(S* to, std::uint32_t count, bool aligned) const {
    if (aligned) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i)
        if (first(i) < count) store_words<true>(to + first(i), words[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kVectors; ++i)
        if (first(i) < count) store_some_words(to + first(i), words[i], left(i, count));
    }
  }

  // The place of the first element of vector i, and how many elements of `count` are left from there on.
  static __device__ __forceinline__ std::uint32_t first(int i) {
    return (threadIdx.x + i * (kThreads > 0 ? kThreads : blockDim.x)) * V;
  }
  static __device__ __forceinline__ int left(int i, std::uint32_t count) {
    return static_cast<int>(count) - static_cast<int>(first(i));
  }
};

// Threads of a block that holds `count` elements, kVectors vectors a thread: a multiple of 32.
template <class S, int kVectors>
unsigned threads_to_hold(std::int64_t count, unsigned most) {
  return threads_for<S>((count + kVectors - 1) / kVectors, most);
}

}  // namespace rk::cuda
