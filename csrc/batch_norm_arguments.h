// The arguments of batch_norm_double_backward, checked once for both devices.
#pragma once

#include "check.h"

namespace rk {

// The number K of cotangents: 1, or K where they are [K, N, C, S].
inline int64_t check_batch_norm(const char* op, const std::optional<Tensor>& gg_x,
                                const std::optional<Tensor>& gg_weight, const std::optional<Tensor>& gg_bias,
                                const Tensor& grad, const Tensor& x, const std::optional<Tensor>& weight,
                                const Tensor& mean, const Tensor& invstd) {
  RK_CHECK(x.dim() == 3, op, ": x must have 3 dimensions, [N, C, S], got ", describe(x));
  RK_CHECK(is_floating_point(x.scalar_type()), op, ": x must be float32, float64, float16 or bfloat16, got ",
           describe(x));
  const auto sizes = sizes_of(x);
  const std::vector<int64_t> channels{x.size(1)};
  const ScalarType accumulation = accumulation_type(x.scalar_type());
  auto cotangents = sizes;
  if (grad.dim() == 4) cotangents.insert(cotangents.begin(), grad.size(0));
  check_optional(op, "gg_x", gg_x, cotangents, x.scalar_type(), x);
  check_optional(op, "gg_weight", gg_weight, channels, accumulation, x);
  check_optional(op, "gg_bias", gg_bias, channels, accumulation, x);
  check_tensor(op, "grad", grad, cotangents, x.scalar_type(), x);
  check_optional(op, "weight", weight, channels, accumulation, x);
  check_tensor(op, "mean", mean, channels, accumulation, x);
  check_tensor(op, "invstd", invstd, channels, accumulation, x);
  if (grad.dim() != 4) return 1;
  RK_CHECK(!gg_weight && !gg_bias, op, ": several cotangents have no gg_weight or gg_bias");
  return grad.size(0);
}

}  // namespace rk
