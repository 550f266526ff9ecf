// The inner loops of softmax_double_backward: pieces of a row, and of rows side by side, in the accumulation type.
#pragma once

#include "../math/softmax.h"
#include "simd.h"

namespace rk::cpu {

// One piece of one row, or of one class in many rows; `p` holds probabilities.
template <class A>
struct SoftmaxPiece {
  const A *p, *u, *g;
  A *gg_grad, *grad_output;
  std::int64_t n;
};

template <class A>
struct SoftmaxSums {
  A total_g, mean_u;
};

template <bool kLog, class A>
RK_HOST_DEVICE SoftmaxSums<A> softmax_sums(const SoftmaxPiece<A>& w) {
  SoftmaxSums<A> sums{};
  const A *p = w.p, *u = w.u, *g = w.g;
  lane_sum2<A>(
      w.n, sums.total_g, sums.mean_u,
      [=](std::int64_t j) RK_INLINE_LAMBDA { return Softmax<kLog, A>::total_g_term(p[j], g[j]); },
      [=](std::int64_t j) RK_INLINE_LAMBDA { return p[j] * u[j]; });
  return sums;
}

template <bool kLog, class A>
RK_HOST_DEVICE void softmax_row(const SoftmaxPiece<A>& w, SoftmaxSums<A> sums) {
  const A *p = w.p, *u = w.u, *g = w.g;
  A* __restrict__ gg_grad = w.gg_grad, * __restrict__ grad_output = w.grad_output;
  for (std::int64_t j = 0; j < w.n; ++j) {
    gg_grad[j] = Softmax<kLog, A>::gg_grad(p[j], u[j], sums.mean_u);
    grad_output[j] = Softmax<kLog, A>::grad_output(p[j], u[j], g[j], sums.total_g, sums.mean_u);
  }
}

// One class of n rows: adds to their sums.
template <bool kLog, class A>
RK_HOST_DEVICE void softmax_add(const SoftmaxPiece<A>& w, double* __restrict__ total_g, double* __restrict__ mean_u) {
  const A *p = w.p, *u = w.u, *g = w.g;
  for (std::int64_t j = 0; j < w.n; ++j) {
    total_g[j] += double(Softmax<kLog, A>::total_g_term(p[j], g[j]));
    mean_u[j] += double(p[j] * u[j]);
  }
}

template <bool kLog, class A>
RK_HOST_DEVICE void softmax_columns(const SoftmaxPiece<A>& w, const double* total_g, const double* mean_u) {
  const A *p = w.p, *u = w.u, *g = w.g;
  A* __restrict__ gg_grad = w.gg_grad, * __restrict__ grad_output = w.grad_output;
  for (std::int64_t j = 0; j < w.n; ++j) {
    gg_grad[j] = Softmax<kLog, A>::gg_grad(p[j], u[j], A(mean_u[j]));
    grad_output[j] = Softmax<kLog, A>::grad_output(p[j], u[j], g[j], A(total_g[j]), A(mean_u[j]));
  }
}

RK_MULTIVERSION static void add(const double* from, double* to, std::int64_t n) {
  for (std::int64_t j = 0; j < n; ++j) to[j] += from[j];
}

#define RK_SOFTMAX_LOOPS(A)                                                                                        \
  RK_MULTIVERSION static void exponentials(const A* o, A* p, std::int64_t n) {                                     \
    for (std::int64_t j = 0; j < n; ++j) p[j] = exp_nonpositive(o[j]);                                             \
  }                                                                                                                \
  RK_MULTIVERSION static SoftmaxSums<A> row_sums(bool log, const SoftmaxPiece<A>& w) {                             \
    return log ? softmax_sums<true>(w) : softmax_sums<false>(w);                                                   \
  }                                                                                                                \
  RK_MULTIVERSION static void finish_row(bool log, const SoftmaxPiece<A>& w, SoftmaxSums<A> sums) {                \
    log ? softmax_row<true>(w, sums) : softmax_row<false>(w, sums);                                                \
  }                                                                                                                \
  RK_MULTIVERSION static void add_class(bool log, const SoftmaxPiece<A>& w, double* g, double* u) {                \
    log ? softmax_add<true>(w, g, u) : softmax_add<false>(w, g, u);                                                \
  }                                                                                                                \
  RK_MULTIVERSION static void finish_class(bool log, const SoftmaxPiece<A>& w, const double* g, const double* u) { \
    log ? softmax_columns<true>(w, g, u) : softmax_columns<false>(w, g, u);                                        \
  }

RK_SOFTMAX_LOOPS(float)
RK_SOFTMAX_LOOPS(double)
#undef RK_SOFTMAX_LOOPS

}  // namespace rk::cpu
