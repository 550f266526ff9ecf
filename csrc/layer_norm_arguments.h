// The arguments of layer_norm_backward and its derivative, checked once for both devices.
#pragma once

#include <optional>
#include <vector>

#include "check.h"

namespace rk {

// The number K of cotangents: 1, or K where they are [K, rows, cols].
inline int64_t check_layer_norm(const char* op, const std::optional<Tensor>& gg_x,
                                const std::optional<Tensor>& gg_weight, const std::optional<Tensor>& gg_bias,
                                const Tensor& grad, const Tensor& x, const std::optional<Tensor>& weight,
                                const std::optional<Tensor>& mean, const Tensor& rstd) {
  check_matrix(op, "x", x);
  const ScalarType dtype = x.scalar_type(), accumulation = accumulation_type(dtype);
  const int64_t rows = x.size(0), columns = x.size(1);
  std::vector<int64_t> cotangents{rows, columns};
  if (grad.dim() == 3) cotangents.insert(cotangents.begin(), grad.size(0));
  check_tensor(op, "grad", grad, cotangents, dtype, x);
  check_optional(op, "gg_x", gg_x, cotangents, dtype, x);
  check_optional(op, "gg_weight", gg_weight, {columns}, accumulation, x);
  check_optional(op, "gg_bias", gg_bias, {columns}, accumulation, x);
  check_optional(op, "weight", weight, {columns}, accumulation, x);
  check_optional(op, "mean", mean, {rows}, accumulation, x);
  check_tensor(op, "rstd", rstd, {rows}, accumulation, x);
  if (grad.dim() != 3) return 1;
  RK_CHECK(!gg_weight && !gg_bias, op, ": several cotangents have no gg_weight or gg_bias");
  return grad.size(0);
}

// The first backward of several cotangents: their weight gradients are not asked for, since they would be so many too.
inline void check_several(const char* op, int64_t cotangents, bool sums_columns) {
  RK_CHECK(cotangents == 1 || !sums_columns, op,
           ": several cotangents have a grad_x only, not need_weight or need_bias");
}

}  // namespace rk
