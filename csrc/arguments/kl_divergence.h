// The arguments of kl_divergence and its derivatives, checked once for both devices.
#pragma once

#include <optional>

#include "storage.h"
#include "../math/kl_divergence.h"

namespace rk {

// Both logits of a call, contiguous.
struct KlTensors {
  const char* op;
  Tensor p, q;

  KlTensors(const char* name, const Tensor& p_logits, const Tensor& q_logits, double temperature)
      : op(name), p(p_logits), q(q_logits) {
    check_matrix(op, "p_logits", p);
    check_tensor(op, "q_logits", q, sizes_of(p), p.scalar_type(), p);
    RK_CHECK(p.size(1) >= 1 || p.size(0) == 0, op, ": p_logits must have at least one class, got ", describe(p));
    check_number(op, "temperature", temperature > 0.0 && temperature < 1e300, "a positive number", temperature);
    p = torch::stable::contiguous(p);
    q = torch::stable::contiguous(q);
  }

  ScalarType accumulation() const { return accumulation_type(p.scalar_type()); }
  Tensor new_logits(bool needed) const {
    return needed ? torch::stable::new_empty(p, {p.size(0), p.size(1)}) : torch::stable::new_empty(p, {0});
  }
  Tensor new_rows() const { return torch::stable::new_empty(p, {p.size(0)}, accumulation()); }
  Tensor new_statistics() const { return torch::stable::new_empty(p, {p.size(0), kKlStatistics}, accumulation()); }

  Tensor per_row(const Tensor& grad) const {
    check_tensor(op, "grad", grad, {p.size(0)}, accumulation(), p);
    return torch::stable::contiguous(grad);
  }
  Tensor saved(const Tensor& statistics) const {
    check_tensor(op, "statistics", statistics, {p.size(0), kKlStatistics}, accumulation(), p);
    return torch::stable::contiguous(statistics);
  }
  std::optional<Tensor> cotangent(const char* name, const std::optional<Tensor>& t) const {
    check_optional(op, name, t, sizes_of(p), p.scalar_type(), p);
    return contiguous(t);
  }
};

}  // namespace rk
