// One kernel three times, for the budget's tests: out = 2 x of 16-bit elements, in vectors, in single elements, and in
// vectors that are loaded one after the other's arithmetic.  `python tests/cuda_budget/record.py` writes sample.sass.
#include <cstdint>
#include <cuda_bf16.h>

__device__ __forceinline__ std::uint32_t doubled(std::uint32_t word) {
  return (word & 0x7fff7fffu) + 0x00800080u;
}

__global__ void __launch_bounds__(256) good_kernel(const uint4* x, uint4* out, std::uint32_t vectors) {
  const std::uint32_t step = gridDim.x * blockDim.x;
  for (std::uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < vectors; i += step) {
    const uint4 v = x[i];
    out[i] = {doubled(v.x), doubled(v.y), doubled(v.z), doubled(v.w)};
  }
}

__global__ void __launch_bounds__(256) bad_kernel(const __nv_bfloat16* x, __nv_bfloat16* out, std::uint32_t elements) {
  const std::uint32_t step = gridDim.x * blockDim.x;
#pragma unroll 1
  for (std::uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < elements; i += step)
    out[i] = __float2bfloat16_rn(2.0f * __bfloat162float(x[i]));
}

// A cotangent that may be absent: an argument decides the branch.
__global__ void __launch_bounds__(256) optional_kernel(const uint4* x, const uint4* u, uint4* out,
                                                       std::uint32_t vectors) {
  const std::uint32_t step = gridDim.x * blockDim.x;
#pragma unroll 1
  for (std::uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < vectors; i += step) {
    uint4 v = x[i];
    if (u) {
      const uint4 w = u[i];
      for (int k = 0; k < 4; ++k) (&v.x)[k] += (&w.x)[k] * 3u;
      __threadfence();
    }
    out[i] = v;
  }
}
