// The arguments of layer_norm_backward and its derivative, checked once for both devices.
#pragma once

#include "norm.h"

namespace rk {

// The number K of cotangents: 1, or K where they are [K, rows, cols].
inline int64_t check_layer_norm(const char* op, const std::optional<Tensor>& u, const std::optional<Tensor>& a,
                                const std::optional<Tensor>& b, const Tensor& grad, const Tensor& x,
                                const std::optional<Tensor>& weight, const std::optional<Tensor>& mean,
                                const Tensor& rstd) {
  check_matrix(op, "x", x);
  const ScalarType accumulation = accumulation_type(x.scalar_type());
  const int64_t cotangents = check_norm(op, u, a, b, grad, x, weight, x.size(1));
  check_optional(op, "mean", mean, {x.size(0)}, accumulation, x);
  check_tensor(op, "rstd", rstd, {x.size(0)}, accumulation, x);
  return cotangents;
}

// The first backward of several cotangents: their weight gradients are not asked for, since they would be so many too.
inline void check_several(const char* op, int64_t cotangents, bool sums_columns) {
  RK_CHECK(cotangents == 1 || !sums_columns, op,
           ": several cotangents have a grad_x only, not need_weight or need_bias");
}

}  // namespace rk
