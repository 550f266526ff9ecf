// The inner loops of group_norm_backward and its derivative, on pieces in the accumulation type.  A piece is either
// planes, one channel's positions side by side, or rows, one position's channels side by side.
#pragma once

#include "../math/group_norm.h"
#include "lane_sums.h"

namespace rk::cpu {

// Planes: `count` channels of `length` positions each, `stride` apart.  Rows: `count` positions of `length` channels.
template <class A>
struct GroupNormPiece {
  const A *x, *g, *u;
  std::int64_t count, length, stride;
};

// The coefficients of every channel of a sample, as arrays: of ChannelSlopes or ChannelBends.
template <class A>
struct GroupNormCoefficients {
  const A *mean, *r;
  const A *t_u, *t_x, *t_one, *x_u, *x_g, *x_x, *x_one;

  GroupNormCoefficients from(std::int64_t c) const {
    const auto at = [c](const A* p) { return p ? p + c : nullptr; };
    return {mean + c, r + c, at(t_u), at(t_x), at(t_one), at(x_u), at(x_g), at(x_x), at(x_one)};
  }
};

// totals[5 * channel + i] += the i-th of ChannelSums; the last three only where p.u is given.
#define RK_GROUP_NORM_LOOPS(A)                                                                                      \
  RK_MULTIVERSION static void plane_sums(const GroupNormPiece<A>& p, const A* means, const A* rs, double* totals) { \
    for (std::int64_t c = 0; c < p.count; ++c, totals += 5) {                                                       \
      const A *x = p.x + c * p.stride, *g = p.g + c * p.stride, mean = means[c], r = rs[c];                         \
      if (p.u)                                                                                                      \
        norm_sums(NormRow<true, false, A>{x, g, p.u + c * p.stride, nullptr, mean, r}, p.length, totals);           \
      else                                                                                                          \
        norm_sums(NormRow<false, false, A>{x, g, nullptr, nullptr, mean, r}, p.length, totals);                     \
    }                                                                                                               \
  }                                                                                                                 \
  RK_MULTIVERSION static void plane_gg_grad(const GroupNormPiece<A>& p, const GroupNormCoefficients<A>& k,          \
                                            A* __restrict__ out) {                                                  \
    for (std::int64_t c = 0; c < p.count; ++c, out += p.stride) {                                                   \
      const A *x = p.x + c * p.stride, *u = p.u + c * p.stride;                                                     \
      const A mean = k.mean[c], r = k.r[c], t_u = k.t_u[c], t_x = k.t_x[c], t_one = k.t_one[c];                     \
      for (std::int64_t j = 0; j < p.length; ++j) out[j] = t_u * u[j] + (t_x * ((x[j] - mean) * r) + t_one);        \
    }                                                                                                               \
  }                                                                                                                 \
  RK_MULTIVERSION static void plane_grad_x(const GroupNormPiece<A>& p, const GroupNormCoefficients<A>& k,           \
                                           A* __restrict__ out) {                                                   \
    for (std::int64_t c = 0; c < p.count; ++c, out += p.stride) {                                                   \
      const A *x = p.x + c * p.stride, *g = p.g + c * p.stride;                                                     \
      const A mean = k.mean[c], r = k.r[c], x_g = k.x_g[c], x_x = k.x_x[c], x_one = k.x_one[c];                     \
      if (p.u) {                                                                                                    \
        const A *u = p.u + c * p.stride, x_u = k.x_u[c];                                                            \
        for (std::int64_t j = 0; j < p.length; ++j)                                                                 \
          out[j] = x_u * u[j] + (x_g * g[j] + (x_x * ((x[j] - mean) * r) + x_one));                                 \
      } else {                                                                                                      \
        for (std::int64_t j = 0; j < p.length; ++j) out[j] = x_g * g[j] + (x_x * ((x[j] - mean) * r) + x_one);      \
      }                                                                                                             \
    }                                                                                                               \
  }                                                                                                                 \
  /* sums: five arrays of p.length */                                                                               \
  RK_MULTIVERSION static void row_sums(const GroupNormPiece<A>& p, const A* mean, const A* r, A* sums) {            \
    if (p.u)                                                                                                        \
      column_sums<true>(p.count, p.length, p.stride, p.x, p.g, p.u, mean, r, sums);                                 \
    else                                                                                                            \
      column_sums<false, A>(p.count, p.length, p.stride, p.x, p.g, nullptr, mean, r, sums);                         \
  }                                                                                                                 \
  RK_MULTIVERSION static void row_gg_grad(const GroupNormPiece<A>& p, const GroupNormCoefficients<A>& k,            \
                                          A* __restrict__ out) {                                                    \
    for (std::int64_t i = 0; i < p.count; ++i, out += p.stride) {                                                   \
      const A *x = p.x + i * p.stride, *u = p.u + i * p.stride;                                                     \
      for (std::int64_t j = 0; j < p.length; ++j)                                                                   \
        out[j] = k.t_u[j] * u[j] + (k.t_x[j] * ((x[j] - k.mean[j]) * k.r[j]) + k.t_one[j]);                         \
    }                                                                                                               \
  }                                                                                                                 \
  RK_MULTIVERSION static void row_grad_x(const GroupNormPiece<A>& p, const GroupNormCoefficients<A>& k,             \
                                         A* __restrict__ out) {                                                     \
    for (std::int64_t i = 0; i < p.count; ++i, out += p.stride) {                                                   \
      const A *x = p.x + i * p.stride, *g = p.g + i * p.stride;                                                     \
      if (p.u) {                                                                                                    \
        const A* u = p.u + i * p.stride;                                                                            \
        for (std::int64_t j = 0; j < p.length; ++j)                                                                 \
          out[j] = k.x_u[j] * u[j] + (k.x_g[j] * g[j] + (k.x_x[j] * ((x[j] - k.mean[j]) * k.r[j]) + k.x_one[j]));   \
      } else {                                                                                                      \
        for (std::int64_t j = 0; j < p.length; ++j)                                                                 \
          out[j] = k.x_g[j] * g[j] + (k.x_x[j] * ((x[j] - k.mean[j]) * k.r[j]) + k.x_one[j]);                       \
      }                                                                                                             \
    }                                                                                                               \
  }

RK_GROUP_NORM_LOOPS(float)
RK_GROUP_NORM_LOOPS(double)
#undef RK_GROUP_NORM_LOOPS

}  // namespace rk::cpu
