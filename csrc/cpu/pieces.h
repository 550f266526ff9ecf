// Short pieces of a row on their way between storage and the accumulation type.  Each function is compiled for every
// instruction set.
#pragma once

#include <algorithm>

#include "dispatch.h"
#include "simd.h"
#include "stream.h"

namespace rk::cpu {

constexpr int64_t kPiece = 1024;  // elements: a few buffers of this size stay in the L1 cache

// What lies `ahead` bytes further is fetched into the cache meanwhile, if it is 16-bit data: pieces of several tensors in
// turn end before the processor has noticed each of them.
RK_MULTIVERSION static inline void read_piece(ScalarType dtype, const void* from, float* to, int64_t n, int64_t ahead) {
  constexpr int64_t line = 32;  // elements
  if (dtype != ScalarType::Half && dtype != ScalarType::BFloat16) {
    std::memcpy(to, from, n * sizeof(float));
    return;
  }
  const auto convert = [=](const auto* in) RK_INLINE_LAMBDA {
    int64_t i = 0;
    for (; i + line <= n; i += line) {
      __builtin_prefetch(reinterpret_cast<const char*>(in + i) + ahead);
      for (int64_t j = i; j < i + line; ++j) to[j] = load(in[j]);
    }
    for (; i < n; ++i) to[i] = load(in[i]);
  };
  if (dtype == ScalarType::Half)
    convert(static_cast<const Half*>(from));
  else
    convert(static_cast<const BFloat16*>(from));
}
inline void read_piece(ScalarType dtype, const void* from, float* to, int64_t n) {
  read_piece(dtype, from, to, n, 2 * n);  // the piece behind this one
}

RK_MULTIVERSION static inline void write_piece(ScalarType dtype, const float* from, void* to, int64_t n) {
  if (dtype == ScalarType::Half) {
    for (int64_t j = 0; j < n; ++j) static_cast<Half*>(to)[j] = store<Half>(from[j]);
  } else if (dtype == ScalarType::BFloat16) {
    for (int64_t j = 0; j < n; ++j) static_cast<BFloat16*>(to)[j] = store<BFloat16>(from[j]);
  } else {
    std::memcpy(to, from, n * sizeof(float));
  }
}

inline void read_piece(ScalarType, const void* from, double* to, int64_t n, int64_t = 0) {
  std::memcpy(to, from, n * sizeof(double));
}
inline void write_piece(ScalarType, const double* from, void* to, int64_t n) {
  std::memcpy(to, from, n * sizeof(double));
}

}  // namespace rk::cpu
