// What every formula header needs: function qualifiers, and the accumulation type of each storage type.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__CUDACC__)
#define RK_HOST_DEVICE __host__ __device__ __forceinline__
#else
// always_inline: a formula must be compiled with the instruction set of the loop that calls it.
#define RK_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace rk {

// Of sums: float for 16- and 32-bit storage.
template <class S>
using accumulation_t = std::conditional_t<std::is_same_v<S, double>, double, float>;

// std::numeric_limits as constants, which device code may use.
template <class A>
struct Limits {
  static constexpr A largest = std::numeric_limits<A>::max();
  static constexpr A smallest_normal = std::numeric_limits<A>::min();
  static constexpr A epsilon = std::numeric_limits<A>::epsilon();
};

// Infinity and NaN survive every comparison below on purpose: a bad row must stay visible in its result.
template <class A>
RK_HOST_DEVICE A sign(A v) {
  return v > A(0) ? A(1) : (v < A(0) ? A(-1) : v);  // sign(+-0) = +-0, sign(NaN) = NaN
}

template <class A>
RK_HOST_DEVICE bool is_nan(A v) {
  return v != v;
}

template <class A>
RK_HOST_DEVICE A absolute(A v) {
  return v < A(0) ? -v : v;
}

template <>
RK_HOST_DEVICE float absolute(float v) {
#if defined(__CUDA_ARCH__)
  return ::fabsf(v);
#else
  return __builtin_fabsf(v);
#endif
}

template <>
RK_HOST_DEVICE double absolute(double v) {
#if defined(__CUDA_ARCH__)
  return ::fabs(v);
#else
  return __builtin_fabs(v);
#endif
}

// 2^v for v <= 0, and 0 below the smallest normal number: one instruction of a GPU, off by two units in the last place.
// CPU kernels have exp_nonpositive: there this is a call.
RK_HOST_DEVICE float exp2_nonpositive(float v) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
#else
  return v < -126.0f ? 0.0f : std::exp2(v);
#endif
}

RK_HOST_DEVICE double exp2_nonpositive(double v) { return v < -1022.0 ? 0.0 : std::exp2(v); }

template <class A>
inline constexpr A kLog2E = A(1.4426950408889634074);
template <class A>
inline constexpr A kLn2 = A(0.69314718055994530942);

// 1 / v, on a GPU without the steps that correct the last place and without denormal numbers.
RK_HOST_DEVICE float reciprocal(float v) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
#else
  return 1.0f / v;
#endif
}

RK_HOST_DEVICE double reciprocal(double v) { return 1.0 / v; }

// The same bits as another type: std::bit_cast for device code.
template <class To, class From>
RK_HOST_DEVICE To bit_cast(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To r;
  std::memcpy(&r, &v, sizeof r);
  return r;
}

// c0 + x (c1 + x (c2 + ...)); the compiler may fuse products and sums.  See also fixed.h.
template <class A>
RK_HOST_DEVICE A power_series(A, A c0) {
  return c0;
}
template <class A, class... Rest>
RK_HOST_DEVICE A power_series(A x, A c0, Rest... rest) {
  return power_series(x, rest...) * x + c0;
}

// exp(v) for v <= 0, as softmax needs it: never overflows, and 0 below the smallest normal number (float on the CPU: below
// 0.71 of it, where 2^k is no normal number).
//
// On the CPU a polynomial without calls, branches or float-to-integer conversions, so that loops over it become
// vector code: v = k ln 2 + r with |r| <= (ln 2)/2.  In float exp(r) = 1 + r + r^2 q(r) with a minimax polynomial q, off
// by 3e-9, whose terms meet in a tree, since in a chain each multiply-add waits for the one before.  In double the Taylor
// series, cut where its remainder, 0.3466^14 / 14!, falls below half a unit in the last place.
//
// On a GPU 2^(v log2 e): rounding the exponent costs |v| half units, no more than rounding v did before.
RK_HOST_DEVICE float exp_nonpositive(float v) {
#if defined(__CUDA_ARCH__)
  return exp2_nonpositive(v * kLog2E<float>);
#else
  const float most = 88.0f;  // k is -127 there, and the bits of 2^k below are those of zero
  const float h = -v, x = most < h ? most : h;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer, left in the low bits
  const float shifted = magic - x * 1.44269504088896341f;
  const float k = shifted - magic;
  const float r = (-x - k * 0.693359375f) - k * -2.12194440e-4f;  // ln 2 in two parts (Cody and Waite)
  const float r2 = r * r, low_terms = 0.499999934319f + 0.166665203987f * r;
  const float high_terms = 0.0416683908162f + 0.00836874514475f * r + 0.00138145387995f * r2;
  const float e = 1.0f + r * (1.0f + r * (low_terms + r2 * high_terms));
  return e * bit_cast<float>((bit_cast<std::uint32_t>(shifted) << 23) + 0x3f800000u);  // e 2^k
#endif
}

RK_HOST_DEVICE double exp_nonpositive(double v) {
#if defined(__CUDA_ARCH__)
  return ::exp(v);
#else
  const double low = -708.0;
  const double x = v < low ? low : v;
  const double magic = 6755399441055744.0;  // 1.5 * 2^52
  const double shifted = x * 1.4426950408889634074 + magic;
  const double k = shifted - magic;
  const double r = (x - k * 6.93147180369123816490e-01) - k * 1.90821492927058770002e-10;
  const double e = power_series(r, 1.0, 1.0, 1.0 / 2, 1.0 / 6, 1.0 / 24, 1.0 / 120, 1.0 / 720, 1.0 / 5040, 1.0 / 40320,
                                1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800);
  const double scale = bit_cast<double>((bit_cast<std::uint64_t>(shifted) << 52) + 0x3ff0000000000000ull);  // 2^k
  return v < low ? 0.0 : e * scale;
#endif
}

#if !defined(__CUDA_ARCH__)
// log2 v of a positive normal number, to 1e-10 of its value: for what becomes a float.  v = 2^k m with m in
// [sqrt(1/2), sqrt(2)), and log m = 2 artanh(s) with s = (m - 1) / (m + 1), |s| < 0.172, as a series.
RK_HOST_DEVICE double log2_for_float(double v) {
  const std::uint64_t bits = bit_cast<std::uint64_t>(v);
  const std::uint64_t sqrt_half = 0x3fe6a09e667f3bcdull, exponent_bias = 1023ull << 52;
  const std::uint64_t shifted = bits - sqrt_half + exponent_bias;  // its exponent field is k + 1023
  const std::uint64_t m_bits = bits - (shifted & 0xfff0000000000000ull) + exponent_bias;
  const std::uint64_t k_bits = (shifted >> 52) | 0x4330000000000000ull;  // 2^52 + (k + 1023), as a double
  const double m = bit_cast<double>(m_bits), k = bit_cast<double>(k_bits), s = (m - 1.0) / (m + 1.0);
  const double series = power_series(s * s, 2.0, 2.0 / 3, 2.0 / 5, 2.0 / 7, 2.0 / 9, 2.0 / 11);
  return (k - (4503599627370496.0 + 1023.0)) + series * s * 1.4426950408889634074;
}
#endif

// v^p for v >= 0 and p > 0, and for p <= 0 where v is positive; 0 stays 0.
//
// On the CPU, like exp_nonpositive, without calls or branches: 2^(p log2 v) in double, rounded once.
RK_HOST_DEVICE float power(float v, float p) {
#if defined(__CUDA_ARCH__)
  return v == 0.0f ? v : ::powf(v, p);
#else
  double y = double(p) * log2_for_float(v);
  y = y > 1000.0 ? 1000.0 : (y < -1000.0 ? -1000.0 : y);  // beyond the range of a float
  const double magic = 6755399441055744.0;                // as in exp_nonpositive
  const double shifted = y + magic, r = (y - (shifted - magic)) * 6.9314718055994530942e-01;
  const double e = power_series(r, 1.0, 1.0, 1.0 / 2, 1.0 / 6, 1.0 / 24, 1.0 / 120, 1.0 / 720, 1.0 / 5040, 1.0 / 40320);
  const double scale =
      bit_cast<double>((bit_cast<std::uint64_t>(shifted) << 52) + 0x3ff0000000000000ull);  // 2^round(y)
  const float result = float(e * scale);
  return v > 0.0f && v <= Limits<float>::largest ? result : v;  // infinity and NaN are their own powers
#endif
}

RK_HOST_DEVICE double power(double v, double p) { return v == 0.0 ? v : std::pow(v, p); }

// log v for v >= 1, the sum of a softmax.
RK_HOST_DEVICE float log_from_one(float v) {
#if defined(__CUDA_ARCH__)
  return ::logf(v);
#else
  const float result = float(log2_for_float(v) * 6.9314718055994530942e-01);
  return v <= Limits<float>::largest ? result : v;  // infinity and NaN
#endif
}

RK_HOST_DEVICE double log_from_one(double v) { return std::log(v); }

}  // namespace rk
