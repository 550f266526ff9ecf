// Arithmetic that gives the same bits on every machine: one order of operations, every product that is added to
// something in an explicit fused multiply-add, so that no compiler has a choice.  Sums and products rounded one by one,
// square roots and divisions are exact to half a unit in the last place everywhere.
#pragma once

#include "scalar.h"

namespace rk {

// a b + c, rounded once.
RK_HOST_DEVICE float fused(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return ::fmaf(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

RK_HOST_DEVICE double fused(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  return ::fma(a, b, c);
#else
  return __builtin_fma(a, b, c);
#endif
}

// c0 + x (c1 + x (c2 + ...))
template <class A>
RK_HOST_DEVICE A polynomial(A, double c0) {
  return A(c0);
}
template <class A, class... Rest>
RK_HOST_DEVICE A polynomial(A x, double c0, Rest... rest) {
  return fused(polynomial(x, rest...), x, A(c0));
}

// exp(v) for v <= 0; below the smallest normal number, 0.  See exp_nonpositive in scalar.h.
RK_HOST_DEVICE float exp_fixed(float v) {
  const float low = -87.3f, x = v < low ? low : v;
  const float magic = 12582912.0f;  // 1.5 * 2^23
  const float shifted = fused(x, 1.44269504088896341f, magic), k = shifted - magic;
  const float r = fused(k, 2.12194440e-4f, fused(k, -0.693359375f, x));
  const float e = polynomial(r, 1.0, 1.0, 1.0 / 2, 1.0 / 6, 1.0 / 24, 1.0 / 120, 1.0 / 720, 1.0 / 5040);
  const float scale = bit_cast<float>((bit_cast<std::uint32_t>(shifted) << 23) + 0x3f800000u);  // 2^k
  return v < low ? 0.0f : e * scale;
}

RK_HOST_DEVICE double exp_fixed(double v) {
  const double low = -708.0, x = v < low ? low : v;
  const double magic = 6755399441055744.0;  // 1.5 * 2^52
  const double shifted = fused(x, 1.4426950408889634074, magic), k = shifted - magic;
  const double r = fused(k, -1.90821492927058770002e-10, fused(k, -6.93147180369123816490e-01, x));
  const double e = polynomial(r, 1.0, 1.0, 1.0 / 2, 1.0 / 6, 1.0 / 24, 1.0 / 120, 1.0 / 720, 1.0 / 5040, 1.0 / 40320,
                              1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800);
  const double scale = bit_cast<double>((bit_cast<std::uint64_t>(shifted) << 52) + 0x3ff0000000000000ull);  // 2^k
  return v < low ? 0.0 : e * scale;
}

// (1/s) log((1 + s) / (1 - s)) / 2 from s^2 < 0.0295: the series of artanh(s) / s, cut below half a unit.
RK_HOST_DEVICE float artanh_series(float s2) { return polynomial(s2, 1.0, 1.0 / 3, 1.0 / 5, 1.0 / 7, 1.0 / 9); }
RK_HOST_DEVICE double artanh_series(double s2) {
  return polynomial(s2, 1.0, 1.0 / 3, 1.0 / 5, 1.0 / 7, 1.0 / 9, 1.0 / 11, 1.0 / 13, 1.0 / 15, 1.0 / 17, 1.0 / 19);
}

// log v for a normal v > 0: v = 2^k m with m in [sqrt(1/2), sqrt(2)), and log m = 2 artanh((m - 1) / (m + 1)).
RK_HOST_DEVICE float log_fixed(float v) {
  const std::int32_t bits = bit_cast<std::int32_t>(v);
  const std::int32_t k = (bits - 0x3f3504f3) >> 23, m_bits = bits - k * (1 << 23);
  const float m = bit_cast<float>(m_bits), s = (m - 1.0f) / (m + 1.0f);
  return fused(float(k), 0.693147180559945309417f, 2.0f * s * artanh_series(s * s));
}

RK_HOST_DEVICE double log_fixed(double v) {
  const std::int64_t bits = bit_cast<std::int64_t>(v);
  const std::int64_t k = (bits - 0x3fe6a09e667f3bcd) >> 52, m_bits = bits - k * (std::int64_t{1} << 52);
  const double m = bit_cast<double>(m_bits), s = (m - 1.0) / (m + 1.0);
  return fused(double(k), 0.693147180559945309417, 2.0 * s * artanh_series(s * s));
}

// sin(x) / x and cos(x) from x^2, |x| <= pi/4: Taylor series, cut likewise.
RK_HOST_DEVICE float sine_series(float x2) {
  return polynomial(x2, 1.0, -1.0 / 6, 1.0 / 120, -1.0 / 5040, 1.0 / 362880);
}
RK_HOST_DEVICE double sine_series(double x2) {
  return polynomial(x2, 1.0, -1.0 / 6, 1.0 / 120, -1.0 / 5040, 1.0 / 362880, -1.0 / 39916800, 1.0 / 6227020800,
                    -1.0 / 1307674368000, 1.0 / 355687428096000);
}
RK_HOST_DEVICE float cosine_series(float x2) {
  return polynomial(x2, 1.0, -1.0 / 2, 1.0 / 24, -1.0 / 720, 1.0 / 40320, -1.0 / 3628800);
}
RK_HOST_DEVICE double cosine_series(double x2) {
  return polynomial(x2, 1.0, -1.0 / 2, 1.0 / 24, -1.0 / 720, 1.0 / 40320, -1.0 / 3628800, 1.0 / 479001600,
                    -1.0 / 87178291200, 1.0 / 20922789888000);
}

template <class A>
struct NormalPair {
  A first, second;
};

// Two independent normal numbers from 64 random bits (Box and Muller): r (cos, sin) with r^2 = -2 log u.  u has 24 bits,
// in float and double alike, and is neither 0 nor 1; the angle, 31 bits.  Neither number is ever zero.
template <class A>
RK_HOST_DEVICE NormalPair<A> box_muller(std::uint32_t radius, std::uint32_t angle) {
  const A u = A(float(std::int32_t((radius >> 8) | 1u)) * 0x1p-24f);
  const A r = std::sqrt(A(-2) * log_fixed(u));

  // Which quarter of a turn, and at most 1/8 turn from its middle: an odd number of 2^-32 turns.
  const std::uint32_t quarter = angle >> 30;
  const A x = A((std::int32_t(angle << 2) >> 1) | 1) * A(3.14159265358979323846 / 2147483648.0 / 2);
  const A x2 = x * x, cosine = cosine_series(x2), sine = x * sine_series(x2);
  const bool swapped = quarter & 1u;
  const A a = swapped ? sine : cosine, b = swapped ? cosine : sine;
  return {r * ((quarter + 1u) & 2u ? -a : a), r * (quarter & 2u ? -b : b)};
}

}  // namespace rk
