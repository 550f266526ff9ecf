// The arguments of layer_norm_backward and its derivative, checked once for both devices.
#pragma once

#include <optional>

#include "check.h"

namespace rk {

inline void check_layer_norm(const char* op, const std::optional<Tensor>& gg_x, const std::optional<Tensor>& gg_weight,
                             const std::optional<Tensor>& gg_bias, const Tensor& grad, const Tensor& x,
                             const std::optional<Tensor>& weight, const std::optional<Tensor>& mean,
                             const Tensor& rstd) {
  check_matrix(op, "x", x);
  const ScalarType dtype = x.scalar_type(), accumulation = accumulation_type(dtype);
  const int64_t rows = x.size(0), columns = x.size(1);
  check_tensor(op, "grad", grad, {rows, columns}, dtype, x);
  check_optional(op, "gg_x", gg_x, {rows, columns}, dtype, x);
  check_optional(op, "gg_weight", gg_weight, {columns}, accumulation, x);
  check_optional(op, "gg_bias", gg_bias, {columns}, accumulation, x);
  check_optional(op, "weight", weight, {columns}, accumulation, x);
  check_optional(op, "mean", mean, {rows}, accumulation, x);
  check_tensor(op, "rstd", rstd, {rows}, accumulation, x);
}

}  // namespace rk
