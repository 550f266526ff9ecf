// The inner loops of softmax_cross_entropy: one piece of one row in the accumulation type.
#pragma once

#include "../math/softmax_cross_entropy.h"
#include "simd.h"

namespace rk::cpu {

// One row's numbers.  inverse_t: 1 / temperature.
template <class A>
struct RowState {
  A max, log_sum, total_q, grad, inverse_t, mean_u;
};

#define RK_CROSS_ENTROPY_LOOPS(A)                                                                                     \
  RK_MULTIVERSION static A largest(const A* z, int64_t n) {                                                           \
    return lane_max<A>(n, -std::numeric_limits<A>::infinity(), [=](int64_t j) RK_INLINE_LAMBDA { return z[j]; });     \
  }                                                                                                                   \
  RK_MULTIVERSION static A sum_exp(const A* z, int64_t n, A inverse_t, A max) {                                       \
    return lane_sum<A>(n, [=](int64_t j) RK_INLINE_LAMBDA { return exp_nonpositive(z[j] * inverse_t - max); });       \
  }                                                                                                                   \
  /* sum of q_c and of q_c (max - z_c / T); a null target is one of zeros */                                          \
  RK_MULTIVERSION static void gaps(const A* z, const A* t, int64_t n, A inverse_t, A max, Smoothing<A> s, A& q_sum,   \
                                   A& gap_sum) {                                                                      \
    if (t)                                                                                                            \
      lane_sum2<A>(                                                                                                   \
          n, q_sum, gap_sum, [=](int64_t j) RK_INLINE_LAMBDA { return s.q(t[j]); },                                   \
          [=](int64_t j) RK_INLINE_LAMBDA { return cross_entropy_term(s.q(t[j]), max - z[j] * inverse_t); });         \
    else                                                                                                              \
      lane_sum2<A>(                                                                                                   \
          n, q_sum, gap_sum, [=](int64_t) RK_INLINE_LAMBDA { return s.floor; },                                       \
          [=](int64_t j) RK_INLINE_LAMBDA { return cross_entropy_term(s.floor, max - z[j] * inverse_t); });           \
  }                                                                                                                   \
  RK_MULTIVERSION static void probabilities(const A* z, A* p, int64_t n, RowState<A> r) {                             \
    for (int64_t j = 0; j < n; ++j) p[j] = softmax_probability(z[j] * r.inverse_t, r.max, r.log_sum);                 \
  }                                                                                                                   \
  RK_MULTIVERSION static A dot(const A* a, const A* b, int64_t n) {                                                   \
    return lane_sum<A>(n, [=](int64_t j) RK_INLINE_LAMBDA { return a[j] * b[j]; });                                   \
  }                                                                                                                   \
  RK_MULTIVERSION static A dot_q(const A* t, const A* u, int64_t n, Smoothing<A> s) {                                 \
    return t ? lane_sum<A>(n, [=](int64_t j) RK_INLINE_LAMBDA { return s.q(t[j]) * u[j]; })                           \
             : lane_sum<A>(n, [=](int64_t j) RK_INLINE_LAMBDA { return s.floor * u[j]; });                            \
  }                                                                                                                   \
  RK_MULTIVERSION static A sum_q(const A* t, int64_t n, Smoothing<A> s) {                                             \
    return lane_sum<A>(n, [=](int64_t j) RK_INLINE_LAMBDA { return s.q(t[j]); });                                     \
  }                                                                                                                   \
  RK_MULTIVERSION static void slopes(const A* p, const A* t, A* __restrict__ out, int64_t n, Smoothing<A> s,          \
                                     RowState<A> r) {                                                                 \
    if (t)                                                                                                            \
      for (int64_t j = 0; j < n; ++j) out[j] = r.grad * cross_entropy_slope(p[j], s.q(t[j]), r.total_q, r.inverse_t); \
    else                                                                                                              \
      for (int64_t j = 0; j < n; ++j) out[j] = r.grad * cross_entropy_slope(p[j], s.floor, r.total_q, r.inverse_t);   \
  }                                                                                                                   \
  RK_MULTIVERSION static void bends(const A* p, const A* u, A* __restrict__ out, int64_t n, RowState<A> r) {          \
    for (int64_t j = 0; j < n; ++j)                                                                                   \
      out[j] = r.grad * cross_entropy_bend(p[j], u[j], r.mean_u, r.total_q, r.inverse_t);                             \
  }

RK_CROSS_ENTROPY_LOOPS(float)
RK_CROSS_ENTROPY_LOOPS(double)
#undef RK_CROSS_ENTROPY_LOOPS

}  // namespace rk::cpu
