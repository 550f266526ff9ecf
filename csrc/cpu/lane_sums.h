// The sums that normalisations share.
#pragma once

#include "half.h"
#include "simd.h"

namespace rk::cpu {

// An AVX2 register.  Written out, because gcc unrolls a loop over lanes with several sums in it and then finds no vectors
// in what is left.
template <class A>
struct LanesOf {
  typedef A type __attribute__((vector_size(32)));
  static constexpr int kCount = 32 / sizeof(A);
};
template <class A>
using Lanes = typename LanesOf<A>::type;

template <class A>
RK_HOST_DEVICE void load_lanes(Lanes<A>& to, const A* from) {
  std::memcpy(&to, from, sizeof to);
}

// The first n < kCount lanes, zeros behind them.
template <class S>
RK_HOST_DEVICE void load_lanes(Lanes<accumulation_t<S>>& to, const S* from, std::int64_t n) {
  accumulation_t<S> padded[LanesOf<accumulation_t<S>>::kCount] = {};
  for (std::int64_t k = 0; k < n; ++k) padded[k] = load(from[k]);
  std::memcpy(&to, padded, sizeof to);
}

// Two registers of adjacent elements.  Those of BFloat16 lie in them as in memory two by two: all first ones, all second
// ones, so that nothing is shuffled between a register of 16-bit numbers and two of floats.
template <class A>
RK_HOST_DEVICE void load_two(Lanes<A>& first, Lanes<A>& second, const A* from) {
  load_lanes<A>(first, from);
  load_lanes<A>(second, from + LanesOf<A>::kCount);
}
typedef std::uint32_t Words __attribute__((vector_size(32)));
RK_HOST_DEVICE void load_two(Lanes<float>& first, Lanes<float>& second, const BFloat16* from) {
  Words pairs;
  std::memcpy(&pairs, from, sizeof pairs);
  const Words low = pairs << 16, high = pairs & 0xffff0000u;
  std::memcpy(&first, &low, sizeof low);
  std::memcpy(&second, &high, sizeof high);
}
RK_HOST_DEVICE void round_to_bfloat16(Words& upper_halves, const Lanes<float>& v) {  // to nearest, ties to even
  Words bits;
  std::memcpy(&bits, &v, sizeof bits);
  const Words rounded = bits + 0x7fffu + ((bits >> 16) & 1u), nan = bits | 0x400000u;
  upper_halves = v == v ? rounded : nan;
}
RK_HOST_DEVICE void store_two(BFloat16* to, const Lanes<float>& first, const Lanes<float>& second) {
  Words low, high;
  round_to_bfloat16(low, first);
  round_to_bfloat16(high, second);
  const Words pairs = (low >> 16) | (high & 0xffff0000u);
  std::memcpy(to, &pairs, sizeof pairs);
}

template <class A>
RK_HOST_DEVICE A sum_of_lanes(const Lanes<A>& lanes) {
  A sum = (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
  if constexpr (LanesOf<A>::kCount == 8) sum += (lanes[4] + lanes[6]) + (lanes[5] + lanes[7]);
  return sum;
}

// Sums of h, h xh, and of u, u xh, u h, in lanes: h = w g, xh = (x - mean) r.
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
  constexpr int L = LanesOf<A>::kCount;
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
  totals[0] += double(sum_of_lanes<A>(even.h));
  totals[1] += double(sum_of_lanes<A>(even.hx));
  if constexpr (kSecond) {
    totals[2] += double(sum_of_lanes<A>(even.u));
    totals[3] += double(sum_of_lanes<A>(even.ux));
    totals[4] += double(sum_of_lanes<A>(even.uh));
  }
}

// The same for every column of `rows` rows, `stride` apart: totals is five arrays [n].
template <bool kSecond, class A>
RK_HOST_DEVICE void column_sums(std::int64_t rows, std::int64_t n, std::int64_t stride, const A* x, const A* g,
                                const A* u, const A* mean, const A* r, A* totals) {
  constexpr int L = LanesOf<A>::kCount;
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

RK_MULTIVERSION [[maybe_unused]] static void add_in_double(double* __restrict__ totals, const float* from,
                                                           std::int64_t n) {
  for (std::int64_t j = 0; j < n; ++j) totals[j] += double(from[j]);
}
RK_MULTIVERSION [[maybe_unused]] static void add_in_double(double* __restrict__ totals, const double* from,
                                                           std::int64_t n) {
  for (std::int64_t j = 0; j < n; ++j) totals[j] += from[j];
}

}  // namespace rk::cpu
