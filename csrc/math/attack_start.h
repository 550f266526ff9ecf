// Random starts x' = clamp(x + u, 0, 1) of an attack, u uniform in the ball ||u|| <= eps of N dimensions:
//
//   linf  independent entries in (-eps, eps)
//   l2    a normal direction, l1: a Laplace one, of length eps v^(1/N), v uniform in (0, 1)
//
// Entry e of sample i comes from word e % 4 of block e / 4 of the stream 2 * restart, its radius from the first word of the
// stream 2 * restart + 1.
#pragma once

#include "attack_step.h"
#include "fixed.h"
#include "philox.h"

namespace rk {

RK_HOST_DEVICE RandomWords start_words(PhiloxKey key, std::uint32_t block, std::int64_t sample, std::uint32_t stream) {
  return philox({block, std::uint32_t(sample), std::uint32_t(std::uint64_t(sample) >> 32), stream}, key);
}

// Uniform in (-1, 1): an odd number of 2^-24, so that float and double have the same.
template <class A>
RK_HOST_DEVICE A symmetric(std::uint32_t word) {
  return A(float(2 * (std::int32_t(word) >> 8) + 1) * 0x1p-24f);
}

// Uniform in (0, 1), likewise.
template <class A>
RK_HOST_DEVICE A unit_interval(std::uint32_t word) {
  return A(float(std::int32_t((word >> 8) | 1u)) * 0x1p-24f);
}

// Laplace-distributed: a random sign times -log u.
template <class A>
RK_HOST_DEVICE A laplace(std::uint32_t word) {
  const A size = -log_fixed(unit_interval<A>(word));
  return word & 1u ? -size : size;
}

// (eps / length of a direction) v^(1/N), v uniform in (0, 1): the radius of a uniformly distributed point.
template <class A>
RK_HOST_DEVICE A start_scale(std::uint32_t word, A eps, double length, std::int64_t columns) {
  const double radius = exp_fixed(log_fixed(unit_interval<double>(word)) / double(columns));
  return length > 0.0 ? A(double(eps) * radius / length) : A(0);
}

}  // namespace rk
