// Short pieces of a row on their way between storage and the accumulation type.  Each function is compiled for every
// instruction set.
#pragma once

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <algorithm>

#include "dispatch.h"
#include "simd.h"

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

// What is this large is written past the caches: memory need not be read for it first, and nothing that is still wanted
// makes room.  By measurement: below a third of 32 MiB, which cores of servers share, the next operator finds the data in
// the cache, which is worth more.
constexpr int64_t kStreamedBytes = int64_t(12) << 20;

// memcpy past the caches; finish_streams comes before another thread reads it.
inline void stream_piece(const void* from, void* to, int64_t bytes) {
  int64_t done = 0;
#if defined(__SSE2__)
  const char* const in = static_cast<const char*>(from);
  char* const out = static_cast<char*>(to);
  done = std::min<int64_t>(bytes, -reinterpret_cast<std::uintptr_t>(out) & 63);  // to a cache line's begin
  std::memcpy(out, in, done);
  for (; done + 64 <= bytes; done += 64) {
    __m128i line[4];
    std::memcpy(line, in + done, sizeof line);
    for (int k = 0; k < 4; ++k) _mm_stream_si128(reinterpret_cast<__m128i*>(out + done) + k, line[k]);
  }
#endif
  std::memcpy(static_cast<char*>(to) + done, static_cast<const char*>(from) + done, bytes - done);
}
inline void finish_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

inline void read_piece(ScalarType, const void* from, double* to, int64_t n, int64_t = 0) {
  std::memcpy(to, from, n * sizeof(double));
}
inline void write_piece(ScalarType, const double* from, void* to, int64_t n) {
  std::memcpy(to, from, n * sizeof(double));
}

}  // namespace rk::cpu
