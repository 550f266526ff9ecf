// Softmax cross-entropy of one row of logits z; target distribution q (label smoothing already in it), temperature T:
//
//   value      loss     = Q l + sum_c q_c (m - z_c / T)     m = max_c z_c / T,  l = log sum_c exp(z_c / T - m)
//   backward   grad_z_c = grad (Q p_c - q_c) / T            p_c = exp((z_c / T - m) - l),  Q = sum_c q_c
//   double     h        = sum_c p_c u_c                     u = cotangent of grad_z
//   backward   gg_grad  = (Q h - sum_c q_c u_c) / T
//              grad_z_c = grad Q p_c (u_c - h) / T^2
//
// m and l are kept apart: their sum, as one number, would cost p the digits that huge logits need.
//
// The target is an index y, q = (1 - s) e_y + s / C, or a row of probabilities t, q = (1 - s) t + s / C.  A sum of t
// other than one is allowed, as in torch.nn.functional.cross_entropy.
#pragma once

#include "scalar.h"

namespace rk {

template <class A>
struct Smoothing {
  A keep, floor;  // q = keep * t + floor
  RK_HOST_DEVICE Smoothing(A smoothing, A classes) : keep(A(1) - smoothing), floor(smoothing / classes) {}
  RK_HOST_DEVICE A q(A t) const { return keep * t + floor; }
};

// q (m - z): a class without weight costs nothing, even where its logit is -inf.
template <class A>
RK_HOST_DEVICE A cross_entropy_term(A q, A below_max) {
  return q == A(0) ? A(0) : q * below_max;
}

template <class A>
RK_HOST_DEVICE A cross_entropy_value(A log_sum, A total_q, A weighted_gap) {
  return total_q * log_sum + weighted_gap;
}

template <class A>
RK_HOST_DEVICE A softmax_probability(A scaled_logit, A max, A log_sum) {
  return exp_nonpositive((scaled_logit - max) - log_sum);
}

template <class A>
RK_HOST_DEVICE A cross_entropy_slope(A p, A q, A total_q, A inverse_temperature) {
  return (total_q * p - q) * inverse_temperature;
}

template <class A>
RK_HOST_DEVICE A cross_entropy_bend(A p, A u, A mean_u, A total_q, A inverse_temperature) {
  return total_q * p * (u - mean_u) * inverse_temperature * inverse_temperature;
}

}  // namespace rk
