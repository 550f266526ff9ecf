// Launchers of the sample kernels, and the bugs that can be planted in them; sample_kernels.cu says what they compute.
#pragma once

#include <cstdint>

#include "launch.cuh"

#define SAMPLE_BUGS(BUG)                                                                                               \
  BUG(missing_barrier)           /* shared memory is read before the barrier that follows its writes */                \
  BUG(missing_barrier_on_reuse)  /* shared memory is written again while others may still read it */                   \
  BUG(broadcast_without_barrier) /* right whenever warp 0 happens to come first */                                     \
  BUG(missing_syncwarp)          /* lanes exchange through shared memory as if they ran in lockstep */                 \
  BUG(unwritten_shared)          /* reads shared memory that no warp wrote */                                          \
  BUG(shared_overrun)            /* writes past a static shared array */                                               \
  BUG(dynamic_shared_overrun)    /* writes past the dynamic shared memory */                                           \
  BUG(tail_overread)             /* reads one element past a row */                                                    \
  BUG(unwritten_output)          /* leaves the last element of a row unwritten */                                      \
  BUG(misaligned_vector)         /* 16-byte loads from an address that is not a multiple of 16 */                      \
  BUG(int32_offset)              /* a row offset that does not fit in 32 bits */                                       \
  BUG(rows_on_grid_y)            /* a grid dimension that ends at 65535 */                                             \
  BUG(wrong_lane)                /* a reduction that adds a lane twice and another never */                            \
  BUG(absent_lane)               /* a shuffle from a lane that has returned */                                         \
  BUG(divergent_shuffle)         /* a full-mask shuffle in a branch that some lanes do not take */                     \
  BUG(divergent_barriers)        /* a barrier in either branch, but not the same one */                                \
  BUG(inlined_barriers)          /* one barrier, inlined into both branches: allowed by sm_70 and later in practice */ \
  BUG(early_return)              /* threads return before a barrier */                                                 \
  BUG(lost_update)               /* blocks add to global memory without an atomic */                                   \
  BUG(missing_async_wait)        /* shared memory is read before the asynchronous copy to it has arrived */            \
  BUG(missing_barrier_after_wait) /* threads wait for their own copies and read those of others */                     \
  BUG(transposed_fragment)        /* a matrix operand is loaded by rows where the product wants columns */

namespace sample {

enum class Bug {
  none,
#define SAMPLE_NAME(name) name,
  SAMPLE_BUGS(SAMPLE_NAME)
#undef SAMPLE_NAME
};

#if defined(__CUDACC__)
__host__ __device__ constexpr bool has(Bug) { return false; }
#else
inline Bug planted = Bug::none;
inline bool has(Bug bug) { return bug == planted; }
#endif

template <class T>
cudaError_t row_normalize(const T* x, T* y, float* norm, std::int64_t rows, int cols, float eps, int threads);

cudaError_t axpby_sum(const float* x, const float* y, float* out, float* total, std::int64_t n, float a, float b,
                      int blocks, int threads);

cudaError_t project(const float* x, float* out, int rows, int cols, int projections, std::uint32_t seed, int threads);

template <class T>
cudaError_t multiply(const T* x, const T* y, float* out, int rows, int cols);

// The sign that entry (row i, column j) of project's random matrix has, on the host as in the kernel.
__host__ __device__ inline float random_sign(std::uint32_t seed, std::uint32_t j, std::uint32_t i) {
  std::uint32_t h = seed ^ (j * 0x9E3779B9u) ^ (i * 0x85EBCA6Bu);
  h = (h ^ (h >> 16)) * 0x7feb352du;
  h = (h ^ (h >> 15)) * 0x846ca68bu;
  return ((h ^ (h >> 16)) & 1u) ? 1.0f : -1.0f;
}

}  // namespace sample
