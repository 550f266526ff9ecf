// A product of two matrices, each row of which is added at a place of its own: what a transposed convolution is made of.
#pragma once

#include <algorithm>

#include "lanes.h"

namespace rk::cpu {

// A register of AVX-512, written out for the same reason as Lanes.
template <class A>
struct WideLanesOf {
  typedef A type __attribute__((vector_size(64)));
};

// What will be read next, and is fetched meanwhile: the cache line at + k of_row + j of_columns and the one behind it, for each
// k of the j-th pair of registers.
struct Ahead {
  const char* at;
  int64_t of_row, of_columns;  // bytes
};

// to[places[r] + j] += sum_k weights[k * R + r] * columns[k * stride + j] for r in [0, R) and j in [0, n), where n is a
// multiple of the lanes of V.  The sums stay in 2 R registers; each adds up k by k, whatever the registers.
template <class V, int R, class A>
RK_HOST_DEVICE void add_shifted_products_of(int64_t depth, const A* weights, const A* columns, int64_t stride,
                                            int64_t n, const int64_t* places, A* to, const Ahead& ahead) {
  constexpr int L = sizeof(V) / sizeof(A);
  int64_t j = 0;
  const char* next = ahead.at;
  for (; j + 2 * L <= n; j += 2 * L, next += ahead.of_columns) {
    V sum[R][2] = {};
    const char* line = next;
    for (int64_t k = 0; k < depth; ++k, line += ahead.of_row) {
      __builtin_prefetch(line, 0, 2);
      __builtin_prefetch(line + 64, 0, 2);
      V first, second;
      std::memcpy(&first, columns + k * stride + j, sizeof first);
      std::memcpy(&second, columns + k * stride + j + L, sizeof second);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const A weight = weights[k * R + r];
        sum[r][0] += weight * first;
        sum[r][1] += weight * second;
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        A* const place = to + places[r] + j + i * L;
        V before;
        std::memcpy(&before, place, sizeof before);
        before += sum[r][i];
        std::memcpy(place, &before, sizeof before);
      }
  }
  for (; j < n; j += L) {
    V sum[R] = {};
    for (int64_t k = 0; k < depth; ++k) {
      V one;
      std::memcpy(&one, columns + k * stride + j, sizeof one);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) sum[r] += weights[k * R + r] * one;
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      A* const place = to + places[r] + j;
      V before;
      std::memcpy(&before, place, sizeof before);
      before += sum[r];
      std::memcpy(place, &before, sizeof before);
    }
  }
}

template <class A>
using ShiftedProducts = void (*)(int64_t depth, const A* weights, const A* columns, int64_t stride, int64_t n,
                                 const int64_t* places, A* to, const Ahead& ahead);

template <int R, class A>
RK_MULTIVERSION static void add_shifted_products(int64_t depth, const A* weights, const A* columns, int64_t stride,
                                                 int64_t n, const int64_t* places, A* to, const Ahead& ahead) {
  add_shifted_products_of<Lanes<A>, R>(depth, weights, columns, stride, n, places, to, ahead);
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define RK_HAS_WIDE_PRODUCTS
// A function of its own rather than a version of the one above: twice as many registers hold twice as many rows.
template <int R, class A>
__attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,fma"))) void add_wide_shifted_products(
    int64_t depth, const A* weights, const A* columns, int64_t stride, int64_t n, const int64_t* places, A* to,
    const Ahead& ahead) {
  add_shifted_products_of<typename WideLanesOf<A>::type, R>(depth, weights, columns, stride, n, places, to, ahead);
}
#endif

// The kernels of this machine: of[r - 1] adds r rows, at most `most`; n is a multiple of `lanes`.
template <class A>
struct ShiftedProductKernels {
  ShiftedProducts<A> of[12];
  int64_t most, lanes;

  static const ShiftedProductKernels& here() {
#ifdef RK_HAS_WIDE_PRODUCTS
    static const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
    static const ShiftedProductKernels of_avx512{
        {add_wide_shifted_products<1, A>, add_wide_shifted_products<2, A>, add_wide_shifted_products<3, A>,
         add_wide_shifted_products<4, A>, add_wide_shifted_products<5, A>, add_wide_shifted_products<6, A>,
         add_wide_shifted_products<7, A>, add_wide_shifted_products<8, A>, add_wide_shifted_products<9, A>,
         add_wide_shifted_products<10, A>, add_wide_shifted_products<11, A>, add_wide_shifted_products<12, A>},
        12,
        64 / sizeof(A)};
    if (wide) return of_avx512;
#endif
    static const ShiftedProductKernels of_others{
        {add_shifted_products<1, A>, add_shifted_products<2, A>, add_shifted_products<3, A>, add_shifted_products<4, A>,
         add_shifted_products<5, A>, add_shifted_products<6, A>},
        6,
        kLanes<A>};
    return of_others;
  }
};

}  // namespace rk::cpu
