// The arguments of margin_loss and its derivative, checked once for both devices.
#pragma once

#include <optional>

#include "check.h"
#include "../math/margin_loss.h"

namespace rk {

inline Margin check_margin_loss(const char* op, const Tensor& logits, const Tensor& target,
                                const std::optional<Tensor>& towards, int64_t kind) {
  check_matrix(op, "logits", logits);
  check_tensor(op, "target", target, {logits.size(0)}, ScalarType::Long, logits);
  check_optional(op, "towards", towards, {logits.size(0)}, ScalarType::Long, logits);
  check_number(op, "kind", kind == 0 || kind == 1, "0 or 1", static_cast<double>(kind));
  const int64_t least = kind == 0 ? 2 : towards ? 4 : 3;
  RK_CHECK(logits.size(1) >= least, op, ": logits must have at least ", least, " classes, got ", describe(logits));
  return static_cast<Margin>(kind);
}

inline void check_margin_loss_backward(const char* op, const Tensor& grad, const Tensor& slopes) {
  check_matrix(op, "slopes", slopes);
  check_tensor(op, "grad", grad, {slopes.size(0)}, accumulation_type(slopes.scalar_type()), slopes);
}

}  // namespace rk
