// The arguments of softmax_cross_entropy and its derivatives, checked once for both devices.
#pragma once

#include "check.h"

namespace rk {

inline bool is_index_target(const Tensor& target) { return target.dim() == 1; }

inline void check_cross_entropy(const char* op, const Tensor& logits, const Tensor& target, double label_smoothing,
                                double temperature) {
  check_matrix(op, "logits", logits);
  const ScalarType dtype = logits.scalar_type();
  if (is_index_target(target)) {
    check_tensor(op, "target", target, {logits.size(0)}, ScalarType::Long, logits);
  } else {
    const bool wide = target.scalar_type() == accumulation_type(dtype);  // probabilities may be finer than the logits
    check_tensor(op, "target", target, {logits.size(0), logits.size(1)}, wide ? accumulation_type(dtype) : dtype,
                 logits);
  }
  RK_CHECK(logits.size(1) >= 1 || logits.size(0) == 0, op, ": logits must have at least one class, got ",
           describe(logits));
  check_number(op, "label_smoothing", label_smoothing >= 0.0 && label_smoothing <= 1.0, "in [0, 1]", label_smoothing);
  check_number(op, "temperature", temperature > 0.0 && temperature < 1e300, "a positive number", temperature);
}

inline void check_statistics(const char* op, const Tensor& grad, const Tensor& statistics, const Tensor& logits) {
  const ScalarType accumulation = accumulation_type(logits.scalar_type());
  check_tensor(op, "grad", grad, {logits.size(0)}, accumulation, logits);
  check_tensor(op, "statistics", statistics, {logits.size(0), 2}, accumulation, logits);
}

}  // namespace rk
