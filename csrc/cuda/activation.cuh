// The kernel of activation_double_backward.  Formulas: math/activation.h.
//
// A thread works on one 16-byte vector at a time, in the order of memory, and loads all that it needs before it computes.
// Bytes: u, grad and x once, gg_grad and grad_x once; without grad_x, grad is not read.  Several cotangents of one x share
// its load, and their grad_x is summed in registers.
#pragma once

#include <cstdint>

#include "../math/activation.h"
#include "words.cuh"

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

// One cotangent.  elements is any number; the tensors begin at multiples of 16 bytes.
template <Activation kFunction, class S>
__global__ void __launch_bounds__(256, 4) activation_double_backward_kernel(const ActivationCall<S> c) {
  using A = accumulation_t<S>;
  constexpr int V = Words<S>::kSize;
  const std::int64_t thread = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x,
                     threads = std::int64_t{gridDim.x} * blockDim.x;
  const std::int64_t vectors = c.elements / V;
  for (std::int64_t v = thread; v < vectors; v += threads) {
    const Words<S> x = load_words<true>(c.x + v * V), u = load_words<true>(c.u + v * V),
                   g = load_words<true>(c.grad + v * V);
    A gg_grad[V], grad_x[V];
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const Slopes<A> s = activation_slopes<kFunction>(x[k], c.parameters);
      gg_grad[k] = times_slope<kFunction>(s, u[k]);
      grad_x[k] = times_bend<kFunction>(s, u[k], g[k]);
    }
    if (c.gg_grad) store_words<true>(c.gg_grad + v * V, Words<S>::of(gg_grad));
    if (c.grad_x) store_words<true>(c.grad_x + v * V, Words<S>::of(grad_x));
  }
  const std::int64_t j = vectors * V + thread;
  if (j < c.elements) {
    const Slopes<A> s = activation_slopes<kFunction>(load(c.x[j]), c.parameters);
    const A u = load(c.u[j]);
    if (c.gg_grad) c.gg_grad[j] = store<S>(times_slope<kFunction>(s, u));
    if (c.grad_x) c.grad_x[j] = store<S>(times_bend<kFunction>(s, u, load(c.grad[j])));
  }
}

// Several cotangents: the slopes at x are computed once, and the next cotangent is on its way while one is used.
// kAligned: elements is a multiple of the vector too.
template <Activation kFunction, bool kAligned, class S>
__global__ void __launch_bounds__(256, 4) activation_double_backward_several_kernel(const ActivationCall<S> c) {
  using A = accumulation_t<S>;
  constexpr int V = Words<S>::kSize;
  const std::int64_t thread = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x,
                     threads = std::int64_t{gridDim.x} * blockDim.x;
  for (std::int64_t first = thread * V; first < c.elements; first += threads * V) {
    const std::int64_t left = c.elements - first;
    const int count = kAligned || left > V ? V : static_cast<int>(left);
    const auto load_at = [&](const S* from) {
      if constexpr (kAligned) return load_words<true>(from);
      return load_some_words(from, count);
    };
    const auto store_at = [&](S* to, const A(&values)[V]) {
      if constexpr (kAligned)
        store_words<true>(to, Words<S>::of(values));
      else
        store_some_words(to, Words<S>::of(values), count);
    };
    const Words<S> x = load_at(c.x + first);
    Words<S> u{}, g{};
    if (c.cotangents > 0) {
      u = load_at(c.u + first);
      g = load_at(c.grad + first);
    }
    Slopes<A> slopes[V];
    A sum[V];
#pragma unroll
    for (int k = 0; k < V; ++k) {
      slopes[k] = activation_slopes<kFunction>(x[k], c.parameters);
      sum[k] = c.cotangents ? A(-0.0) : A(0);  // a sum of one term is that term, of either sign
    }
#pragma unroll 1
    for (std::int64_t i = 0; i < c.cotangents; ++i) {
      const std::int64_t at = i * c.elements + first;
      Words<S> next_u = u, next_g = g;
      if (i + 1 < c.cotangents) {
        next_u = load_at(c.u + at + c.elements);
        next_g = load_at(c.grad + at + c.elements);
      }
      A gg_grad[V];
#pragma unroll
      for (int k = 0; k < V; ++k) {
        gg_grad[k] = times_slope<kFunction>(slopes[k], u[k]);
        sum[k] += times_bend<kFunction>(slopes[k], u[k], g[k]);
      }
      if (c.gg_grad) store_at(c.gg_grad + at, gg_grad);
      u = next_u;
      g = next_g;
    }
    if (c.grad_x) store_at(c.grad_x + first, sum);
  }
}

template <Activation kFunction, class S>
cudaError_t launch_activation_as(const ActivationCall<S>& c, cudaStream_t stream) {
  constexpr std::int64_t threads = 256, per_block = threads * Words<S>::kSize;
  const dim3 grid = grid_for((c.elements + per_block - 1) / per_block), block(threads);
  if constexpr (sizeof(S) < 8) {  // in float64 arithmetic is the floor
    const bool one = c.cotangents == 1;
    if (aligned<S>(one ? 0 : c.elements, c.u, c.grad, c.x, c.gg_grad, c.grad_x)) {
      const auto kernel = one ? activation_double_backward_kernel<kFunction, S>
                              : activation_double_backward_several_kernel<kFunction, true, S>;
      return launch(kernel, grid, block, 0, stream, c);
    }
  }
  return launch(activation_double_backward_several_kernel<kFunction, false, S>, grid, block, 0, stream, c);
}

template <class S>
cudaError_t launch_activation_double_backward(Activation function, ActivationCall<S> c, cudaStream_t stream) {
  if (!c.grad_x) c.grad = c.u;  // what a cache has already: a condition would delay the load
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
