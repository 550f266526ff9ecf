// The arguments of row_norm and its derivatives, checked once for both devices.
#pragma once

#include <limits>
#include <optional>

#include "check.h"
#include "../math/row_norm.h"

namespace rk {

inline Norm norm_kind(const char* op, double p, bool squared) {
  check_number(op, "p", p >= 1.0, "1, 2, inf or any number >= 1", p);  // NaN fails too
  RK_CHECK(!squared || p == 2.0, op, ": squared must be False unless p is 2, got p = ", p);
  if (p == 1.0) return Norm::kL1;
  if (p == 2.0) return squared ? Norm::kSquaredL2 : Norm::kL2;
  return p == std::numeric_limits<double>::infinity() ? Norm::kInf : Norm::kP;
}

inline void check_weight(const char* op, const std::optional<Tensor>& weight, int64_t inner, const Tensor& x) {
  if (!weight) return;
  RK_CHECK(weight->dim() == 1, op, ": weight must have 1 dimension, got ", describe(*weight));
  const int64_t count = weight->size(0);
  check_tensor(op, "weight", *weight, {count}, accumulation_type(x.scalar_type()), x);
  check_number(op, "inner", inner >= 1, "at least 1", static_cast<double>(inner));
  RK_CHECK(count >= 1 && x.size(1) % count == 0 && (x.size(1) / count) % inner == 0, op, ": weight of ", count,
           " entries with inner = ", inner, " must divide the ", x.size(1), " columns of x");
}

}  // namespace rk
