// The kernel of random_cotangents' orthonormal law: the first K columns of a Haar-distributed orthogonal matrix for each
// sample, as products of Householder reflections.  See math/random_cotangents.h.
//
// One block a sample.  A warp makes a reflection, a thread turns a column by all of them, four at a time, without
// waiting for others.  Reflections and columns lie in shared memory, or where they are too many, in a workspace.
#pragma once

#include <cstdint>

#include "random_cotangents.cuh"

namespace rk::cuda {

constexpr unsigned kFrameThreads = 512;
constexpr std::int64_t kFrameBlocks = 132;       // of a grid whose blocks have workspaces
constexpr std::size_t kFrameShared = 96 * 1024;  // bytes: two blocks a multiprocessor

// Where a block keeps what: u [rows, 4] of all groups, their constants, and q [D, K], before which the numbers lie there.
struct FrameLayout {
  std::int64_t groups, u, four, q, size;  // in numbers of the accumulation type

  __host__ __device__ FrameLayout(std::int64_t projections, std::int64_t dimensions)
      : groups((projections + 3) / 4),
        u(0),
        four(4 * group_begin(groups, dimensions)),
        q(four + 10 * groups),
        size(q + projections * dimensions + 4) {}
};

template <class A>
struct FrameCall {
  std::int64_t projections, batch, size;
  const std::int64_t* seed;
  A* workspace;  // [blocks, FrameLayout.size] or null: shared memory
  A* frames;     // [K, B, D]
  A* scale;      // [K, B]
};

// Makes reflection k of a sample from its numbers, by one warp: u in column k % 4 of its group.
template <class A>
__device__ __forceinline__ void make_reflection(const FrameCall<A>& c, std::int64_t sample, std::int64_t k,
                                                const A* numbers, A* u, FourReflections<A>* four) {
  const std::int64_t group = k / 4, j = k % 4, rows = c.size - 4 * group, lane = threadIdx.x % 32;
  u += 4 * group_begin(group, c.size) + j;
  if (k >= c.projections) {
    for (std::int64_t i = lane; i < rows; i += 32) u[4 * i] = A(0);
    if (lane == 0) four[group].factor[j] = A(0);
    return;
  }
  const A* const x = numbers + reflection_begin(k, c.size);
  const std::int64_t n = c.size - k;
  const A total = warp_sum<A>(n, [&](std::int64_t block, A sum) {
    for_four(block, n, [&](int i) { sum = fused(x[4 * block + i], x[4 * block + i], sum); });
    return sum;
  });
  const Reflection<A> h(x[0], std::sqrt(total));
  for (std::int64_t i = lane; i < rows; i += 32) u[4 * i] = i < j ? A(0) : i == j ? h.head : x[i - j];
  if (lane != 0) return;
  four[group].factor[j] = h.factor;
  c.scale[k * c.batch + sample] = h.sign * std::sqrt(A(c.size));
}

// Column k of H_0 H_1 ..., by one thread; q points to its first entry, the others are `stride` apart.
template <class A>
__device__ __forceinline__ void make_column(std::int64_t k, std::int64_t size, const A* u,
                                            const FourReflections<A>* four, A* q, std::int64_t stride) {
  for (std::int64_t i = 0; i < size; ++i) q[i * stride] = i == k ? A(1) : A(0);
  for (std::int64_t group = k / 4; group >= 0; --group) {
    const A* const x = u + 4 * group_begin(group, size);
    A* const column = q + 4 * group * stride;
    const std::int64_t rows = size - 4 * group;
    A d0 = 0, d1 = 0, d2 = 0, d3 = 0;
#pragma unroll 4
    for (std::int64_t i = 0; i < rows; ++i) {
      const A value = column[i * stride];
      d0 = fused(x[4 * i], value, d0);
      d1 = fused(x[4 * i + 1], value, d1);
      d2 = fused(x[4 * i + 2], value, d2);
      d3 = fused(x[4 * i + 3], value, d3);
    }
    const FourSteps<A> s(four[group], d0, d1, d2, d3);
#pragma unroll 4
    for (std::int64_t i = 0; i < rows; ++i) {
      A value = column[i * stride];
      value = fused(x[4 * i + 3], s.s3, value);
      value = fused(x[4 * i + 2], s.s2, value);
      value = fused(x[4 * i + 1], s.s1, value);
      column[i * stride] = fused(x[4 * i], s.s0, value);
    }
  }
}

template <class A>
__global__ void __launch_bounds__(kFrameThreads, 1) random_frames_kernel(const FrameCall<A> c) {
  RK_DYNAMIC_SHARED(A, shared);
  const FrameLayout layout(c.projections, c.size);
  A* const memory = c.workspace ? c.workspace + blockIdx.x * layout.size : shared;
  A *const u = memory + layout.u, *const q = memory + layout.q;
  FourReflections<A>* const four = reinterpret_cast<FourReflections<A>*>(memory + layout.four);
  const std::int64_t warp = threadIdx.x / 32, warps = blockDim.x / 32, K = c.projections, D = c.size;
  const PhiloxKey key(static_cast<std::uint64_t>(*c.seed));
  for (std::int64_t sample = blockIdx.x; sample < c.batch; sample += gridDim.x) {
    const std::int64_t blocks = (reflection_begin(K, D) + 3) / 4;
    for (std::int64_t block = threadIdx.x; block < blocks; block += blockDim.x) {
      const FourNormals<A> x(key, static_cast<std::uint64_t>(block), static_cast<std::uint32_t>(sample));
      for (int j = 0; j < 4; ++j) q[4 * block + j] = x.at[j];
    }
    __syncthreads();
    for (std::int64_t k = warp; k < 4 * layout.groups; k += warps) make_reflection(c, sample, k, q, u, four);
    __syncthreads();
    for (std::int64_t pair = threadIdx.x; pair < 6 * layout.groups; pair += blockDim.x) {
      const std::int64_t group = pair / 6, which = pair % 6, rows = D - 4 * group;
      const std::int64_t i = which < 3 ? 0 : which < 5 ? 1 : 2, j = which < 3 ? which + 1 : which < 5 ? which - 1 : 3;
      const A* const x = u + 4 * group_begin(group, D);
      A product = 0;
      for (std::int64_t r = 0; r < rows; ++r) product = fused(x[4 * r + i], x[4 * r + j], product);
      four[group].product[which] = product;
    }
    __syncthreads();
    for (std::int64_t k = threadIdx.x; k < K; k += blockDim.x) make_column(k, D, u, four, q + k, K);
    __syncthreads();
    for (std::int64_t i = threadIdx.x; i < K * D; i += blockDim.x) {
      const std::int64_t k = i / D, e = i % D;
      c.frames[(k * c.batch + sample) * D + e] = q[e * K + k];
    }
    __syncthreads();
  }
}

// Bytes of shared memory that a block needs, or 0 if it takes a workspace instead.
template <class A>
std::size_t frame_shared(std::int64_t projections, std::int64_t size) {
  const std::size_t bytes = static_cast<std::size_t>(FrameLayout(projections, size).size) * sizeof(A);
  return bytes <= kFrameShared ? bytes : 0;
}

template <class A>
cudaError_t launch_random_frames(const FrameCall<A>& c, cudaStream_t stream) {
  const std::int64_t wanted = (c.projections + 31) / 32 * 32;
  const unsigned threads = wanted < 128 ? 128 : wanted > kFrameThreads ? kFrameThreads : static_cast<unsigned>(wanted);
  const std::int64_t blocks = c.workspace && c.batch > kFrameBlocks ? kFrameBlocks : c.batch;
  const std::size_t shared = c.workspace ? 0 : frame_shared<A>(c.projections, c.size);
  return launch(random_frames_kernel<A>, grid_for(blocks), dim3(threads), shared, stream, c);
}

}  // namespace rk::cuda
