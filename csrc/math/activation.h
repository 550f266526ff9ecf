// Activations y = f(x): slope f' and bend f'', side by side.
//
//   backward   grad_x  = f'(x) grad
//   double     gg_grad = f'(x) u          u = cotangent of grad_x
//   backward   grad_x  = f''(x) u grad
//
// For tanh, sigmoid, and elu of which only the result y is known, x is y: the slope is written as a function s(y), and
// the bend is s'(y), as PyTorch differentiates these backwards.
//
//   function    parameters
//   gelu        none                                       x Phi(x), with the normal distribution Phi
//   gelu_tanh   none                                       x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2
//   silu        none                                       x sigmoid(x)
//   mish        none                                       x tanh(log(1 + exp(x)))
//   softplus    beta, threshold                            log(1 + exp(beta x)) / beta, or x where beta x > threshold
//   elu         alpha, scale, input_scale, 1 if x is y     scale (x > 0 ? x : alpha (exp(input_scale x) - 1))
//   hardswish   none                                       x min(max(x + 3, 0), 6) / 6
//   tanh        none
//   sigmoid     none
//
// A NaN falls on the side of each comparison where it falls in PyTorch: the slopes of elu and hardswish are finite there.
// Everything is written in exp(-|v|), so that nothing overflows, and without branches or calls, so that loops over it
// become vector code.
#pragma once

#include "scalar.h"

namespace rk {

enum class Activation { kGelu, kGeluTanh, kSilu, kMish, kSoftplus, kElu, kEluResult, kHardswish, kTanh, kSigmoid };

template <class A>
struct ActivationParameters {
  A beta, threshold;            // softplus
  A alpha, scale, input_scale;  // elu
};

template <class A>
struct Slopes {
  A slope, bend;
};

// The normal distribution's upper tail, 1 - Phi(h) = exp(-h^2 / 2) normal_tail(h), for h >= 0: a minimax polynomial in
// 1 / (h + const), whose relative error is 1e-8 in float and 2e-17 in double as far as exp(-h^2 / 2) is not zero.
//
// On the CPU the terms meet in a tree, in float: in a chain each multiply-add waits for the one before.  A GPU has other
// threads to turn to.
RK_HOST_DEVICE float normal_tail(float h) {
  const float t = reciprocal(h + 3.5f), s = t * 8.814814815f - 1.518518519f;
#if defined(__CUDA_ARCH__)
  return t * power_series(s, 0.8752667642f, 0.5644133598f, 0.2465005847f, 0.06366108041f, 0.003540001628f,
                          -0.003095390083f, -0.0005116182453f, 0.0002066743163f, 3.399020552e-5f, -1.544481075e-5f);
#else
  const float s2 = s * s, s4 = s2 * s2;
  const float low_terms = (0.8752667642f + 0.5644133598f * s) + (0.2465005847f + 0.06366108041f * s) * s2;
  const float high_terms = (0.003540001628f - 0.003095390083f * s) + (-0.0005116182453f + 0.0002066743163f * s) * s2;
  const float highest_terms = 3.399020552e-5f - 1.544481075e-5f * s;
  return t * (low_terms + (high_terms + highest_terms * s4) * s4);
#endif
}

RK_HOST_DEVICE double normal_tail(double h) {
  const double t = 1.0 / (h + 5.0), s = t * 11.2987012987012987 - 1.25974025974025974;
  return t * power_series(s, 0.852724038648595756, 0.70161880589833469, 0.483788119842195969, 0.276750822180399462,
                          0.128250395565890876, 0.0457323534971783582, 0.0109766901104843257, 0.000847755276353508419,
                          -0.000520733900747070174, -0.000190612801653016187, 4.69041900297268876e-6,
                          0.0000175553127893532886, 1.79395814490106019e-6, -1.5601199781135549e-6,
                          -2.85458126238836087e-7, 1.57608453338283323e-7, 3.33633296771636128e-8,
                          -1.83632000418505725e-8, -3.20298324842081529e-9, 2.13493076043856803e-9,
                          1.97020701755326962e-10, -1.66416920001065032e-10);
}

// Beyond these, slopes are constant to the last bit: squares and cubes of larger numbers need not be formed.
template <class A>
RK_HOST_DEVICE A at_most(A v, A most) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<A, float>) return ::fminf(v, most);  // of a NaN the exponentials tell
#endif
  return v > most ? most : v;  // NaN stays
}

// What is long to compute in the slopes at x: e = exp(exponent(x)), where exponent(x) <= 0, and of gelu normal_tail(|x|).
// Loops compute these for many x before they come to the slopes: one after the other they are a chain so long that the
// processor sees nothing of the next x while it waits.
template <class A>
struct ActivationTerms {
  A e, tail;
};

template <Activation kFunction, class A>
struct ActivationSlopes;

struct ExponentialOnly {
  static constexpr bool kExponential = true, kTail = false;
};
struct NoTerms {
  static constexpr bool kExponential = false, kTail = false;
};

template <class A>
struct ActivationSlopes<Activation::kGelu, A> {
  static constexpr bool kExponential = true, kTail = true;
  static RK_HOST_DEVICE A exponent(A x, const ActivationParameters<A>&) { return A(-0.5) * x * x; }
  static RK_HOST_DEVICE Slopes<A> at(A x, ActivationTerms<A> terms, const ActivationParameters<A>&) {
    const A h = at_most(absolute(x), A(40)), square = h * h;
    const A tail = terms.e * terms.tail, density = terms.e * A(0.39894228040143267794);
    const A below = tail - h * density;  // the slope at -h; the two at h and -h add up to 1
    return {x > A(0) ? A(1) - below : below, density * (A(2) - square)};
  }
};

template <class A>
struct ActivationSlopes<Activation::kGeluTanh, A> : ExponentialOnly {
  static constexpr A kRoot = A(0.79788456080286535588);                    // sqrt(2 / pi)
  static RK_HOST_DEVICE A exponent(A x, const ActivationParameters<A>&) {  // twice the argument of tanh at -|x|
    const A h = absolute(x);
    return h * (A(-2) * kRoot + A(-2) * kRoot * A(0.044715) * (h * h));
  }
  static RK_HOST_DEVICE Slopes<A> at(A x, ActivationTerms<A> terms, const ActivationParameters<A>&) {
    const A h = at_most(absolute(x), A(25)), square = h * h;
    // At h: the slope v' of the argument of tanh, and v' + h v'' / 2.
    const A slope_v = kRoot + kRoot * A(0.134145) * square, sum_v = kRoot + kRoot * A(0.26829) * square;
    const A e = terms.e, r = reciprocal(A(1) + e), er = e * r, tanh_v = r - er;
    const A half = A(2) * er * r, turn = h * slope_v;  // (1 - tanh^2) / 2
    const A below = er - half * turn;                  // the slope at -h; the two add up to 1
    return {x > A(0) ? A(1) - below : below, A(2) * half * (sum_v - tanh_v * turn * slope_v)};
  }
};

template <class A>
struct ActivationSlopes<Activation::kSilu, A> : ExponentialOnly {
  static RK_HOST_DEVICE A exponent(A x, const ActivationParameters<A>&) { return -absolute(x); }
  static RK_HOST_DEVICE Slopes<A> at(A x, ActivationTerms<A> terms, const ActivationParameters<A>&) {
    const A h = absolute(x), e = terms.e, r = reciprocal(A(1) + e), er = e * r;  // sigmoid(h), sigmoid(-h)
    const A s = x > A(0) ? r : er, q = er * r;                                   // sigmoid(x) and its slope
    return {s + x * q, q * (A(2) - h * (r - er))};
  }
};

// t = tanh(log(1 + w)) = n / (n + 2) with n = w^2 + 2 w, w = exp(x), so 1 - t^2 = 4 (1 + w)^2 / (n + 2)^2.  For positive
// x both sides of the fractions are multiplied by exp(-2 x).
template <class A>
struct ActivationSlopes<Activation::kMish, A> : ExponentialOnly {
  static RK_HOST_DEVICE A exponent(A x, const ActivationParameters<A>&) { return -absolute(x); }
  static RK_HOST_DEVICE Slopes<A> at(A x, ActivationTerms<A> terms, const ActivationParameters<A>&) {
    const bool positive = x > A(0);
    const A e = terms.e, one_e = A(1) + e, a = positive ? e : A(1), b = positive ? A(1) : e;
    const A n = positive ? A(1) + A(2) * e : A(2) * e + e * e, d = n + A(2) * a * a;
    const A both = reciprocal(one_e * d), inverse = both * one_e;  // one division for two fractions
    const A s = b * (both * d), t = n * inverse;                   // sigmoid(x), tanh(log(1 + w))
    const A q = A(4) * e * a * one_e * inverse * inverse;          // (1 - t^2) sigmoid(x)
    return {t + x * q, q * (A(2) + at_most(x, A(1000)) * (A(1) - s - A(2) * t * s))};
  }
};

template <class A>
struct ActivationSlopes<Activation::kSoftplus, A> : ExponentialOnly {
  static RK_HOST_DEVICE A exponent(A x, const ActivationParameters<A>& p) { return -absolute(p.beta * x); }
  static RK_HOST_DEVICE Slopes<A> at(A x, ActivationTerms<A> terms, const ActivationParameters<A>& p) {
    const A z = p.beta * x, e = terms.e, r = reciprocal(A(1) + e), er = e * r;
    const A s = z > A(0) ? r : er;
    return {z > p.threshold ? A(1) : s, z >= p.threshold ? A(0) : p.beta * er * r};
  }
};

template <class A>
struct ActivationSlopes<Activation::kElu, A> : ExponentialOnly {
  static RK_HOST_DEVICE A exponent(A x, const ActivationParameters<A>& p) { return p.input_scale * at_most(x, A(0)); }
  static RK_HOST_DEVICE Slopes<A> at(A x, ActivationTerms<A> terms, const ActivationParameters<A>& p) {
    const A slope = p.input_scale * p.alpha * p.scale * terms.e;
    return {x <= A(0) ? slope : p.scale, x < A(0) ? p.input_scale * slope : A(0)};
  }
};

template <class A>
struct ActivationSlopes<Activation::kEluResult, A> : NoTerms {
  static RK_HOST_DEVICE Slopes<A> at(A y, ActivationTerms<A>, const ActivationParameters<A>& p) {
    return {y <= A(0) ? p.input_scale * (y + p.alpha * p.scale) : p.scale, y < A(0) ? p.input_scale : A(0)};
  }
};

template <class A>
struct ActivationSlopes<Activation::kHardswish, A> : NoTerms {
  static RK_HOST_DEVICE Slopes<A> at(A x, ActivationTerms<A>, const ActivationParameters<A>&) {
    const bool inside = (x > A(-3)) & (x < A(3));
    return {inside ? x * A(1.0 / 3.0) + A(0.5) : x <= A(-3) ? A(0) : A(1), inside ? A(1.0 / 3.0) : A(0)};
  }
};

template <class A>
struct ActivationSlopes<Activation::kTanh, A> : NoTerms {
  static RK_HOST_DEVICE Slopes<A> at(A y, ActivationTerms<A>, const ActivationParameters<A>&) {
    return {A(1) - y * y, A(-2) * y};
  }
};

template <class A>
struct ActivationSlopes<Activation::kSigmoid, A> : NoTerms {
  static RK_HOST_DEVICE Slopes<A> at(A y, ActivationTerms<A>, const ActivationParameters<A>&) {
    return {y * (A(1) - y), A(1) - A(2) * y};
  }
};

// The derivatives' products.  Hardswish selects, as PyTorch does: an infinity where it is flat does not become NaN.
template <Activation kFunction, class A>
RK_HOST_DEVICE A times_slope(const Slopes<A>& s, A u) {
  return kFunction == Activation::kHardswish && s.slope == A(0) ? A(0) : s.slope * u;
}
template <Activation kFunction, class A>
RK_HOST_DEVICE A times_bend(const Slopes<A>& s, A u, A g) {
  return kFunction == Activation::kHardswish && s.bend == A(0) ? A(0) : s.bend * u * g;
}

template <Activation kFunction, class A>
RK_HOST_DEVICE Slopes<A> activation_slopes(A x, const ActivationParameters<A>& p) {
  using Function = ActivationSlopes<kFunction, A>;
  ActivationTerms<A> terms{};
  if constexpr (kFunction == Activation::kGelu)
    terms.e = exp2_nonpositive(A(-0.5) * kLog2E<A> * (x * x));  // one product less
  else if constexpr (Function::kExponential)
    terms.e = exp_nonpositive(Function::exponent(x, p));
  if constexpr (Function::kTail) terms.tail = normal_tail(absolute(x));
  return Function::at(x, terms, p);
}

}  // namespace rk
