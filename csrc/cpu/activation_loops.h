// The inner loops of activation_double_backward: one piece in the accumulation type.
#pragma once

#include "../math/activation.h"
#include "simd.h"

namespace rk::cpu {

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
  for (std::int64_t j = 0; j < w.n; ++j) {
    const Slopes<A> s = ActivationSlopes<kFunction, A>::at(x[j], p);
    const A u = gg_x[j];
    gg_grad[j] = s.slope * u;
    grad_x[j] = s.bend * u * grad[j];
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

#define RK_SEVERAL_COTANGENTS(A)                                                                                     \
  RK_MULTIVERSION static void multiply(const A* a, const A* b, A* __restrict__ out, std::int64_t n) {                \
    for (std::int64_t j = 0; j < n; ++j) out[j] = a[j] * b[j];                                                       \
  }                                                                                                                  \
  RK_MULTIVERSION static void add_product(const A* a, const A* b, const A* c, A* __restrict__ sum, std::int64_t n) { \
    for (std::int64_t j = 0; j < n; ++j) sum[j] += a[j] * b[j] * c[j];                                               \
  }

RK_SEVERAL_COTANGENTS(float)
RK_SEVERAL_COTANGENTS(double)
#undef RK_SEVERAL_COTANGENTS

RK_ACTIVATION_LOOPS(float)
RK_ACTIVATION_LOOPS(double)
#undef RK_ACTIVATION_LOOPS
#undef RK_ACTIVATION_LOOP

}  // namespace rk::cpu
