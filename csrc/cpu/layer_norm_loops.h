// The inner loops of layer_norm_backward and its derivative: one piece of one row in the accumulation type.
#pragma once

#include "../math/layer_norm.h"
#include "lane_sums.h"

namespace rk::cpu {

// What a piece of a row is read from; a null gg_weight and gg_bias are both absent, or neither.
template <class A>
struct NormPiece {
  const A *x, *g, *u, *weight, *gg_weight, *gg_bias;
  std::int64_t n;
  A mean, r;

  RK_HOST_DEVICE A normalized(std::int64_t j) const { return (x[j] - mean) * r; }
};

#define RK_LAYER_NORM_LOOPS(A)                                                                                         \
  /* += the sums of w g, w g xh */                                                                                     \
  RK_MULTIVERSION static void slope_sums(const NormPiece<A>& p, double* totals) {                                      \
    norm_sums(NormRow<false, true, A>{p.x, p.g, p.u, p.weight, p.mean, p.r}, p.n, totals);                             \
  }                                                                                                                    \
  /* += the sums of w g, w g xh, u, u xh, u w g */                                                                     \
  RK_MULTIVERSION static void bend_sums(const NormPiece<A>& p, double* totals) {                                       \
    norm_sums(NormRow<true, true, A>{p.x, p.g, p.u, p.weight, p.mean, p.r}, p.n, totals);                              \
  }                                                                                                                    \
  /* += the sums of a g, a g xh */                                                                                     \
  RK_MULTIVERSION static void affine_sums(const NormPiece<A>& p, double* totals) {                                     \
    norm_sums(NormRow<false, true, A>{p.x, p.g, p.u, p.gg_weight, p.mean, p.r}, p.n, totals);                          \
  }                                                                                                                    \
  RK_MULTIVERSION static void write_slopes(const NormPiece<A>& p, NormSlopes<A> c, A* __restrict__ out) {              \
    for (std::int64_t j = 0; j < p.n; ++j)                                                                             \
      out[j] = c.x_g * (p.weight[j] * p.g[j]) + (c.x_x * p.normalized(j) + c.x_one);                                   \
  }                                                                                                                    \
  RK_MULTIVERSION static void write_bends(const NormPiece<A>& p, NormBends<A> c, A* __restrict__ out) {                \
    if (p.gg_weight) {                                                                                                 \
      for (std::int64_t j = 0; j < p.n; ++j)                                                                           \
        out[j] = c.x_u * p.u[j] + (c.x_g * p.weight[j] + p.r * p.gg_weight[j]) * p.g[j] +                              \
                 (c.x_x * p.normalized(j) + c.x_one);                                                                  \
    } else {                                                                                                           \
      for (std::int64_t j = 0; j < p.n; ++j)                                                                           \
        out[j] = c.x_u * p.u[j] + c.x_g * (p.weight[j] * p.g[j]) + (c.x_x * p.normalized(j) + c.x_one);                \
    }                                                                                                                  \
  }                                                                                                                    \
  /* gg_grad = w t + a xh + b */                                                                                       \
  RK_MULTIVERSION static void write_gg_grad(const NormPiece<A>& p, NormBends<A> c, A* __restrict__ out) {              \
    if (p.gg_weight) {                                                                                                 \
      for (std::int64_t j = 0; j < p.n; ++j)                                                                           \
        out[j] = p.weight[j] * (p.r * p.u[j] + (c.t_x * p.normalized(j) + c.t_one)) +                                  \
                 (p.gg_weight[j] * p.normalized(j) + p.gg_bias[j]);                                                    \
    } else {                                                                                                           \
      for (std::int64_t j = 0; j < p.n; ++j)                                                                           \
        out[j] = p.weight[j] * (p.r * p.u[j] + (c.t_x * p.normalized(j) + c.t_one));                                   \
    }                                                                                                                  \
  }                                                                                                                    \
  /* += g t */                                                                                                         \
  RK_MULTIVERSION static void add_weight_bends(const NormPiece<A>& p, NormBends<A> c, A* __restrict__ totals) {        \
    for (std::int64_t j = 0; j < p.n; ++j) totals[j] += p.g[j] * (p.r * p.u[j] + (c.t_x * p.normalized(j) + c.t_one)); \
  }                                                                                                                    \
  /* += g xh */                                                                                                        \
  RK_MULTIVERSION static void add_weight_slopes(const NormPiece<A>& p, A* __restrict__ totals) {                       \
    for (std::int64_t j = 0; j < p.n; ++j) totals[j] += p.g[j] * p.normalized(j);                                      \
  }                                                                                                                    \
  RK_MULTIVERSION static void add_to(A* __restrict__ totals, const A* from, std::int64_t n) {                          \
    for (std::int64_t j = 0; j < n; ++j) totals[j] += from[j];                                                         \
  }

RK_LAYER_NORM_LOOPS(float)
RK_LAYER_NORM_LOOPS(double)
#undef RK_LAYER_NORM_LOOPS

}  // namespace rk::cpu
