// Division of 32-bit indices by a number that the host knows: a multiplication and a shift.
#pragma once

#include <cstdint>

#include "../math/scalar.h"

namespace rk::cuda {

// n / d for 0 <= n < 2^31 and 1 <= d < 2^31.  With d <= 2^l, the multiplier ceil(2^(31 + l) / d) is too large by less
// than d / 2^(31 + l), which n cannot carry into the next quotient.
struct Divisor {
  std::uint32_t d = 1, multiplier = 1u << 31, shift = 31;

  Divisor() = default;
  explicit Divisor(std::int64_t divisor) : d(static_cast<std::uint32_t>(divisor)) {
    std::uint32_t l = 0;
    while ((std::int64_t{1} << l) < divisor) ++l;
    shift = 31 + l;
    multiplier = static_cast<std::uint32_t>(((std::uint64_t{1} << shift) + d - 1) / d);
  }
  RK_HOST_DEVICE std::uint32_t quotient(std::uint32_t n) const {
    return static_cast<std::uint32_t>((std::uint64_t{n} * multiplier) >> shift);
  }
  RK_HOST_DEVICE std::uint32_t remainder(std::uint32_t n) const { return n - quotient(n) * d; }
};

// n / d of numbers that are not negative, in 32 bits where they fit: 64 take several times as long.
RK_HOST_DEVICE std::int64_t quotient(std::int64_t n, std::int64_t d) {
  if (((n | d) >> 32) == 0) return static_cast<std::uint32_t>(n) / static_cast<std::uint32_t>(d);
  return n / d;
}
RK_HOST_DEVICE std::int64_t remainder(std::int64_t n, std::int64_t d) { return n - quotient(n, d) * d; }

}  // namespace rk::cuda
