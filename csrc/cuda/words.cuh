// Storage types on the device: numbers of them, 16 bytes of them at once, and the grids that go over them.
//
// 16 bytes, what one thread loads or stores at once, travel as four raw words and become numbers where they are used.
// As an array of 16-bit elements, some of which may be read one by one, they would be merged piece by piece, and each
// merge would wait for the load before it.  Whether 16 bytes may be read at once is therefore known to the compiler, and
// decided on the host, by `aligned`.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../math/scalar.h"
#include "launch.cuh"

namespace rk::cuda {

using rk::accumulation_t;

__device__ __forceinline__ float load(float v) { return v; }
__device__ __forceinline__ double load(double v) { return v; }
__device__ __forceinline__ float load(__half v) { return __half2float(v); }
__device__ __forceinline__ float load(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class S>
__device__ __forceinline__ S store(accumulation_t<S> v) {
  if constexpr (sizeof(S) != 2)
    return v;
  else if constexpr (std::is_same_v<S, __half>)
    return __float2half_rn(v);
  else
    return __float2bfloat16_rn(v);
}

template <class S>
struct Words {
  using A = rk::accumulation_t<S>;
  static constexpr int kSize = 16 / sizeof(S);
  static constexpr int kPerWord = sizeof(S) == 2 ? 2 : 1;
  uint4 raw;

  // The element k, which must be known after unrolling.
  __device__ __forceinline__ A operator[](int k) const {
    if constexpr (sizeof(S) == 8) {
      const std::uint32_t words[2] = {word(2 * k), word(2 * k + 1)};
      return bits_as<double>(words);
    } else if constexpr (sizeof(S) == 4) {
      return bits_as<float>(word(k));
    } else if constexpr (std::is_same_v<S, __nv_bfloat16>) {
      return bits_as<float>(upper_bits(k));
    } else {
      const __half2 pair = bits_as<__half2>(word(k / 2));
      return k % 2 ? __high2float(pair) : __low2float(pair);
    }
  }

  // The bits of an element of 16, in the upper half.
  __device__ __forceinline__ std::uint32_t upper_bits(int k) const {
    static_assert(sizeof(S) == 2);
    return k % 2 ? word(k / 2) & 0xffff0000u : word(k / 2) << 16;
  }

  // values, each rounded to the nearest S.
  static __device__ __forceinline__ Words of(const A (&values)[kSize]) {
    std::uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(S) == 8)
        words[i] = half_of(values[i / 2], i % 2);
      else if constexpr (sizeof(S) == 4)
        words[i] = bits_as<std::uint32_t>(values[i]);
      else if constexpr (std::is_same_v<S, __nv_bfloat16>)
        words[i] = bits_as<std::uint32_t>(__floats2bfloat162_rn(values[2 * i], values[2 * i + 1]));
      else
        words[i] = bits_as<std::uint32_t>(__floats2half2_rn(values[2 * i], values[2 * i + 1]));
    }
    return {make_uint4(words[0], words[1], words[2], words[3])};
  }

 private:
  __device__ __forceinline__ std::uint32_t word(int i) const {
    return i == 0 ? raw.x : i == 1 ? raw.y : i == 2 ? raw.z : raw.w;
  }
  template <class To, class From>
  static __device__ __forceinline__ To bits_as(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(static_cast<void*>(&to), &from, sizeof(To));
    return to;
  }
  static __device__ __forceinline__ std::uint32_t half_of(double value, int high) {
    std::uint32_t words[2];
    memcpy(words, &value, sizeof(value));
    return words[high];
  }
};

// The 16 bytes at `from`; without kAligned element by element.  A thread gets the same elements wherever they lie, so
// that no bit of a sum depends on addresses.
template <bool kAligned, class S>
__device__ __forceinline__ Words<S> load_words(const S* from) {
  if constexpr (kAligned) {
    return {*reinterpret_cast<const uint4*>(from)};
  } else {
    S elements[Words<S>::kSize];
#pragma unroll
    for (int k = 0; k < Words<S>::kSize; ++k) elements[k] = from[k];
    Words<S> result;
    memcpy(&result, elements, sizeof(result));
    return result;
  }
}

// The first `count` elements at `from`, and those of `others` in the place of the rest, by default zeros.
template <class S>
__device__ __forceinline__ Words<S> load_some_words(const S* from, int count, const Words<S>& others = {}) {
  S elements[Words<S>::kSize];
  memcpy(static_cast<void*>(elements), &others, sizeof(others));
#pragma unroll
  for (int k = 0; k < Words<S>::kSize; ++k)
    if (k < count) elements[k] = from[k];
  Words<S> result;
  memcpy(&result, elements, sizeof(result));
  return result;
}

template <bool kAligned, class S>
__device__ __forceinline__ void store_words(S* to, const Words<S>& words) {
  if constexpr (kAligned) {
    __stwb(reinterpret_cast<uint4*>(to), words.raw);  // an assignment may become four, of a word each
  } else {
    S elements[Words<S>::kSize];
    memcpy(static_cast<void*>(elements), &words, sizeof(words));
#pragma unroll
    for (int k = 0; k < Words<S>::kSize; ++k) to[k] = elements[k];
  }
}

template <class S>
__device__ __forceinline__ void store_some_words(S* to, const Words<S>& words, int count) {
  S elements[Words<S>::kSize];
  memcpy(static_cast<void*>(elements), &words, sizeof(words));
#pragma unroll
  for (int k = 0; k < Words<S>::kSize; ++k)
    if (k < count) to[k] = elements[k];
}

// On the host: whether vectors at these pointers, null or not, and at every multiple of `stride` elements from them can
// be loaded at once.
template <class S, class... Pointers>
bool aligned(std::int64_t stride, const Pointers*... pointers) {
  static_assert((std::is_same_v<Pointers, S> && ...));
  return stride % Words<S>::kSize == 0 && ((reinterpret_cast<std::uintptr_t>(pointers) % 16 == 0) && ...);
}

// Threads for a block that works on `columns` elements at a time: a multiple of 32, one vector a thread if that is
// enough.  It depends on the row's length alone, and so does the order of additions.
template <class S>
unsigned threads_for(std::int64_t columns, unsigned most = 256) {
  const std::int64_t vectors = (columns + Words<S>::kSize - 1) / Words<S>::kSize, rounded = (vectors + 31) / 32 * 32;
  return rounded < 32 ? 32 : rounded > most ? most : static_cast<unsigned>(rounded);
}

// A grid of one block for each unit of work, as far as CUDA allows: kernels stride by gridDim.x.
inline dim3 grid_for(std::int64_t units) {
  constexpr std::int64_t most = 2147483647;
  return dim3(static_cast<unsigned>(units < most ? units : most));
}

}  // namespace rk::cuda
