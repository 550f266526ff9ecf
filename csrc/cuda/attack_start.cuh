// The kernels of attack_start.  Formulas: math/attack_start.h.
//
// A thread draws four numbers at a time, as often as they are needed: once for linf, twice for l2 and l1, whose lengths
// are sums over a row, by one block.  Sums are kept in double, whose range holds the squares of every float.
#pragma once

#include <cstdint>
#include <cstring>

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
  bool whole;  // four elements of a row may be loaded at once

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

// Four elements of x in, four of adversary out: at once where they may be (`whole`), else those that exist.
template <class S>
struct FourElements {
  S element[4];

  __device__ __forceinline__ void load(const S* from, std::uint32_t count, bool whole) {
    if (whole) {
      if constexpr (sizeof(S) == 2) {
        const uint2 raw = *reinterpret_cast<const uint2*>(from);
        std::memcpy(static_cast<void*>(element), &raw, sizeof raw);
      } else {
#pragma unroll
        for (int i = 0; i < int(sizeof(S)) / 4; ++i) {
          const Words<S> w = load_words<true>(from + i * Words<S>::kSize);
#pragma unroll
          for (int k = 0; k < Words<S>::kSize; ++k) element[i * Words<S>::kSize + k] = w[k];
        }
      }
      return;
    }
#pragma unroll
    for (std::uint32_t k = 0; k < 4; ++k) element[k] = k < count ? from[k] : S{};
  }
  __device__ __forceinline__ void store(S* to, std::uint32_t count, bool whole) const {
    if (whole) {
      if constexpr (sizeof(S) == 2) {
        uint2 raw;
        std::memcpy(&raw, element, sizeof raw);
        *reinterpret_cast<uint2*>(to) = raw;
      } else {
#pragma unroll
        for (int i = 0; i < int(sizeof(S)) / 4; ++i) {
          Words<S> w;
          std::memcpy(&w, element + i * Words<S>::kSize, sizeof w);
          store_words<true>(to + i * Words<S>::kSize, w);
        }
      }
      return;
    }
#pragma unroll
    for (std::uint32_t k = 0; k < 4; ++k)
      if (k < count) to[k] = element[k];
  }
};

template <class S>
__global__ void __launch_bounds__(256)
    attack_start_linf_kernel(const AttackStartCall<S> c, const Slabs slabs, const Divisor by_blocks) {
  using A = accumulation_t<S>;
  const std::uint32_t unit = blockIdx.x * 256 + threadIdx.x;  // of four columns
  if (unit >= slabs.rows_here() * by_blocks.d) return;
  const std::uint32_t row_here = by_blocks.quotient(unit), block = unit - row_here * by_blocks.d,
                      left = c.columns - 4 * block;
  const std::int64_t row = slabs.first_row() + row_here, at = row * c.columns + 4 * block;
  FourElements<S> pixels;
  pixels.load(c.x + at, left, c.whole);
  A u[4], eps[4];
  draw_four<Ball::kLinf>(c.key(), block, c.sample(row), c.stream, u);
  c.eps.at(4 * block).fill(eps);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const A x = load(pixels.element[k]);
    const Interval<A> to = linf_interval(x, eps[k]);
    pixels.element[k] = store<S>(stored_between<S>(clamp(fused(eps[k], u[k], x), to.low, to.high), to));
  }
  pixels.store(c.adversary + at, left, c.whole);
}

template <Ball kBall, class S>
__global__ void __launch_bounds__(512, 1) attack_start_kernel(const AttackStartCall<S> c) {
  using A = accumulation_t<S>;
  const auto blocks = static_cast<std::uint32_t>((std::int64_t{c.columns} + 3) / 4);
  for (std::int64_t row = blockIdx.x; row < c.rows; row += gridDim.x) {
    const auto for_drawn = [&](const auto& f) {
      for (std::uint32_t block = threadIdx.x; block < blocks; block += blockDim.x) {
        A u[4];
        draw_four<kBall>(c.key(), block, c.sample(row), c.stream, u);
        f(block, u);
      }
    };
    double length = 0.0;
    for_drawn([&](std::uint32_t block, const A(&u)[4]) {
#pragma unroll
      for (std::uint32_t k = 0; k < 4; ++k)
        if (k < c.columns - 4 * block)
          length += kBall == Ball::kL2 ? double(u[k]) * double(u[k]) : double(absolute(u[k]));
    });
    length = block_sum(length);
    const std::uint32_t word = start_words(c.key(), 0, c.sample(row), c.stream + 1).w0;
    const A scale = start_scale(word, c.eps.number[0], kBall == Ball::kL2 ? std::sqrt(length) : length, c.columns);
    for_drawn([&](std::uint32_t block, const A(&u)[4]) {
      const std::int64_t at = row * c.columns + 4 * block;
      const std::uint32_t left = c.columns - 4 * block;
      FourElements<S> pixels;
      pixels.load(c.x + at, left, c.whole);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const A x = load(pixels.element[k]), to = clamp(x + scale * u[k], A(0), A(1));
        pixels.element[k] = store<S>(stored_towards<S>(to, x));
      }
      pixels.store(c.adversary + at, left, c.whole);
    });
  }
}

template <class S>
cudaError_t launch_attack_start(Ball ball, AttackStartCall<S> c, cudaStream_t stream) {
  if (c.rows == 0 || c.columns == 0) return cudaSuccess;
  c.whole = c.columns % 4 == 0 && aligned<S>(0, static_cast<const S*>(c.adversary), c.x);
  const std::int64_t blocks = (std::int64_t{c.columns} + 3) / 4;
  const dim3 block(threads_for<float>(c.columns, 512)), grid = grid_for(c.rows);
  switch (ball) {
    case Ball::kLinf: {
      const Slabs slabs(c.rows, c.columns);
      const dim3 units(static_cast<unsigned>((slabs.slab_rows * blocks + 255) / 256),
                       static_cast<unsigned>(slabs.count()));
      return launch(attack_start_linf_kernel<S>, units, dim3(256), 0, stream, c, slabs, Divisor(blocks));
    }
    case Ball::kL2: return launch(attack_start_kernel<Ball::kL2, S>, grid, block, 0, stream, c);
    default: return launch(attack_start_kernel<Ball::kL1, S>, grid, block, 0, stream, c);
  }
}

}  // namespace rk::cuda
