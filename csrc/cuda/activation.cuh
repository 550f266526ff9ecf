// The kernel of activation_double_backward.  Formulas: math/activation.h.
//
// A thread works on one 16-byte vector at a time, in the order of memory.  Bytes: u, grad and x once, gg_grad and
// grad_x once; without grad_x, grad is not read.  Several cotangents of one x share its load, and their grad_x is summed
// in registers.
#pragma once

#include <cstdint>

#include "../math/activation.h"
#include "vector.cuh"

namespace rk::cuda {

template <class S>
struct ActivationCall {
  using A = accumulation_t<S>;
  std::int64_t elements, cotangents = 1;  // elements: of x
  const S *u, *grad;                      // [cotangents, elements]
  const S* x;                             // [elements]
  S *gg_grad, *grad_x;                    // like u and like x; null: not needed
  ActivationParameters<A> parameters;
};

template <Activation kFunction, class S>
__global__ void __launch_bounds__(256, 1) activation_double_backward_kernel(const ActivationCall<S> c) {
  using A = accumulation_t<S>;
  constexpr int V = Vector<S>::kSize;
  const std::int64_t thread = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x,
                     threads = std::int64_t{gridDim.x} * blockDim.x;
  const std::int64_t vectors = c.elements / V;
  const bool x_aligned = is_aligned(c.x), grad_x_aligned = is_aligned(c.grad_x);
  for (std::int64_t v = thread; v < vectors; v += threads) {
    const Vector<S> x = load_vector(c.x + v * V, x_aligned);
    Slopes<A> slopes[V];
    A sum[V] = {};
#pragma unroll
    for (int k = 0; k < V; ++k) slopes[k] = activation_slopes<kFunction>(load(x.element[k]), c.parameters);
    for (std::int64_t i = 0; i < c.cotangents; ++i) {
      const std::int64_t at = i * c.elements + v * V;
      const Vector<S> u = load_vector(c.u + at, is_aligned(c.u + at));
      Vector<S> g = u, gg_grad;
      if (c.grad_x) g = load_vector(c.grad + at, is_aligned(c.grad + at));
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const A u_k = load(u.element[k]);
        gg_grad.element[k] = store<S>(times_slope<kFunction>(slopes[k], u_k));
        sum[k] += times_bend<kFunction>(slopes[k], u_k, load(g.element[k]));
      }
      if (c.gg_grad) store_vector(c.gg_grad + at, gg_grad, is_aligned(c.gg_grad + at));
    }
    if (!c.grad_x) continue;
    Vector<S> grad_x;
#pragma unroll
    for (int k = 0; k < V; ++k) grad_x.element[k] = store<S>(sum[k]);
    store_vector(c.grad_x + v * V, grad_x, grad_x_aligned);
  }
  const std::int64_t j = vectors * V + thread;
  if (j < c.elements) {
    const Slopes<A> s = activation_slopes<kFunction>(load(c.x[j]), c.parameters);
    A sum = 0;
    for (std::int64_t i = 0; i < c.cotangents; ++i) {
      const std::int64_t at = i * c.elements + j;
      const A u = load(c.u[at]);
      if (c.gg_grad) c.gg_grad[at] = store<S>(times_slope<kFunction>(s, u));
      if (c.grad_x) sum += times_bend<kFunction>(s, u, load(c.grad[at]));
    }
    if (c.grad_x) c.grad_x[j] = store<S>(sum);
  }
}

template <Activation kFunction, class S>
cudaError_t launch_activation_as(const ActivationCall<S>& c, cudaStream_t stream) {
  constexpr std::int64_t threads = 256, per_block = threads * Vector<S>::kSize;
  const dim3 grid = grid_for((c.elements + per_block - 1) / per_block);
  return launch(activation_double_backward_kernel<kFunction, S>, grid, dim3(threads), 0, stream, c);
}

template <class S>
cudaError_t launch_activation_double_backward(Activation function, const ActivationCall<S>& c, cudaStream_t stream) {
  switch (function) {
    case Activation::kGelu: return launch_activation_as<Activation::kGelu>(c, stream);
    case Activation::kGeluTanh: return launch_activation_as<Activation::kGeluTanh>(c, stream);
    case Activation::kSilu: return launch_activation_as<Activation::kSilu>(c, stream);
    case Activation::kMish: return launch_activation_as<Activation::kMish>(c, stream);
    case Activation::kSoftplus: return launch_activation_as<Activation::kSoftplus>(c, stream);
    case Activation::kElu: return launch_activation_as<Activation::kElu>(c, stream);
    case Activation::kEluResult: return launch_activation_as<Activation::kEluResult>(c, stream);
    case Activation::kHardswish: return launch_activation_as<Activation::kHardswish>(c, stream);
    case Activation::kTanh: return launch_activation_as<Activation::kTanh>(c, stream);
    default: return launch_activation_as<Activation::kSigmoid>(c, stream);
  }
}

}  // namespace rk::cuda
