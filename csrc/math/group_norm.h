// GroupNorm: the row of math/layer_norm.h is one group of one sample, and w, a and b are one number a channel.
#pragma once

#include "layer_norm.h"

namespace rk {

// What a channel of one sample adds to the sums of its group, and to the gradients of weight and bias.
template <class A>
struct ChannelSums {
  A g, gx;      // g, g xh
  A u, ux, ug;  // u, u xh, u g

  RK_HOST_DEVICE void add_to(NormSums<A>& group, A weight, A a) const {
    group.u += u;
    group.ux += ux;
    group.g += weight * g;
    group.gx += weight * gx;
    group.ug += weight * ug;
    group.ag += a * g;
    group.agx += a * gx;
  }

  // sum g t
  RK_HOST_DEVICE A weight_bend(const NormBends<A>& group, A r) const {
    return r * ug + group.t_x * gx + group.t_one * g;
  }
};

// grad_x = g * g + x * xh + one
template <class A>
struct ChannelSlopes {
  A g, x, one;
};

template <class A>
RK_HOST_DEVICE ChannelSlopes<A> channel_slopes(const NormSlopes<A>& group, A weight) {
  return {group.x_g * weight, group.x_x, group.x_one};
}

// gg_grad = t_u u + t_x xh + t_one,   grad_x = x_u u + x_g g + x_x xh + x_one
template <class A>
struct ChannelBends {
  A t_u, t_x, t_one, x_u, x_g, x_x, x_one;
};

template <class A>
RK_HOST_DEVICE ChannelBends<A> channel_bends(const NormBends<A>& group, A r, A weight, A a, A b) {
  return {weight * r, weight * group.t_x + a,     weight * group.t_one + b,
          group.x_u,  group.x_g * weight + r * a, group.x_x,
          group.x_one};
}

}  // namespace rk
