// The loops over one row of scores between the matrix products of attention_double_backward.
#pragma once

#include <algorithm>
#include <limits>
#include <utility>

#include "../math/attention.h"
#include "lanes.h"
#include "pieces.h"

namespace rk::cpu {

// n, up to the next multiple of a register's lanes: rows are that long, and no loop has a remainder.
template <class A>
constexpr int64_t whole_lanes(int64_t n) {
  return (n + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

// The largest of n whole lanes, NaN if there is one.
template <class A>
RK_HOST_DEVICE A largest_score(const A* s, int64_t n) {
  constexpr int L = kLanes<A>;
  Lanes<A> best, v;
  load_lanes(best, s);
  for (int64_t j = L; j < n; j += L) {
    load_lanes(v, s + j);
    best = (v > best) | (v != v) ? v : best;
  }
  A largest = best[0];
  for (int k = 1; k < L; ++k) largest = best[k] > largest || is_nan(best[k]) ? best[k] : largest;
  return largest;
}

// A sum of n whole lanes, in their type within a piece and in double across pieces; f(j) gives those from j.
template <class A, class F>
RK_HOST_DEVICE double row_sum(int64_t n, const F& f) {
  constexpr int L = kLanes<A>;
  double total = 0;
  for (int64_t i = 0; i < n; i += kPiece) {
    const int64_t end = n - i < kPiece ? n : i + kPiece;
    Lanes<A> sum_0 = {}, sum_1 = {}, sum_2 = {}, sum_3 = {}, term;  // four hide the latency of an addition
    int64_t j = i;
    for (; j + 4 * L <= end; j += 4 * L) {
      f(term, j);
      sum_0 += term;
      f(term, j + L);
      sum_1 += term;
      f(term, j + 2 * L);
      sum_2 += term;
      f(term, j + 3 * L);
      sum_3 += term;
    }
    for (; j < end; j += L) {
      f(term, j);
      sum_0 += term;
      std::swap(sum_0, sum_1);
    }
    total += double(horizontal_sum<A>((sum_0 + sum_2) + (sum_1 + sum_3)));
  }
  return total;
}

// sum x y
template <class A>
RK_HOST_DEVICE double row_dot(const A* x, const A* y, int64_t n) {
  return row_sum<A>(n, [=](Lanes<A>& term, int64_t j) RK_INLINE_LAMBDA {
    Lanes<A> y_j;
    load_lanes(term, x + j);
    load_lanes(y_j, y + j);
    term *= y_j;
  });
}

// S, T, dP, X become Pd = P (T - t), P, W = P (G - g), dS = P (dP - D): n whole lanes.  False, and nothing done, if all
// scores are -inf: such a row attends to nothing.
template <class A>
RK_MULTIVERSION static bool attention_lanes(A* __restrict__ s, A* __restrict__ t, A* __restrict__ dp, A* __restrict__ x,
                                            int64_t n) {
  const A max = largest_score(s, n);
  if (max == -std::numeric_limits<A>::infinity()) return false;
  for (int64_t j = 0; j < n; ++j) s[j] = exp_nonpositive(s[j] - max);
  const double sum = row_sum<A>(n, [=](Lanes<A>& term, int64_t j) RK_INLINE_LAMBDA { load_lanes(term, s + j); });
  AttentionRow<A> row{};
  row.t = A(row_dot(s, t, n) / sum);
  row.d = A(row_dot(s, dp, n) / sum);
  row.inverse_sum = A(1 / sum);
  for (int64_t j = 0; j < n; ++j) {
    s[j] *= row.inverse_sum;
    x[j] = attention_bend(t[j], dp[j], x[j], row);
  }
  row.g = A(row_dot(s, x, n));
  for (int64_t j = 0; j < n; ++j) {
    const A probability = s[j], slope = dp[j];
    s[j] = probability * (t[j] - row.t);
    t[j] = probability;
    dp[j] = probability * (x[j] - row.g);
    x[j] = probability * (slope - row.d);
  }
  return true;
}

template <class A>
RK_MULTIVERSION static void add_to_scores(A* s, const A* mask, int64_t stride, int64_t n) {
  if (stride == 1)
    for (int64_t j = 0; j < n; ++j) s[j] += mask[j];
  else
    for (int64_t j = 0; j < n; ++j) s[j] += mask[j * stride];
}

template <class A>
RK_MULTIVERSION static void add_rows(const A* from, A* to, int64_t n) {
  for (int64_t j = 0; j < n; ++j) to[j] += from[j];
}

template <class A>
RK_MULTIVERSION static void scale_rows(A* rows, int64_t n, A scale) {
  for (int64_t j = 0; j < n; ++j) rows[j] *= scale;
}

// One row of scores s, with t, dp and x beside it: in place, s becomes Pd, t becomes P, dp becomes W, x becomes dS.
// Columns from `valid` on lie behind the causal mask or the last key; `width` counts them in whole lanes.
template <class A>
void attention_row(A* s, A* t, A* dp, A* x, int64_t valid, int64_t width) {
  const int64_t n = whole_lanes<A>(valid);
  std::fill(s + valid, s + n, -std::numeric_limits<A>::infinity());
  for (A* row : {t, dp, x}) std::fill(row + valid, row + n, A(0));
  const int64_t from = attention_lanes(s, t, dp, x, n) ? n : 0;
  if (from == width) return;
  for (A* row : {s, t, dp, x}) std::fill(row + from, row + width, A(0));
}

}  // namespace rk::cpu
