// Storage types on the device: conversion to and from the accumulation type, and 16-byte loads and stores.
#pragma once

#include <cstdint>

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

// 16 bytes of a row: what one thread loads or stores at once.
template <class S>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(S);
  S element[kSize];
};

template <class S>
__device__ __forceinline__ bool is_aligned(const S* pointer) {
  return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0;
}

// At once where the address allows it, element by element where not.
template <class S>
__device__ __forceinline__ Vector<S> load_vector(const S* pointer, bool aligned) {
  if (aligned) return *reinterpret_cast<const Vector<S>*>(pointer);
  Vector<S> v;
#pragma unroll
  for (int k = 0; k < Vector<S>::kSize; ++k) v.element[k] = pointer[k];
  return v;
}

template <class S>
__device__ __forceinline__ void store_vector(S* pointer, const Vector<S>& v, bool aligned) {
  if (aligned) {
    *reinterpret_cast<Vector<S>*>(pointer) = v;
    return;
  }
#pragma unroll
  for (int k = 0; k < Vector<S>::kSize; ++k) pointer[k] = v.element[k];
}

// The threads of a block share n adjacent elements of one or two rows and, if kWrite, of an output row, in vectors. A
// thread gets the same elements wherever the rows lie: the order of a sum, and every bit of it, depends on n alone.
//
// `cursor.at(j)` gives an iterator whose next() is what f needs to know of elements j, j + 1, ...: an index, a weight.
//   kWrite: out[j] = f(cursor, x[j], ...), else f(cursor, x[j], ...) only.
template <bool kWrite, int kInputs, class S, class Cursor, class F>
__device__ __forceinline__ void for_elements(const S* const (&x)[kInputs], S* __restrict__ out, std::int64_t n,
                                             const Cursor& cursor, const F& f) {
  constexpr int V = Vector<S>::kSize;
  const auto apply = [&](auto tag, S first, S last) {
    if constexpr (kInputs == 1)
      return f(tag, load(first));
    else
      return f(tag, load(first), load(last));
  };
  const std::int64_t vectors = n / V;
  for (std::int64_t v = threadIdx.x; v < vectors; v += blockDim.x) {
    Vector<S> values[kInputs];
#pragma unroll
    for (int i = 0; i < kInputs; ++i) values[i] = load_vector(x[i] + v * V, is_aligned(x[i]));
    auto tags = cursor.at(v * V);
    [[maybe_unused]] Vector<S> result;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      if constexpr (kWrite)
        result.element[k] = store<S>(apply(tags.next(), values[0].element[k], values[kInputs - 1].element[k]));
      else
        apply(tags.next(), values[0].element[k], values[kInputs - 1].element[k]);
    }
    if constexpr (kWrite) store_vector(out + v * V, result, is_aligned(out));
  }
  for (std::int64_t j = vectors * V + threadIdx.x; j < n; j += blockDim.x) {
    auto tags = cursor.at(j);
    if constexpr (kWrite)
      out[j] = store<S>(apply(tags.next(), x[0][j], x[kInputs - 1][j]));
    else
      apply(tags.next(), x[0][j], x[kInputs - 1][j]);
  }
}

template <class S, class Cursor, class F>
__device__ __forceinline__ void read(const S* x, std::int64_t n, const Cursor& cursor, const F& f) {
  const S* const inputs[1] = {x};
  for_elements<false>(inputs, static_cast<S*>(nullptr), n, cursor, f);
}

template <class S, class Cursor, class F>
__device__ __forceinline__ void read(const S* x, const S* y, std::int64_t n, const Cursor& cursor, const F& f) {
  const S* const inputs[2] = {x, y};
  for_elements<false>(inputs, static_cast<S*>(nullptr), n, cursor, f);
}

template <class S, class Cursor, class F>
__device__ __forceinline__ void transform(const S* x, S* out, std::int64_t n, const Cursor& cursor, const F& f) {
  const S* const inputs[1] = {x};
  for_elements<true>(inputs, out, n, cursor, f);
}

template <class S, class Cursor, class F>
__device__ __forceinline__ void transform(const S* x, const S* y, S* out, std::int64_t n, const Cursor& cursor,
                                          const F& f) {
  const S* const inputs[2] = {x, y};
  for_elements<true>(inputs, out, n, cursor, f);
}

// The cursor that counts.
struct Counter {
  struct Iterator {
    std::int64_t j;
    __device__ __forceinline__ std::int64_t next() { return j++; }
  };
  __device__ __forceinline__ Iterator at(std::int64_t j) const { return {j}; }
};

// Threads for a block that works on `columns` elements at a time: a multiple of 32, one vector a thread if that is
// enough.  It depends on the row's length alone, and so does the order of additions.
template <class S>
unsigned threads_for(std::int64_t columns, unsigned most = 256) {
  const std::int64_t vectors = (columns + Vector<S>::kSize - 1) / Vector<S>::kSize, rounded = (vectors + 31) / 32 * 32;
  return rounded < 32 ? 32 : rounded > most ? most : static_cast<unsigned>(rounded);
}

// A grid of one block for each unit of work, as far as CUDA allows: kernels stride by gridDim.x.
inline dim3 grid_for(std::int64_t units) {
  constexpr std::int64_t most = 2147483647;
  return dim3(static_cast<unsigned>(units < most ? units : most));
}

}  // namespace rk::cuda
