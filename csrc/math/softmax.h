// softmax and log_softmax of one row.  p: probabilities; output o = p, or log p.
//
//              softmax                                     log_softmax
//   backward   grad_x = p (g - <p, g>)                     grad_x = g - p G,  G = sum_c g_c
//   double     gg_grad = p (u - <p, u>)                    gg_grad = u - <p, u>
//   backward   grad_o  = u (g - <p, g>) - g <p, u>         grad_o  = -p u G
//
// where u is the cotangent of grad_x, and grad_o differentiates the first backward as the function of o that it is.
#pragma once

#include "scalar.h"

namespace rk {

// A row's sums: total_g is <p, g> or G, mean_u is <p, u>.
template <bool kLog, class A>
struct Softmax {
  static RK_HOST_DEVICE A probability(A o) { return kLog ? exp_nonpositive(o) : o; }
  static RK_HOST_DEVICE A total_g_term(A p, A g) { return kLog ? g : p * g; }
  static RK_HOST_DEVICE A gg_grad(A p, A u, A mean_u) { return kLog ? u - mean_u : p * (u - mean_u); }
  static RK_HOST_DEVICE A grad_output(A p, A u, A g, A total_g, A mean_u) {
    return kLog ? -(p * u) * total_g : u * (g - total_g) - g * mean_u;
  }
};

}  // namespace rk
