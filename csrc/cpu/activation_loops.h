// The inner loops of activation_double_backward: one piece in the accumulation type.
#pragma once

#include "../math/activation.h"
#include "pieces.h"

namespace rk::cpu {

// Of at most kPiece elements.
template <class A>
struct ActivationPiece {
  const A *gg_x, *grad, *x;
  A *gg_grad, *grad_x;
  std::int64_t n;
};

template <Activation kFunction, class A>
RK_HOST_DEVICE void activation_piece(const ActivationPiece<A>& w, const ActivationParameters<A>& parameters) {
  const A *gg_x = w.gg_x, *grad = w.grad, *x = w.x;
  A* __restrict__ gg_grad = w.gg_grad, * __restrict__ grad_x = w.grad_x;
  const ActivationParameters<A> p = parameters;
  using Function = ActivationSlopes<kFunction, A>;
  alignas(64) A e[kPiece], tail[kPiece];
  if constexpr (Function::kExponential)
    for (std::int64_t j = 0; j < w.n; ++j) e[j] = exp_nonpositive(Function::exponent(x[j], p));
  if constexpr (Function::kTail)
    for (std::int64_t j = 0; j < w.n; ++j) tail[j] = normal_tail(absolute(x[j]));
  for (std::int64_t j = 0; j < w.n; ++j) {
    ActivationTerms<A> terms{};
    if constexpr (Function::kExponential) terms.e = e[j];
    if constexpr (Function::kTail) terms.tail = tail[j];
    const Slopes<A> s = Function::at(x[j], terms, p);
    const A u = gg_x[j];
    gg_grad[j] = times_slope<kFunction>(s, u);
    grad_x[j] = times_bend<kFunction>(s, u, grad[j]);
  }
}

#define RK_ACTIVATION_LOOP(name, function, A)                                                       \
  RK_MULTIVERSION static void name(const ActivationPiece<A>& w, const ActivationParameters<A>& p) { \
    activation_piece<Activation::function, A>(w, p);                                                \
  }
#define RK_ACTIVATION_LOOPS(A)                                                                                \
  RK_ACTIVATION_LOOP(gelu, kGelu, A)                                                                          \
  RK_ACTIVATION_LOOP(gelu_tanh, kGeluTanh, A)                                                                 \
  RK_ACTIVATION_LOOP(silu, kSilu, A)                                                                          \
  RK_ACTIVATION_LOOP(mish, kMish, A)                                                                          \
  RK_ACTIVATION_LOOP(softplus, kSoftplus, A)                                                                  \
  RK_ACTIVATION_LOOP(elu, kElu, A)                                                                            \
  RK_ACTIVATION_LOOP(elu_result, kEluResult, A)                                                               \
  RK_ACTIVATION_LOOP(hardswish, kHardswish, A)                                                                \
  RK_ACTIVATION_LOOP(tanh_result, kTanh, A)                                                                   \
  RK_ACTIVATION_LOOP(sigmoid_result, kSigmoid, A)                                                             \
  inline void run_piece(Activation function, const ActivationPiece<A>& w, const ActivationParameters<A>& p) { \
    switch (function) {                                                                                       \
      case Activation::kGelu: return gelu(w, p);                                                              \
      case Activation::kGeluTanh: return gelu_tanh(w, p);                                                     \
      case Activation::kSilu: return silu(w, p);                                                              \
      case Activation::kMish: return mish(w, p);                                                              \
      case Activation::kSoftplus: return softplus(w, p);                                                      \
      case Activation::kElu: return elu(w, p);                                                                \
      case Activation::kEluResult: return elu_result(w, p);                                                   \
      case Activation::kHardswish: return hardswish(w, p);                                                    \
      case Activation::kTanh: return tanh_result(w, p);                                                       \
      case Activation::kSigmoid: return sigmoid_result(w, p);                                                 \
    }                                                                                                         \
  }

// A piece of one of several cotangents: slope and bend are given, grad_x is added to.
template <class A>
struct CotangentPiece {
  const A *slope, *bend, *gg_x, *grad;
  A *gg_grad, *grad_x;  // or null
  std::int64_t n;
  std::int64_t gg_x_ahead, grad_ahead;  // elements to where the next pieces lie, too far for the processor to guess
};

template <bool kGrad, bool kX, class A>
RK_HOST_DEVICE void cotangent_piece(const CotangentPiece<A>& w) {
  const A *slope = w.slope, *bend = w.bend, *gg_x = w.gg_x, *grad = w.grad;
  A* __restrict__ gg_grad = w.gg_grad, * __restrict__ grad_x = w.grad_x;
  const auto run = [=](std::int64_t begin, std::int64_t end) RK_INLINE_LAMBDA {
    for (std::int64_t j = begin; j < end; ++j) {
      const A u = gg_x[j];
      if constexpr (kGrad) gg_grad[j] = slope[j] * u;
      if constexpr (kX) grad_x[j] += bend[j] * u * grad[j];
    }
  };
  constexpr std::int64_t line = 64 / sizeof(A);
  std::int64_t j = 0;
  for (; j + line <= w.n; j += line) {
    __builtin_prefetch(gg_x + j + w.gg_x_ahead);
    if constexpr (kX) __builtin_prefetch(grad + j + w.grad_ahead);
    run(j, j + line);
  }
  run(j, w.n);
}

#define RK_COTANGENT_LOOPS(A)                                                                                    \
  RK_MULTIVERSION static void cotangent_both(const CotangentPiece<A>& w) { cotangent_piece<true, true>(w); }     \
  RK_MULTIVERSION static void cotangent_gg_grad(const CotangentPiece<A>& w) { cotangent_piece<true, false>(w); } \
  RK_MULTIVERSION static void cotangent_grad_x(const CotangentPiece<A>& w) { cotangent_piece<false, true>(w); }  \
  inline void run_piece(const CotangentPiece<A>& w) {                                                            \
    if (w.gg_grad && w.grad_x)                                                                                   \
      cotangent_both(w);                                                                                         \
    else if (w.gg_grad)                                                                                          \
      cotangent_gg_grad(w);                                                                                      \
    else if (w.grad_x)                                                                                           \
      cotangent_grad_x(w);                                                                                       \
  }

RK_COTANGENT_LOOPS(float)
RK_COTANGENT_LOOPS(double)
#undef RK_COTANGENT_LOOPS

RK_ACTIVATION_LOOPS(float)
RK_ACTIVATION_LOOPS(double)
#undef RK_ACTIVATION_LOOPS
#undef RK_ACTIVATION_LOOP

}  // namespace rk::cpu
