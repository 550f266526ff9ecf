// The arguments that the derivatives of batch_norm, group_norm and layer_norm have in common.
#pragma once

#include <optional>
#include <vector>

#include "check.h"

namespace rk {

// weight, gg_weight and gg_bias have `parameters` numbers.  Returns the number K of cotangents: 1, or K where grad and gg_x
// are K tensors like x.
inline int64_t check_norm(const char* op, const std::optional<Tensor>& gg_x, const std::optional<Tensor>& gg_weight,
                          const std::optional<Tensor>& gg_bias, const Tensor& grad, const Tensor& x,
                          const std::optional<Tensor>& weight, int64_t parameters) {
  const ScalarType dtype = x.scalar_type(), accumulation = accumulation_type(dtype);
  const bool several = grad.dim() == x.dim() + 1;
  auto sizes = sizes_of(x);
  if (several) sizes.insert(sizes.begin(), grad.size(0));
  check_tensor(op, "grad", grad, sizes, dtype, x);
  check_optional(op, "gg_x", gg_x, sizes, dtype, x);
  check_optional(op, "gg_weight", gg_weight, {parameters}, accumulation, x);
  check_optional(op, "gg_bias", gg_bias, {parameters}, accumulation, x);
  check_optional(op, "weight", weight, {parameters}, accumulation, x);
  if (!several) return 1;
  RK_CHECK(!gg_weight && !gg_bias, op, ": several cotangents have no gg_weight or gg_bias");
  return grad.size(0);
}

}  // namespace rk
