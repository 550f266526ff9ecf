// The arguments of softmax_double_backward, checked once for both devices.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "check.h"

namespace rk {

// The tensors of a call, contiguous, and its outputs; one that is not needed is [0].
struct SoftmaxTensors {
  Tensor output, u, grad, gg_grad, grad_output;

  SoftmaxTensors(const char* op, const Tensor& cotangent, const Tensor& g, const Tensor& o, bool need_grad,
                 bool need_output)
      : output(o), u(cotangent), grad(g), gg_grad(o), grad_output(o) {
    RK_CHECK(o.dim() == 3, op, ": output must have 3 dimensions, got ", describe(o));
    check_floating(op, "output", o);
    check_tensor(op, "u", cotangent, sizes_of(o), o.scalar_type(), o);
    check_tensor(op, "grad", g, sizes_of(o), o.scalar_type(), o);
    output = torch::stable::contiguous(o);
    u = torch::stable::contiguous(cotangent);
    grad = torch::stable::contiguous(g);
    gg_grad = result(need_grad);
    grad_output = result(need_output);
  }

 private:
  Tensor result(bool needed) const {
    return needed ? torch::stable::empty_like(output) : torch::stable::new_empty(output, {0});
  }
};

}  // namespace rk
