// Frames of few dimensions on the CPU: as many samples side by side as a register has lanes, so that no sum runs across a
// register.  The same operations on each sample as elsewhere, in the same order: the same bits.
#pragma once

#include "random_cotangents_loops.h"
#include "transpose.h"

namespace rk::cpu {

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
