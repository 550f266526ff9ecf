// Kernels of softmax_cross_entropy.  Formulas: math/softmax_cross_entropy.h.
//
// One block a row, with as many threads as the row has 16-byte vectors, up to 512.  A kernel sweeps its row two times;
// the second sweep finds it in the L1 or L2 cache, so device memory is read once: logits for the value; logits and
// result for the backward; logits, cotangent and result for the double backward (and the target, where it is a row of
// probabilities).
#pragma once

#include <cstdint>

#include "../math/softmax_cross_entropy.h"
#include "reduce.cuh"
#include "vector.cuh"

namespace rk::cuda {

template <class S>
struct CrossEntropyCall {
  using A = accumulation_t<S>;
  std::int64_t rows, classes;
  const S *logits, *u;                   // [rows, classes]; u: cotangent of grad_logits
  std::int64_t logits_stride, u_stride;  // elements between rows
  const std::int64_t* indices;           // [rows], or null
  const S* narrow_target;                // [rows, classes] probabilities as fine as the logits, or null
  const A* wide_target;                  // the same in the accumulation type, or null
  std::int64_t target_stride, ignore_index;
  A label_smoothing, inverse_t;
  const A *grad, *statistics_in;  // [rows], [rows, 2]
  A *per_row, *statistics;        // [rows], [rows, 2] outputs
  S* out;                         // [rows, classes] output
};

// The target of one row.  A class that does not exist makes everything about its row NaN: raising would need the host.
template <class S>
struct RowTarget {
  using A = accumulation_t<S>;
  const S* narrow;
  const A* wide;
  std::int64_t index = -1;
  bool ignored = false, invalid = false;
  Smoothing<A> smoothing;

  __device__ __forceinline__ RowTarget(const CrossEntropyCall<S>& c, std::int64_t row)
      : narrow(c.narrow_target ? c.narrow_target + row * c.target_stride : nullptr),
        wide(c.wide_target ? c.wide_target + row * c.target_stride : nullptr),
        smoothing(c.label_smoothing, A(c.classes)) {
    if (!c.indices) return;
    index = c.indices[row];
    ignored = index == c.ignore_index;
    invalid = !ignored && (index < 0 || index >= c.classes);
  }

  __device__ __forceinline__ A q(std::int64_t j) const {
    const A t = wide ? wide[j] : narrow ? load(narrow[j]) : (j == index ? A(1) : A(0));
    return smoothing.q(t);
  }
  __device__ __forceinline__ bool is_row() const { return wide || narrow; }

  // sum_c q_c, in every thread
  __device__ __forceinline__ A total_q(std::int64_t classes) const {
    if (!is_row()) return smoothing.keep + smoothing.floor * A(classes);
    A total = 0;
    for (std::int64_t j = threadIdx.x; j < classes; j += blockDim.x) total += q(j);
    return block_sum(total);
  }
};

template <class S>
__device__ __forceinline__ void fill_row(const CrossEntropyCall<S>& c, std::int64_t row, accumulation_t<S> value) {
  if (c.out)
    for (std::int64_t j = threadIdx.x; j < c.classes; j += blockDim.x) c.out[row * c.classes + j] = store<S>(value);
  if (threadIdx.x != 0) return;
  if (c.per_row) c.per_row[row] = value;
  if (c.statistics) c.statistics[2 * row] = c.statistics[2 * row + 1] = accumulation_t<S>(0);
}

// Rows without anything to compute; true if this was one.
template <class S>
__device__ __forceinline__ bool settle_row(const CrossEntropyCall<S>& c, const RowTarget<S>& target, std::int64_t row) {
  if (!target.ignored && !target.invalid) return false;
  fill_row(c, row, target.ignored ? accumulation_t<S>(0) : accumulation_t<S>(NAN));
  return true;
}

template <class S>
__global__ void __launch_bounds__(512, 1) softmax_cross_entropy_kernel(const CrossEntropyCall<S> c) {
  using A = accumulation_t<S>;
  for (std::int64_t row = blockIdx.x; row < c.rows; row += gridDim.x) {
    const RowTarget<S> target(c, row);
    if (settle_row(c, target, row)) continue;
    const S* z = c.logits + row * c.logits_stride;
    A max = -static_cast<A>(INFINITY);
    read(z, c.classes, Counter{}, [&](std::int64_t, A v) { max = Maximum{}(max, v); });
    max = block_max(max, -static_cast<A>(INFINITY)) * c.inverse_t;
    A sum = 0, total_q = 0, gap = 0;
    read(z, c.classes, Counter{}, [&](std::int64_t j, A v) {
      const A q = target.q(j), scaled = v * c.inverse_t;
      sum += exp_nonpositive(scaled - max);
      total_q += q;
      gap += cross_entropy_term(q, max - scaled);
    });
    sum = block_sum(sum);
    gap = block_sum(gap);
    total_q = target.is_row() ? block_sum(total_q) : target.total_q(c.classes);
    if (threadIdx.x == 0) {
      const A log_sum = std::log(sum);
      c.per_row[row] = cross_entropy_value(log_sum, total_q, gap);
      c.statistics[2 * row] = max;
      c.statistics[2 * row + 1] = log_sum;
    }
  }
}

template <class S>
__global__ void __launch_bounds__(512, 1) softmax_cross_entropy_backward_kernel(const CrossEntropyCall<S> c) {
  using A = accumulation_t<S>;
  for (std::int64_t row = blockIdx.x; row < c.rows; row += gridDim.x) {
    const RowTarget<S> target(c, row);
    if (settle_row(c, target, row)) continue;
    const A max = c.statistics_in[2 * row], log_sum = c.statistics_in[2 * row + 1], grad = c.grad[row];
    const A total_q = target.total_q(c.classes), inverse_t = c.inverse_t;
    transform(c.logits + row * c.logits_stride, c.out + row * c.classes, c.classes, Counter{},
              [&](std::int64_t j, A v) {
                const A p = softmax_probability(v * inverse_t, max, log_sum);
                return grad * cross_entropy_slope(p, target.q(j), total_q, inverse_t);
              });
  }
}

template <class S>
__global__ void __launch_bounds__(512, 1) softmax_cross_entropy_double_backward_kernel(const CrossEntropyCall<S> c) {
  using A = accumulation_t<S>;
  for (std::int64_t row = blockIdx.x; row < c.rows; row += gridDim.x) {
    const RowTarget<S> target(c, row);
    if (settle_row(c, target, row)) continue;
    const S *z = c.logits + row * c.logits_stride, *u_row = c.u + row * c.u_stride;
    const A max = c.statistics_in[2 * row], log_sum = c.statistics_in[2 * row + 1], grad = c.grad[row];
    const A total_q = target.total_q(c.classes), inverse_t = c.inverse_t;
    A mean_u = 0, dot_qu = 0;
    read(z, u_row, c.classes, Counter{}, [&](std::int64_t j, A v, A u) {
      mean_u += softmax_probability(v * inverse_t, max, log_sum) * u;
      dot_qu += target.q(j) * u;
    });
    mean_u = block_sum(mean_u);
    dot_qu = block_sum(dot_qu);
    if (threadIdx.x == 0) c.per_row[row] = (total_q * mean_u - dot_qu) * inverse_t;
    transform(z, u_row, c.out + row * c.classes, c.classes, Counter{}, [&](std::int64_t, A v, A u) {
      const A p = softmax_probability(v * inverse_t, max, log_sum);
      return grad * cross_entropy_bend(p, u, mean_u, total_q, inverse_t);
    });
  }
}

template <class S>
cudaError_t launch_softmax_cross_entropy(Order order, const CrossEntropyCall<S>& c, cudaStream_t stream) {
  const dim3 block(threads_for<S>(c.classes, 512)), grid = grid_for(c.rows);
  switch (order) {
    case Order::kValue: return launch(softmax_cross_entropy_kernel<S>, grid, block, 0, stream, c);
    case Order::kBackward: return launch(softmax_cross_entropy_backward_kernel<S>, grid, block, 0, stream, c);
    default: return launch(softmax_cross_entropy_double_backward_kernel<S>, grid, block, 0, stream, c);
  }
}

}  // namespace rk::cuda
