// The inner loops of attack_step and attack_start: one piece of a row in the accumulation type.
#pragma once

#include "../math/attack_step.h"
#include "../math/fixed.h"
#include "half.h"
#include "simd.h"

namespace rk::cpu {

// A piece of a row.  `low` and `high` are where 16-bit values may be rounded to; null where nothing is rounded.
template <class A>
struct AttackPiece {
  const A *adversary, *grad, *x;  // grad: null without a step
  const A *eps, *step;            // for each column
  A *out, *low, *high;
  A scale;  // of the steps
  std::int64_t n;
};

template <bool kGrad, class A>
RK_HOST_DEVICE void linf_loop(const AttackPiece<A>& w) {
  const A *adversary = w.adversary, *grad = w.grad, *x = w.x, *eps = w.eps, *step = w.step;
  A* out = w.out;
  for (std::int64_t j = 0; j < w.n; ++j) {
    const Interval<A> to = linf_interval(x[j], eps[j]);
    out[j] = linf_step(adversary[j], kGrad ? grad[j] : A(0), step[j] * w.scale, to);
  }
}

template <bool kGrad, class A>
RK_HOST_DEVICE void l2_loop(const AttackPiece<A>& w, const L2Step<A>& s) {
  const A *adversary = w.adversary, *grad = w.grad, *x = w.x;
  A* out = w.out;
  for (std::int64_t j = 0; j < w.n; ++j) out[j] = l2_step(adversary[j], x[j], kGrad ? grad[j] : A(0), s);
}

#define RK_ATTACK_LOOPS(A)                                                                                        \
  RK_MULTIVERSION static void linf_piece(const AttackPiece<A>& w) {                                               \
    w.grad ? linf_loop<true>(w) : linf_loop<false>(w);                                                            \
  }                                                                                                               \
  RK_MULTIVERSION static void l2_piece(const AttackPiece<A>& w, const L2Step<A>& s) {                             \
    w.grad ? l2_loop<true>(w, s) : l2_loop<false>(w, s);                                                          \
  }                                                                                                               \
  RK_MULTIVERSION static double sum_dd(const A* a, const A* x, std::int64_t n) {                                  \
    return lane_sum<double>(n, [=](std::int64_t j) RK_INLINE_LAMBDA {                                             \
      const double d = double(a[j]) - double(x[j]);                                                               \
      return d * d;                                                                                               \
    });                                                                                                           \
  }                                                                                                               \
  RK_MULTIVERSION static void sum_g(const A* g, const A* a, const A* x, double scale, std::int64_t n, double& gg, \
                                    double& gd) {                                                                 \
    lane_sum2<double>(                                                                                            \
        n, gg, gd,                                                                                                \
        [=](std::int64_t j) RK_INLINE_LAMBDA {                                                                    \
          const double v = double(without_nan(g[j])) * scale;                                                     \
          return v * v;                                                                                           \
        },                                                                                                        \
        [=](std::int64_t j)                                                                                       \
            RK_INLINE_LAMBDA { return double(without_nan(g[j])) * scale * (double(a[j]) - double(x[j])); });      \
  }                                                                                                               \
  RK_MULTIVERSION static A largest_of(const A* g, std::int64_t n) {                                               \
    return lane_max<A>(n, A(0), [=](std::int64_t j) RK_INLINE_LAMBDA { return absolute(without_nan(g[j])); });    \
  }                                                                                                               \
  RK_MULTIVERSION static void l1_sizes(const A* a, const A* g, A* size, std::int64_t n) {                         \
    for (std::int64_t j = 0; j < n; ++j) size[j] = l1_size(a[j], g[j]);                                           \
  }                                                                                                               \
  RK_MULTIVERSION static void l1_move(const A* a, const A* g, A least, A step, A* moved, std::int64_t n) {        \
    for (std::int64_t j = 0; j < n; ++j) moved[j] = l1_moved(a[j], g[j], least, step);                            \
  }                                                                                                               \
  RK_MULTIVERSION static double l1_total(const A* moved, const A* x, A t, std::int64_t n) {                       \
    return lane_sum<double>(                                                                                      \
        n, [=](std::int64_t j) RK_INLINE_LAMBDA { return double(l1_length(moved[j] - x[j], x[j], t)); });         \
  }                                                                                                               \
  RK_MULTIVERSION static double l1_inside(const A* moved, const A* x, A t, std::int64_t n) {                      \
    return lane_sum<double>(n, [=](std::int64_t j) RK_INLINE_LAMBDA {                                             \
      const A v = moved[j] - x[j], size = absolute(v) - t;                                                        \
      return size > A(0) && size < l1_room(v, x[j]) ? 1.0 : 0.0;                                                  \
    });                                                                                                           \
  }                                                                                                               \
  RK_MULTIVERSION static A l1_farthest(const A* moved, const A* x, std::int64_t n) {                              \
    return lane_max<A>(n, A(0), [=](std::int64_t j) RK_INLINE_LAMBDA { return absolute(moved[j] - x[j]); });      \
  }                                                                                                               \
  RK_MULTIVERSION static void l1_piece(const A* moved, const A* x, A t, A* out, std::int64_t n) {                 \
    for (std::int64_t j = 0; j < n; ++j) out[j] = l1_point(moved[j], x[j], t);                                    \
  }                                                                                                               \
  RK_MULTIVERSION static void intervals(const A* a, const A* b, A* low, A* high, std::int64_t n) {                \
    for (std::int64_t j = 0; j < n; ++j) {                                                                        \
      const Interval<A> to = between(a[j], b[j]);                                                                 \
      low[j] = to.low, high[j] = to.high;                                                                         \
    }                                                                                                             \
  }                                                                                                               \
  RK_MULTIVERSION static void linf_intervals(const A* x, const A* eps, A* low, A* high, std::int64_t n) {         \
    for (std::int64_t j = 0; j < n; ++j) {                                                                        \
      const Interval<A> to = linf_interval(x[j], eps[j]);                                                         \
      low[j] = to.low, high[j] = to.high;                                                                         \
    }                                                                                                             \
  }                                                                                                               \
  RK_MULTIVERSION static void draw_uniform(PhiloxKey key, std::uint32_t first, std::int64_t sample,               \
                                           std::uint32_t stream, A* u, std::int64_t blocks) {                     \
    for (std::int64_t b = 0; b < blocks; ++b) {                                                                   \
      const RandomWords w = start_words(key, first + std::uint32_t(b), sample, stream);                           \
      u[4 * b] = symmetric<A>(w.w0), u[4 * b + 1] = symmetric<A>(w.w1);                                           \
      u[4 * b + 2] = symmetric<A>(w.w2), u[4 * b + 3] = symmetric<A>(w.w3);                                       \
    }                                                                                                             \
  }                                                                                                               \
  RK_MULTIVERSION static void draw_normal(PhiloxKey key, std::uint32_t first, std::int64_t sample,                \
                                          std::uint32_t stream, A* u, std::int64_t blocks) {                      \
    for (std::int64_t b = 0; b < blocks; ++b) {                                                                   \
      const RandomWords w = start_words(key, first + std::uint32_t(b), sample, stream);                           \
      const NormalPair<A> p = box_muller<A>(w.w0, w.w1), q = box_muller<A>(w.w2, w.w3);                           \
      u[4 * b] = p.first, u[4 * b + 1] = p.second, u[4 * b + 2] = q.first, u[4 * b + 3] = q.second;               \
    }                                                                                                             \
  }                                                                                                               \
  RK_MULTIVERSION static void draw_laplace(PhiloxKey key, std::uint32_t first, std::int64_t sample,               \
                                           std::uint32_t stream, A* u, std::int64_t blocks) {                     \
    for (std::int64_t b = 0; b < blocks; ++b) {                                                                   \
      const RandomWords w = start_words(key, first + std::uint32_t(b), sample, stream);                           \
      u[4 * b] = laplace<A>(w.w0), u[4 * b + 1] = laplace<A>(w.w1);                                               \
      u[4 * b + 2] = laplace<A>(w.w2), u[4 * b + 3] = laplace<A>(w.w3);                                           \
    }                                                                                                             \
  }                                                                                                               \
  RK_MULTIVERSION static double squares(const A* u, std::int64_t n) {                                             \
    return lane_sum<double>(n, [=](std::int64_t j) RK_INLINE_LAMBDA { return double(u[j]) * double(u[j]); });     \
  }                                                                                                               \
  RK_MULTIVERSION static double sizes(const A* u, std::int64_t n) {                                               \
    return lane_sum<double>(n, [=](std::int64_t j) RK_INLINE_LAMBDA { return double(absolute(u[j])); });          \
  }                                                                                                               \
  RK_MULTIVERSION static void offset_uniform(const A* x, const A* u, const A* eps, A* out, std::int64_t n) {      \
    for (std::int64_t j = 0; j < n; ++j) {                                                                        \
      const Interval<A> to = linf_interval(x[j], eps[j]);                                                         \
      out[j] = clamp(fused(eps[j], u[j], x[j]), to.low, to.high);                                                      \
    }                                                                                                             \
  }                                                                                                               \
  RK_MULTIVERSION static void offset(const A* x, const A* u, A scale, A* out, std::int64_t n) {                   \
    for (std::int64_t j = 0; j < n; ++j) out[j] = clamp(x[j] + scale * u[j], A(0), A(1));                         \
  }

RK_ATTACK_LOOPS(float)
RK_ATTACK_LOOPS(double)
#undef RK_ATTACK_LOOPS

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
