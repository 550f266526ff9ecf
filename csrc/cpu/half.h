// 16-bit storage on the CPU: conversions in integer arithmetic that the compiler vectorises for every instruction set.
#pragma once

#include "../math/scalar.h"

namespace rk::cpu {

struct Half {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

template <class To, class From>
RK_HOST_DEVICE To bit_cast(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To r;
  std::memcpy(&r, &v, sizeof r);
  return r;
}

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

}  // namespace rk::cpu
