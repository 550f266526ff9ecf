// Short pieces of a row on their way between storage and the accumulation type.  Each function is compiled for every
// instruction set.
#pragma once

#include <algorithm>

#include "dispatch.h"
#include "half.h"
#include "simd.h"
#include "stream.h"

namespace rk::cpu {

constexpr int64_t kPiece = 1024;  // elements: a few buffers of this size stay in the L1 cache

RK_MULTIVERSION static inline void widen_all(const BFloat16* from, float* to, int64_t n, int64_t ahead) {
  constexpr int64_t line = 32;  // elements
  int64_t i = 0;
  for (; i + line <= n; i += line) {
    __builtin_prefetch(reinterpret_cast<const char*>(from + i) + ahead);
    for (int64_t j = i; j < i + line; ++j) to[j] = load(from[j]);
  }
  for (; i < n; ++i) to[i] = load(from[i]);
}

// 16-bit data that lie `ahead` bytes further are fetched into the cache meanwhile: pieces come from several tensors in
// turn, and each ends before the processor has noticed it.
inline void read_piece(ScalarType dtype, const void* from, float* to, int64_t n, int64_t ahead) {
  if (dtype == ScalarType::BFloat16) return widen_all(static_cast<const BFloat16*>(from), to, n, ahead);
  if (dtype != ScalarType::Half) {
    std::memcpy(to, from, n * sizeof(float));
    return;
  }
  const Half* const in = static_cast<const Half*>(from);
  int64_t done = 0;
#if defined(__x86_64__)
  if (has_avx2()) done = widen_most(in, to, n, ahead);
#endif
  if (done < n) vector_loop(n - done, [=](int64_t j) RK_INLINE_LAMBDA { to[done + j] = load(in[done + j]); });
}
inline void read_piece(ScalarType dtype, const void* from, float* to, int64_t n) {
  read_piece(dtype, from, to, n, 2 * n);  // the piece behind this one
}

template <class S>
inline void narrow_all(const float* from, S* to, int64_t n) {
  int64_t done = 0;
#if defined(__x86_64__)
  if (has_avx2()) done = narrow_most(from, to, n);
#endif
  if (done < n) vector_loop(n - done, [=](int64_t j) RK_INLINE_LAMBDA { to[done + j] = store<S>(from[done + j]); });
}

inline void write_piece(ScalarType dtype, const float* from, void* to, int64_t n) {
  if (dtype == ScalarType::Half)
    narrow_all(from, static_cast<Half*>(to), n);
  else if (dtype == ScalarType::BFloat16)
    narrow_all(from, static_cast<BFloat16*>(to), n);
  else
    std::memcpy(to, from, n * sizeof(float));
}

inline void read_piece(ScalarType, const void* from, double* to, int64_t n, int64_t = 0) {
  std::memcpy(to, from, n * sizeof(double));
}
inline void write_piece(ScalarType, const double* from, void* to, int64_t n) {
  std::memcpy(to, from, n * sizeof(double));
}

}  // namespace rk::cpu
