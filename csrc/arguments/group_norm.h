// The arguments of group_norm_backward and its derivative, checked once for both devices.
#pragma once

#include "norm.h"

namespace rk {

inline bool is_dense(const Tensor& t, int64_t d0, int64_t d1, int64_t d2) {
  int64_t expected = 1;
  for (const int64_t d : {d2, d1, d0}) {
    if (t.size(d) != 1 && t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return true;
}

// Whether x: [N, C, S] lies in memory as [N, S, C], and not as [N, C, S] as well.
inline bool channels_innermost(const Tensor& x) { return !is_dense(x, 0, 1, 2) && is_dense(x, 0, 2, 1); }

// x: [N, C, S] in one of the two layouts.
inline Tensor dense_in(bool innermost, const Tensor& t) {
  if (is_dense(t, 0, innermost ? 2 : 1, innermost ? 1 : 2)) return t;
  if (!innermost) return torch::stable::contiguous(t);
  return torch::stable::transpose(torch::stable::contiguous(torch::stable::transpose(t, 1, 2)), 1, 2);
}

inline Tensor empty_in(bool innermost, const Tensor& x) {
  if (!innermost) return torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)});
  return torch::stable::transpose(torch::stable::new_empty(x, {x.size(0), x.size(2), x.size(1)}), 1, 2);
}

inline void check_group_norm(const char* op, const std::optional<Tensor>& u, const std::optional<Tensor>& a,
                             const std::optional<Tensor>& b, const Tensor& grad, const Tensor& x,
                             const std::optional<Tensor>& weight, const Tensor& mean, const Tensor& rstd,
                             int64_t groups) {
  RK_CHECK(x.dim() == 3, op, ": x must have 3 dimensions, got ", describe(x));
  check_floating(op, "x", x);
  const ScalarType dtype = x.scalar_type(), accumulation = accumulation_type(dtype);
  const int64_t channels = x.size(1);
  RK_CHECK(groups >= 1 && channels % groups == 0, op, ": groups must divide the ", channels, " channels of x, got ",
           groups);
  check_tensor(op, "grad", grad, sizes_of(x), dtype, x);  // of one cotangent
  check_norm(op, u, a, b, grad, x, weight, channels);
  check_tensor(op, "mean", mean, {x.size(0), groups}, accumulation, x);
  check_tensor(op, "rstd", rstd, {x.size(0), groups}, accumulation, x);
}

}  // namespace rk
