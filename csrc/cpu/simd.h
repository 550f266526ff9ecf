// Vector code without intrinsics: loops over a fixed number of lanes, compiled once for each instruction set.
#pragma once

#include "../math/scalar.h"

// A function marked RK_MULTIVERSION is compiled for baseline x86-64, AVX2 + FMA and AVX-512, and the loader picks one
// on the machine it runs on.  Everything it calls must be inlined into it (RK_HOST_DEVICE, RK_INLINE_LAMBDA): a call
// would leave the instruction set.  It may be a template, of which clang knows no versions; in a header it is static.
#if defined(__x86_64__) && defined(__ELF__) && !defined(__clang__) && defined(__GNUC__) && __GNUC__ >= 12
#define RK_MULTIVERSION __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#define RK_MULTIVERSION_NAMES "x86-64, x86-64-v3 (AVX2), x86-64-v4 (AVX-512)"
#else
#define RK_MULTIVERSION
#define RK_MULTIVERSION_NAMES "the compiler's default only"
#endif
#define RK_INLINE_LAMBDA __attribute__((always_inline))

namespace rk::cpu {

// A number that all entries share, or the one of entry j.
template <class Each>
RK_HOST_DEVICE auto entry(Each of, std::int64_t j) {
  if constexpr (std::is_pointer_v<Each>)
    return of[j];
  else
    return of;
}

// The larger of two numbers, or NaN if one of them is.
template <class A>
RK_HOST_DEVICE A larger(A most, A v) {
  return (v > most) | is_nan(v) ? v : most;
}

// 128 bytes: four AVX2 or two AVX-512 registers, enough independent sums to hide the latency of an addition.
template <class A>
inline constexpr int kPartialSums = 128 / sizeof(A);

// sum_j f(j) for j in [0, n).  The order of the additions depends on n alone, never on the instruction set or threads.
template <class A, class F>
RK_HOST_DEVICE A sum_over(std::int64_t n, const F& f) {
  constexpr int L = kPartialSums<A>;
  A partial[L] = {};
  std::int64_t j = 0;
  for (; j + L <= n; j += L)
    for (int k = 0; k < L; ++k) partial[k] += f(j + k);
  for (int k = 0; j < n; ++j, ++k) partial[k] += f(j);
  for (int half = L / 2; half; half /= 2)
    for (int k = 0; k < half; ++k) partial[k] += partial[k + half];
  return partial[0];
}

// sum_j f(j) and sum_j g(j) in one sweep.
template <class A, class F, class G>
RK_HOST_DEVICE void sums_over(std::int64_t n, A& total_f, A& total_g, const F& f, const G& g) {
  constexpr int L = kPartialSums<A>;
  A first[L] = {}, second[L] = {};
  std::int64_t j = 0;
  for (; j + L <= n; j += L)
    for (int k = 0; k < L; ++k) {
      first[k] += f(j + k);
      second[k] += g(j + k);
    }
  for (int k = 0; j < n; ++j, ++k) {
    first[k] += f(j);
    second[k] += g(j);
  }
  for (int half = L / 2; half; half /= 2)
    for (int k = 0; k < half; ++k) {
      first[k] += first[k + half];
      second[k] += second[k + half];
    }
  total_f = first[0];
  total_g = second[0];
}

// max_j f(j); NaN if any f(j) is NaN, `least` for n = 0.
template <class A, class F>
RK_HOST_DEVICE A max_over(std::int64_t n, A least, const F& f) {
  constexpr int L = kPartialSums<A>;
  A partial[L];
  A poison[L] = {};  // a comparison drops NaN, so it is kept here
  for (int k = 0; k < L; ++k) partial[k] = least;
  std::int64_t j = 0;
  for (; j + L <= n; j += L)
    for (int k = 0; k < L; ++k) {
      const A v = f(j + k);
      partial[k] = v > partial[k] ? v : partial[k];
      poison[k] = v == v ? poison[k] : v;
    }
  for (int k = 0; j < n; ++j, ++k) {
    const A v = f(j);
    partial[k] = v > partial[k] ? v : partial[k];
    poison[k] = v == v ? poison[k] : v;
  }
  A best = least;
  for (int k = 0; k < L; ++k) {
    if (is_nan(poison[k])) return poison[k];
    best = partial[k] > best ? partial[k] : best;
  }
  return best;
}

// The same, and a plain loop, as functions compiled for every instruction set; f is a lambda marked RK_INLINE_LAMBDA,
// which holds a few pointers and numbers.  Each copies them: they need not be read again after every store.
template <class A, class F>
RK_MULTIVERSION static A vector_sum(std::int64_t n, const F& f) {
  const F own = f;
  return sum_over<A>(n, own);
}
template <class A, class F, class G>
RK_MULTIVERSION static void vector_sums(std::int64_t n, A& total_f, A& total_g, const F& f, const G& g) {
  const F own_f = f;
  const G own_g = g;
  sums_over<A>(n, total_f, total_g, own_f, own_g);
}
template <class A, class F>
RK_MULTIVERSION static A vector_max(std::int64_t n, A least, const F& f) {
  const F own = f;
  return max_over<A>(n, least, own);
}
template <class F>
RK_MULTIVERSION static void vector_loop(std::int64_t n, const F& f) {
  const F own = f;
  for (std::int64_t j = 0; j < n; ++j) own(j);
}
// to[j] = f(j), and to[j] += f(j), where f reads nothing that is written.
template <class A, class F>
RK_MULTIVERSION static void vector_write(std::int64_t n, A* __restrict__ to, const F& f) {
  const F own = f;
  for (std::int64_t j = 0; j < n; ++j) to[j] = own(j);
}
template <class A, class F>
RK_MULTIVERSION static void vector_add(std::int64_t n, A* __restrict__ to, const F& f) {
  const F own = f;
  for (std::int64_t j = 0; j < n; ++j) to[j] += own(j);
}

}  // namespace rk::cpu
