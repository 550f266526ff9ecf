// Kernels of group_norm_backward and its derivative.  Formulas: math/group_norm.h.
//
// A block sums over one group of one sample, or some adjacent ones, and then writes it: no block waits for another, no
// atomics, the same bits on every run.  Another kernel adds the samples' shares of grad_weight and grad_bias in order.
#pragma once

#include "column_totals.cuh"
#include "group_norm_planes.cuh"
#include "group_norm_rows.cuh"

namespace rk::cuda {

// Whether adjacent elements, which share a channel or a position, come in whole vectors.
template <class S>
bool in_words(bool innermost, const GroupNormCall<S>& c) {
  return (innermost ? c.channels : c.positions) % Words<S>::kSize == 0;
}

// How the work is shared out, from the shape alone.
template <class S>
void set_units(GroupNormCall<S>& c, bool innermost) {
  using A = accumulation_t<S>;
  c.width = c.channels / c.groups;
  c.by_width = Divider::of(c.width > 0 ? c.width : 1);
  c.by_groups = Divider::of(c.groups);
  c.average = Mean<A>::of(c.width * c.positions > 0 ? c.width * c.positions : 1);
  const int V = in_words(innermost, c) ? Words<S>::kSize : 1;
  if (innermost)
    set_strips(c, V);
  else
    set_planes(c, V);
}

// The numbers that kernels leave for themselves in device memory.
template <class S>
std::int64_t scratch_size(const GroupNormCall<S>& c, bool innermost) {
  if (innermost) return c.strip > kStripChannels ? c.samples * c.channels * kChannelNumbers : 0;
  const bool sums = c.grad_weight || c.grad_bias;
  return sums && c.threads == kPlaneThreads ? c.samples * c.groups * c.pieces * 3 : 0;
}

// After set_units.  c.scratch holds scratch_size numbers, c.sample_* samples * channels where c.grad_* is wanted, and is
// null where not.  Where vectors are whole, every tensor like x begins at a multiple of 16 bytes.
template <class S>
cudaError_t launch_group_norm(bool innermost, const GroupNormCall<S>& c, cudaStream_t stream) {
  using A = accumulation_t<S>;
  const bool words = in_words(innermost, c);
  if (words && !aligned<S>(0, c.x, c.g, c.u, c.gg_grad, c.grad_x)) return cudaErrorMisalignedAddress;
  cudaError_t status = cudaSuccess;
  if (innermost)
    status = words ? launch_rows<S, Words<S>>(c, stream) : launch_rows<S, Element<S>>(c, stream);
  else
    status = words ? launch_planes<S, Words<S>>(c, stream) : launch_planes<S, Element<S>>(c, stream);
  if (status == cudaSuccess)
    status = launch_column_totals<A>(c.sample_weight, c.grad_weight, c.sample_bias, c.grad_bias, c.samples, c.channels,
                                     stream);
  return status;
}

}  // namespace rk::cuda
