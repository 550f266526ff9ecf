// The arguments of activation_double_backward, checked once for both devices.
#pragma once

#include <string>
#include <vector>

#include "check.h"
#include "layout.h"
#include "../math/activation.h"

namespace rk {

struct ActivationChoice {
  Activation function;
  ActivationParameters<double> parameters{};

  template <class A>
  ActivationParameters<A> as() const {
    const auto& p = parameters;
    return {A(p.beta), A(p.threshold), A(p.alpha), A(p.scale), A(p.input_scale)};
  }
};

inline ActivationChoice activation_choice(const char* op, const std::string& name, const std::vector<double>& values) {
  const auto take = [&](Activation function, size_t count) {
    RK_CHECK(values.size() == count, op, ": ", name, " has ", count, " parameters, got ", values.size());
    return ActivationChoice{function};
  };
  if (name == "gelu") return take(Activation::kGelu, 0);
  if (name == "gelu_tanh") return take(Activation::kGeluTanh, 0);
  if (name == "silu") return take(Activation::kSilu, 0);
  if (name == "mish") return take(Activation::kMish, 0);
  if (name == "hardswish") return take(Activation::kHardswish, 0);
  if (name == "tanh") return take(Activation::kTanh, 0);
  if (name == "sigmoid") return take(Activation::kSigmoid, 0);
  if (name == "softplus") {
    ActivationChoice choice = take(Activation::kSoftplus, 2);
    choice.parameters.beta = values[0];
    choice.parameters.threshold = values[1];
    return choice;
  }
  RK_CHECK(name == "elu", op,
           ": function must be gelu, gelu_tanh, silu, mish, softplus, elu, hardswish, tanh or sigmoid, got '", name,
           "'");
  ActivationChoice choice = take(Activation::kElu, 4);
  choice.parameters.alpha = values[0];
  choice.parameters.scale = values[1];
  choice.parameters.input_scale = values[2];
  if (values[3] != 0.0) choice.function = Activation::kEluResult;
  check_number(op, "input_scale", values[3] != 0.0 || values[2] >= 0.0, "at least 0", values[2]);
  return choice;
}

// The tensors of a call in one layout, that of x, and the outputs in the same; contiguous if there are several cotangents.
struct ActivationTensors {
  int64_t cotangents = 1;              // u, grad and gg_grad are so many tensors like x
  Tensor x, u, grad, gg_grad, grad_x;  // an output that is not needed is [0]

  ActivationTensors(const char* op, const Tensor& cotangent, const Tensor& g, const Tensor& input, bool need_grad,
                    bool need_x)
      : x(input), u(cotangent), grad(g), gg_grad(cotangent), grad_x(cotangent) {
    check_floating(op, "x", input);
    const bool several = cotangent.dim() == input.dim() + 1;
    std::vector<int64_t> sizes = sizes_of(input);
    if (several) {
      cotangents = cotangent.size(0);
      sizes.insert(sizes.begin(), cotangents);
    }
    check_tensor(op, "u", cotangent, sizes, input.scalar_type(), input);
    check_tensor(op, "grad", g, sizes, input.scalar_type(), input);
    x = several ? torch::stable::contiguous(input) : dense(input);
    u = several ? torch::stable::contiguous(cotangent) : in_layout_of(x, cotangent);
    if (need_x) grad = several ? torch::stable::contiguous(g) : in_layout_of(x, g);
    gg_grad = need_grad ? torch::stable::empty_like(u) : torch::stable::new_empty(x, {0});
    grad_x = need_x ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  }
};

}  // namespace rk
