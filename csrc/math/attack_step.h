// One step of a gradient attack, x' <- P(x' + s d(g)) in the ball ||x' - x|| <= eps and the box [0, 1].
//
//   linf  d = sign g                      P: clamp to [max(x - eps, 0), min(x + eps, 1)]
//   l2    d = g / ||g||                   P: x + v min(1, eps / ||v||), v = x' + s d - x, then clamped to [0, 1]
//   l1    d = sign(g) / k at the k        P: x + sign(v) min(max(|v| - t, 0), room), room up to the end of [0, 1] that v
//         largest |g| that are free          points to, t >= 0 the smallest for which the sum is at most eps
//
// A NaN in g counts as 0.  The squared length of v needs no pass of its own:
//   ||v||^2 = ||x' - x||^2 + 2 a <g, x' - x> + a^2 ||g||^2,  a = s / ||g||.
#pragma once

#include "scalar.h"

namespace rk {

enum class Ball : std::int64_t { kLinf, kL2, kL1 };

template <class A>
RK_HOST_DEVICE A clamp(A v, A low, A high) {
  return v < low ? low : (v > high ? high : v);  // NaN stays
}
#if defined(__CUDA_ARCH__)
template <>
RK_HOST_DEVICE float clamp(float v, float low, float high) {
  asm("max.NaN.f32 %0, %0, %1;\n\tmin.NaN.f32 %0, %0, %2;" : "+f"(v) : "f"(low), "f"(high));
  return v;
}
#endif

template <class A>
RK_HOST_DEVICE A without_nan(A g) {
  return g == g ? g : A(0);
}

// Where a pixel may go; low and high then round 16-bit values inwards.
template <class A>
struct Interval {
  A low, high;
};

template <class A>
RK_HOST_DEVICE Interval<A> linf_interval(A x, A eps) {
  const A low = x - eps, high = x + eps;
  return {low > A(0) ? low : A(0), high < A(1) ? high : A(1)};
}

template <class A>
RK_HOST_DEVICE Interval<A> between(A a, A b) {
  return {a < b ? a : b, a < b ? b : a};
}

template <class A>
RK_HOST_DEVICE A linf_step(A adversary, A g, A step, Interval<A> to) {
  const A down = g < A(0) ? -step : A(0), d = g > A(0) ? step : down;  // two choices; NaN is neither
  return clamp(adversary + d, to.low, to.high);
}

// The sums of a row that a step in l2 needs, with g divided by `largest` where its squares would leave the range.
template <class T>
struct L2SumsIn {
  T gg, gd, dd;
};
using L2Sums = L2SumsIn<double>;

template <class A>
struct L2Step {
  A along;   // a: of g
  A shrink;  // of v; 1: inside, where x' is not to be rounded by way of x
  L2Step() = default;
  template <class T>
  RK_HOST_DEVICE L2Step(L2SumsIn<T> s, T step, T eps, T scale_of_g) {
    const bool moves = s.gg > T(0) && s.gg <= Limits<T>::largest;
    const T a = moves ? step / std::sqrt(s.gg) : T(0);
    const T vv = moves ? s.dd + T(2) * a * s.gd + a * (a * s.gg) : s.dd;
    along = A(a * scale_of_g);
    shrink = vv > eps * eps ? A(eps / std::sqrt(vv)) : A(1);
  }
};

// `along` holds the scale of g already; where it is zero, g may be infinite.
template <class A>
RK_HOST_DEVICE A l2_step(A adversary, A x, A g, L2Step<A> s) {
  const A largest = s.along != A(0) ? Limits<A>::largest : A(0);
  const A moved = adversary + s.along * (absolute(g) <= largest ? g : A(0));
  return clamp(s.shrink < A(1) ? x + s.shrink * (moved - x) : moved, A(0), A(1));
}

// How much a coordinate counts in the choice for l1: not at all where the box stops it.
template <class A>
RK_HOST_DEVICE A l1_size(A adversary, A g) {
  const A v = without_nan(g);
  const bool free = v > A(0) ? adversary < A(1) : adversary > A(0);
  return free ? absolute(v) : A(0);
}

template <class A>
RK_HOST_DEVICE A l1_moved(A adversary, A g, A least, A step) {
  const A size = l1_size(adversary, g);
  return size >= least && size > A(0) ? adversary + step * sign(g) : adversary;
}

template <class A>
RK_HOST_DEVICE A l1_room(A v, A x) {
  return v > A(0) ? A(1) - x : x;
}

// |d| of one coordinate for the threshold t.
template <class A>
RK_HOST_DEVICE A l1_length(A v, A x, A t) {
  const A size = absolute(v) - t, room = l1_room(v, x);
  return size > A(0) ? (size < room ? size : room) : A(0);
}

template <class A>
RK_HOST_DEVICE A l1_point(A moved, A x, A t) {
  const A v = moved - x, size = absolute(v) - t;
  if (size >= l1_room(v, x)) return v > A(0) ? A(1) : A(0);  // exactly there, where the next step knows it
  const A point = t > A(0) ? x + (size > A(0) ? sign(v) * size : A(0)) : moved;
  return clamp(point, A(0), A(1));
}

}  // namespace rk
