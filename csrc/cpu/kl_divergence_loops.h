// The inner loops of kl_divergence: one piece of one row in the accumulation type.
#pragma once

#include "../math/kl_divergence.h"
#include "simd.h"

namespace rk::cpu {

// One piece of one row: the first logits, what both say, the cotangents of both gradients.
template <class A>
struct KlPiece {
  const A *a, *p, *q, *d, *u, *v;
  std::int64_t n;
};

#define RK_KL_LOOPS(A)                                                                                                 \
  RK_MULTIVERSION static A kl_largest(const A* z, std::int64_t n) {                                                    \
    return lane_max<A>(n, -std::numeric_limits<A>::infinity(), [=](std::int64_t j) RK_INLINE_LAMBDA { return z[j]; }); \
  }                                                                                                                    \
  RK_MULTIVERSION static A kl_sum_exp(const A* z, std::int64_t n, A inverse_t, A max) {                                \
    return lane_sum<A>(n, [=](std::int64_t j) RK_INLINE_LAMBDA { return exp_nonpositive(z[j] * inverse_t - max); });   \
  }                                                                                                                    \
  RK_MULTIVERSION static void kl_points(const A* a, const A* b, std::int64_t n, KlRow<A> r, A* __restrict__ p,         \
                                        A* __restrict__ q, A* __restrict__ d) {                                        \
    for (std::int64_t j = 0; j < n; ++j) {                                                                             \
      const KlPoint<A> point(r, a[j], b[j]);                                                                           \
      p[j] = point.p;                                                                                                  \
      q[j] = point.q;                                                                                                  \
      d[j] = point.d;                                                                                                  \
    }                                                                                                                  \
  }                                                                                                                    \
  RK_MULTIVERSION static A kl_sum(const KlPiece<A>& w) {                                                               \
    const A *p = w.p, *q = w.q, *d = w.d;                                                                              \
    return lane_sum<A>(w.n, [=](std::int64_t j) RK_INLINE_LAMBDA { return kl_term(p[j], q[j], d[j]); });               \
  }                                                                                                                    \
  RK_MULTIVERSION static A kl_dot(const A* a, const A* b, std::int64_t n) {                                            \
    return lane_sum<A>(n, [=](std::int64_t j) RK_INLINE_LAMBDA { return a[j] * b[j]; });                               \
  }                                                                                                                    \
  /* the largest d of p's first choices */                                                                             \
  RK_MULTIVERSION static A kl_top(const A* a, const A* d, std::int64_t n, KlRow<A> r) {                                \
    const A least = -std::numeric_limits<A>::infinity();                                                               \
    return lane_max<A>(n, least, [=](std::int64_t j) RK_INLINE_LAMBDA { return kl_is_top(r, a[j]) ? d[j] : least; });  \
  }                                                                                                                    \
  /* sum of p e */                                                                                                     \
  RK_MULTIVERSION static A kl_mean(const KlPiece<A>& w, A top) {                                                       \
    const A *p = w.p, *d = w.d;                                                                                        \
    return lane_sum<A>(w.n, [=](std::int64_t j) RK_INLINE_LAMBDA { return p[j] * (d[j] - top); });                     \
  }                                                                                                                    \
  /* sum of (q - p) v: the difference first, since the two sums nearly agree where the predictions do */               \
  RK_MULTIVERSION static A kl_dot_difference(const KlPiece<A>& w) {                                                    \
    const A *p = w.p, *q = w.q, *v = w.v;                                                                              \
    return lane_sum<A>(w.n, [=](std::int64_t j) RK_INLINE_LAMBDA { return (q[j] - p[j]) * v[j]; });                    \
  }                                                                                                                    \
  RK_MULTIVERSION static A kl_cross(const KlPiece<A>& w, A top, KlSums<A> s) {                                         \
    const A *p = w.p, *d = w.d, *u = w.u;                                                                              \
    return lane_sum<A>(w.n,                                                                                            \
                       [=](std::int64_t j) RK_INLINE_LAMBDA { return kl_cross_term(p[j], d[j] - top, u[j], s); });     \
  }                                                                                                                    \
  RK_MULTIVERSION static void kl_slopes(const KlPiece<A>& w, A grad, A top, A mean_e, A inverse_t,                     \
                                        A* __restrict__ grad_p, A* __restrict__ grad_q) {                              \
    const A *p = w.p, *q = w.q, *d = w.d;                                                                              \
    for (std::int64_t j = 0; j < w.n; ++j) {                                                                           \
      grad_p[j] = grad * kl_slope_p(p[j], d[j] - top, mean_e, inverse_t);                                              \
      grad_q[j] = grad * kl_slope_q(p[j], q[j], inverse_t);                                                            \
    }                                                                                                                  \
  }                                                                                                                    \
  RK_MULTIVERSION static void kl_bends(const KlPiece<A>& w, A grad, A top, KlSums<A> s, A inverse_t,                   \
                                       A* __restrict__ grad_p, A* __restrict__ grad_q) {                               \
    const A *p = w.p, *q = w.q, *d = w.d, *u = w.u, *v = w.v;                                                          \
    for (std::int64_t j = 0; j < w.n; ++j) {                                                                           \
      grad_p[j] = grad * kl_bend_p(p[j], d[j] - top, u[j], v[j], s, inverse_t);                                        \
      grad_q[j] = grad * kl_bend_q(p[j], q[j], u[j], v[j], s, inverse_t);                                              \
    }                                                                                                                  \
  }

RK_KL_LOOPS(float)
RK_KL_LOOPS(double)
#undef RK_KL_LOOPS

}  // namespace rk::cpu
