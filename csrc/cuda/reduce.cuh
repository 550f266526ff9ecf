// Reductions over a warp or a block: trees of fixed shape, so the same bits on every run, and the result in every thread.
#pragma once

#include "launch.cuh"

namespace rk::cuda {

struct Sum {
  template <class A>
  __device__ __forceinline__ A operator()(A a, A b) const {
    return a + b;
  }
};

struct Maximum {  // NaN wins
  template <class A>
  __device__ __forceinline__ A operator()(A a, A b) const {
    return b > a || b != b ? b : a;
  }
};

struct Larger {  // a NaN loses: one instruction
  template <class A>
  __device__ __forceinline__ A operator()(A a, A b) const {
    return ::max(a, b);
  }
};

template <class A, class Combine>
__device__ __forceinline__ A warp_reduce(A v, Combine combine) {
#pragma unroll
  for (int d = 16; d; d /= 2) v = combine(v, __shfl_xor_sync(0xffffffffu, v, d));
  return v;
}

// blockDim.x is a multiple of 32; `identity` is the neutral element.
template <class A, class Combine>
__device__ __forceinline__ A block_reduce(A v, A identity, Combine combine) {
  __shared__ A part[32];
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  v = warp_reduce(v, combine);
  if (warps == 1) return v;
  __syncthreads();  // part may still be read from the reduction before
  if (lane == 0) part[warp] = v;
  __syncthreads();
  return warp_reduce(lane < warps ? part[lane] : identity, combine);
}

// Several sums at once, for the barriers of one.
template <int kCount, class A>
__device__ __forceinline__ void block_sums(A (&v)[kCount]) {
  __shared__ A part[kCount][32];
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll
  for (int i = 0; i < kCount; ++i) v[i] = warp_reduce(v[i], Sum{});
  if (warps == 1) return;
  __syncthreads();  // as above
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) part[i][warp] = v[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) v[i] = warp_reduce(lane < warps ? part[i][lane] : A(0), Sum{});
}

template <class A>
__device__ __forceinline__ A warp_sum(A v) {
  return warp_reduce(v, Sum{});
}

template <class A>
__device__ __forceinline__ A block_sum(A v) {
  return block_reduce(v, A(0), Sum{});
}

template <class A>
__device__ __forceinline__ A block_max(A v, A least) {
  return block_reduce(v, least, Maximum{});
}

}  // namespace rk::cuda
