// Kernels of softmax_double_backward.  Formulas: math/softmax.h.
//
// Rows whose classes are adjacent (inner = 1): one block each.  Rows side by side, as the pixels of an image: one thread
// each, neighbours reading neighbours.  Both make two sweeps, the second of which finds its row in the L1 or L2 cache:
// device memory is read once, u, grad and output, and written once, gg_grad and grad_output.
#pragma once

#include <cstdint>

#include "../math/softmax.h"
#include "reduce.cuh"
#include "vector.cuh"

namespace rk::cuda {

template <class S>
struct SoftmaxCall {
  std::int64_t batch, classes, inner;
  const S *u, *grad, *output;  // [batch, classes, inner]
  S *gg_grad, *grad_output;    // null: not needed
};

// One element's numbers on the way in and out.
template <bool kLog, class S>
struct SoftmaxElement {
  using A = accumulation_t<S>;
  A p, u, g;

  __device__ __forceinline__ SoftmaxElement(S output, S u, S grad)
      : p(Softmax<kLog, A>::probability(load(output))), u(load(u)), g(load(grad)) {}
  __device__ __forceinline__ SoftmaxElement(const SoftmaxCall<S>& c, std::int64_t j)
      : SoftmaxElement(c.output[j], c.u[j], c.grad[j]) {}

  __device__ __forceinline__ void add_to(A& total_g, A& mean_u) const {
    total_g += Softmax<kLog, A>::total_g_term(p, g);
    mean_u += p * u;
  }
  __device__ __forceinline__ S gg_grad(A mean_u) const { return store<S>(Softmax<kLog, A>::gg_grad(p, u, mean_u)); }
  __device__ __forceinline__ S grad_output(A total_g, A mean_u) const {
    return store<S>(Softmax<kLog, A>::grad_output(p, u, g, total_g, mean_u));
  }
};

// One row, of which a block's threads have a share each.  f(j, element) for single elements at the end of a row;
// f_vector(j, output, u, grad) for 16-byte vectors of them.
template <class S, class Vectors, class Single>
__device__ __forceinline__ void for_row(const SoftmaxCall<S>& c, std::int64_t row, const Vectors& f_vector,
                                        const Single& f) {
  constexpr int V = Vector<S>::kSize;
  const std::int64_t first = row * c.classes, vectors = c.classes / V;
  const bool o_aligned = is_aligned(c.output + first), u_aligned = is_aligned(c.u + first),
             g_aligned = is_aligned(c.grad + first);
  for (std::int64_t v = threadIdx.x; v < vectors; v += blockDim.x) {
    const std::int64_t j = first + v * V;
    f_vector(j, load_vector(c.output + j, o_aligned), load_vector(c.u + j, u_aligned),
             load_vector(c.grad + j, g_aligned));
  }
  for (std::int64_t j = first + vectors * V + threadIdx.x; j < first + c.classes; j += blockDim.x) f(j);
}

template <bool kLog, class S>
__global__ void __launch_bounds__(512, 1) softmax_double_backward_rows_kernel(const SoftmaxCall<S> c) {
  using A = accumulation_t<S>;
  using Element = SoftmaxElement<kLog, S>;
  constexpr int V = Vector<S>::kSize;
  for (std::int64_t row = blockIdx.x; row < c.batch; row += gridDim.x) {
    A total_g = 0, mean_u = 0;
    for_row(
        c, row,
        [&](std::int64_t, const Vector<S>& o, const Vector<S>& u, const Vector<S>& g) {
#pragma unroll
          for (int k = 0; k < V; ++k) Element(o.element[k], u.element[k], g.element[k]).add_to(total_g, mean_u);
        },
        [&](std::int64_t j) { Element(c, j).add_to(total_g, mean_u); });
    total_g = block_sum(total_g);
    mean_u = block_sum(mean_u);
    const std::int64_t first = row * c.classes;
    const bool gg_grad_aligned = c.gg_grad && is_aligned(c.gg_grad + first),
               grad_output_aligned = c.grad_output && is_aligned(c.grad_output + first);
    for_row(
        c, row,
        [&](std::int64_t j, const Vector<S>& o, const Vector<S>& u, const Vector<S>& g) {
          Vector<S> gg_grad, grad_output;
#pragma unroll
          for (int k = 0; k < V; ++k) {
            const Element e(o.element[k], u.element[k], g.element[k]);
            gg_grad.element[k] = e.gg_grad(mean_u);
            grad_output.element[k] = e.grad_output(total_g, mean_u);
          }
          if (c.gg_grad) store_vector(c.gg_grad + j, gg_grad, gg_grad_aligned);
          if (c.grad_output) store_vector(c.grad_output + j, grad_output, grad_output_aligned);
        },
        [&](std::int64_t j) {
          const Element e(c, j);
          if (c.gg_grad) c.gg_grad[j] = e.gg_grad(mean_u);
          if (c.grad_output) c.grad_output[j] = e.grad_output(total_g, mean_u);
        });
  }
}

template <bool kLog, class S>
__global__ void __launch_bounds__(256) softmax_double_backward_columns_kernel(const SoftmaxCall<S> c) {
  using A = accumulation_t<S>;
  using Element = SoftmaxElement<kLog, S>;
  constexpr std::int64_t together = 32;  // classes summed before their sum is: rounding grows with 32 + classes / 32
  const std::int64_t blocks = (c.inner + blockDim.x - 1) / blockDim.x;
  for (std::int64_t unit = blockIdx.x; unit < c.batch * blocks; unit += gridDim.x) {
    const std::int64_t column = unit % blocks * blockDim.x + threadIdx.x;
    if (column >= c.inner) continue;
    const std::int64_t first = unit / blocks * c.classes * c.inner + column;
    A total_g = 0, mean_u = 0;
    for (std::int64_t k = 0; k < c.classes;) {
      const std::int64_t end = k + together < c.classes ? k + together : c.classes;
      A part_g = 0, part_u = 0;
#pragma unroll 4
      for (; k < end; ++k) Element(c, first + k * c.inner).add_to(part_g, part_u);
      total_g += part_g;
      mean_u += part_u;
    }
#pragma unroll 4
    for (std::int64_t k = 0; k < c.classes; ++k) {
      const std::int64_t j = first + k * c.inner;
      const Element e(c, j);
      if (c.gg_grad) c.gg_grad[j] = e.gg_grad(mean_u);
      if (c.grad_output) c.grad_output[j] = e.grad_output(total_g, mean_u);
    }
  }
}

template <bool kLog, class S>
cudaError_t launch_softmax_as(const SoftmaxCall<S>& c, cudaStream_t stream) {
  if (c.inner == 1)
    return launch(softmax_double_backward_rows_kernel<kLog, S>, grid_for(c.batch), dim3(threads_for<S>(c.classes, 512)),
                  0, stream, c);
  const std::int64_t threads = c.inner >= 256 ? 256 : (c.inner + 31) / 32 * 32;
  if (threads == 0) return cudaSuccess;
  const std::int64_t blocks = (c.inner + threads - 1) / threads;
  return launch(softmax_double_backward_columns_kernel<kLog, S>, grid_for(c.batch * blocks),
                dim3(static_cast<unsigned>(threads)), 0, stream, c);
}

template <class S>
cudaError_t launch_softmax_double_backward(bool log, const SoftmaxCall<S>& c, cudaStream_t stream) {
  return log ? launch_softmax_as<true>(c, stream) : launch_softmax_as<false>(c, stream);
}

}  // namespace rk::cuda
