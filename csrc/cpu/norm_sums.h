// The sums that the normalisations share: along rows, and down columns.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "dispatch.h"
#include "lanes.h"

namespace rk::cpu {

// Sums of h, h xh, and of u, u xh, u h, in lanes: h = w g, xh = (x - mean) r, or x - mean where r is to follow.
template <class A>
struct NormLanes {
  Lanes<A> h = {}, hx = {}, u = {}, ux = {}, uh = {};

  template <bool kSecond>
  RK_HOST_DEVICE void add(const Lanes<A>& xh, const Lanes<A>& h_j, const Lanes<A>& u_j) {
    h += h_j;
    hx += h_j * xh;
    if constexpr (kSecond) {
      u += u_j;
      ux += u_j * xh;
      uh += u_j * h_j;
    }
  }
  RK_HOST_DEVICE void add(const NormLanes& other) {
    h += other.h;
    hx += other.hx;
    u += other.u;
    ux += other.ux;
    uh += other.uh;
  }
};

// A row, or part of one; w is read if kWeighted, u if kSecond.
template <bool kSecond, bool kWeighted, class A>
struct NormRow {
  const A *x, *g, *u, *w;
  A mean, r;

  template <class... Count>  // none for all lanes
  RK_HOST_DEVICE void add_to(NormLanes<A>& sums, std::int64_t j, Count... count) const {
    Lanes<A> x_j, h_j, u_j = {}, w_j;
    load_lanes(x_j, x + j, count...);
    load_lanes(h_j, g + j, count...);
    if constexpr (kWeighted) {
      load_lanes(w_j, w + j, count...);
      h_j *= w_j;
    }
    if constexpr (kSecond) load_lanes(u_j, u + j, count...);
    sums.template add<kSecond>((x_j - mean) * r, h_j, u_j);
  }
};

// totals += the first two sums of n elements and, if kSecond, the others.  The order of additions depends on n alone.
template <bool kSecond, bool kWeighted, class A>
RK_HOST_DEVICE void norm_sums(const NormRow<kSecond, kWeighted, A>& row, std::int64_t n, double* totals) {
  constexpr int L = kLanes<A>;
  NormLanes<A> even, odd;  // two of each sum hide the latency of an addition
  std::int64_t j = 0;
  for (; j + 2 * L <= n; j += 2 * L) {
    row.add_to(even, j);
    row.add_to(odd, j + L);
  }
  if (j + L <= n) {
    row.add_to(even, j);
    j += L;
  }
  if (j < n) row.add_to(odd, j, n - j);
  even.add(odd);
  totals[0] += double(horizontal_sum<A>(even.h));
  totals[1] += double(horizontal_sum<A>(even.hx));
  if constexpr (kSecond) {
    totals[2] += double(horizontal_sum<A>(even.u));
    totals[3] += double(horizontal_sum<A>(even.ux));
    totals[4] += double(horizontal_sum<A>(even.uh));
  }
}

// The same for every column of `rows` rows, `stride` apart: totals is five arrays [n].
template <bool kSecond, class A>
RK_HOST_DEVICE void column_sums(std::int64_t rows, std::int64_t n, std::int64_t stride, const A* x, const A* g,
                                const A* u, const A* mean, const A* r, A* totals) {
  constexpr int L = kLanes<A>;
  std::int64_t j = 0;
  for (; j + L <= n; j += L) {
    NormLanes<A> sums;
    Lanes<A> mean_j, r_j, x_j, g_j, u_j = {};
    load_lanes(mean_j, mean + j);
    load_lanes(r_j, r + j);
    load_lanes(sums.h, totals + j);
    load_lanes(sums.hx, totals + n + j);
    if constexpr (kSecond) {
      load_lanes(sums.u, totals + 2 * n + j);
      load_lanes(sums.ux, totals + 3 * n + j);
      load_lanes(sums.uh, totals + 4 * n + j);
    }
    for (std::int64_t at = j; at < rows * stride; at += stride) {
      const std::int64_t next = at + rows * stride;  // the rows behind these, which come next
      __builtin_prefetch(x + next);
      __builtin_prefetch(g + next);
      if constexpr (kSecond) __builtin_prefetch(u + next);
      load_lanes(x_j, x + at);
      load_lanes(g_j, g + at);
      if constexpr (kSecond) load_lanes(u_j, u + at);
      sums.template add<kSecond>((x_j - mean_j) * r_j, g_j, u_j);
    }
    std::memcpy(totals + j, &sums.h, sizeof sums.h);
    std::memcpy(totals + n + j, &sums.hx, sizeof sums.h);
    if constexpr (kSecond) {
      std::memcpy(totals + 2 * n + j, &sums.u, sizeof sums.h);
      std::memcpy(totals + 3 * n + j, &sums.ux, sizeof sums.h);
      std::memcpy(totals + 4 * n + j, &sums.uh, sizeof sums.h);
    }
  }
  for (; j < n; ++j)
    for (std::int64_t at = j; at < rows * stride; at += stride) {
      const A xh = (x[at] - mean[j]) * r[j];
      totals[j] += g[at];
      totals[n + j] += g[at] * xh;
      if constexpr (kSecond) {
        totals[2 * n + j] += u[at];
        totals[3 * n + j] += u[at] * xh;
        totals[4 * n + j] += u[at] * g[at];
      }
    }
}

template <class A>
RK_MULTIVERSION static void add_in_double(double* __restrict__ totals, const A* from, std::int64_t n) {
  for (std::int64_t j = 0; j < n; ++j) totals[j] += double(from[j]);
}

// out[j] = sum over rows of from[., j], in order and in double
template <class A>
void add_rows_in_double(std::int64_t rows, std::int64_t columns, const A* from, A* out) {
  constexpr std::int64_t strip = 256;  // columns
  const std::int64_t units = (columns + strip - 1) / strip;
  torch::stable::parallel_for(0, units, rows_per_thread(rows * strip), [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t unit = first; unit < last; ++unit) {
      const std::int64_t begin = unit * strip, n = std::min(columns - begin, strip);
      double totals[strip] = {};
      for (std::int64_t i = 0; i < rows; ++i) add_in_double(totals, from + i * columns + begin, n);
      for (std::int64_t j = 0; j < n; ++j) out[begin + j] = A(totals[j]);
    }
  });
}

}  // namespace rk::cpu
