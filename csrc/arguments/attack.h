// The arguments of attack_step and attack_start, checked once for both devices.
#pragma once

#include <optional>

#include "check.h"
#include "../math/attack_step.h"

namespace rk {

inline Ball ball_of(const char* op, int64_t norm) {
  check_number(op, "norm", norm >= 0 && norm <= 2, "0, 1 or 2", static_cast<double>(norm));
  return static_cast<Ball>(norm);
}

// A number for all columns, for each channel (entry (j / inner) % C for column j), or for each column.
inline void check_table(const char* op, const char* name, const Tensor& table, int64_t inner, const Tensor& x,
                        Ball ball) {
  RK_CHECK(table.dim() == 1, op, ": ", name, " must have 1 dimension, got ", describe(table));
  const int64_t count = table.size(0), columns = x.size(1);
  check_tensor(op, name, table, {count}, accumulation_type(x.scalar_type()), x);
  check_number(op, "inner", inner >= 1, "at least 1", static_cast<double>(inner));
  const bool divides = count >= 1 && columns % count == 0 && (columns / count) % inner == 0;
  RK_CHECK(count == 1 || count == columns || divides, op, ": ", name, " must divide the columns of x, got ", count,
           " entries with inner = ", inner, " for ", columns, " columns");
  RK_CHECK(count == 1 || ball == Ball::kLinf, op, ": ", name, " must be one number for l1 and l2, got ",
           describe(table));
}

inline void check_rows(const char* op, const Tensor& adversary, const Tensor& x) {
  check_matrix(op, "adversary", adversary);
  check_tensor(op, "x", x, {adversary.size(0), adversary.size(1)}, adversary.scalar_type(), adversary);
  RK_CHECK(adversary.is_contiguous(), op, ": adversary must be contiguous, got ", describe(adversary));
  RK_CHECK(adversary.size(1) <= 2147483647, op, ": adversary must have at most 2^31 - 1 columns, got ",
           describe(adversary));
}

inline Ball check_attack_step(const char* op, const Tensor& adversary, const Tensor& x,
                              const std::optional<Tensor>& grad, const Tensor& eps, const Tensor& step,
                              const std::optional<Tensor>& scale, int64_t inner, int64_t norm, int64_t coordinates) {
  const Ball ball = ball_of(op, norm);
  check_rows(op, adversary, x);
  check_optional(op, "grad", grad, sizes_of(adversary), adversary.scalar_type(), adversary);
  check_table(op, "eps", eps, inner, x, ball);
  check_table(op, "step_size", step, inner, x, ball);
  check_optional(op, "scale", scale, {adversary.size(0)}, accumulation_type(adversary.scalar_type()), adversary);
  check_number(op, "coordinates", coordinates >= 1, "at least 1", static_cast<double>(coordinates));
  return ball;
}

inline Ball check_attack_start(const char* op, const Tensor& adversary, const Tensor& x, const Tensor& eps,
                               const Tensor& seed, const std::optional<Tensor>& samples, int64_t inner, int64_t norm,
                               int64_t restart) {
  const Ball ball = ball_of(op, norm);
  check_rows(op, adversary, x);
  check_table(op, "eps", eps, inner, x, ball);
  check_tensor(op, "seed", seed, {1}, ScalarType::Long, adversary);
  check_optional(op, "samples", samples, {adversary.size(0)}, ScalarType::Long, adversary);
  check_number(op, "restart", restart >= 0 && restart < (int64_t{1} << 31), "in [0, 2^31)",
               static_cast<double>(restart));
  return ball;
}

}  // namespace rk
