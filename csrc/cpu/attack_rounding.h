// Rounding to 16 bits that stays inside the ball: shared by attack_step and attack_start.
#pragma once

#include "../math/attack_step.h"
#include "half.h"
#include "simd.h"

namespace rk::cpu {

#define RK_INTERVAL_LOOPS(A)                                                                              \
  RK_MULTIVERSION static void intervals(const A* a, const A* b, A* low, A* high, std::int64_t n) {        \
    for (std::int64_t j = 0; j < n; ++j) {                                                                \
      const Interval<A> to = between(a[j], b[j]);                                                         \
      low[j] = to.low, high[j] = to.high;                                                                 \
    }                                                                                                     \
  }                                                                                                       \
  RK_MULTIVERSION static void linf_intervals(const A* x, const A* eps, A* low, A* high, std::int64_t n) { \
    for (std::int64_t j = 0; j < n; ++j) {                                                                \
      const Interval<A> to = linf_interval(x[j], eps[j]);                                                 \
      low[j] = to.low, high[j] = to.high;                                                                 \
    }                                                                                                     \
  }

RK_INTERVAL_LOOPS(float)
RK_INTERVAL_LOOPS(double)
#undef RK_INTERVAL_LOOPS

// The nearest 16-bit number within [low, high], 0 <= low: the bits of numbers that are not negative count steps.
template <class S>
RK_HOST_DEVICE void write_between_loop(const float* from, const float* low, const float* high, S* to, std::int64_t n) {
  for (std::int64_t j = 0; j < n; ++j) {
    S s = store<S>(from[j]);
    const float back = load(s);
    s.bits = std::uint16_t(s.bits + (back < low[j] ? 1 : 0) - (back > high[j] ? 1 : 0));
    to[j] = s;
  }
}

RK_MULTIVERSION static void write_between(const float* from, const float* low, const float* high, Half* to,
                                          std::int64_t n) {
  write_between_loop(from, low, high, to, n);
}
RK_MULTIVERSION static void write_between(const float* from, const float* low, const float* high, BFloat16* to,
                                          std::int64_t n) {
  write_between_loop(from, low, high, to, n);
}

}  // namespace rk::cpu
