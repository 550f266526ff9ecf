// The inner loops of random_cotangents: rows of v, their sums in lanes, reflections of blocks of columns, small frames.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../math/random_cotangents.h"
#include "philox_lanes.h"
#include "transpose.h"

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
  A p[6] = {};
  for (std::int64_t i = 0; i < n; ++i, u += 4) {
    p[0] = fused(u[0], u[1], p[0]);
    p[1] = fused(u[0], u[2], p[1]);
    p[2] = fused(u[0], u[3], p[2]);
    p[3] = fused(u[1], u[2], p[3]);
    p[4] = fused(u[1], u[3], p[4]);
    p[5] = fused(u[2], u[3], p[5]);
  }
  std::copy_n(p, 6, h.product);
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
RK_MULTIVERSION static void add_dot(const A* x, const A* y, A* __restrict__ sum, std::int64_t n) {
  for (std::int64_t e = 0; e < n; ++e) sum[e] = fused(x[e], y[e], sum[e]);
}

template <class A>
RK_MULTIVERSION static void add_dot(const A* g, const A* a, const A* v, A* __restrict__ sum, std::int64_t n) {
  for (std::int64_t e = 0; e < n; ++e) sum[e] = fused(g[e], a[e] * v[e], sum[e]);
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

template <class A, class Each>
RK_MULTIVERSION static void roots(const A* z, Each max, Each log_sum, A* __restrict__ a, std::int64_t n) {
  for (std::int64_t e = 0; e < n; ++e) a[e] = root_probability(z[e], entry(max, e), entry(log_sum, e));
}

template <class A, class Each>
RK_MULTIVERSION static void subtract(A* g, Each v, std::int64_t n) {
  for (std::int64_t e = 0; e < n; ++e) g[e] -= entry(v, e);
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

// Frames of few dimensions: as many samples side by side as a register has lanes, so that no sum runs across a register.
// The same operations on each sample as above, in the same order: the same bits.

constexpr std::int64_t kFewDimensions = 16;

template <class A>
struct SmallFrames {
  static constexpr int L = kLanes<A>;
  // Each number of every sample: the sequence, the reflections [rows, 4], the columns [D, K].
  alignas(64) A x[kFewDimensions * (kFewDimensions + 1) / 2 + 3][L], u[4 * 40][L],
      q[kFewDimensions * kFewDimensions][L];
  alignas(64) A head[kFewDimensions][L], square[kFewDimensions][L], factor[kFewDimensions][L], sign[kFewDimensions][L];
};

// r = a b + c
template <class A>
RK_HOST_DEVICE void fuse(Lanes<A>& r, const Lanes<A>& a, const Lanes<A>& b, const Lanes<A>& c) {
  for (int l = 0; l < kLanes<A>; ++l) r[l] = fused(a[l], b[l], c[l]);
}

template <class A>
RK_HOST_DEVICE void sum_of_squares(const A (*x)[kLanes<A>], std::int64_t n, A* to) {
  Lanes<A> lane[4] = {}, v;  // of math/random_cotangents.h's order: n is at most 16
  for (std::int64_t e = 0; e < n; ++e) {
    load_lanes(v, x[e]);
    fuse<A>(lane[e / 4], v, v, lane[e / 4]);
  }
  lane[0] = (lane[0] + lane[2]) + (lane[1] + lane[3]);
  std::memcpy(to, &lane[0], sizeof lane[0]);
}

// d = <u_k, q>, then q += sum_k s_k u_k, of one column and one group of reflections.
template <class A>
RK_HOST_DEVICE void turn_column(const Lanes<A>* u, const Lanes<A>* factor, const Lanes<A>* product, std::int64_t rows,
                                Lanes<A>* q, std::int64_t stride) {
  Lanes<A> d0 = {}, d1 = {}, d2 = {}, d3 = {}, t;
  for (std::int64_t i = 0; i < rows; ++i) {
    const Lanes<A> v = q[i * stride];
    fuse<A>(d0, u[4 * i], v, d0);
    fuse<A>(d1, u[4 * i + 1], v, d1);
    fuse<A>(d2, u[4 * i + 2], v, d2);
    fuse<A>(d3, u[4 * i + 3], v, d3);
  }
  d3 = factor[3] * d3;
  fuse<A>(t, product[5], d3, d2);
  d2 = factor[2] * t;
  fuse<A>(t, product[4], d3, d1);
  fuse<A>(t, product[3], d2, t);
  d1 = factor[1] * t;
  fuse<A>(t, product[2], d3, d0);
  fuse<A>(t, product[1], d2, t);
  fuse<A>(t, product[0], d1, t);
  d0 = factor[0] * t;
  for (std::int64_t i = 0; i < rows; ++i) {
    Lanes<A> v = q[i * stride];
    fuse<A>(v, u[4 * i + 3], d3, v);
    fuse<A>(v, u[4 * i + 2], d2, v);
    fuse<A>(v, u[4 * i + 1], d1, v);
    fuse<A>(v, u[4 * i], d0, v);
    q[i * stride] = v;
  }
}

template <class A>
RK_MULTIVERSION static void draw_side_by_side(PhiloxKey key, std::uint32_t sample, std::int64_t blocks,
                                              SmallFrames<A>& s) {
  constexpr int L = SmallFrames<A>::L;
  A* __restrict__ x = &s.x[0][0];
  for (std::int64_t b = 0; b < blocks; ++b, x += 4 * L) {
    WordLanes w;  // of which double takes half
    philox_lanes(key, std::uint64_t(b), 0, sample, 1, kNormalStream, w);
    for (int l = 0; l < L; ++l) {
      const FourNormals<A> four(RandomWords{w.w[0][l], w.w[1][l], w.w[2][l], w.w[3][l]});
      for (int j = 0; j < 4; ++j) x[j * L + l] = four.at[j];
    }
  }
}

template <class A>
RK_MULTIVERSION static void find_reflections(std::int64_t K, std::int64_t D, SmallFrames<A>& s) {
  constexpr int L = SmallFrames<A>::L;
  for (std::int64_t k = 0; k < K; ++k) {
    sum_of_squares<A>(s.x + reflection_begin(k, D), D - k, s.square[k]);
    std::memcpy(s.head[k], s.x[reflection_begin(k, D)], sizeof s.head[k]);
  }
  A *head = &s.head[0][0], *square = &s.square[0][0], *factor = &s.factor[0][0], *sign = &s.sign[0][0];
  const A length = std::sqrt(A(D));
  for (std::int64_t i = 0; i < K * L; ++i) {
    const Reflection<A> h(head[i], std::sqrt(square[i]));
    head[i] = h.head;
    factor[i] = h.factor;
    sign[i] = h.sign * length;
  }
}

template <class A>
RK_MULTIVERSION static void turn_columns(std::int64_t K, std::int64_t D, SmallFrames<A>& s) {
  typedef Lanes<A> V;
  V *const u = reinterpret_cast<V*>(s.u), *const q = reinterpret_cast<V*>(s.q);
  const V *const x = reinterpret_cast<const V*>(s.x), *const head = reinterpret_cast<const V*>(s.head),
                 *const factors = reinterpret_cast<const V*>(s.factor);
  const std::int64_t groups = (K + 3) / 4;
  V product[kFewDimensions / 4][6] = {}, factor[kFewDimensions / 4][4] = {};
  for (std::int64_t group = 0; group < groups; ++group) {
    V* const at = u + 4 * group_begin(group, D);
    const std::int64_t rows = D - 4 * group;
    for (std::int64_t j = 0; j < 4; ++j) {
      const std::int64_t k = 4 * group + j;
      if (k < K) factor[group][j] = factors[k];
      for (std::int64_t i = 0; i < rows; ++i)
        at[4 * i + j] = k >= K || i < j ? V{} : i == j ? head[k] : x[reflection_begin(k, D) + i - j];
    }
    for (std::int64_t i = 0; i < rows; ++i) {
      const V* const r = at + 4 * i;
      V* const p = product[group];
      fuse<A>(p[0], r[0], r[1], p[0]);
      fuse<A>(p[1], r[0], r[2], p[1]);
      fuse<A>(p[2], r[0], r[3], p[2]);
      fuse<A>(p[3], r[1], r[2], p[3]);
      fuse<A>(p[4], r[1], r[3], p[4]);
      fuse<A>(p[5], r[2], r[3], p[5]);
    }
  }
  for (std::int64_t e = 0; e < D; ++e)
    for (std::int64_t k = 0; k < K; ++k) q[e * K + k] = V{} + A(e == k);
  for (std::int64_t k = 0; k < K; ++k)
    for (std::int64_t group = k / 4; group >= 0; --group)
      turn_column<A>(u + 4 * group_begin(group, D), factor[group], product[group], D - 4 * group, q + 4 * group * K + k,
                     K);
}

// Row k of the frames of `count` samples, to [count, D]; times the samples' signs if they are given.
template <class A>
RK_MULTIVERSION static void copy_rows(const SmallFrames<A>& s, const A* sign, std::int64_t k, std::int64_t K,
                                      std::int64_t D, std::int64_t count, A* __restrict__ to) {
  constexpr int L = SmallFrames<A>::L;
  alignas(64) A row[kFewDimensions][L];
  Lanes<A> by = Lanes<A>{} + A(1), v;
  if (sign) load_lanes(by, sign);
  for (std::int64_t e = 0; e < D; ++e) {
    load_lanes(v, s.q[e * K + k]);
    v *= by;
    std::memcpy(row[e], &v, sizeof v);
  }
  if (count < L || D < 4) {
    for (std::int64_t l = 0; l < count; ++l)
      for (std::int64_t e = 0; e < D; ++e) to[l * D + e] = row[e][l];
    return;
  }
  for (std::int64_t begin = 0; begin < D; begin += 4) {
    const std::int64_t e = begin + 4 <= D ? begin : D - 4;  // the last block overlaps the one before
    for (int l = 0; l < L; l += 4) transpose_block<A>(row[e] + l, L, to + l * D + e, D);
  }
}

}  // namespace rk::cpu
