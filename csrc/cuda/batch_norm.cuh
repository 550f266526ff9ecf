// Kernels of batch_norm_double_backward.  Formulas: math/batch_norm.h.
//
// Two sweeps: five sums a channel, then the results, from coefficients that follow from the sums.  With fixed
// statistics the coefficients are known beforehand, and the first sweep writes the results as well.  Blocks take fixed
// shares of the data and sum as trees: the same bits on every run, no atomics.  Of K cotangents the first sweep goes
// through one after the other; the second reads x once for all, and grad_x is summed in registers.
//
//   batch_norm_along.cuh    [N, C, S]: a run of adjacent elements is one channel of one image
//   batch_norm_across.cuh   [P, C]: a run is a row of all channels
#pragma once

#include "batch_norm_across.cuh"
#include "batch_norm_along.cuh"

namespace rk::cuda {

// How the call's data divide, from its shape, mode and outputs.  Before launch_batch_norm.
template <class S>
void arrange(BatchNormCall<S>& c, const BatchNormLimits& limits = {}) {
  c.elements = c.images * c.channels * c.inner;
  is_across(c) ? arrange_across(c, limits) : arrange_along(c, limits);
}

// Elements of `partial` and `coefficients` that an arranged call needs.
template <class S>
std::int64_t partial_size(const BatchNormCall<S>& c) {
  return c.fused ? 0 : c.cotangents * c.columns * kBatchNormSums * c.shares;
}
template <class S>
std::int64_t coefficients_size(const BatchNormCall<S>& c) {
  return c.fused ? 0 : (4 + 3 * c.cotangents) * c.columns;
}

template <class S>
cudaError_t launch_batch_norm(const BatchNormCall<S>& c, cudaStream_t stream) {
  // Vectors of the second cotangent begin where the first one's elements end.
  const bool vectors =
      c.elements >= Words<S>::kSize && aligned<S>(c.cotangents > 1 ? c.elements : 0, c.u, c.g, c.x, c.grad, c.grad_x);
  if constexpr (sizeof(S) < 8)  // numbers of 8 bytes are read fast enough one by one
    if (vectors) return is_across(c) ? launch_across<S, true>(c, stream) : launch_along<S, true>(c, stream);
  return is_across(c) ? launch_across<S, false>(c, stream) : launch_along<S, false>(c, stream);
}

}  // namespace rk::cuda
