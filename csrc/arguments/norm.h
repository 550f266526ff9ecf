// The arguments that the derivatives of batch_norm, group_norm and layer_norm have in common.
#pragma once

#include <optional>
#include <vector>

#include "check.h"

namespace rk {

// weight, a and b have `parameters` numbers.  Returns the number K of cotangents: 1, or K where grad and u
// are K tensors like x.
inline int64_t check_norm(const char* op, const std::optional<Tensor>& u, const std::optional<Tensor>& a,
                          const std::optional<Tensor>& b, const Tensor& grad, const Tensor& x,
                          const std::optional<Tensor>& weight, int64_t parameters) {
  const ScalarType dtype = x.scalar_type(), accumulation = accumulation_type(dtype);
  const bool several = grad.dim() == x.dim() + 1;
  auto sizes = sizes_of(x);
  if (several) sizes.insert(sizes.begin(), grad.size(0));
  check_tensor(op, "grad", grad, sizes, dtype, x);
  check_optional(op, "u", u, sizes, dtype, x);
  check_optional(op, "a", a, {parameters}, accumulation, x);
  check_optional(op, "b", b, {parameters}, accumulation, x);
  check_optional(op, "weight", weight, {parameters}, accumulation, x);
  if (!several) return 1;
  RK_CHECK(!a && !b, op, ": several cotangents have no a or b");
  return grad.size(0);
}

}  // namespace rk
