// The second derivative of batch normalisation, for one channel of M elements.
//
//   xh = (x - mean) r,   y = w xh + bias,   P(v) = v - mean(v) - xh mean(v xh)
//   first backward:   grad_x = w r P(g)          grad_w = sum g xh          grad_bias = sum g
//   cotangents of these: u, a, b.  Second backward, of L = <u, grad_x> + a grad_w + b grad_bias:
//     K = sum u g - sum u sum g / M - sum u xh sum g xh / M
//     gg_grad = w r P(u) + a xh + b
//     grad_x  = -(w r^2 / M) [K xh + (sum g xh) P(u) + (sum u xh) P(g)] + a r P(g)
//     grad_w  = r K
// With fixed statistics (evaluation mode) P(v) = v, mean and r do not depend on x:
//     gg_grad = w r u + a xh + b,   grad_x = a r g,   grad_w = r sum u g
#pragma once

#include "scalar.h"

namespace rk {

// Sums over the elements of a channel.
template <class A>
struct BatchNormSums {
  A u = 0, g = 0, ug = 0, ux = 0, gx = 0;  // sum u, g, u g, u xh, g xh
};

// gg_grad = grad_u u + grad_x (x - mean) + grad_1,  grad_x = x_u u + x_g g + x_x (x - mean) + x_1
template <class A>
struct BatchNormCoefficients {
  A grad_u, grad_x, grad_1;
  A x_u, x_g, x_x, x_1;
  A weight;  // grad_w
};

template <class A>
RK_HOST_DEVICE BatchNormCoefficients<A> batch_norm_coefficients(const BatchNormSums<A>& s, A count, A w, A r, A a, A b,
                                                                bool training) {
  BatchNormCoefficients<A> c;
  if (!training) {
    c.grad_u = w * r;
    c.grad_x = a * r;
    c.grad_1 = b;
    c.x_u = c.x_x = c.x_1 = A(0);
    c.x_g = a * r;
    c.weight = r * s.ug;
    return c;
  }
  const A mean_u = s.u / count, mean_g = s.g / count, mean_ux = s.ux / count, mean_gx = s.gx / count;
  const A k = s.ug - s.u * mean_g - s.ux * mean_gx, scale = w * r;
  c.weight = r * k;
  c.grad_u = scale;
  c.grad_x = (a - scale * mean_ux) * r;
  c.grad_1 = b - scale * mean_u;
  c.x_u = -scale * r * mean_gx;
  c.x_g = r * (a - scale * mean_ux);
  c.x_x = -r * r * (scale * (k / count - 2 * mean_ux * mean_gx) + a * mean_gx);
  c.x_1 = r * (scale * (mean_gx * mean_u + mean_ux * mean_g) - a * mean_g);
  return c;
}

}  // namespace rk
