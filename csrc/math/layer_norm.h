// y = w xh + b with xh = (x - mean) r over the D elements of a row: first and second derivative.
//
//   P(v)             = v - mean(v) - xh mean(v xh)                      r P is the symmetric matrix d(xh)/dx
//   backward         grad_x = r P(w g)      grad_w = sum g xh      grad_b = sum g
//   double           gg_grad     = w t + a xh + b,   t = r P(u)
//   backward         grad_x      = -r^2/D [K xh + S(w g xh) P(u) + S(u xh) P(w g)] + r P(a g),   K = S(u P(w g))
//                    grad_weight = sum g t
//
// where u, a, b are the cotangents of the backward's grad_x, grad_w, grad_b, and S is the sum over a row.  Without a mean
// (RMSNorm) the mean drops out of xh and of P.  A group of GroupNorm is such a row, whose w, a and b are one number a
// channel.
#pragma once

#include "scalar.h"

namespace rk {

// S(.) of a row.  Sums of v alone are zero for RMSNorm.
template <class A>
struct NormSums {
  A u, ux, g, gx, ug;  // u, u xh, w g, w g xh, u w g
  A ag, agx;           // a g, a g xh
};

// grad_x = x_g w g + x_x xh + x_one
template <class A>
struct NormSlopes {
  A x_g, x_x, x_one;
};

template <class A>
RK_HOST_DEVICE NormSlopes<A> norm_slopes(A sum_g, A sum_gx, A r, A count) {
  return {r, -r * (sum_gx / count), -r * (sum_g / count)};
}

// t = r u + t_x xh + t_one,   grad_x = x_u u + x_g w g + x_x xh + x_one + r a g
template <class A>
struct NormBends {
  A t_x, t_one, x_u, x_g, x_x, x_one;
};

template <class A>
RK_HOST_DEVICE NormBends<A> norm_bends(const NormSums<A>& s, A r, A count) {
  const A mean_u = s.u / count, mean_ux = s.ux / count, mean_g = s.g / count, mean_gx = s.gx / count;
  const A mean_k = s.ug / count - mean_u * mean_g - mean_ux * mean_gx;
  const A q = r * r;
  NormBends<A> c;
  c.t_x = -r * mean_ux;
  c.t_one = -r * mean_u;
  c.x_u = -q * mean_gx;
  c.x_g = -q * mean_ux;
  c.x_x = -q * (mean_k - A(2) * mean_ux * mean_gx) - r * (s.agx / count);
  c.x_one = q * (mean_gx * mean_u + mean_ux * mean_g) - r * (s.ag / count);
  return c;
}

}  // namespace rk
