// n_i = ||a_i||_p with a_ik = w_k x_ik: value, first and second derivative of each norm, side by side.
//
//   value          n = finish(sum_k term(a_k))                      (a maximum instead of a sum for p = inf)
//   backward       grad_x_k = grad * w_k * slope(a_k)               slope = dn/da_k
//   double         s        = sum_k v_k slope(a_k)                  v_k = w_k * u_k
//   backward       gg_grad  = s
//                  grad_x_k = grad * w_k * bend(a_k, v_k)           bend = sum_j v_j d2n/(da_j da_k)
//
// where u is the cotangent of the backward's grad_x.  Where a norm has a corner, the subgradient is zero, in both
// orders: at a = 0 for every p, at a_k = 0 for L1 and for the bend of 1 < p < 2.  Linf shares its slope equally between
// ties.
#pragma once

#include "fixed.h"
#include "scalar.h"

namespace rk {

enum class Norm { kL1, kL2, kSquaredL2, kInf, kP };

// n == 0 gives 0; a NaN or infinite n stays visible.
template <class A>
RK_HOST_DEVICE A divide_or_zero(A v, A n) {
  return n == A(0) ? A(0) : v / n;
}

// A divisor that many numbers share, as two factors, neither of which leaves the normal numbers; of zero or infinity one
// is zero.  A quotient is put right by what is left over, so that a / a is 1: the bend of a row of one number must vanish.
template <class A>
struct SharedDivisor {
  A n, first, second, product;  // product: n * first, or 0 where nothing can be put right
  SharedDivisor() = default;
  explicit RK_HOST_DEVICE SharedDivisor(A divisor) : n(divisor) {
    const A large = A(sizeof(A) == 8 ? 0x1p900 : 0x1p100);
    first = n > large ? A(0x1p-64) : n < A(1) / large ? A(0x1p64) : A(1);
    product = n <= Limits<A>::largest || is_nan(n) ? n * first : A(0);
    second = n == A(0) ? A(0) : A(1) / (n * first);
  }
};
// v / n of a finite number; the quotient of an infinite one is NaN.
template <class A>
RK_HOST_DEVICE A part_or_zero(A v, SharedDivisor<A> d) {
  const A scaled = v * d.first, quotient = scaled * d.second;
  return fused(fused(-quotient, d.product, scaled), d.second, quotient);
}
template <class A>
RK_HOST_DEVICE A part_or_zero(A v, A n) {
  return divide_or_zero(v, n);
}
// The same off by a unit in the last place, where nothing has to cancel.
template <class A>
RK_HOST_DEVICE A scaled_or_zero(A v, SharedDivisor<A> d) {
  return v * d.first * d.second;
}
template <class A>
RK_HOST_DEVICE A scaled_or_zero(A v, A n) {
  return divide_or_zero(v, n);
}
template <class A>
RK_HOST_DEVICE A divide_or_zero(A v, SharedDivisor<A> d) {
  const A quotient = v * d.first * d.second, corrected = part_or_zero(v, d);
  return is_nan(corrected) ? quotient : corrected;  // infinity
}
RK_HOST_DEVICE float number(float n) { return n; }
RK_HOST_DEVICE double number(double n) { return n; }
template <class A>
RK_HOST_DEVICE A number(SharedDivisor<A> d) {
  return d.n;
}

// An exponent that is a whole number, from 1 to 7.
struct WholeExponent {
  int p;
};
template <class A>
RK_HOST_DEVICE A power(A v, WholeExponent n) {
  const A v2 = v * v, v4 = v2 * v2;
  return (n.p & 1 ? v : A(1)) * (n.p & 2 ? v2 : A(1)) * (n.p & 4 ? v4 : A(1));
}
template <class A>
RK_HOST_DEVICE A less(A p, int k) {
  return p - A(k);
}
RK_HOST_DEVICE WholeExponent less(WholeExponent p, int k) { return {p.p - k}; }
RK_HOST_DEVICE float number(WholeExponent p) { return float(p.p); }

// N: a number or a SharedDivisor of it.  P: a number or a WholeExponent.
template <Norm kNorm, class A>
struct RowNorm;

template <class A>
struct RowNorm<Norm::kL1, A> {
  template <class P>
  static RK_HOST_DEVICE A term(A a, P) {
    return absolute(a);
  }
  static RK_HOST_DEVICE A finish(A total, A) { return total; }
  template <class N, class P>
  static RK_HOST_DEVICE A slope(A a, N, P, N) {
    return sign(a);
  }
};

template <class A>
struct RowNorm<Norm::kL2, A> {
  template <class P>
  static RK_HOST_DEVICE A term(A a, P) {
    return a * a;
  }
  static RK_HOST_DEVICE A finish(A total, A) { return std::sqrt(total); }
  template <class N, class P>
  static RK_HOST_DEVICE A slope(A a, N n, P, N) {
    return part_or_zero(a, n);
  }
  template <class N, class P>
  static RK_HOST_DEVICE A bend(A a, A v, A s, N n, P) {
    return scaled_or_zero(v - part_or_zero(a, n) * s, n);
  }
};

template <class A>
struct RowNorm<Norm::kSquaredL2, A> {
  template <class P>
  static RK_HOST_DEVICE A term(A a, P) {
    return a * a;
  }
  static RK_HOST_DEVICE A finish(A total, A) { return total; }
  template <class N, class P>
  static RK_HOST_DEVICE A slope(A a, N, P, N) {
    return A(2) * a;
  }
  template <class N, class P>
  static RK_HOST_DEVICE A bend(A, A v, A, N, P) {
    return A(2) * v;
  }
};

template <class A>
struct RowNorm<Norm::kInf, A> {
  template <class P>
  static RK_HOST_DEVICE A term(A a, P) {
    return absolute(a);
  }
  static RK_HOST_DEVICE A finish(A total, A) { return total; }
  template <class N, class P>
  static RK_HOST_DEVICE A slope(A a, N n, P, N ties) {
    const A largest = number(n);
    return is_nan(largest) ? largest : (absolute(a) == largest ? divide_or_zero(sign(a), ties) : A(0));
  }
};

template <class A>
struct RowNorm<Norm::kP, A> {
  template <class P>
  static RK_HOST_DEVICE A term(A a, P p) {
    return power(absolute(a), p);
  }
  // 1 / p is rounded, which costs n its last |log(total)| / p bits; one Newton step on n^p = total brings them back.
  static RK_HOST_DEVICE A finish(A total, A p) {
    const A n = std::pow(total, A(1) / p), power = std::pow(n, p);
    return power > A(0) && power <= Limits<A>::largest ? n + n * ((total / power - A(1)) / p) : n;
  }
  template <class N, class P>
  static RK_HOST_DEVICE A slope(A a, N n, P p, N) {
    return sign(a) * power(divide_or_zero(absolute(a), n), less(p, 1));
  }
  template <class N, class P>
  static RK_HOST_DEVICE A bend(A a, A v, A s, N n, P p) {
    if (number(n) == A(0) || a == A(0)) return A(0);
    const A r = divide_or_zero(absolute(a), n), q = power(r, less(p, 2));
    return divide_or_zero(A(number(less(p, 1))) * (q * v - sign(a) * q * r * s), n);
  }
};

// Norms whose terms can overflow or vanish although the norm itself is an ordinary number.
template <Norm kNorm>
inline constexpr bool kNeedsRangeCheck = kNorm == Norm::kL2 || kNorm == Norm::kP;

// Whether the plain sum of `count` terms is accurate: no term overflowed, and what underflowed is below rounding.
template <class A>
RK_HOST_DEVICE bool in_safe_range(A total, A count) {
  return total >= count * (Limits<A>::smallest_normal / Limits<A>::epsilon) && total <= Limits<A>::largest;
}

// The slow path for the rest: n = m ||a / m||_p with m = max |a|, for rows of tiny, huge or zero entries.
template <Norm kNorm, class A>
RK_HOST_DEVICE A finish_scaled(A scaled_total, A m, A p) {
  if (m == A(0) || m > Limits<A>::largest) return m;
  return m * RowNorm<kNorm, A>::finish(scaled_total, p);
}

}  // namespace rk
