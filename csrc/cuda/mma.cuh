// What a warp does beyond plain C++, as raw PTX: products of small matrices, their fragments from shared memory, and
// copies to shared memory that nobody waits for until asked to.  For sm_80 and later: below, nothing may launch a kernel
// that calls these, which then traps.  Under g++ the emulator has them.
//
// Matrices are spread over a warp's lanes as the PTX manual says ("Matrix Fragments for mma.m16n8k16"); with
// g = lane / 4 and t = lane % 4, two 16-bit numbers a register:
//
//     A, 16 x 16   a[0]: row g, columns 2t and 2t + 1;  a[1]: row g + 8;  a[2], a[3]: the same, 8 columns on
//     B, 16 x 8    b[0]: rows 2t and 2t + 1 of column g;  b[1]: 8 rows on
//     D, 16 x 8    d[0], d[1]: row g, columns 2t and 2t + 1;  d[2], d[3]: row g + 8
//
// So D's numbers, packed, are half of an A: {pack(d[0], d[1]), pack(d[2], d[3])} is its a[0] and a[1], and those of the
// next 8 columns are its a[2] and a[3].
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "launch.cuh"

namespace rk::cuda {

// Two numbers of a fragment's register, each rounded to the nearest S.
template <class S>
__device__ __forceinline__ std::uint32_t pack(float low, float high) {
  std::uint32_t bits;
  if constexpr (std::is_same_v<S, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&bits, &pair, sizeof(bits));
  } else {
    static_assert(std::is_same_v<S, __nv_bfloat16>);
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&bits, &pair, sizeof(bits));
  }
  return bits;
}

#if !defined(__CUDACC__)
using cuda_emulator::copy_async_16;
using cuda_emulator::copy_async_commit;
using cuda_emulator::copy_async_wait;
using cuda_emulator::ldmatrix_x4;
using cuda_emulator::ldmatrix_x4_transposed;
using cuda_emulator::mma_16816;
#else

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
inline constexpr bool kFromSm80 = false;
#else
inline constexpr bool kFromSm80 = true;
#endif

// D += A B.
template <class S>
__device__ __forceinline__ void mma_16816(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  static_assert(std::is_same_v<S, __half> || std::is_same_v<S, __nv_bfloat16>);
  if constexpr (!kFromSm80) {
    __trap();
  } else if constexpr (std::is_same_v<S, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

__device__ __forceinline__ std::uint32_t shared_address(const void* shared) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
}

// Four 8 x 8 matrices: lane 8 i + j says where row j of matrix i lies, 16 bytes at a multiple of 16.  r[i]: the numbers
// 2t and 2t + 1 of row g of matrix i.
__device__ __forceinline__ void ldmatrix_x4(std::uint32_t (&r)[4], const void* shared_row) {
  if constexpr (!kFromSm80) {
    __trap();
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(shared_row))
                 : "memory");
  }
}

// The same of the transposed matrices: r[i] has the numbers g of rows 2t and 2t + 1.
__device__ __forceinline__ void ldmatrix_x4_transposed(std::uint32_t (&r)[4], const void* shared_row) {
  if constexpr (!kFromSm80) {
    __trap();
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(shared_row))
                 : "memory");
  }
}

// Begins to copy 16 bytes, both addresses multiples of 16; zeros, without a look at `global`, where not there.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool there) {
  if constexpr (!kFromSm80) {
    __trap();
  } else {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)), "r"(there ? 16 : 0)
                 : "memory");
  }
}

// The thread's copies since the last call are a group.
__device__ __forceinline__ void copy_async_commit() {
  if constexpr (kFromSm80) asm volatile("cp.async.commit_group;" : : : "memory");
}

// All but the thread's newest kPending groups have arrived.  Others see them after a barrier.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  if constexpr (kFromSm80) asm volatile("cp.async.wait_group %0;" : : "n"(kPending) : "memory");
}

#endif

}  // namespace rk::cuda
