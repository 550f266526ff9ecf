// Runs CUDA kernels on the CPU, so that g++ and its sanitizers can check them without a GPU. For tests only.
//
// csrc/cuda/launch.cuh includes this file in place of the CUDA runtime when the compiler is not nvcc. Kernels then
// compile as plain C++, against the CUDA toolkit's own headers for vector types, half and bfloat16.
//
//   configuration.h  what a test can set: the order of execution, the blocks to run
//   fiber.h          a CUDA thread is a fiber
//   shared_memory.h  __shared__ and dynamic shared memory, filled with NaN before every block
//   scheduler.h      runs blocks, warps, lanes; finds deadlocks and divergent barriers
//   launch.h         checks and runs a launch
//   warp.h           barriers, shuffles, votes, reductions
//   matrix.h         products of small matrices by a warp (csrc/cuda/mma.cuh)
//   async_copy.h     copies to shared memory that arrive at a wait (csrc/cuda/mma.cuh)
//   intrinsics.h     atomics, fences, bits, arithmetic
//
// README.md says what it finds, what it does not model and how to use it.
#pragma once

// The toolkit's headers come first: below, threadIdx and its like are macros.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <driver_types.h>
#include <vector_functions.h>
#include <vector_types.h>

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__
#undef __forceinline__
#define __forceinline__ inline __attribute__((always_inline))

inline constexpr int warpSize = 32;

#include "async_copy.h"
#include "intrinsics.h"
#include "launch.h"
#include "matrix.h"

#define threadIdx (::cuda_emulator::current->index)
#define blockIdx (::cuda_emulator::current->block->index)
#define blockDim (::cuda_emulator::current->block->dimensions)
#define gridDim (::cuda_emulator::current->block->grid)
