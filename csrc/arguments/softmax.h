// The arguments of softmax_double_backward, checked once for both devices.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "check.h"

namespace rk {

// The tensors of a call, contiguous, and its outputs; one that is not needed is [0].
struct SoftmaxTensors {
  Tensor output, gg_x, grad, gg_grad, grad_output;

  SoftmaxTensors(const char* op, const Tensor& u, const Tensor& g, const Tensor& o, bool need_grad, bool need_output)
      : output(o), gg_x(u), grad(g), gg_grad(o), grad_output(o) {
    RK_CHECK(o.dim() == 3, op, ": output must have 3 dimensions, got ", describe(o));
    check_floating(op, "output", o);
    check_tensor(op, "gg_x", u, sizes_of(o), o.scalar_type(), o);
    check_tensor(op, "grad", g, sizes_of(o), o.scalar_type(), o);
    output = torch::stable::contiguous(o);
    gg_x = torch::stable::contiguous(u);
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
