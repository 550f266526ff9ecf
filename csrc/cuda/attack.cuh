// The kernels of attack_step and attack_start.  Formulas: math/attack_step.h, math/attack_start.h.
//
// linf: a thread works on one 16-byte vector at a time; adversary, x and grad are read once, adversary written once.  l2
// and l1: a block to a row, which it finds in the L2 cache when it comes back; sums are kept in double, whose range holds
// the squares of every float.
#pragma once

#include <cstdint>
#include <cstring>

#include "../math/attack_start.h"
#include "reduce.cuh"
#include "vector.cuh"

namespace rk::cuda {

// Numbers for columns: [1], [C] or [N].
template <class A>
struct ColumnTable {
  const A* number;
  std::uint32_t count, inner;  // entry (j / inner) % count
  __device__ __forceinline__ A at(std::uint32_t column) const {
    return count == 1 ? number[0] : number[column / inner % count];
  }
};

template <class S>
struct AttackStepCall {
  using A = accumulation_t<S>;
  std::int64_t rows;
  std::uint32_t columns;
  S* adversary;
  const S *x, *grad;  // grad null: projection only
  ColumnTable<A> eps, step;
  const A* scale;  // [rows] or null
  std::int64_t coordinates;

  __device__ __forceinline__ A scale_of(std::int64_t row) const { return scale ? scale[row] : A(1); }
};

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

// The nearest number that S stores within [low, high], 0 <= low: the bits of numbers that are not negative count steps.
template <class S>
__device__ __forceinline__ S store_between(accumulation_t<S> v, Interval<accumulation_t<S>> to) {
  S s = store<S>(v);
  if constexpr (sizeof(S) == 2) {
    const float back = load(s);
    std::uint16_t bits;
    std::memcpy(&bits, &s, sizeof bits);
    bits = static_cast<std::uint16_t>(bits + (back < to.low ? 1 : 0) - (back > to.high ? 1 : 0));
    std::memcpy(static_cast<void*>(&s), &bits, sizeof bits);
  }
  return s;
}

template <class S>
__device__ __forceinline__ S linf_element(const AttackStepCall<S>& c, S adversary, S x, S g, std::uint32_t column,
                                          std::int64_t row) {
  using A = accumulation_t<S>;
  const Interval<A> to = linf_interval(load(x), c.eps.at(column));
  const A step = c.grad ? c.step.at(column) * c.scale_of(row) : A(0);
  return store_between<S>(linf_step(load(adversary), c.grad ? load(g) : A(0), step, to), to);
}

template <class S>
__global__ void __launch_bounds__(256, 1) attack_step_linf_kernel(const AttackStepCall<S> c) {
  constexpr int V = Vector<S>::kSize;
  const std::int64_t thread = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x,
                     threads = std::int64_t{gridDim.x} * blockDim.x;
  const std::int64_t elements = c.rows * c.columns, vectors = elements / V;
  const bool adversary_aligned = is_aligned(c.adversary), x_aligned = is_aligned(c.x),
             grad_aligned = is_aligned(c.grad);
  for (std::int64_t v = thread; v < vectors; v += threads) {
    Vector<S> a = load_vector(static_cast<const S*>(c.adversary) + v * V, adversary_aligned);
    const Vector<S> x = load_vector(c.x + v * V, x_aligned);
    const Vector<S> g = c.grad ? load_vector(c.grad + v * V, grad_aligned) : x;
    std::int64_t row = v * V / c.columns;
    auto column = static_cast<std::uint32_t>(v * V - row * c.columns);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      a.element[k] = linf_element(c, a.element[k], x.element[k], g.element[k], column, row);
      if (++column == c.columns) column = 0, ++row;
    }
    store_vector(c.adversary + v * V, a, adversary_aligned);
  }
  const std::int64_t j = vectors * V + thread;
  if (j < elements) {
    const std::int64_t row = j / c.columns;
    const S g = c.grad ? c.grad[j] : c.x[j];
    c.adversary[j] = linf_element(c, c.adversary[j], c.x[j], g, static_cast<std::uint32_t>(j - row * c.columns), row);
  }
}

// f(column) for this thread's share of a row.
template <class F>
__device__ __forceinline__ void for_columns(std::uint32_t columns, const F& f) {
  for (std::uint32_t j = threadIdx.x; j < columns; j += blockDim.x) f(j);
}

template <class A>
struct AttackElement {
  A adversary, x, grad;
};

template <class S>
__device__ __forceinline__ AttackElement<accumulation_t<S>> element_at(const AttackStepCall<S>& c, std::int64_t at) {
  using A = accumulation_t<S>;
  return {load(c.adversary[at]), load(c.x[at]), c.grad ? load(c.grad[at]) : A(0)};
}

template <class S>
__device__ __forceinline__ L2Sums l2_sums(const AttackStepCall<S>& c, std::int64_t begin, double scale) {
  L2Sums s{0.0, 0.0, 0.0};
  for_columns(c.columns, [&](std::uint32_t j) {
    const auto e = element_at(c, begin + j);
    const double d = double(e.adversary) - double(e.x), g = double(without_nan(e.grad)) * scale;
    s.gg += g * g;
    s.gd += g * d;
    s.dd += d * d;
  });
  return {block_sum(s.gg), block_sum(s.gd), block_sum(s.dd)};
}

template <class S>
__global__ void __launch_bounds__(512, 1) attack_step_l2_kernel(const AttackStepCall<S> c) {
  using A = accumulation_t<S>;
  for (std::int64_t row = blockIdx.x; row < c.rows; row += gridDim.x) {
    const std::int64_t begin = row * c.columns;
    double scale = 1.0;
    L2Sums s = l2_sums(c, begin, scale);
    if (sizeof(S) == 8 && !(s.gg > 1e-280 && s.gg < 1e280)) {
      A largest = A(0);
      for_columns(c.columns, [&](std::uint32_t j) {
        const A size = absolute(without_nan(element_at(c, begin + j).grad));
        largest = size > largest ? size : largest;
      });
      largest = block_max(largest, A(0));
      if (largest > A(0) && largest <= Limits<A>::largest) {
        scale = 1.0 / double(largest);
        s = l2_sums(c, begin, scale);
      }
    }
    const L2Step<A> step(s, double(c.step.at(0)) * double(c.scale_of(row)), double(c.eps.at(0)), scale);
    for_columns(c.columns, [&](std::uint32_t j) {
      const auto e = element_at(c, begin + j);
      const A to = l2_step(e.adversary, e.x, e.grad, step);
      c.adversary[begin + j] = store_between<S>(to, between(to, e.x));
    });
  }
}

template <class A>
struct BitsOf;
template <>
struct BitsOf<float> {
  using type = std::uint32_t;
};
template <>
struct BitsOf<double> {
  using type = std::uint64_t;
};

// The `count`th largest size of the row's coordinates, found bit by bit: sizes are not negative, so their bits are in
// their order.
template <class S>
__device__ __forceinline__ accumulation_t<S> l1_least(const AttackStepCall<S>& c, std::int64_t begin, double count) {
  using A = accumulation_t<S>;
  using Bits = typename BitsOf<A>::type;
  Bits least = 0;
  for (int bit = 8 * int(sizeof(A)) - 2; bit >= 0; --bit) {
    const Bits trial = least | (Bits(1) << bit);
    double reached = 0.0;
    for_columns(c.columns, [&](std::uint32_t j) {
      const auto e = element_at(c, begin + j);
      const A size = l1_size(e.adversary, e.grad);
      Bits bits;
      std::memcpy(&bits, &size, sizeof bits);
      reached += bits >= trial ? 1.0 : 0.0;
    });
    if (block_sum(reached) >= count) least = trial;
  }
  A size;
  std::memcpy(&size, &least, sizeof size);
  return size;
}

template <class S>
__global__ void __launch_bounds__(512, 1) attack_step_l1_kernel(const AttackStepCall<S> c) {
  using A = accumulation_t<S>;
  for (std::int64_t row = blockIdx.x; row < c.rows; row += gridDim.x) {
    const std::int64_t begin = row * c.columns;
    A least = A(0), step = A(0);
    if (c.grad) {
      least = l1_least(c, begin, double(c.coordinates < c.columns ? c.coordinates : c.columns));
      double chosen = 0.0;
      for_columns(c.columns, [&](std::uint32_t j) {
        const auto e = element_at(c, begin + j);
        const A size = l1_size(e.adversary, e.grad);
        chosen += size >= least && size > A(0) ? 1.0 : 0.0;
      });
      chosen = block_sum(chosen);
      step = A(double(c.step.at(0)) * double(c.scale_of(row)) / (chosen > 0.0 ? chosen : 1.0));
    }
    const auto moved = [&](const AttackElement<A>& e) {
      return c.grad ? l1_moved(e.adversary, e.grad, least, step) : e.adversary;
    };
    // How far the row is outside for a threshold, and how many coordinates it would shorten.
    const auto excess_at = [&](A t, double& inside) {
      double total = 0.0, count = 0.0;
      for_columns(c.columns, [&](std::uint32_t j) {
        const auto e = element_at(c, begin + j);
        const A v = moved(e) - e.x, size = absolute(v) - t;
        total += double(l1_length(v, e.x, t));
        count += size > A(0) && size < l1_room(v, e.x) ? 1.0 : 0.0;
      });
      inside = block_sum(count);
      return block_sum(total) - double(c.eps.at(0));
    };
    double inside = 0.0, excess = excess_at(A(0), inside);
    A low = A(0), high = A(0);
    if (excess > 0.0) {
      for_columns(c.columns, [&](std::uint32_t j) {
        const auto e = element_at(c, begin + j);
        const A size = absolute(moved(e) - e.x);
        high = size > high ? size : high;
      });
      high = block_max(high, A(0));
      for (int trial = 0; trial < 100; ++trial) {
        A t = inside > 0.0 ? A(double(low) + excess / inside) : high;
        if (!(t > low && t < high)) t = low + (high - low) / A(2);
        if (!(t > low && t < high)) break;
        double count = 0.0;
        const double total = excess_at(t, count);
        if (total > 0.0)
          low = t, excess = total, inside = count;
        else
          high = t;
        if (total <= 0.0 && total >= -double(Limits<A>::epsilon) * double(c.eps.at(0))) break;
      }
    }
    for_columns(c.columns, [&](std::uint32_t j) {
      const auto e = element_at(c, begin + j);
      const A to = l1_point(moved(e), e.x, high);
      c.adversary[begin + j] = store_between<S>(to, between(to, e.x));
    });
  }
}

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

template <class S>
cudaError_t launch_attack_step(Ball ball, const AttackStepCall<S>& c, cudaStream_t stream) {
  constexpr std::int64_t per_block = 256 * Vector<S>::kSize;
  const dim3 block(threads_for<S>(c.columns, 512)), grid = grid_for(c.rows);
  switch (ball) {
    case Ball::kLinf:
      return launch(attack_step_linf_kernel<S>, grid_for((c.rows * c.columns + per_block - 1) / per_block), dim3(256),
                    0, stream, c);
    case Ball::kL2: return launch(attack_step_l2_kernel<S>, grid, block, 0, stream, c);
    default: return launch(attack_step_l1_kernel<S>, grid, block, 0, stream, c);
  }
}

template <class S>
cudaError_t launch_attack_start(Ball ball, const AttackStartCall<S>& c, cudaStream_t stream) {
  const std::int64_t blocks = c.rows * ((std::int64_t{c.columns} + 3) / 4);
  const dim3 block(threads_for<float>(c.columns)), grid = grid_for(c.rows);
  switch (ball) {
    case Ball::kLinf:
      return launch(attack_start_linf_kernel<S>, grid_for((blocks + 255) / 256), dim3(256), 0, stream, c);
    case Ball::kL2: return launch(attack_start_kernel<Ball::kL2, S>, grid, block, 0, stream, c);
    default: return launch(attack_start_kernel<Ball::kL1, S>, grid, block, 0, stream, c);
  }
}

}  // namespace rk::cuda
