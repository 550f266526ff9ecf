// A row's softmax in one sweep: the maximum so far, and sums relative to it, which are rescaled when it grows.
#pragma once

#include "../math/scalar.h"
#include "reduce.cuh"

namespace rk::cuda {

// What some threads know of a row so far, in powers of two: k = log2(e) / T.
template <class A, bool kWeighted>
struct RunningRow {
  static constexpr A kNone = -std::numeric_limits<A>::infinity();
  A max = kNone;
  A sum = 0;               // sum 2^((z - max) k)
  A weight = 0, gaps = 0;  // if kWeighted: sum w, sum w (z - max) k

  // What is subtracted from z: the maximum, where there is one.
  __device__ __forceinline__ A pivot() const { return max == kNone ? A(0) : max; }

  __device__ __forceinline__ void raise_to(A new_max, A k) {
    const A before = pivot();
    const bool empty = max == kNone;
    max = new_max;
    const A step = (before - pivot()) * k;
    sum *= empty ? A(0) : exp2_nonpositive(step);
    if constexpr (kWeighted) {
      if (weight != A(0)) gaps += weight * step;
    }
  }

  // The same for all threads of a row together, in each of them.
  __device__ __forceinline__ void join(A k) {
    __shared__ A part[kWeighted ? 4 : 2][32];
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    join_warp(k);
    if (warps == 1) return;
    __syncthreads();  // part may still be read from the row before
    if (lane == 0) {
      part[0][warp] = max;
      part[1][warp] = sum;
      if constexpr (kWeighted) {
        part[2][warp] = weight;
        part[3][warp] = gaps;
      }
    }
    __syncthreads();
    const bool mine = lane < warps;
    max = mine ? part[0][lane] : kNone;
    sum = mine ? part[1][lane] : A(0);
    if constexpr (kWeighted) {
      weight = mine ? part[2][lane] : A(0);
      gaps = mine ? part[3][lane] : A(0);
    }
    join_warp(k);
  }

 private:
  __device__ __forceinline__ void join_warp(A k) {
    raise_to(warp_reduce(max, Larger{}), k);
    sum = warp_sum(sum);
    if constexpr (kWeighted) {
      weight = warp_sum(weight);
      gaps = warp_sum(gaps);
    }
  }
};

}  // namespace rk::cuda
