// The loops over one row of scores between the matrix products of attention_double_backward.
#pragma once

#include <algorithm>

#include "../math/attention.h"
#include "pieces.h"
#include "simd.h"

namespace rk::cpu {

// Sums run in the type of the data within a piece, in double across pieces.
#define RK_ATTENTION_LOOPS(A)                                                                                       \
  RK_MULTIVERSION static void add_to_scores(A* s, const A* mask, int64_t stride, int64_t n) {                       \
    if (stride == 1)                                                                                                \
      for (int64_t j = 0; j < n; ++j) s[j] += mask[j];                                                              \
    else                                                                                                            \
      for (int64_t j = 0; j < n; ++j) s[j] += mask[j * stride];                                                     \
  }                                                                                                                 \
  RK_MULTIVERSION static A largest_score(const A* s, int64_t n) {                                                   \
    return lane_max<A>(n, -std::numeric_limits<A>::infinity(), [=](int64_t j) RK_INLINE_LAMBDA { return s[j]; });   \
  }                                                                                                                 \
  /* s = exp(s - max); returns the sum */                                                                           \
  RK_MULTIVERSION static double exponentials(A* s, int64_t n, A max) {                                              \
    double total = 0;                                                                                               \
    for (int64_t i = 0; i < n; i += kPiece) {                                                                       \
      A* e = s + i;                                                                                                 \
      const int64_t m = n - i < kPiece ? n - i : kPiece;                                                            \
      for (int64_t j = 0; j < m; ++j) e[j] = exp_nonpositive(e[j] - max);                                           \
      total += lane_sum<A>(m, [=](int64_t j) RK_INLINE_LAMBDA { return e[j]; });                                    \
    }                                                                                                               \
    return total;                                                                                                   \
  }                                                                                                                 \
  /* sum x y */                                                                                                     \
  RK_MULTIVERSION static double dot(const A* x, const A* y, int64_t n) {                                            \
    double total = 0;                                                                                               \
    for (int64_t i = 0; i < n; i += kPiece) {                                                                       \
      const A *a = x + i, *b = y + i;                                                                               \
      const int64_t m = n - i < kPiece ? n - i : kPiece;                                                            \
      total += lane_sum<A>(m, [=](int64_t j) RK_INLINE_LAMBDA { return a[j] * b[j]; });                             \
    }                                                                                                               \
    return total;                                                                                                   \
  }                                                                                                                 \
  /* e becomes P, x becomes G */                                                                                    \
  RK_MULTIVERSION static void bends(A* __restrict__ e, const A* __restrict__ t, const A* __restrict__ dp,           \
                                    A* __restrict__ x, int64_t n, const AttentionRow<A>& r) {                       \
    const AttentionRow<A> row = r;                                                                                  \
    for (int64_t j = 0; j < n; ++j) {                                                                               \
      e[j] *= row.inverse_sum;                                                                                      \
      x[j] = attention_bend(t[j], dp[j], x[j], row);                                                                \
    }                                                                                                               \
  }                                                                                                                 \
  /* in place: P, T, dP, G become P (T - t), P, P (dP - D), P (G - g) */                                            \
  RK_MULTIVERSION static void products(A* __restrict__ p, A* __restrict__ t, A* __restrict__ dp, A* __restrict__ x, \
                                       int64_t n, const AttentionRow<A>& r) {                                       \
    const AttentionRow<A> row = r;                                                                                  \
    for (int64_t j = 0; j < n; ++j) {                                                                               \
      const A probability = p[j];                                                                                   \
      p[j] = probability * (t[j] - row.t);                                                                          \
      t[j] = probability;                                                                                           \
      dp[j] = probability * (dp[j] - row.d);                                                                        \
      x[j] = probability * (x[j] - row.g);                                                                          \
    }                                                                                                               \
  }                                                                                                                 \
  RK_MULTIVERSION static void add_rows(const A* from, A* to, int64_t n) {                                           \
    for (int64_t j = 0; j < n; ++j) to[j] += from[j];                                                               \
  }

RK_ATTENTION_LOOPS(float)
RK_ATTENTION_LOOPS(double)
#undef RK_ATTENTION_LOOPS

// One row of scores s, with t, dp and x beside it: in place, s becomes Pd, t becomes P, dp becomes dS, x becomes W.
// Columns from `valid` on lie behind the causal mask.
template <class A>
void attention_row(A* s, A* t, A* dp, A* x, int64_t valid, int64_t cols) {
  const A max = largest_score(s, valid);
  const bool masked = max == -std::numeric_limits<A>::infinity();  // everywhere: such a row attends to nothing
  if (!masked) {
    AttentionRow<A> row{};
    const double inverse_sum = 1.0 / exponentials(s, valid, max);
    row.inverse_sum = A(inverse_sum);
    row.t = A(dot(s, t, valid) * inverse_sum);
    row.d = A(dot(s, dp, valid) * inverse_sum);
    bends(s, t, dp, x, valid, row);
    row.g = A(dot(s, x, valid));
    products(s, t, dp, x, valid, row);
  }
  const int64_t from = masked ? 0 : valid;
  for (A* matrix : {s, t, dp, x}) std::fill(matrix + from, matrix + cols, A(0));
}

}  // namespace rk::cpu
