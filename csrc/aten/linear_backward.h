// First backwards that are linear in their cotangent g and piecewise constant in the input x: relu, pooling, nll_loss.
//
//   first backward   grad_x = M(x) g               cotangent: u
//   second backward  grad_g = M(x)^T u             grad_x = 0
//
// PyTorch returns that zero as a tensor: a memory-set, an addition, and, where nothing else depends on x, a backward of
// the whole network below x over zeros.  Here the gradient is undefined, which costs nothing, unless zeros were asked
// for.
#pragma once

#include <functional>

#include "replacement.h"

namespace rk::aten {

// M^T u, of the tensors and numbers that a graph keeps: no function object, which PyTorch's compiled autograd could not tell
// from others.  Made of operators that are themselves replaced, so it can be differentiated any number of times.
using Transposed = Tensor (*)(const Tensor& u, const variable_list& tensors, Kept& kept);

// What the node of `linear_backward` is made of.
struct LinearMap {
  std::function<Tensor()> first;  // M g
  Transposed transposed;
  variable_list tensors;
  Kept kept;
  bool differentiable = true;  // by PyTorch too: hardsigmoid is not, nll_loss2d not of every layout
};

// The result of map.first, as a function of g and x.  PyTorch's own, zeros and all, where x is small: then nothing.
std::optional<Tensor> linear_backward(const Tensor& g, const Tensor& x, const LinearMap& map);

}  // namespace rk::aten
