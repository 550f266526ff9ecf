// Kernels of random_cotangents.  Formulas and orders of sums: math/random_cotangents.h.
//
// v is drawn wherever it is needed: for the sums that a row or a position shares (one warp or one thread each), then
// again entry by entry.  Nothing of its size lies in memory but the frames of the orthonormal law, which have kernels of
// their own in random_frames.cuh.  Bytes: outputs once for sqrt(p), sqrt(p) twice, w once.
#pragma once

#include <cstdint>

#include "../math/random_cotangents.h"
#include "divisor.cuh"
#include "reduce.cuh"
#include "words.cuh"

namespace rk::cuda {

constexpr unsigned kCotangentThreads = 128;

template <class A>
struct CotangentDraws {
  Law law;
  std::int64_t projections, batch, classes, positions, size;
  const std::int64_t* seed;
  const A* frames;  // [K, B, D], of the orthonormal law
  const A* scale;   // [K, B], of the sphere and orthonormal laws

  __device__ __forceinline__ PhiloxKey key() const { return PhiloxKey(static_cast<std::uint64_t>(*seed)); }
  __device__ __forceinline__ A scale_of(std::int64_t row) const { return scale ? scale[row] : A(1); }

  // Entries 4 block to 4 block + 3 of v in row k B + b, not scaled; garbage beyond its end.
  __device__ __forceinline__ void four(PhiloxKey key, std::int64_t row, std::int64_t block, A (&v)[4]) const {
    const std::int64_t k = quotient(row, batch);
    const std::uint32_t sample = static_cast<std::uint32_t>(row - k * batch);
    if (law == Law::kOrthonormal) {
#pragma unroll
      for (int j = 0; j < 4; ++j) v[j] = 4 * block + j < size ? frames[row * size + 4 * block + j] : A(0);
    } else if (law == Law::kRademacher) {
      const std::int64_t word = k * ((size + 31) / 32) + block / 8;
      const RandomWords w = cotangent_words(key, static_cast<std::uint64_t>(word / 4), sample, kBitStream);
      const int index = static_cast<int>(word % 4);
      const std::uint32_t bits = index == 0 ? w.w0 : index == 1 ? w.w1 : index == 2 ? w.w2 : w.w3;
#pragma unroll
      for (int j = 0; j < 4; ++j) v[j] = sign_from<A>(bits, static_cast<std::uint32_t>(block % 8 * 4 + j));
    } else {
      const FourNormals<A> x(key, static_cast<std::uint64_t>(k * ((size + 3) / 4) + block), sample);
#pragma unroll
      for (int j = 0; j < 4; ++j) v[j] = x.at[j];
    }
  }

  __device__ __forceinline__ A one(PhiloxKey key, std::int64_t row, std::int64_t entry) const {
    A v[4];
    four(key, row, entry / 4, v);
    const int j = static_cast<int>(entry % 4);
    return j == 0 ? v[0] : j == 1 ? v[1] : j == 2 ? v[2] : v[3];
  }
};

// A warp's sum over n adjacent entries, in every lane; f(block, sum) adds the entries of a block of four.
template <class A, class F>
__device__ __forceinline__ A warp_sum(std::int64_t n, const F& f) {
  A sum = 0;
  for (std::int64_t block = threadIdx.x % 32; 4 * block < n; block += 32) sum = f(block, sum);
  return warp_reduce(sum, Sum{});
}

// f(j) for the entries of a block that exist.
template <class F>
__device__ __forceinline__ void for_four(std::int64_t block, std::int64_t n, const F& f) {
#pragma unroll
  for (int j = 0; j < 4; ++j)
    if (4 * block + j < n) f(j);
}

// The units of work of this warp, or of this thread.
template <class F>
__device__ __forceinline__ void for_warps(std::int64_t units, const F& f) {
  const std::int64_t warp = (blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x) / 32,
                     warps = std::int64_t{gridDim.x} * blockDim.x / 32;
  for (std::int64_t unit = warp; unit < units; unit += warps) f(unit);
}
template <class F>
__device__ __forceinline__ void for_threads(std::int64_t units, const F& f) {
  const std::int64_t thread = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x,
                     threads = std::int64_t{gridDim.x} * blockDim.x;
  for (std::int64_t unit = thread; unit < units; unit += threads) f(unit);
}

template <class A>
__global__ void __launch_bounds__(kCotangentThreads) sphere_scale_kernel(const CotangentDraws<A> c, A* scale) {
  const PhiloxKey key = c.key();
  for_warps(c.projections * c.batch, [&](std::int64_t row) {
    const A total = warp_sum<A>(c.size, [&](std::int64_t block, A sum) {
      A v[4];
      c.four(key, row, block, v);
      for_four(block, c.size, [&](int j) { sum = fused(v[j], v[j], sum); });
      return sum;
    });
    if (threadIdx.x % 32 == 0) scale[row] = std::sqrt(A(c.size)) / std::sqrt(total);
  });
}

// sqrt(p) [B, C, S]: a warp for a row of classes, or a thread for a position.
template <class S>
__global__ void __launch_bounds__(kCotangentThreads, 1)  // one block at least: without it sm_120 spills
    root_rows_kernel(std::int64_t batch, std::int64_t classes, const S* outputs, double* root) {
  for_warps(batch, [&](std::int64_t row) {
    const S* const z = outputs + row * classes;
    double max = load(z[0]);
    for (std::int64_t e = threadIdx.x % 32; e < classes; e += 32) max = load(z[e]) > max ? load(z[e]) : max;
#pragma unroll
    for (int d = 16; d; d /= 2) {
      const double other = __shfl_xor_sync(0xffffffffu, max, d);
      max = other > max ? other : max;
    }
    const double log_sum = log_fixed(warp_sum<double>(classes, [&](std::int64_t block, double sum) {
      for_four(block, classes, [&](int j) { sum += exp_fixed(double(load(z[4 * block + j])) - max); });
      return sum;
    }));
    for (std::int64_t e = threadIdx.x % 32; e < classes; e += 32)
      root[row * classes + e] = root_probability(double(load(z[e])), max, log_sum);
  });
}

template <class S>
__global__ void __launch_bounds__(kCotangentThreads)
    root_positions_kernel(std::int64_t batch, std::int64_t classes, std::int64_t positions, const S* outputs,
                          double* root) {
  for_threads(batch * positions, [&](std::int64_t unit) {
    const std::int64_t first = quotient(unit, positions) * classes * positions + remainder(unit, positions),
                       end = first + classes * positions;
    double max = load(outputs[first]), sum = 0;
    for (std::int64_t e = first; e < end; e += positions) max = load(outputs[e]) > max ? load(outputs[e]) : max;
    for (std::int64_t e = first; e < end; e += positions) sum += exp_fixed(double(load(outputs[e])) - max);
    const double log_sum = log_fixed(sum);
    for (std::int64_t e = first; e < end; e += positions)
      root[e] = root_probability(double(load(outputs[e])), max, log_sum);
  });
}

// What the entries of a row, or of a position, share: the mean of v, or d = <a, v>; for the backward also m = <g, a v>
// and b = <p, g>, of g less its first entry.
template <class S>
struct CotangentSums {
  using A = accumulation_t<S>;
  CotangentDraws<A> draws;
  Kind kind;
  const double* root;  // [B, C, S] or null
  const S* grad;       // [K, B, C, S] or null
  A* mean;             // [K, B, S] or null
  double *d, *m, *b;   // [K, B, S] or null

  __device__ __forceinline__ double slope(std::int64_t row, std::int64_t e) const {
    const S* const g = grad + row * draws.size;
    return double(load(g[e])) - double(load(g[remainder(e, draws.positions)]));
  }
};

template <class S>
__global__ void __launch_bounds__(kCotangentThreads) cotangent_row_sums_kernel(const CotangentSums<S> c) {
  using A = accumulation_t<S>;
  const CotangentDraws<A>& draws = c.draws;
  const PhiloxKey key = draws.key();
  const std::int64_t n = draws.classes;
  for_warps(draws.projections * draws.batch, [&](std::int64_t row) {
    // f(e, v, sum) over the row, in the type of the sum.
    const auto sum_of = [&](auto zero, const auto& f) {
      return warp_sum<decltype(zero)>(n, [&](std::int64_t block, decltype(zero) sum) {
        A v[4];
        draws.four(key, row, block, v);
        for_four(block, n, [&](int j) { sum = f(4 * block + j, v[j], sum); });
        return sum;
      });
    };
    const bool first = threadIdx.x % 32 == 0;
    if (c.kind == Kind::kCentred) {
      const A sum = sum_of(A(0), [](std::int64_t, A v, A s) { return s + v; });
      if (first) c.mean[row] = sum / A(n);
      return;
    }
    const double* const a = c.root + remainder(row, draws.batch) * n;
    const double d = sum_of(0.0, [&](std::int64_t e, A v, double s) { return fused(a[e], double(v), s); });
    if (first) c.d[row] = d;
    if (!c.grad) return;
    const double m =
        sum_of(0.0, [&](std::int64_t e, A v, double s) { return fused(c.slope(row, e), a[e] * double(v), s); });
    const double b = warp_sum<double>(n, [&](std::int64_t block, double sum) {
      for_four(block, n, [&](int j) {
        const std::int64_t e = 4 * block + j;
        sum = fused(c.slope(row, e), a[e] * a[e], sum);
      });
      return sum;
    });
    if (!first) return;
    c.m[row] = m;
    c.b[row] = b;
  });
}

template <class S>
__global__ void __launch_bounds__(kCotangentThreads) cotangent_position_sums_kernel(const CotangentSums<S> c) {
  using A = accumulation_t<S>;
  const CotangentDraws<A>& draws = c.draws;
  const PhiloxKey key = draws.key();
  const std::int64_t positions = draws.positions;
  for_threads(draws.projections * draws.batch * positions, [&](std::int64_t unit) {
    const std::int64_t row = quotient(unit, positions), position = unit - row * positions;
    if (c.kind == Kind::kCentred) {
      A sum = 0;
      for (std::int64_t e = position; e < draws.size; e += positions) sum += draws.one(key, row, e);
      c.mean[unit] = sum / A(draws.classes);
      return;
    }
    const double* const a = c.root + remainder(row, draws.batch) * draws.size;
    double d = 0, m = 0, b = 0;
    for (std::int64_t e = position; e < draws.size; e += positions) {
      const double v = draws.one(key, row, e);
      d = fused(a[e], v, d);
      if (!c.grad) continue;
      m = fused(c.slope(row, e), a[e] * v, m);
      b = fused(c.slope(row, e), a[e] * a[e], b);
    }
    c.d[unit] = d;
    if (!c.grad) return;
    c.m[unit] = m;
    c.b[unit] = b;
  });
}

// w, four entries a thread.
template <class S>
__global__ void __launch_bounds__(kCotangentThreads) cotangent_value_kernel(const CotangentSums<S> c, S* w) {
  using A = accumulation_t<S>;
  const CotangentDraws<A>& draws = c.draws;
  const PhiloxKey key = draws.key();
  const std::int64_t size = draws.size, blocks = (size + 3) / 4;
  for_threads(draws.projections * draws.batch * blocks, [&](std::int64_t unit) {
    const std::int64_t row = quotient(unit, blocks), block = unit - row * blocks;
    const A scale = draws.scale_of(row);
    A v[4];
    draws.four(key, row, block, v);
    for_four(block, size, [&](int j) {
      const std::int64_t e = 4 * block + j, at = row * draws.positions + remainder(e, draws.positions);
      A value = c.kind == Kind::kCentred ? (v[j] - c.mean[at]) * scale : v[j] * scale;
      if (c.kind == Kind::kFisher)
        value = A(fisher_value(c.root[remainder(row, draws.batch) * size + e], double(v[j]), c.d[at]) * double(scale));
      w[row * size + e] = store<S>(value);
    });
  });
}

// grad_outputs, four entries a thread, projection after projection.
template <class S>
__global__ void __launch_bounds__(kCotangentThreads)
    cotangent_gradient_kernel(const CotangentSums<S> c, S* grad_outputs) {
  using A = accumulation_t<S>;
  const CotangentDraws<A>& draws = c.draws;
  const PhiloxKey key = draws.key();
  const std::int64_t size = draws.size, blocks = (size + 3) / 4;
  for_threads(draws.batch * blocks, [&](std::int64_t unit) {
    const std::int64_t sample = quotient(unit, blocks), block = unit - sample * blocks;
    double total[4] = {};
    A v[4];
    for (std::int64_t k = 0; k < draws.projections; ++k) {
      const std::int64_t row = k * draws.batch + sample;
      const double scale = draws.scale_of(row);
      draws.four(key, row, block, v);
      for_four(block, size, [&](int j) {
        const std::int64_t e = 4 * block + j, at = row * draws.positions + remainder(e, draws.positions);
        total[j] = fisher_slope(c.root[sample * size + e], double(v[j]) * scale, c.slope(row, e), c.d[at] * scale,
                                c.m[at] * scale, c.b[at], total[j]);
      });
    }
    for_four(block, size, [&](int j) { grad_outputs[sample * size + 4 * block + j] = store<S>(A(total[j])); });
  });
}

inline dim3 grid_for_threads(std::int64_t threads) {
  return grid_for((threads + kCotangentThreads - 1) / kCotangentThreads);
}

template <class A>
cudaError_t launch_sphere_scale(const CotangentDraws<A>& c, A* scale, cudaStream_t stream) {
  return launch(sphere_scale_kernel<A>, grid_for_threads(32 * c.projections * c.batch), dim3(kCotangentThreads), 0,
                stream, c, scale);
}

template <class S>
cudaError_t launch_roots(std::int64_t batch, std::int64_t classes, std::int64_t positions, const S* outputs,
                         double* root, cudaStream_t stream) {
  if (classes == 0) return cudaSuccess;
  if (positions == 1)
    return launch(root_rows_kernel<S>, grid_for_threads(32 * batch), dim3(kCotangentThreads), 0, stream, batch, classes,
                  outputs, root);
  return launch(root_positions_kernel<S>, grid_for_threads(batch * positions), dim3(kCotangentThreads), 0, stream,
                batch, classes, positions, outputs, root);
}

template <class S>
cudaError_t launch_cotangent_sums(const CotangentSums<S>& c, cudaStream_t stream) {
  const std::int64_t rows = c.draws.projections * c.draws.batch;
  if (c.draws.size == 0) return cudaSuccess;
  if (c.draws.positions == 1)
    return launch(cotangent_row_sums_kernel<S>, grid_for_threads(32 * rows), dim3(kCotangentThreads), 0, stream, c);
  return launch(cotangent_position_sums_kernel<S>, grid_for_threads(rows * c.draws.positions), dim3(kCotangentThreads),
                0, stream, c);
}

template <class S>
cudaError_t launch_cotangent_value(const CotangentSums<S>& c, S* w, cudaStream_t stream) {
  const std::int64_t units = c.draws.projections * c.draws.batch * ((c.draws.size + 3) / 4);
  return launch(cotangent_value_kernel<S>, grid_for_threads(units), dim3(kCotangentThreads), 0, stream, c, w);
}

template <class S>
cudaError_t launch_cotangent_gradient(const CotangentSums<S>& c, S* grad_outputs, cudaStream_t stream) {
  const std::int64_t units = c.draws.batch * ((c.draws.size + 3) / 4);
  return launch(cotangent_gradient_kernel<S>, grid_for_threads(units), dim3(kCotangentThreads), 0, stream, c,
                grad_outputs);
}

}  // namespace rk::cuda
