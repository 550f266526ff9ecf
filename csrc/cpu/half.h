// 16-bit storage on the CPU.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../math/scalar.h"

namespace rk::cpu {

struct Half {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

// Conversions in integer arithmetic, which the compiler vectorises for every instruction set.
RK_HOST_DEVICE float load(float v) { return v; }
RK_HOST_DEVICE double load(double v) { return v; }

RK_HOST_DEVICE float load(BFloat16 v) { return bit_cast<float>(std::uint32_t(v.bits) << 16); }

RK_HOST_DEVICE float load(Half v) {
  const std::uint32_t magnitude = std::uint32_t(v.bits & 0x7fffu) << 13, sign = std::uint32_t(v.bits & 0x8000u) << 16;
  const float rescaled = bit_cast<float>(magnitude) * 0x1p112f;  // moves the exponent bias, subnormals included
  const std::uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  return bit_cast<float>(bit_cast<std::uint32_t>(rescaled) | special | sign);
}

template <class S>
RK_HOST_DEVICE S store(float v);
template <class S>
RK_HOST_DEVICE S store(double v);

template <>
RK_HOST_DEVICE float store<float>(float v) {
  return v;
}
template <>
RK_HOST_DEVICE double store<double>(double v) {
  return v;
}

template <>
RK_HOST_DEVICE BFloat16 store<BFloat16>(float v) {  // to nearest, ties to even
  const std::uint32_t bits = bit_cast<std::uint32_t>(v);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {std::uint16_t(v != v ? 0x7fc0u : rounded)};
}

template <>
RK_HOST_DEVICE Half store<Half>(float v) {  // to nearest, ties to even
  const std::uint32_t bits = bit_cast<std::uint32_t>(v), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  // Normal results: rebias the exponent and round the 13 bits that go.
  const std::uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal results: adding 1/2 lines the bits up with the last place and lets the addition round.
  const std::uint32_t subnormal = bit_cast<std::uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  std::uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x47800000u ? 0x7c00u : result;  // 65536 and more; what rounds up to it overflows by itself
  result = magnitude > 0x7f800000u ? 0x7e00u : result;   // NaN
  return {std::uint16_t(sign | result)};
}

// Conversions 16 elements at a time, in the instructions that AVX2 machines have for them: reading float16 takes a third of
// the time of what the compiler makes of the above, writing it a ninth.  The results are the same, but for which NaN a NaN
// becomes.
#if defined(__x86_64__)
#define RK_AVX2 __attribute__((target("avx2,f16c")))

// F16C too, which every processor with AVX2 has, and not every compiler knows by name here.
inline bool has_avx2() { return __builtin_cpu_supports("avx2"); }

RK_AVX2 inline void widen(const Half* from, float* to) {  // 16 of them
  const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm256_castsi256_si128(v)));
  _mm256_storeu_ps(to + 8, _mm256_cvtph_ps(_mm256_extracti128_si256(v, 1)));
}
RK_AVX2 inline void narrow(const float* from, Half* to) {
  const __m128i low = _mm256_cvtps_ph(_mm256_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT);
  const __m128i high = _mm256_cvtps_ph(_mm256_loadu_ps(from + 8), _MM_FROUND_TO_NEAREST_INT);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_set_m128i(high, low));
}
// To nearest, ties to even, in the low half of each element; none is NaN.
RK_AVX2 inline __m256i rounded_bfloat16(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
}
RK_AVX2 inline void narrow(const float* from, BFloat16* to) {
  const __m256 v = _mm256_loadu_ps(from), w = _mm256_loadu_ps(from + 8);
  if (_mm256_movemask_ps(_mm256_cmp_ps(v, w, _CMP_UNORD_Q))) {  // a NaN among them
    for (int i = 0; i < 16; ++i) to[i] = store<BFloat16>(from[i]);
    return;
  }
  const __m256i packed = _mm256_packus_epi32(rounded_bfloat16(v), rounded_bfloat16(w));
  const __m256i in_order = _mm256_permute4x64_epi64(packed, 0xd8);  // packed lane by lane
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), in_order);
}

// As many as there are 16 at a time; how many that was.
RK_AVX2 inline std::int64_t widen_most(const Half* from, float* to, std::int64_t n, std::int64_t ahead) {
  std::int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    __builtin_prefetch(reinterpret_cast<const char*>(from + i) + ahead);
    widen(from + i, to + i);
  }
  return i;
}
template <class S>
RK_AVX2 inline std::int64_t narrow_most(const float* from, S* to, std::int64_t n) {
  std::int64_t i = 0;
  for (; i + 16 <= n; i += 16) narrow(from + i, to + i);
  return i;
}
#undef RK_AVX2
#endif

}  // namespace rk::cpu
