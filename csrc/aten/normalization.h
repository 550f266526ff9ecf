// What the normalisations have in common: their first backward in differentiable operators, for third and higher
// orders, their second backward, and the bookkeeping of three gradients of which some are asked for.
#pragma once

#include "replacement.h"

namespace rk::aten {

using Triple = std::tuple<Tensor, Tensor, Tensor>;
using Mask = std::array<bool, 3>;

inline int64_t to_bits(const Mask& mask) { return (mask[0] ? 1 : 0) + (mask[1] ? 2 : 0) + (mask[2] ? 4 : 0); }
inline Mask from_bits(int64_t bits) { return {(bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0}; }

inline variable_list pick(const Triple& of, const Mask& mask) {
  variable_list picked;
  if (mask[0]) picked.push_back(std::get<0>(of));
  if (mask[1]) picked.push_back(std::get<1>(of));
  if (mask[2]) picked.push_back(std::get<2>(of));
  return picked;
}

inline Triple spread(const variable_list& picked, const Mask& mask) {
  Tensor result[3];
  for (size_t i = 0, k = 0; i < 3; ++i)
    if (mask[i]) result[i] = picked[k++];
  return {result[0], result[1], result[2]};
}

inline std::optional<Tensor> if_defined(const Tensor& t) { return t.defined() ? std::make_optional(t) : std::nullopt; }

inline SymInt product(SymIntArrayRef sizes) {
  SymInt result = 1;
  for (const auto& size : sizes) result = result * size;
  return result;
}

// The kernels' four types; a weight is of the data's type or of its sums'.
inline bool has_kernel(const Tensor& x, const std::optional<Tensor>& w) {
  const auto dtype = x.scalar_type();
  if (dtype != at::kFloat && dtype != at::kDouble && dtype != at::kHalf && dtype != at::kBFloat16) return false;
  return !w || !w->defined() || w->scalar_type() == dtype || w->scalar_type() == accumulation_type(dtype);
}

// Rows x: [..., D] normalised, as a differentiable function of x whose value agrees with the statistics of the forward:
// eps is what is missing in the variance.  PyTorch's own formula for LayerNorm takes the statistics for constants, and
// its third order is wrong.
struct Normalized {
  Tensor xh, r;
  bool centred;

  Normalized(const Tensor& x, const Tensor& mean, const Tensor& rstd) : centred(mean.defined()) {
    Tensor d = x;
    if (centred) {
      const Tensor own = x.mean(-1, true);
      d = x - (own + (mean - own).detach());
    }
    const Tensor square = (d * d).mean(-1, true);
    r = (square + (rstd.pow(-2) - square).detach()).rsqrt();
    xh = d * r;
  }

  // r P(h) of math/layer_norm.h
  Tensor backward(const Tensor& h) const {
    const Tensor middle = xh * (h * xh).mean(-1, true);
    return r * (centred ? h - h.mean(-1, true) - middle : h - middle);
  }
};

// The backward of a normalisation's Function that has saved g, x, w as its first tensors: the second derivative.
//   Norm::composed(g, x, w, mask)                      the first backward in differentiable operators
//   Norm::double_backward(u, a, b, g, x, w, need)      its derivatives in g, x, w; below autograd
//   Norm::bends(u, a)                                  whether there is a derivative in x at all
template <class Norm>
variable_list second_backward(AutogradContext* ctx, const variable_list& saved, const Norm& norm, const Mask& mask,
                              const variable_list& cotangents) {
  const Tensor &g = saved[0], &x = saved[1], &w = saved[2];
  const auto [u, a, b] = spread(cotangents, mask);
  variable_list result(5);
  size_t edge = 0;
  Mask need{needs(ctx, g, edge), needs(ctx, x, edge), needs(ctx, w, edge)};
  if (!u.defined() && !a.defined() && !b.defined()) return result;

  if (at::GradMode::is_enabled()) {
    const auto first = [&](const variable_list& in) { return pick(norm.composed(in[0], in[1], in[2], mask), mask); };
    const auto grads = higher_order(first, {g, x, w}, cotangents, {need[0], need[1], need[2]});
    std::copy(grads.begin(), grads.end(), result.begin());
    return result;
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  need[1] = need[1] && norm.bends(u, a);
  need[2] = need[2] && u.defined();
  const auto [grad_g, grad_x, grad_w] = norm.double_backward(u, a, b, g, x, w, need);
  if (need[0]) result[0] = grad_g;
  if (need[1]) result[1] = grad_x;
  if (need[2]) result[2] = grad_w;
  return result;
}

}  // namespace rk::aten
