// The inner loops of random_cotangents: rows of v, their sums in lanes, reflections of blocks of columns.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../math/random_cotangents.h"
#include "lanes.h"
#include "philox_lanes.h"

namespace rk::cpu {

// f(e, sum) adds entry e to the sum of its lane; see math/random_cotangents.h for the order.
template <class A, class F>
RK_HOST_DEVICE A ordered_sum(std::int64_t n, const F& f) {
  int used = kSumLanes;  // lanes beyond the row's end would hold zeros, whose addition changes nothing
  while (used > 1 && n <= 2 * used) used /= 2;
  A lane[kSumLanes];
  for (int l = 0; l < used; ++l) lane[l] = A(0);
  std::int64_t e = 0;
  for (; e + 4 * kSumLanes <= n; e += 4 * kSumLanes)
    for (int j = 0; j < 4; ++j)
      for (int l = 0; l < kSumLanes; ++l) lane[l] = f(e + 4 * l + j, lane[l]);
  const std::int64_t rest = n - e;
  for (int l = 0; 4 * l < rest; ++l)
    for (int j = 0; j < 4 && 4 * l + j < rest; ++j) lane[l] = f(e + 4 * l + j, lane[l]);
  for (int half = used / 2; half; half /= 2)
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  return lane[0];
}

// Numbers of a sample's sequence, in whole blocks.
template <class A>
RK_HOST_DEVICE void draw_normals(PhiloxKey key, std::uint32_t sample, std::uint64_t first, std::int64_t blocks,
                                 A* __restrict__ v) {
  std::int64_t b = 0;
  for (; b + kPhiloxLanes <= blocks; b += kPhiloxLanes) {
    WordLanes w;
    philox_lanes(key, first + std::uint64_t(b), 1, sample, 0, kNormalStream, w);
    for (int l = 0; l < kPhiloxLanes; ++l) {
      const FourNormals<A> x(RandomWords{w.w[0][l], w.w[1][l], w.w[2][l], w.w[3][l]});
      for (int j = 0; j < 4; ++j) v[4 * (b + l) + j] = x.at[j];
    }
  }
  for (; b < blocks; ++b) {
    const FourNormals<A> x(key, first + std::uint64_t(b), sample);
    for (int j = 0; j < 4; ++j) v[4 * b + j] = x.at[j];
  }
}

template <class A>
RK_MULTIVERSION static void draw_normal(PhiloxKey key, std::uint32_t sample, std::uint64_t first, std::int64_t blocks,
                                        A* v) {
  draw_normals(key, sample, first, blocks, v);
}

// Signs from words [first, first + words) of the sequence, 32 each.
template <class A>
RK_HOST_DEVICE void draw_signs(PhiloxKey key, std::uint32_t sample, std::uint64_t first, std::int64_t words,
                               A* __restrict__ v) {
  const std::uint64_t end = first + std::uint64_t(words);
  for (std::uint64_t block = first / 4; 4 * block < end; ++block) {
    const RandomWords w = cotangent_words(key, block, sample, kBitStream);
    const std::uint32_t four[4] = {w.w0, w.w1, w.w2, w.w3};
    for (int j = 0; j < 4; ++j) {
      const std::uint64_t word = 4 * block + j;
      if (word < first || word >= end) continue;
      for (std::uint32_t bit = 0; bit < 32; ++bit) v[(word - first) * 32 + bit] = sign_from<A>(four[j], bit);
    }
  }
}

template <class A>
RK_MULTIVERSION static void draw_sign(PhiloxKey key, std::uint32_t sample, std::uint64_t first, std::int64_t words,
                                      A* v) {
  draw_signs(key, sample, first, words, v);
}

// The dot products of four vectors u [n, 4] with each other.
template <class A>
RK_MULTIVERSION static void products(const A* u, std::int64_t n, FourReflections<A>& h) {
  A p01 = 0, p02 = 0, p03 = 0, p12 = 0, p13 = 0, p23 = 0;
  for (std::int64_t i = 0; i < n; ++i, u += 4) {
    p01 = fused(u[0], u[1], p01);
    p02 = fused(u[0], u[2], p02);
    p03 = fused(u[0], u[3], p03);
    p12 = fused(u[1], u[2], p12);
    p13 = fused(u[1], u[3], p13);
    p23 = fused(u[2], u[3], p23);
  }
  const A product[6] = {p01, p02, p03, p12, p13, p23};
  for (int j = 0; j < 6; ++j) h.product[j] = product[j];
}

// Columns that are reflected together, side by side in two registers.
template <class A>
inline constexpr int kColumns = 2 * kLanes<A>;

// r += a b
template <class A>
RK_HOST_DEVICE void add_fused(Lanes<A>& r, A a, const Lanes<A>& b) {
  for (int l = 0; l < kLanes<A>; ++l) r[l] = fused(a, b[l], r[l]);
}

// q [n, kColumns] turned by four reflections u [n, 4].  Written out for each of them: gcc keeps an array of registers that
// a loop walks through in memory.
template <class A>
RK_MULTIVERSION static void reflect(const A* u, const FourReflections<A>& h, std::int64_t n, A* __restrict__ q) {
  constexpr int L = kLanes<A>, W = kColumns<A>;
  Lanes<A> x0 = {}, x1 = {}, x2 = {}, x3 = {}, y0 = {}, y1 = {}, y2 = {}, y3 = {}, x, y;
  const A* at = u;
  for (std::int64_t i = 0; i < n; ++i, at += 4) {
    load_lanes(x, q + i * W);
    load_lanes(y, q + i * W + L);
    add_fused(x0, at[0], x);
    add_fused(x1, at[1], x);
    add_fused(x2, at[2], x);
    add_fused(x3, at[3], x);
    add_fused(y0, at[0], y);
    add_fused(y1, at[1], y);
    add_fused(y2, at[2], y);
    add_fused(y3, at[3], y);
  }
  A d[4][W];
  const Lanes<A> sums[8] = {x0, y0, x1, y1, x2, y2, x3, y3};
  std::memcpy(d, sums, sizeof d);
  for (int l = 0; l < W; ++l) {
    const FourSteps<A> steps(h, d[0][l], d[1][l], d[2][l], d[3][l]);
    d[0][l] = steps.s0;
    d[1][l] = steps.s1;
    d[2][l] = steps.s2;
    d[3][l] = steps.s3;
  }
  load_lanes(x0, d[0]);
  load_lanes(y0, d[0] + L);
  load_lanes(x1, d[1]);
  load_lanes(y1, d[1] + L);
  load_lanes(x2, d[2]);
  load_lanes(y2, d[2] + L);
  load_lanes(x3, d[3]);
  load_lanes(y3, d[3] + L);
  at = u;
  for (std::int64_t i = 0; i < n; ++i, at += 4) {
    load_lanes(x, q + i * W);
    load_lanes(y, q + i * W + L);
    add_fused(x, at[3], x3);
    add_fused(y, at[3], y3);
    add_fused(x, at[2], x2);
    add_fused(y, at[2], y2);
    add_fused(x, at[1], x1);
    add_fused(y, at[1], y1);
    add_fused(x, at[0], x0);
    add_fused(y, at[0], y0);
    std::memcpy(q + i * W, &x, sizeof x);
    std::memcpy(q + i * W + L, &y, sizeof y);
  }
}

template <class A>
RK_MULTIVERSION static A sum(const A* v, std::int64_t n) {
  return ordered_sum<A>(n, [=](std::int64_t e, A s) RK_INLINE_LAMBDA { return s + v[e]; });
}

template <class A>
RK_MULTIVERSION static A dot(const A* x, const A* y, std::int64_t n) {
  return ordered_sum<A>(n, [=](std::int64_t e, A s) RK_INLINE_LAMBDA { return fused(x[e], y[e], s); });
}

template <class A>
RK_MULTIVERSION static A dot(const A* g, const A* a, const A* v, std::int64_t n) {
  return ordered_sum<A>(n, [=](std::int64_t e, A s) RK_INLINE_LAMBDA { return fused(g[e], a[e] * v[e], s); });
}

template <class A>
RK_MULTIVERSION static void add_sum(const A* v, A* __restrict__ sum, std::int64_t n) {
  for (std::int64_t e = 0; e < n; ++e) sum[e] += v[e];
}

template <class A>
RK_MULTIVERSION static void add_dot(const A* x, const A* y, A* __restrict__ sum, std::int64_t n) {
  for (std::int64_t e = 0; e < n; ++e) sum[e] = fused(x[e], y[e], sum[e]);
}

template <class A>
RK_MULTIVERSION static void add_dot(const A* g, const A* a, const A* v, A* __restrict__ sum, std::int64_t n) {
  for (std::int64_t e = 0; e < n; ++e) sum[e] = fused(g[e], a[e] * v[e], sum[e]);
}

template <class A>
RK_MULTIVERSION static void raise(const A* z, A* __restrict__ max, std::int64_t n) {
  for (std::int64_t e = 0; e < n; ++e) max[e] = z[e] > max[e] ? z[e] : max[e];
}

template <class A>
RK_MULTIVERSION static A largest(const A* z, std::int64_t n) {
  A most = z[0];
  for (std::int64_t e = 1; e < n; ++e) most = z[e] > most ? z[e] : most;
  return most;
}

template <class A>
RK_MULTIVERSION static A sum_of_exponentials(const A* z, A max, std::int64_t n) {
  return ordered_sum<A>(n, [=](std::int64_t e, A s) RK_INLINE_LAMBDA { return s + exp_fixed(z[e] - max); });
}

template <class A>
RK_MULTIVERSION static void add_exponentials(const A* z, const A* max, A* __restrict__ sum, std::int64_t n) {
  for (std::int64_t e = 0; e < n; ++e) sum[e] += exp_fixed(z[e] - max[e]);
}

template <class A>
RK_MULTIVERSION static void logarithms(A* v, std::int64_t n) {
  for (std::int64_t e = 0; e < n; ++e) v[e] = log_fixed(v[e]);
}

template <class A, class Each>
RK_MULTIVERSION static void roots(const A* z, Each max, Each log_sum, A* __restrict__ a, std::int64_t n) {
  for (std::int64_t e = 0; e < n; ++e) a[e] = root_probability(z[e], entry(max, e), entry(log_sum, e));
}

template <class A, class Each>
RK_MULTIVERSION static void subtract(A* g, Each v, std::int64_t n) {
  for (std::int64_t e = 0; e < n; ++e) g[e] -= entry(v, e);
}

template <class A>
RK_MULTIVERSION static void divide(A* a, A by, std::int64_t n) {
  for (std::int64_t e = 0; e < n; ++e) a[e] /= by;
}

template <class A>
RK_MULTIVERSION static void scale_row(const A* v, A scale, A* w, std::int64_t n) {
  for (std::int64_t e = 0; e < n; ++e) w[e] = v[e] * scale;
}

template <class A, class Each>
RK_MULTIVERSION static void centre(const A* v, Each mean, A scale, A* __restrict__ w, std::int64_t n) {
  for (std::int64_t e = 0; e < n; ++e) w[e] = (v[e] - entry(mean, e)) * scale;
}

template <class A, class Each>
RK_MULTIVERSION static void fisher(const A* a, const A* v, Each d, A scale, A* __restrict__ w, std::int64_t n) {
  for (std::int64_t e = 0; e < n; ++e) w[e] = fisher_value(a[e], v[e], entry(d, e)) * scale;
}

// d = <a, v>, m = <g, a v>, b = <g, p>
template <class A, class Each>
RK_MULTIVERSION static void add_slopes(const A* a, const A* v, const A* g, Each d, Each m, Each b, A scale,
                                       A* __restrict__ total, std::int64_t n) {
  for (std::int64_t e = 0; e < n; ++e)
    total[e] = fisher_slope(a[e], v[e] * scale, g[e], entry(d, e) * scale, entry(m, e) * scale, entry(b, e), total[e]);
}

}  // namespace rk::cpu
