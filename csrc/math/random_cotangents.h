// Random cotangents w of outputs z in R^D, D = C S (classes, positions), from random v with E[v v^T] = I:
//
//   plain      w = v
//   centred    w_c = v_c - mean_c v                      at each position
//   fisher     w_c = a_c v_c - p_c d                     a = sqrt(p),  p = softmax z,  d = <a, v>
//   backward   grad_z_c = a_c v_c h_c / 2 - p_c (d h_c + (m - d b) / 2)
//              h = g - b,  b = <p, g>,  m = <g, a v>     g = cotangent of w
//
// Nothing is divided by a or p.  All of fisher is computed in double, from v in the accumulation type: where p is nearly
// one, h loses digits.  The entries of w sum to zero, so that a constant in g has no effect; g_0 is subtracted,
// which keeps it from leaving rounding errors.
//
// All numbers of a sample are one sequence of Philox blocks, of 4 normals or 128 bits; the counter is (block, sample,
// stream).  A row of v begins with a new block, or with a new word of bits.  Sums over a row of adjacent entries run in 32
// lanes, entry e in lane (e / 4) % 32, then down a tree; sums over classes that lie apart, in their order.
#pragma once

#include "fixed.h"
#include "philox.h"

namespace rk {

enum class Law : std::int64_t { kSphere, kGaussian, kRademacher, kOrthonormal };
enum class Kind : std::int64_t { kPlain, kCentred, kFisher };

constexpr int kSumLanes = 32;
constexpr std::uint32_t kNormalStream = 0, kBitStream = 1;

RK_HOST_DEVICE RandomWords cotangent_words(PhiloxKey key, std::uint64_t block, std::uint32_t sample,
                                           std::uint32_t stream) {
  return philox({std::uint32_t(block), std::uint32_t(block >> 32), sample, stream}, key);
}

template <class A>
struct FourNormals {
  A at[4];
  RK_HOST_DEVICE explicit FourNormals(RandomWords w) {
    const NormalPair<A> p = box_muller<A>(w.w0, w.w1), q = box_muller<A>(w.w2, w.w3);
    at[0] = p.first, at[1] = p.second, at[2] = q.first, at[3] = q.second;
  }
  RK_HOST_DEVICE FourNormals(PhiloxKey key, std::uint64_t block, std::uint32_t sample)
      : FourNormals(cotangent_words(key, block, sample, kNormalStream)) {}
};

template <class A>
RK_HOST_DEVICE A sign_from(std::uint32_t word, std::uint32_t bit) {
  return (word >> bit) & 1u ? A(-1) : A(1);
}

// The Householder reflection H = I + factor u u^T, u = x except at its head, that turns x into -sign(x_0) |x| e_0.
// Column k of H_0 H_1 ... H_(K-1), times `sign`, is column k of the Haar-distributed Q that a QR factorisation with a
// positive diagonal finds (Stewart, 1980): H_k is made of a Gaussian vector x of D - k entries, and leaves the first k
// rows alone.  Entry i of that vector is number reflection_begin(k) + i of the sequence.
template <class A>
struct Reflection {
  A head, factor, sign;
  RK_HOST_DEVICE Reflection(A x0, A norm)
      : head(x0 < A(0) ? x0 - norm : x0 + norm),
        factor(A(-1) / (norm * (norm + absolute(x0)))),
        sign(x0 < A(0) ? A(1) : A(-1)) {}
};

RK_HOST_DEVICE std::int64_t reflection_begin(std::int64_t k, std::int64_t size) { return k * size - k * (k - 1) / 2; }

// Rows of u in the groups of four reflections before this one: a group begins at its first reflection's head.
RK_HOST_DEVICE std::int64_t group_begin(std::int64_t group, std::int64_t size) {
  return group * size - 2 * group * (group - 1);
}

// Reflections are applied four at a time, the last one first: q += sum_k s_k u_k, from the dot products d_k = <u_k, q>.
template <class A>
struct FourReflections {
  A factor[4];
  A product[6];  // <u_0, u_1>, <u_0, u_2>, <u_0, u_3>, <u_1, u_2>, <u_1, u_3>, <u_2, u_3>
};

template <class A>
struct FourSteps {
  A s0, s1, s2, s3;
  RK_HOST_DEVICE FourSteps(const FourReflections<A>& h, A d0, A d1, A d2, A d3) {
    s3 = h.factor[3] * d3;
    s2 = h.factor[2] * fused(h.product[5], s3, d2);
    s1 = h.factor[1] * fused(h.product[3], s2, fused(h.product[4], s3, d1));
    s0 = h.factor[0] * fused(h.product[0], s1, fused(h.product[1], s2, fused(h.product[2], s3, d0)));
  }
};

// a = sqrt(p), not divided by a sum: where p is nearly one, 1 - p keeps its digits.
template <class A>
RK_HOST_DEVICE A root_probability(A z, A max, A log_sum) {
  return exp_fixed(A(0.5) * ((z - max) - log_sum));
}

template <class A>
RK_HOST_DEVICE A fisher_value(A a, A v, A d) {
  return fused(-(a * a), d, a * v);
}

// total + grad_z of one projection.
template <class A>
RK_HOST_DEVICE A fisher_slope(A a, A v, A g, A d, A m, A b, A total) {
  const A h = g - b, bend = A(0.5) * fused(-d, b, m);
  return fused(-(a * a), fused(d, h, bend), fused(A(0.5) * a * v, h, total));
}

}  // namespace rk
