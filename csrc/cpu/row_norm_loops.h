// The inner loops of row_norm: one piece of one row, already weighted and in the accumulation type.
#pragma once

#include "../math/row_norm.h"
#include "simd.h"

namespace rk::cpu {

// What a row contributes to each of its columns.
template <class A>
struct RowScalars {
  A n, grad, s, ties, p;  // norm, its cotangent, directional derivative, entries sharing the maximum, exponent
};

template <class A>
RK_HOST_DEVICE A terms_of(Norm norm, const A* a, int64_t n, A p) {
  switch (norm) {
    case Norm::kL1:
      return lane_sum<A>(n, [=](int64_t j) RK_INLINE_LAMBDA { return RowNorm<Norm::kL1, A>::term(a[j], p); });
    case Norm::kInf:
      return lane_max<A>(n, A(0), [=](int64_t j) RK_INLINE_LAMBDA { return RowNorm<Norm::kInf, A>::term(a[j], p); });
    case Norm::kP:
      return lane_sum<A>(n, [=](int64_t j) RK_INLINE_LAMBDA { return RowNorm<Norm::kP, A>::term(a[j], p); });
    default: return lane_sum<A>(n, [=](int64_t j) RK_INLINE_LAMBDA { return RowNorm<Norm::kL2, A>::term(a[j], p); });
  }
}

template <class A>
RK_HOST_DEVICE A ties_of(const A* a, int64_t n, A norm) {
  return lane_sum<A>(n, [=](int64_t j) RK_INLINE_LAMBDA { return absolute(a[j]) == norm ? A(1) : A(0); });
}

// out_j = grad * slope_j
template <Norm kNorm, class A>
RK_HOST_DEVICE void slopes(const A* __restrict__ a, A* __restrict__ out, int64_t n, const RowScalars<A>& r) {
  for (int64_t j = 0; j < n; ++j) out[j] = r.grad * RowNorm<kNorm, A>::slope(a[j], r.n, r.p, r.ties);
}

template <class A>
RK_HOST_DEVICE void slopes_of(Norm norm, const A* a, A* out, int64_t n, const RowScalars<A>& r) {
  switch (norm) {
    case Norm::kL1: return slopes<Norm::kL1>(a, out, n, r);
    case Norm::kL2: return slopes<Norm::kL2>(a, out, n, r);
    case Norm::kSquaredL2: return slopes<Norm::kSquaredL2>(a, out, n, r);
    case Norm::kInf: return slopes<Norm::kInf>(a, out, n, r);
    case Norm::kP: return slopes<Norm::kP>(a, out, n, r);
  }
}

// sum_j v_j slope_j
template <Norm kNorm, class A>
RK_HOST_DEVICE A directional(const A* a, const A* v, int64_t n, const RowScalars<A>& r) {
  return lane_sum<A>(
      n, [=](int64_t j) RK_INLINE_LAMBDA { return v[j] * RowNorm<kNorm, A>::slope(a[j], r.n, r.p, r.ties); });
}

template <class A>
RK_HOST_DEVICE A directional_of(Norm norm, const A* a, const A* v, int64_t n, const RowScalars<A>& r) {
  switch (norm) {
    case Norm::kL1: return directional<Norm::kL1>(a, v, n, r);
    case Norm::kL2: return directional<Norm::kL2>(a, v, n, r);
    case Norm::kSquaredL2: return directional<Norm::kSquaredL2>(a, v, n, r);
    case Norm::kInf: return directional<Norm::kInf>(a, v, n, r);
    default: return directional<Norm::kP>(a, v, n, r);
  }
}

// out_j = grad * bend_j
template <Norm kNorm, class A>
RK_HOST_DEVICE void bends(const A* __restrict__ a, const A* __restrict__ v, A* __restrict__ out, int64_t n,
                          const RowScalars<A>& r) {
  for (int64_t j = 0; j < n; ++j) out[j] = r.grad * RowNorm<kNorm, A>::bend(a[j], v[j], r.s, r.n, r.p);
}

template <class A>
RK_HOST_DEVICE void bends_of(Norm norm, const A* a, const A* v, A* out, int64_t n, const RowScalars<A>& r) {
  switch (norm) {
    case Norm::kL2: return bends<Norm::kL2>(a, v, out, n, r);
    case Norm::kSquaredL2: return bends<Norm::kSquaredL2>(a, v, out, n, r);
    case Norm::kP: return bends<Norm::kP>(a, v, out, n, r);
    default: return;  // identically zero
  }
}

// The same for each accumulation type, compiled for every instruction set.
#define RK_ROW_NORM_LOOPS(A)                                                                                        \
  RK_MULTIVERSION static A terms(Norm norm, const A* a, int64_t n, A p) { return terms_of<A>(norm, a, n, p); }      \
  RK_MULTIVERSION static A ties(const A* a, int64_t n, A norm) { return ties_of<A>(a, n, norm); }                   \
  RK_MULTIVERSION static void slopes(Norm norm, const A* a, A* out, int64_t n, const RowScalars<A>& r) {            \
    slopes_of<A>(norm, a, out, n, r);                                                                               \
  }                                                                                                                 \
  RK_MULTIVERSION static A directional(Norm norm, const A* a, const A* v, int64_t n, const RowScalars<A>& r) {      \
    return directional_of<A>(norm, a, v, n, r);                                                                     \
  }                                                                                                                 \
  RK_MULTIVERSION static void bends(Norm norm, const A* a, const A* v, A* out, int64_t n, const RowScalars<A>& r) { \
    bends_of<A>(norm, a, v, out, n, r);                                                                             \
  }                                                                                                                 \
  RK_MULTIVERSION static void multiply(const A* from, const A* w, A* to, int64_t n) {                               \
    for (int64_t j = 0; j < n; ++j) to[j] = from[j] * w[j];                                                         \
  }                                                                                                                 \
  RK_MULTIVERSION static void multiply(const A* from, A w, A* to, int64_t n) {                                      \
    for (int64_t j = 0; j < n; ++j) to[j] = from[j] * w;                                                            \
  }

RK_ROW_NORM_LOOPS(float)
RK_ROW_NORM_LOOPS(double)
#undef RK_ROW_NORM_LOOPS

}  // namespace rk::cpu
