// The second derivative of scaled dot-product attention, entry by entry of one row of scores; and its forward mode.
//
//   forward         S = scale Q K^T + mask, P = softmax(S), O = P V
//   first backward  dP = dO V^T, D = sum_j P dP, dS = P (dP - D)
//                   dV = P^T dO, dQ = scale dS K, dK = scale dS^T Q           cotangents of these: C, A, B
//   second          T = scale (A K^T + Q B^T): how S moves along (A, B);  t = sum_j P T;  X = dO C^T
//                   Pd = P (T - t): how P moves;  G = (dP - D)(T - t) + X, g = sum_j P G;  W = P (G - g)
//                   ddO = Pd V + P C                dQ' = scale (W K + dS B)
//                   dV' = Pd^T dO                   dK' = scale (W^T Q + dS^T A)
//
// Forward mode is a part of it: along (dQ, dK, dV) in the place of (A, B, C), O moves by ddO.
//
// G differs from the derivative of sum_j P T dP + P X by a number per row, which W does not see; written with both
// factors centred, no large terms cancel.
#pragma once

#include "scalar.h"

namespace rk {

// The numbers of one row.
template <class A>
struct AttentionRow {
  A inverse_sum;  // of exp(S - max)
  A t, d, g;
};

template <class A>
RK_HOST_DEVICE A attention_bend(A t, A dp, A x, const AttentionRow<A>& r) {
  return (dp - r.d) * (t - r.t) + x;  // G
}

}  // namespace rk
