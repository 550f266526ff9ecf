// What the kernels of layer_norm_backward and its derivative share: their arguments, how rows are shared out, and what
// one element adds to a row's sums and gets from them.
//
// Rows of whole 16-byte vectors are read in vectors (Words), which the caller has aligned; others element by element
// (Element).  Which it is, and which thread gets which element, follow from the shape alone.
#pragma once

#include <cmath>
#include <cstdint>

#include "../math/layer_norm.h"
#include "reduce.cuh"
#include "words.cuh"

namespace rk::cuda {

constexpr int kRowThreads = 256;  // of a block
constexpr int kRowWarps = kRowThreads / 32;
constexpr int kRowBlocks = 264;  // that run at a time on a large device: two on each of 132 multiprocessors

// sum / count, by multiplication: as accurate as a division, without its many instructions.
template <class A>
struct Mean {
  A count, inverse;

  static Mean of(std::int64_t count) { return {A(count), A(1) / A(count)}; }
  __device__ __forceinline__ A operator()(A sum) const {
    const A mean = sum * inverse;
    return mean + std::fma(-mean, count, sum) * inverse;
  }
};

template <class S>
struct LayerNormCall {
  using A = accumulation_t<S>;
  std::int64_t rows, cols, cotangents = 1, chunk_rows, chunks;
  int team;                          // threads that share a row; 0 for rows too long for registers
  int shares;                        // vectors a thread
  Mean<A> average;                   // over a row
  const S* x;                        // [rows, cols]
  const S *g, *u;                    // [cotangents, rows, cols]; u: null if absent
  const A *weight, *a, *b;           // [cols] or null
  const A *mean, *rstd;              // [rows]; mean: null for RMSNorm
  S *gg_grad, *grad_x;               // outputs or null: like g, and like x or (of the first backward) g
  NormBends<A>* bends;               // [cotangents, rows], of rows too long for registers
  A *partial_weight, *partial_bias;  // [chunks, cols] or null
  A *grad_weight, *grad_bias;        // [cols] outputs or null
};

// A vector of one element, where rows do not begin at multiples of 16 bytes.
template <class S>
struct Element {
  using A = accumulation_t<S>;
  static constexpr int kSize = 1;
  S raw;

  __device__ __forceinline__ A operator[](int) const { return load(raw); }
  static __device__ __forceinline__ Element of(const A (&values)[1]) { return {store<S>(values[0])}; }
};

template <class W, class S>
__device__ __forceinline__ W read_vector(const S* from) {
  if constexpr (W::kSize > 1)
    return load_words<true>(from);
  else
    return {*from};
}

template <class W, class S>
__device__ __forceinline__ void write_vector(S* to, const typename W::A (&values)[W::kSize]) {
  if constexpr (W::kSize > 1)
    store_words<true>(to, W::of(values));
  else
    *to = W::of(values).raw;
}

// The compiler forgets what it has computed from the vector, and computes it again rather than keep it in registers.
template <class W>
__device__ __forceinline__ void forget(W& vector) {
  if constexpr (W::kSize > 1)
    asm volatile("" : "+r"(vector.raw.x), "+r"(vector.raw.y), "+r"(vector.raw.z), "+r"(vector.raw.w));
}

// The parameters of a vector's elements, or `absent`.
template <class W, class A>
__device__ __forceinline__ void read_parameters(A (&to)[W::kSize], const A* from, A absent) {
  constexpr int V = W::kSize, P = Words<A>::kSize;
#pragma unroll
  for (int k = 0; k < V; ++k) to[k] = absent;
  if (!from) return;
  if constexpr (V % P == 0) {
#pragma unroll
    for (int q = 0; q < V; q += P) {
      const Words<A> words = load_words<true>(from + q);
#pragma unroll
      for (int k = 0; k < P; ++k) to[q + k] = words[k];
    }
  } else {
    to[0] = *from;
  }
}

// Sums over a team of threads, a power of two, all of them in one round: the result in every thread, in an order that
// depends on the team's size alone.  Every thread of the block takes part.
template <class A, int kSums>
class TeamSums {
 public:
  __device__ __forceinline__ explicit TeamSums(int team) : team_(team), turn_(0) {}

  __device__ __forceinline__ void add_up(A (&sums)[kSums]) {
    __shared__ __align__(16) A parts[2][kMostWarps][kPadded];
#pragma unroll
    for (int d = 16; d; d /= 2) {
      if (d >= team_) continue;
#pragma unroll
      for (int n = 0; n < kSums; ++n) sums[n] += __shfl_xor_sync(0xffffffffu, sums[n], d);
    }
    if (team_ <= 32) return;
    const int warp = threadIdx.x / 32, warps = team_ / 32, first = warp & -warps;
    if (threadIdx.x % 32 == 0)
#pragma unroll
      for (int n = 0; n < kSums; ++n) parts[turn_][warp][n] = sums[n];
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kSums; ++n) sums[n] = parts[turn_][first][n];
#pragma unroll 1
    for (int i = 1; i < warps; ++i)
#pragma unroll
      for (int n = 0; n < kSums; ++n) sums[n] += parts[turn_][first + i][n];
    turn_ ^= 1;  // the other half, since these may still be read
  }

 private:
  static constexpr int kPadded = (kSums + 3) / 4 * 4, kMostWarps = 16;
  int team_, turn_;
};

// What an element adds to the sums of the first backward: w g and w g (x - mean).
template <class A>
struct SlopeSums {
  static constexpr int kCount = 2;
  A sums[kCount] = {};

  __device__ __forceinline__ void add(A d, A g, A w) {
    const A h = w * g;
    sums[0] += h;
    sums[1] += h * d;
  }
  __device__ __forceinline__ NormSlopes<A> slopes(bool centred, A r, const Mean<A>& average) const {
    return norm_slopes(centred ? average(sums[0]) : A(0), average(r * sums[1]), r, A(1));
  }
};

// And to those of the second; a = 0 where it is absent.
template <class A, bool kAffine>
struct BendSums {
  static constexpr int kCount = kAffine ? 7 : 5;
  A sums[kCount] = {};

  __device__ __forceinline__ void add(A d, A g, A u, A w, A a) {
    const A h = w * g;
    sums[0] += u;
    sums[1] += u * d;
    sums[2] += h;
    sums[3] += h * d;
    sums[4] += u * h;
    if constexpr (kAffine) {
      const A ag = a * g;
      sums[5] += ag;
      sums[6] += ag * d;
    }
  }
  __device__ __forceinline__ NormBends<A> bends(bool centred, A r, const Mean<A>& average) const {
    NormSums<A> s{};
    s.u = centred ? average(sums[0]) : A(0);
    s.ux = average(r * sums[1]);
    s.g = centred ? average(sums[2]) : A(0);
    s.gx = average(r * sums[3]);
    s.ug = average(sums[4]);
    if constexpr (kAffine) {
      s.ag = centred ? average(sums[5]) : A(0);
      s.agx = average(r * sums[6]);
    }
    return norm_bends(s, r, A(1));
  }
};

// An element of the second backward's results.
template <class A>
struct BendResult {
  A gg_grad, grad_x, weight;  // weight: what it adds to grad_weight
};

template <bool kAffine, class A>
__device__ __forceinline__ BendResult<A> bend(const NormBends<A>& c, A xh, A r, A g, A u, A w, A a, A b) {
  const A t = r * u + (c.t_x * xh + c.t_one), rest = c.x_x * xh + c.x_one;
  if constexpr (kAffine)
    return {w * t + (a * xh + b), c.x_u * u + ((c.x_g * w + r * a) * g + rest), g * t};
  else
    return {w * t, c.x_u * u + (c.x_g * (w * g) + rest), g * t};
}

// Whether rows are read in vectors: if they are whole ones, and at least two, so that of a thread's vectors only the last
// may be missing.
template <class S>
constexpr bool in_words(std::int64_t cols) {
  return cols % Words<S>::kSize == 0 && cols > Words<S>::kSize;
}

// How rows are shared out, from the shape alone: a row to a team of threads, a chunk of rows to a block, as many chunks
// as run at a time or a multiple of that.
template <class S>
void set_shares(LayerNormCall<S>& c) {
  using A = accumulation_t<S>;
  c.average = Mean<A>::of(c.cols);
  const bool words = in_words<S>(c.cols);
  const std::int64_t vectors = words ? c.cols / Words<S>::kSize : c.cols, most = words ? 3 : 4;
  c.team = 1;
  while (c.team <= kRowThreads && most * c.team < vectors) c.team *= 2;
  c.shares = !words ? 4 : vectors <= 2 * c.team ? 2 : 3;
  const auto ratio = [](std::int64_t a, std::int64_t b) { return (a + b - 1) / b; };
  if (c.team > kRowThreads) {
    c.team = 0;
    const std::int64_t strips = ratio(vectors, 32);
    c.chunk_rows = ratio(c.rows, ratio(4 * kRowBlocks, strips));
    if (c.chunk_rows < kRowWarps) c.chunk_rows = kRowWarps;
  } else {
    const std::int64_t teams = kRowThreads / c.team, steps = ratio(c.rows, teams), most_steps = 64;
    const std::int64_t waves = steps > 0 ? ratio(steps, kRowBlocks * most_steps) : 1;
    c.chunk_rows = (steps > 0 ? ratio(steps, kRowBlocks * waves) : 1) * teams;
  }
  c.chunks = ratio(c.rows, c.chunk_rows);
}

}  // namespace rk::cuda
