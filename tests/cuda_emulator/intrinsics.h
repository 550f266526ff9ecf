// The functions that kernels call and that concern one thread alone: atomics, fences, cached loads and stores, bits,
// and arithmetic. CUDA's fast functions differ from these in the last places; compare results with tolerances.
#pragma once

#include <math.h>

#include <cstdint>
#include <type_traits>

#include "warp.h"

namespace cuda_emulator {

// Replaces *address by f(*address) and returns the old value. Relaxed, as CUDA's atomics are.
template <class T, class F>
T update(T* address, F f) {
  T old, next;
  __atomic_load(address, &old, __ATOMIC_RELAXED);
  do next = f(old);
  while (!__atomic_compare_exchange(address, &old, &next, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}

// ThreadSanitizer does not know fences, so they order everything there: a race that a fence of another kind would
// leave can be missed, but none is invented.
inline char fence_name = 0;
inline void fence() {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(&fence_name);
  __tsan_release(&fence_name);
#else
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
#endif
}

}  // namespace cuda_emulator

// Atomics. The operand takes no part in deduction, so that atomicAdd(&unsigned_value, 1) compiles, as in CUDA.
#define CUDA_EMULATOR_ATOMIC(name, expression)                                            \
  template <class T>                                                                      \
  T name(T* address, std::type_identity_t<T> value) {                                     \
    return cuda_emulator::update(address, [value](T old) -> T { return T(expression); }); \
  }
CUDA_EMULATOR_ATOMIC(atomicAdd, old + value)
CUDA_EMULATOR_ATOMIC(atomicSub, old - value)
CUDA_EMULATOR_ATOMIC(atomicMin, value < old ? value : old)
CUDA_EMULATOR_ATOMIC(atomicMax, old < value ? value : old)
CUDA_EMULATOR_ATOMIC(atomicAnd, old& value)
CUDA_EMULATOR_ATOMIC(atomicOr, old | value)
CUDA_EMULATOR_ATOMIC(atomicXor, old ^ value)
CUDA_EMULATOR_ATOMIC(atomicExch, ((void)old, value))
CUDA_EMULATOR_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
CUDA_EMULATOR_ATOMIC(atomicDec, old == 0 || old > value ? value : old - 1)
#undef CUDA_EMULATOR_ATOMIC
template <class T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> desired) {
  return cuda_emulator::update(address, [=](T old) { return old == expected ? desired : old; });
}

inline void __threadfence() { cuda_emulator::fence(); }
inline void __threadfence_block() { cuda_emulator::fence(); }
inline void __threadfence_system() { cuda_emulator::fence(); }

// Loads and stores that only differ in which caches they use.
#define CUDA_EMULATOR_LOAD(name) \
  template <class T>             \
  T name(const T* address) {     \
    return *address;             \
  }
#define CUDA_EMULATOR_STORE(name)                        \
  template <class T>                                     \
  void name(T* address, std::type_identity_t<T> value) { \
    *address = value;                                    \
  }
CUDA_EMULATOR_LOAD(__ldg)
CUDA_EMULATOR_LOAD(__ldca)
CUDA_EMULATOR_LOAD(__ldcg)
CUDA_EMULATOR_LOAD(__ldcs)
CUDA_EMULATOR_LOAD(__ldcv)
CUDA_EMULATOR_LOAD(__ldlu)
CUDA_EMULATOR_STORE(__stcg)
CUDA_EMULATOR_STORE(__stcs)
CUDA_EMULATOR_STORE(__stwb)
CUDA_EMULATOR_STORE(__stwt)
#undef CUDA_EMULATOR_LOAD
#undef CUDA_EMULATOR_STORE

// Bits.
inline int __float_as_int(float x) { return cuda_emulator::unpack<int>(cuda_emulator::pack(x)); }
inline unsigned __float_as_uint(float x) { return cuda_emulator::unpack<unsigned>(cuda_emulator::pack(x)); }
inline float __int_as_float(int x) { return cuda_emulator::unpack<float>(cuda_emulator::pack(x)); }
inline float __uint_as_float(unsigned x) { return cuda_emulator::unpack<float>(cuda_emulator::pack(x)); }
inline long long __double_as_longlong(double x) { return cuda_emulator::unpack<long long>(cuda_emulator::pack(x)); }
inline double __longlong_as_double(long long x) { return cuda_emulator::unpack<double>(cuda_emulator::pack(x)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __mulhi(int a, int b) { return static_cast<int>((static_cast<std::int64_t>(a) * b) >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((static_cast<std::uint64_t>(a) * b) >> 32);
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>((static_cast<unsigned __int128>(a) * b) >> 64);
}

// Arithmetic. sqrtf, fmaf, fminf, expf, erff, sincosf and the rest of C's functions come with <math.h>.
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a < b ? b : a; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a < b ? b : a; }
inline long min(long a, long b) { return a < b ? a : b; }
inline long max(long a, long b) { return a < b ? b : a; }
inline unsigned long min(unsigned long a, unsigned long b) { return a < b ? a : b; }
inline unsigned long max(unsigned long a, unsigned long b) { return a < b ? b : a; }
inline long long min(long long a, long long b) { return a < b ? a : b; }
inline long long max(long long a, long long b) { return a < b ? b : a; }
inline unsigned long long min(unsigned long long a, unsigned long long b) { return a < b ? a : b; }
inline unsigned long long max(unsigned long long a, unsigned long long b) { return a < b ? b : a; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float __frsqrt_rn(float x) { return 1.0f / sqrtf(x); }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __saturatef(float x) { return fminf(fmaxf(x, 0.0f), 1.0f); }
inline float __expf(float x) { return expf(x); }
inline float __exp10f(float x) { return powf(10.0f, x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __log10f(float x) { return log10f(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }

inline int __float2int_rn(float x) { return static_cast<int>(rintf(x)); }
inline int __float2int_rz(float x) { return static_cast<int>(x); }
inline int __float2int_rd(float x) { return static_cast<int>(floorf(x)); }
inline int __float2int_ru(float x) { return static_cast<int>(ceilf(x)); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline float __ull2float_rn(unsigned long long x) { return static_cast<float>(x); }
inline float __ll2float_rn(long long x) { return static_cast<float>(x); }
inline float __double2float_rn(double x) { return static_cast<float>(x); }
