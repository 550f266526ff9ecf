// The arguments of batch_norm_double_backward, checked once for both devices.
#pragma once

#include "norm.h"

namespace rk {

// The number K of cotangents: 1, or K where they are [K, N, C, S].
inline int64_t check_batch_norm(const char* op, const std::optional<Tensor>& u, const std::optional<Tensor>& a,
                                const std::optional<Tensor>& b, const Tensor& grad, const Tensor& x,
                                const std::optional<Tensor>& weight, const Tensor& mean, const Tensor& invstd) {
  RK_CHECK(x.dim() == 3, op, ": x must have 3 dimensions, [N, C, S], got ", describe(x));
  check_floating(op, "x", x);
  const std::vector<int64_t> channels{x.size(1)};
  const ScalarType accumulation = accumulation_type(x.scalar_type());
  const int64_t cotangents = check_norm(op, u, a, b, grad, x, weight, x.size(1));
  check_tensor(op, "mean", mean, channels, accumulation, x);
  check_tensor(op, "invstd", invstd, channels, accumulation, x);
  return cotangents;
}

}  // namespace rk
