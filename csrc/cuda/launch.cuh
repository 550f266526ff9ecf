// The only CUDA runtime include of the kernels, and the only way to launch one.
//
// nvcc compiles it against the CUDA toolkit. g++ compiles it against tests/cuda_emulator (found through -I), where
// every CUDA thread is a fiber, so that the same kernels run under tests and sanitizers without a GPU. Kernels
// therefore use no <<<>>> and no `extern __shared__`; they use launch() and RK_DYNAMIC_SHARED.
//
//     __global__ void scale_kernel(const float* x, float* y, int64_t n, float factor) { ... }
//
//     cudaError_t scale(const float* x, float* y, int64_t n, float factor, cudaStream_t stream) {
//       return launch(scale_kernel, dim3(blocks), dim3(256), 0, stream, x, y, n, factor);
//     }
#pragma once

#include <cstddef>
#include <cstdint>
#include <tuple>
#include <utility>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#else
#include "cuda_emulator.h"
#endif
#include <cuda_bf16.h>
#include <cuda_fp16.h>

// Declares `T* name`, the kernel's dynamic shared memory, aligned to 16 bytes.
#if defined(__CUDACC__)
#define RK_DYNAMIC_SHARED(T, name)                                          \
  extern __shared__ __align__(16) unsigned char rk_dynamic_shared_memory[]; \
  T* const name = reinterpret_cast<T*>(rk_dynamic_shared_memory)
#else
#define RK_DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(::cuda_emulator::dynamic_shared_memory())
#endif

namespace rk::cuda {

// Which operator of an op: its value, or one of its derivatives.
enum class Order { kValue, kBackward, kDoubleBackward };

// Bytes of shared memory that one block may ask for on this device.
inline std::int64_t shared_memory_of_block() {
#if defined(__CUDACC__)
  int device = 0, bytes = 0;
  const bool known = cudaGetDevice(&device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess;
  return known ? bytes : 48 * 1024;
#else
  return static_cast<std::int64_t>(::cuda_emulator::configuration().dynamic_shared_limit);
#endif
}

// Runs `kernel` on `stream`. Arguments are converted to the kernel's parameter types here, on the host.
//
// A grid with a zero dimension is an empty batch: nothing is launched and the result is cudaSuccess, where CUDA itself
// would report an invalid configuration. A launch that CUDA refuses returns its error, which is not left pending for
// whoever asks next. Never synchronises, so it can be captured in a CUDA graph.
template <class... Parameters, class... Arguments>
[[nodiscard]] cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t dynamic_shared,
                                 [[maybe_unused]] cudaStream_t stream, Arguments&&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments), "wrong number of kernel arguments");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  std::tuple<Parameters...> values(static_cast<Parameters>(std::forward<Arguments>(arguments))...);

#if defined(__CUDACC__)
  const void* const function = reinterpret_cast<const void*>(kernel);
  // A kernel may use 48 KiB of shared memory, its static arrays included, without asking. Asking earlier than needed
  // costs nothing and leaves room for those arrays.
  constexpr std::size_t granted_without_asking = 32 * 1024;
  cudaError_t status = cudaSuccess;
  if (dynamic_shared > granted_without_asking) {
    status =
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(dynamic_shared));
  }
  if (status == cudaSuccess) {
    status = std::apply(
        [&](auto&... value) {
          void* pointers[] = {const_cast<void*>(static_cast<const void*>(&value))..., nullptr};
          return cudaLaunchKernel(function, grid, block, pointers, dynamic_shared, stream);
        },
        values);
  }
  // Both calls also store their error; it is returned instead, so take it out of the store. An error that an earlier
  // kernel left behind is returned too rather than passed over.
  const cudaError_t pending = cudaGetLastError();
  return status != cudaSuccess ? status : pending;
#else
  return ::cuda_emulator::launch(grid, block, dynamic_shared, kernel, values);
#endif
}

}  // namespace rk::cuda
