// Short pieces of a row on their way between storage and the accumulation type.  Each function is compiled for every
// instruction set.
#pragma once

#include "dispatch.h"
#include "simd.h"

namespace rk::cpu {

constexpr int64_t kPiece = 1024;  // elements: a few buffers of this size stay in the L1 cache

RK_MULTIVERSION static inline void read_piece(ScalarType dtype, const void* from, float* to, int64_t n) {
  if (dtype == ScalarType::Half) {
    for (int64_t j = 0; j < n; ++j) to[j] = load(static_cast<const Half*>(from)[j]);
  } else if (dtype == ScalarType::BFloat16) {
    for (int64_t j = 0; j < n; ++j) to[j] = load(static_cast<const BFloat16*>(from)[j]);
  } else {
    std::memcpy(to, from, n * sizeof(float));
  }
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

inline void read_piece(ScalarType, const void* from, double* to, int64_t n) {
  std::memcpy(to, from, n * sizeof(double));
}
inline void write_piece(ScalarType, const double* from, void* to, int64_t n) {
  std::memcpy(to, from, n * sizeof(double));
}

}  // namespace rk::cpu
