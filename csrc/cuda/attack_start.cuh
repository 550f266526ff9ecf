// The kernels of attack_start.  Formulas: math/attack_start.h.
//
// A thread draws four numbers at a time, as often as they are needed: once for linf, twice for l2 and l1, whose lengths
// are sums over a row, by one block.  Sums are kept in double, whose range holds the squares of every float.
#pragma once

#include <cstdint>

#include "../math/attack_start.h"
#include "attack.cuh"
#include "reduce.cuh"

namespace rk::cuda {

template <class S>
struct AttackStartCall {
  using A = accumulation_t<S>;
  std::int64_t rows;
  std::uint32_t columns;
  S* adversary;
  const S* x;
  ColumnTable<A> eps;
  const std::int64_t *seed, *samples;  // samples [rows] or null: 0, 1, ...
  std::uint32_t stream;

  __device__ __forceinline__ PhiloxKey key() const { return PhiloxKey(static_cast<std::uint64_t>(seed[0])); }
  __device__ __forceinline__ std::int64_t sample(std::int64_t row) const { return samples ? samples[row] : row; }
};

// One of a block's four numbers, before it is scaled.
template <Ball kBall, class A>
__device__ __forceinline__ void draw_four(PhiloxKey key, std::uint32_t block, std::int64_t sample, std::uint32_t stream,
                                          A (&u)[4]) {
  const RandomWords w = start_words(key, block, sample, stream);
  if constexpr (kBall == Ball::kL2) {
    const NormalPair<A> p = box_muller<A>(w.w0, w.w1), q = box_muller<A>(w.w2, w.w3);
    u[0] = p.first, u[1] = p.second, u[2] = q.first, u[3] = q.second;
  } else if constexpr (kBall == Ball::kL1) {
    u[0] = laplace<A>(w.w0), u[1] = laplace<A>(w.w1), u[2] = laplace<A>(w.w2), u[3] = laplace<A>(w.w3);
  } else {
    u[0] = symmetric<A>(w.w0), u[1] = symmetric<A>(w.w1), u[2] = symmetric<A>(w.w2), u[3] = symmetric<A>(w.w3);
  }
}

template <class S>
__global__ void __launch_bounds__(256, 1) attack_start_linf_kernel(const AttackStartCall<S> c) {
  using A = accumulation_t<S>;
  const std::int64_t thread = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x,
                     threads = std::int64_t{gridDim.x} * blockDim.x;
  const std::int64_t blocks = (std::int64_t{c.columns} + 3) / 4;
  for (std::int64_t unit = thread; unit < c.rows * blocks; unit += threads) {
    const std::int64_t row = unit / blocks;
    const auto block = static_cast<std::uint32_t>(unit - row * blocks);
    A u[4];
    draw_four<Ball::kLinf>(c.key(), block, c.sample(row), c.stream, u);
    for (std::uint32_t k = 0; k < 4 && 4 * std::uint64_t{block} + k < c.columns; ++k) {
      const std::uint32_t column = 4 * block + k;
      const A x = load(c.x[row * c.columns + column]), eps = c.eps.at(column);
      const Interval<A> to = linf_interval(x, eps);
      c.adversary[row * c.columns + column] = store_between<S>(clamp(fused(eps, u[k], x), to.low, to.high), to);
    }
  }
}

template <Ball kBall, class S>
__global__ void __launch_bounds__(256, 1) attack_start_kernel(const AttackStartCall<S> c) {
  using A = accumulation_t<S>;
  const auto blocks = static_cast<std::uint32_t>((std::int64_t{c.columns} + 3) / 4);
  for (std::int64_t row = blockIdx.x; row < c.rows; row += gridDim.x) {
    const auto for_drawn = [&](const auto& f) {
      for_columns(blocks, [&](std::uint32_t block) {
        A u[4];
        draw_four<kBall>(c.key(), block, c.sample(row), c.stream, u);
        for (std::uint32_t k = 0; k < 4 && 4 * std::uint64_t{block} + k < c.columns; ++k) f(4 * block + k, u[k]);
      });
    };
    double length = 0.0;
    for_drawn([&](std::uint32_t, A u) { length += kBall == Ball::kL2 ? double(u) * double(u) : double(absolute(u)); });
    length = block_sum(length);
    const std::uint32_t word = start_words(c.key(), 0, c.sample(row), c.stream + 1).w0;
    const A scale = start_scale(word, c.eps.at(0), kBall == Ball::kL2 ? std::sqrt(length) : length, c.columns);
    for_drawn([&](std::uint32_t column, A u) {
      const A x = load(c.x[row * c.columns + column]), to = clamp(x + scale * u, A(0), A(1));
      c.adversary[row * c.columns + column] = store_between<S>(to, between(to, x));
    });
  }
}

