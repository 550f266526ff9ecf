// Activations y = f(x): slope f' and bend f'', side by side.
//
//   backward   grad_x  = f'(x) grad
//   double     gg_grad = f'(x) gg_x          gg_x = cotangent of grad_x
//   backward   grad_x  = f''(x) gg_x grad
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
RK_HOST_DEVICE float normal_tail(float h) {
  const float t = 1.0f / (h + 3.5f), s = t * 8.814814815f - 1.518518519f;
  float r = -1.544481075e-5f;
  r = r * s + 3.399020552e-5f;
  r = r * s + 0.0002066743163f;
  r = r * s - 0.0005116182453f;
  r = r * s - 0.003095390083f;
  r = r * s + 0.003540001628f;
  r = r * s + 0.06366108041f;
  r = r * s + 0.2465005847f;
  r = r * s + 0.5644133598f;
  r = r * s + 0.8752667642f;
  return t * r;
}

RK_HOST_DEVICE double normal_tail(double h) {
  const double t = 1.0 / (h + 5.0), s = t * 11.2987012987012987 - 1.25974025974025974;
  double r = -1.66416920001065032e-10;
  r = r * s + 1.97020701755326962e-10;
  r = r * s + 2.13493076043856803e-9;
  r = r * s - 3.20298324842081529e-9;
  r = r * s - 1.83632000418505725e-8;
  r = r * s + 3.33633296771636128e-8;
  r = r * s + 1.57608453338283323e-7;
  r = r * s - 2.85458126238836087e-7;
  r = r * s - 1.5601199781135549e-6;
  r = r * s + 1.79395814490106019e-6;
  r = r * s + 0.0000175553127893532886;
  r = r * s + 4.69041900297268876e-6;
  r = r * s - 0.000190612801653016187;
  r = r * s - 0.000520733900747070174;
  r = r * s + 0.000847755276353508419;
  r = r * s + 0.0109766901104843257;
  r = r * s + 0.0457323534971783582;
  r = r * s + 0.128250395565890876;
  r = r * s + 0.276750822180399462;
  r = r * s + 0.483788119842195969;
  r = r * s + 0.70161880589833469;
  r = r * s + 0.852724038648595756;
  return t * r;
}

// Beyond these, slopes are constant to the last bit: squares and cubes of larger numbers need not be formed.
template <class A>
RK_HOST_DEVICE A at_most(A v, A most) {
  return v > most ? most : v;  // NaN stays
}

template <Activation kFunction, class A>
struct ActivationSlopes;

template <class A>
struct ActivationSlopes<Activation::kGelu, A> {
  static RK_HOST_DEVICE Slopes<A> at(A x, const ActivationParameters<A>&) {
    const A h = at_most(absolute(x), A(40)), square = h * h, e = exp_nonpositive(A(-0.5) * square);
    const A tail = e * normal_tail(h), density = e * A(0.39894228040143267794);
    const bool positive = x > A(0);
    const A below = tail - h * density;  // the slope at -h; the two at h and -h add up to 1
    return {positive ? A(1) - below : below, density * (A(2) - square)};
  }
};

template <class A>
struct ActivationSlopes<Activation::kGeluTanh, A> {
  static RK_HOST_DEVICE Slopes<A> at(A x, const ActivationParameters<A>&) {
    const A h = at_most(absolute(x), A(25)), square = h * h, root = A(0.79788456080286535588);  // sqrt(2 / pi)
    const A v = root * h * (A(1) + A(0.044715) * square);                                       // at h
    const A slope_v = root * (A(1) + A(0.134145) * square), bend_v = root * A(0.26829) * h;
    const A e = exp_nonpositive(A(-2) * v), r = A(1) / (A(1) + e);
    const A tanh_v = (A(1) - e) * r, sech2 = A(4) * e * r * r;  // 1 - tanh^2
    const A below = e * r - A(0.5) * h * sech2 * slope_v;       // the slope at -h; the two add up to 1
    const A bend = sech2 * (slope_v + A(0.5) * h * (bend_v - A(2) * tanh_v * slope_v * slope_v));
    return {x > A(0) ? A(1) - below : below, bend};
  }
};

template <class A>
struct ActivationSlopes<Activation::kSilu, A> {
  static RK_HOST_DEVICE Slopes<A> at(A x, const ActivationParameters<A>&) {
    const A e = exp_nonpositive(-absolute(x)), r = A(1) / (A(1) + e), er = e * r;
    const bool positive = x > A(0);
    const A s = positive ? r : er, rest = positive ? er : r;  // sigmoid(x), sigmoid(-x)
    return {s * (A(1) + x * rest), er * r * (A(2) + x * (rest - s))};
  }
};

// t = tanh(log(1 + w)) = n / (n + 2) with n = w^2 + 2 w, w = exp(x), so 1 - t^2 = 4 (1 + w)^2 / (n + 2)^2.  For positive
// x both sides of the fractions are multiplied by exp(-2 x).
template <class A>
struct ActivationSlopes<Activation::kMish, A> {
  static RK_HOST_DEVICE Slopes<A> at(A x, const ActivationParameters<A>&) {
    const A e = exp_nonpositive(-absolute(x)), r = A(1) / (A(1) + e);
    const bool positive = x > A(0);
    const A s = positive ? r : e * r;  // sigmoid(x)
    const A n = positive ? A(1) + A(2) * e : e * (e + A(2)), inverse = A(1) / (n + (positive ? A(2) * e * e : A(2)));
    const A t = n * inverse;
    const A q = A(4) * e * (positive ? e : A(1)) * (A(1) + e) * inverse * inverse;  // (1 - t^2) sigmoid(x)
    return {t + x * q, q * (A(2) + at_most(x, A(1000)) * (A(1) - s - A(2) * t * s))};
  }
};

template <class A>
struct ActivationSlopes<Activation::kSoftplus, A> {
  static RK_HOST_DEVICE Slopes<A> at(A x, const ActivationParameters<A>& p) {
    const A z = p.beta * x, e = exp_nonpositive(-absolute(z)), r = A(1) / (A(1) + e), er = e * r;
    const A s = z > A(0) ? r : er;
    return {z > p.threshold ? A(1) : s, z >= p.threshold ? A(0) : p.beta * er * r};
  }
};

template <class A>
struct ActivationSlopes<Activation::kElu, A> {
  static RK_HOST_DEVICE Slopes<A> at(A x, const ActivationParameters<A>& p) {
    const A e = p.input_scale * p.alpha * p.scale * exp_nonpositive(p.input_scale * at_most(x, A(0)));
    return {x > A(0) ? p.scale : e, x >= A(0) ? A(0) : p.input_scale * e};
  }
};

template <class A>
struct ActivationSlopes<Activation::kEluResult, A> {
  static RK_HOST_DEVICE Slopes<A> at(A y, const ActivationParameters<A>& p) {
    return {y > A(0) ? p.scale : p.input_scale * (y + p.alpha * p.scale), y >= A(0) ? A(0) : p.input_scale};
  }
};

template <class A>
struct ActivationSlopes<Activation::kHardswish, A> {
  static RK_HOST_DEVICE Slopes<A> at(A x, const ActivationParameters<A>&) {
    const bool below = x <= A(-3), above = x >= A(3);
    return {below ? A(0) : above ? A(1) : x / A(3) + A(0.5), below | above ? A(0) : A(1) / A(3)};
  }
};

template <class A>
struct ActivationSlopes<Activation::kTanh, A> {
  static RK_HOST_DEVICE Slopes<A> at(A y, const ActivationParameters<A>&) { return {A(1) - y * y, A(-2) * y}; }
};

template <class A>
struct ActivationSlopes<Activation::kSigmoid, A> {
  static RK_HOST_DEVICE Slopes<A> at(A y, const ActivationParameters<A>&) { return {y * (A(1) - y), A(1) - A(2) * y}; }
};

}  // namespace rk
