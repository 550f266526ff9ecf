// The inner loops of attack_step: one piece of a row in the accumulation type.
#pragma once

#include "../math/attack_step.h"
#include "simd.h"

namespace rk::cpu {

// A piece of a row.
template <class A>
struct AttackPiece {
  const A *adversary, *grad, *x;  // grad: null without a step
  const A *eps, *step;            // for each column
  A* out;
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

#define RK_STEP_LOOPS(A)                                                                                          \
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
  }

RK_STEP_LOOPS(float)
RK_STEP_LOOPS(double)
#undef RK_STEP_LOOPS

}  // namespace rk::cpu
