// Sums of several things at once.
#pragma once

#include "simd.h"

namespace rk::cpu {

// totals[i] += sum_j terms(j)[i], where terms(j, v) writes K numbers to v.  Half the lanes of lane_sum, so that the
// lanes of several sums fit the registers; the order of additions depends on n alone.
template <class A, int K, class F>
RK_HOST_DEVICE void lane_sums(std::int64_t n, double* totals, const F& terms) {
  constexpr int L = kLanes<A> / 2;
  A lane[K][L] = {};
  std::int64_t j = 0;
  for (; j + L <= n; j += L)
    for (int k = 0; k < L; ++k) {
      A v[K];
      terms(j + k, v);
      for (int i = 0; i < K; ++i) lane[i][k] += v[i];
    }
  for (int k = 0; j < n; ++j, ++k) {
    A v[K];
    terms(j, v);
    for (int i = 0; i < K; ++i) lane[i][k] += v[i];
  }
  for (int i = 0; i < K; ++i) {
    for (int half = L / 2; half; half /= 2)
      for (int k = 0; k < half; ++k) lane[i][k] += lane[i][k + half];
    totals[i] += double(lane[i][0]);
  }
}

RK_MULTIVERSION [[maybe_unused]] static void add_in_double(double* __restrict__ totals, const float* from,
                                                           std::int64_t n) {
  for (std::int64_t j = 0; j < n; ++j) totals[j] += double(from[j]);
}
RK_MULTIVERSION [[maybe_unused]] static void add_in_double(double* __restrict__ totals, const double* from,
                                                           std::int64_t n) {
  for (std::int64_t j = 0; j < n; ++j) totals[j] += from[j];
}

}  // namespace rk::cpu
