// The inner loops of attack_start: one piece of a row in the accumulation type.
#pragma once

#include "../math/attack_start.h"
#include "simd.h"

namespace rk::cpu {

#define RK_START_LOOPS(A)                                                                                     \
  RK_MULTIVERSION static void draw_uniform(PhiloxKey key, std::uint32_t first, std::int64_t sample,           \
                                           std::uint32_t stream, A* u, std::int64_t blocks) {                 \
    for (std::int64_t b = 0; b < blocks; ++b) {                                                               \
      const RandomWords w = start_words(key, first + std::uint32_t(b), sample, stream);                       \
      u[4 * b] = symmetric<A>(w.w0), u[4 * b + 1] = symmetric<A>(w.w1);                                       \
      u[4 * b + 2] = symmetric<A>(w.w2), u[4 * b + 3] = symmetric<A>(w.w3);                                   \
    }                                                                                                         \
  }                                                                                                           \
  RK_MULTIVERSION static void draw_normal(PhiloxKey key, std::uint32_t first, std::int64_t sample,            \
                                          std::uint32_t stream, A* u, std::int64_t blocks) {                  \
    for (std::int64_t b = 0; b < blocks; ++b) {                                                               \
      const RandomWords w = start_words(key, first + std::uint32_t(b), sample, stream);                       \
      const NormalPair<A> p = box_muller<A>(w.w0, w.w1), q = box_muller<A>(w.w2, w.w3);                       \
      u[4 * b] = p.first, u[4 * b + 1] = p.second, u[4 * b + 2] = q.first, u[4 * b + 3] = q.second;           \
    }                                                                                                         \
  }                                                                                                           \
  RK_MULTIVERSION static void draw_laplace(PhiloxKey key, std::uint32_t first, std::int64_t sample,           \
                                           std::uint32_t stream, A* u, std::int64_t blocks) {                 \
    for (std::int64_t b = 0; b < blocks; ++b) {                                                               \
      const RandomWords w = start_words(key, first + std::uint32_t(b), sample, stream);                       \
      u[4 * b] = laplace<A>(w.w0), u[4 * b + 1] = laplace<A>(w.w1);                                           \
      u[4 * b + 2] = laplace<A>(w.w2), u[4 * b + 3] = laplace<A>(w.w3);                                       \
    }                                                                                                         \
  }                                                                                                           \
  RK_MULTIVERSION static double squares(const A* u, std::int64_t n) {                                         \
    return lane_sum<double>(n, [=](std::int64_t j) RK_INLINE_LAMBDA { return double(u[j]) * double(u[j]); }); \
  }                                                                                                           \
  RK_MULTIVERSION static double sizes(const A* u, std::int64_t n) {                                           \
    return lane_sum<double>(n, [=](std::int64_t j) RK_INLINE_LAMBDA { return double(absolute(u[j])); });      \
  }                                                                                                           \
  RK_MULTIVERSION static void offset_uniform(const A* x, const A* u, const A* eps, A* out, std::int64_t n) {  \
    for (std::int64_t j = 0; j < n; ++j) {                                                                    \
      const Interval<A> to = linf_interval(x[j], eps[j]);                                                     \
      out[j] = clamp(fused(eps[j], u[j], x[j]), to.low, to.high);                                             \
    }                                                                                                         \
  }                                                                                                           \
  RK_MULTIVERSION static void offset(const A* x, const A* u, A scale, A* out, std::int64_t n) {               \
    for (std::int64_t j = 0; j < n; ++j) out[j] = clamp(x[j] + scale * u[j], A(0), A(1));                     \
  }

RK_START_LOOPS(float)
RK_START_LOOPS(double)
#undef RK_START_LOOPS

}  // namespace rk::cpu
