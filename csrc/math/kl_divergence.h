// KL(p || q) of one row, p = softmax(a / T), q = softmax(b / T):
//
//   value      kl      = sum_c p_c d_c - p_c + q_c                     d_c = log p_c - log q_c, and 0 where p_c = 0
//   backward   grad_a_c = grad p_c (e_c - h) / T                       e_c = d_c - d_top,  h = sum_c p_c e_c
//              grad_b_c = grad (q_c - p_c) / T
//   double     gg_grad  = (D + v_q - v_p) / T                          u, v: cotangents of grad_a, grad_b
//   backward   grad_a_c = grad p_c ((e_c - h + 1) (u_c - u_p) - D - (v_c - v_p)) / T^2
//              grad_b_c = grad (q_c (v_c - v_q) - p_c (u_c - u_p)) / T^2
//
// with u_p = sum_c p_c u_c, v_p and v_q likewise, and D = sum_c p_c (u_c - u_p) (e_c - h).  top is p's
// first choice: where p is certain of it, d_c - sum_c p_c d_c would be the difference of two equal numbers there.  As
// sum_c p_c (e_c - h) = 0, any number may stand for u_p in D.
//
// The terms of the value add the zero sum_c q_c - p_c: none is negative, they shrink with the square of d_c, and an
// error of d_c counts with p_c - q_c.  p_c d_c alone shrinks with d_c, so that its sum would lose, where two predictions
// nearly agree, the digits in which they differ.
#pragma once

#include "scalar.h"

namespace rk {

// One row's maxima and logs of sums of exponentials, of a / T and of b / T, d_top, of several first choices the largest
// d, and h.
template <class A>
struct KlRow {
  A p_max, p_log_sum, q_max, q_log_sum, d_top, mean_e, inverse_t;
};
constexpr int kKlStatistics = 6;  // all but the last

template <class A>
struct KlPoint {
  A p, q, d;
  RK_HOST_DEVICE KlPoint(const KlRow<A>& r, A a, A b)
      : p(exp_nonpositive(log_p(r, a))), q(exp_nonpositive(log_q(r, b))), d(difference(r, a, b)) {}

  // Where both probabilities are known already.  As of exp_nonpositive, p is zero where it is no normal number.
  RK_HOST_DEVICE KlPoint(const KlRow<A>& r, A a, A b, A p_known, A q_known)
      : p(p_known < Limits<A>::smallest_normal ? A(0) : p_known), q(q_known), d(difference(r, a, b)) {}

 private:
  static RK_HOST_DEVICE A log_p(const KlRow<A>& r, A a) { return (a * r.inverse_t - r.p_max) - r.p_log_sum; }
  static RK_HOST_DEVICE A log_q(const KlRow<A>& r, A b) { return (b * r.inverse_t - r.q_max) - r.q_log_sum; }
  RK_HOST_DEVICE A difference(const KlRow<A>& r, A a, A b) const {
    return p == A(0) ? A(0) : log_p(r, a) - log_q(r, b);  // where both are -inf, their difference is NaN
  }
};

template <class A>
RK_HOST_DEVICE bool kl_is_top(const KlRow<A>& r, A a) {
  return a * r.inverse_t == r.p_max;
}

// d - 1 + exp(-d) for |d| < 1/4: d^2 / 2 (1 - d/3 (1 - d/4 (...))), cut where the rest is below half a unit in the last
// place.
RK_HOST_DEVICE float kl_of_small(float d) {
#if defined(__CUDA_ARCH__)  // the same multiplied out: a multiply-add a term
  return 0.5f * d * d *
         power_series(d, 1.0f, -1.0f / 3.0f, 1.0f / 12.0f, -1.0f / 60.0f, 1.0f / 360.0f, -1.0f / 2520.0f);
#else
  float s = 1.0f - d * (1.0f / 7.0f);
  s = 1.0f - d * (1.0f / 6.0f) * s;
  s = 1.0f - d * (1.0f / 5.0f) * s;
  s = 1.0f - d * (1.0f / 4.0f) * s;
  s = 1.0f - d * (1.0f / 3.0f) * s;
  return 0.5f * d * d * s;
#endif
}

RK_HOST_DEVICE double kl_of_small(double d) {
  double s = 1.0 - d * (1.0 / 13.0);
  s = 1.0 - d * (1.0 / 12.0) * s;
  s = 1.0 - d * (1.0 / 11.0) * s;
  s = 1.0 - d * (1.0 / 10.0) * s;
  s = 1.0 - d * (1.0 / 9.0) * s;
  s = 1.0 - d * (1.0 / 8.0) * s;
  s = 1.0 - d * (1.0 / 7.0) * s;
  s = 1.0 - d * (1.0 / 6.0) * s;
  s = 1.0 - d * (1.0 / 5.0) * s;
  s = 1.0 - d * (1.0 / 4.0) * s;
  s = 1.0 - d * (1.0 / 3.0) * s;
  return 0.5 * d * d * s;
}

template <class A>
RK_HOST_DEVICE A kl_term(A p, A q, A d) {
  const bool small = (absolute(d) < A(0.25)) & (p != A(0));
  const A near = p * kl_of_small(d), far = p * d + (q - p);
  return small ? near : far;
}

template <class A>
RK_HOST_DEVICE A kl_slope_p(A p, A e, A mean_e, A inverse_t) {
  return p * (e - mean_e) * inverse_t;
}
template <class A>
RK_HOST_DEVICE A kl_slope_q(A p, A q, A inverse_t) {
  return (q - p) * inverse_t;
}

// What a row's second derivatives need: h, u_p, v_p, v_q, D.
template <class A>
struct KlSums {
  A mean_e, u_p, v_p, v_q, cross;
};

template <class A>
RK_HOST_DEVICE A kl_cross_term(A p, A e, A u, const KlSums<A>& s) {
  return p * (u - s.u_p) * (e - s.mean_e);
}
// With rise = e - h + 1.  Without kU or kV that cotangent is zero, and so is what it is in.
template <bool kU = true, bool kV = true, class A>
RK_HOST_DEVICE A kl_bend_p_of_rise(A p, A rise, A u, A v, const KlSums<A>& s, A inverse_t) {
  if constexpr (!kU) return p * -(v - s.v_p) * inverse_t * inverse_t;
  if constexpr (!kV) return p * (rise * (u - s.u_p) - s.cross) * inverse_t * inverse_t;
  return p * (rise * (u - s.u_p) - s.cross - (v - s.v_p)) * inverse_t * inverse_t;
}
template <bool kU = true, bool kV = true, class A>
RK_HOST_DEVICE A kl_bend_p(A p, A e, A u, A v, const KlSums<A>& s, A inverse_t) {
  return kl_bend_p_of_rise<kU, kV>(p, e + (A(1) - s.mean_e), u, v, s, inverse_t);
}
template <bool kU = true, bool kV = true, class A>
RK_HOST_DEVICE A kl_bend_q(A p, A q, A u, A v, const KlSums<A>& s, A inverse_t) {
  if constexpr (!kU) return q * (v - s.v_q) * inverse_t * inverse_t;
  if constexpr (!kV) return -(p * (u - s.u_p)) * inverse_t * inverse_t;
  return (q * (v - s.v_q) - p * (u - s.u_p)) * inverse_t * inverse_t;
}

}  // namespace rk
