// Writing past the caches.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace rk::cpu {

// What is this large is written past the caches: memory need not be read for it first, and nothing that is still wanted
// makes room.  By measurement: below a third of 32 MiB, which cores of servers share, the next operator finds the data in
// the cache, which is worth more.
constexpr std::int64_t kStreamedBytes = std::int64_t(12) << 20;

#if defined(__x86_64__)
// From anywhere to whole cache lines, in as few stores as the processor allows: a piece of some hundred bytes waits in
// its store queue then while the next one is computed.
inline void stream_lines_sse2(const char* from, char* to, std::int64_t bytes) {
  for (std::int64_t i = 0; i < bytes; i += 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
}
__attribute__((target("avx"))) inline void stream_lines_avx(const char* from, char* to, std::int64_t bytes) {
  for (std::int64_t i = 0; i < bytes; i += 32)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
}
__attribute__((target("avx512f"))) inline void stream_lines_avx512(const char* from, char* to, std::int64_t bytes) {
  for (std::int64_t i = 0; i < bytes; i += 64)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
}
inline void stream_lines(const char* from, char* to, std::int64_t bytes) {
  if (__builtin_cpu_supports("avx512f"))
    stream_lines_avx512(from, to, bytes);
  else if (__builtin_cpu_supports("avx"))
    stream_lines_avx(from, to, bytes);
  else
    stream_lines_sse2(from, to, bytes);
}
#endif

// memcpy past the caches; finish_streams comes before another thread reads it.
inline void stream_piece(const void* from, void* to, std::int64_t bytes) {
  std::int64_t done = 0;
#if defined(__x86_64__)
  constexpr std::int64_t line = 64;
  const char* const in = static_cast<const char*>(from);
  char* const out = static_cast<char*>(to);
  done = std::min<std::int64_t>(bytes, -reinterpret_cast<std::uintptr_t>(out) & (line - 1));
  std::memcpy(out, in, done);
  const std::int64_t lines = (bytes - done) / line * line;
  stream_lines(in + done, out + done, lines);
  done += lines;
#endif
  std::memcpy(static_cast<char*>(to) + done, static_cast<const char*>(from) + done, bytes - done);
}
inline void finish_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace rk::cpu
