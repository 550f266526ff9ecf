// What the normalisations have in common: both backwards in differentiable operators, for third and higher orders and for
// forward mode, what calls the fused second one, and the bookkeeping of three gradients of which some are asked for.
#pragma once

#include <functional>

#include "replacement.h"

namespace rk::aten {

using Triple = std::tuple<Tensor, Tensor, Tensor>;
using Mask = std::array<bool, 3>;

// Of a forward, one of each row.
struct Statistics {
  Tensor mean, rstd;
};

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

// In forward mode PyTorch's operators give more than they are asked for, which a Function must not.
inline void drop_unasked(variable_list& grads, const Mask& mask) {
  for (size_t i = 0; i < 3; ++i)
    if (!mask[i]) grads[i] = Tensor();
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
  bool centred = false;
  bool constant = false;  // the statistics do not depend on x: P(v) = v

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

  // By fixed statistics: mean, and r = 1 / sqrt(variance + eps).
  static Normalized fixed(const Tensor& x, const Tensor& mean, const Tensor& r) {
    Normalized n;
    n.xh = (x - mean) * r;
    n.r = r;
    n.constant = true;
    return n;
  }

  // P(h), and r P(h), of math/layer_norm.h
  Tensor projected(const Tensor& h) const {
    if (constant) return h;
    const Tensor middle = xh * (h * xh).mean(-1, true);
    return centred ? h - h.mean(-1, true) - middle : h - middle;
  }
  Tensor backward(const Tensor& h) const { return r * projected(h); }

  // d <u, r P(h)> / d x
  Tensor bend(const Tensor& u, const Tensor& h) const {
    if (constant) return Tensor();
    const auto mean = [](const Tensor& t) { return t.mean(-1, true); };
    const Tensor of_u = projected(u), of_h = projected(h);
    return -r * r * (mean(u * of_h) * xh + mean(h * xh) * of_u + mean(u * xh) * of_h);
  }

 private:
  Normalized() = default;
};

// How a normalisation sees its tensors as rows that are normalised each by itself, in the accumulation type.
struct RowsOfNorm {
  std::function<Tensor(const Tensor&)> rows;          // of g, x or u
  std::function<Tensor(const Tensor&)> spread;        // a parameter, so that it multiplies rows
  std::function<Tensor(const Tensor&)> to_parameter;  // the sum of rows over everything that a parameter multiplies
  std::function<Tensor(const Tensor&, const Tensor&)> back;  // rows as a tensor like the second
};

// What differentiable operators need to know of a normalisation: as_rows(x), and normalized(x).
//
// The first backward.
template <class Norm>
Triple composed_first(const Norm& norm, const Tensor& g, const Tensor& x, const Tensor& w, const Mask& mask) {
  const RowsOfNorm of = norm.as_rows(x);
  const Normalized normalized = norm.normalized(x);
  const Tensor grad = of.rows(g);
  const auto dtype = w.defined() ? w.scalar_type() : x.scalar_type();
  Triple result;
  if (mask[0]) std::get<0>(result) = of.back(normalized.backward(w.defined() ? of.spread(w) * grad : grad), g);
  if (mask[1]) std::get<1>(result) = of.to_parameter(grad * normalized.xh).to(dtype);
  if (mask[2]) std::get<2>(result) = of.to_parameter(grad).to(dtype);
  return result;
}

// The second backward: cotangents u, a, b of grad_x, grad_w, grad_b; of several cotangents [K, *x.shape] the sum over them
// where x or w is concerned.
template <class Norm>
Triple composed_second(const Norm& norm, const Tensor& u, const Tensor& a, const Tensor& b, const Tensor& g,
                       const Tensor& x, const Tensor& w, const Mask& need) {
  const RowsOfNorm of = norm.as_rows(x);
  const Normalized normalized = norm.normalized(x);
  const auto plus = [](Tensor& sum, const Tensor& t) {
    if (t.defined()) sum = sum.defined() ? sum + t : t;
  };
  const auto weighted = [&](const Tensor& t) { return w.defined() ? of.spread(w) * t : t; };
  const Tensor grad = of.rows(g), rows_of_u = u.defined() ? of.rows(u) : u;
  Tensor of_g, of_x, of_w;
  if (u.defined()) {
    const Tensor moved = normalized.backward(rows_of_u);
    if (need[0]) plus(of_g, weighted(moved));
    if (need[1]) plus(of_x, normalized.bend(rows_of_u, weighted(grad)));
    if (need[2]) of_w = grad * moved;
  }
  if (a.defined()) {
    if (need[0]) plus(of_g, of.spread(a) * normalized.xh);
    if (need[1]) plus(of_x, normalized.backward(of.spread(a) * grad));
  }
  if (b.defined() && need[0]) plus(of_g, of.spread(b).expand_as(grad));
  const bool several = g.dim() > x.dim();
  const auto summed = [&](const Tensor& t) { return several && t.dim() == grad.dim() ? t.sum(0) : t; };
  return {of_g.defined() ? of.back(of_g, g) : of_g, of_x.defined() ? of.back(summed(of_x), x) : of_x,
          of_w.defined() ? of.to_parameter(summed(of_w)).to(w.scalar_type()) : of_w};
}

// The backward of a normalisation's Function that has saved g, x, w as its first tensors: the second derivative.
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

  need[1] = need[1] && norm.bends(u, a);
  need[2] = need[2] && u.defined();
  const bool composed = composes(cotangents);
  std::optional<at::AutoDispatchBelowADInplaceOrView> below;
  if (!composed) below.emplace();
  const auto [grad_g, grad_x, grad_w] =
      composed ? composed_second(norm, u, a, b, g, x, w, need) : norm.double_backward(u, a, b, g, x, w, need);
  if (need[0]) result[0] = grad_g;
  if (need[1]) result[1] = grad_x;
  if (need[2]) result[2] = grad_w;
  fill_for_compiled_autograd(ctx, result, {g, x, w});
  return result;
}

}  // namespace rk::aten
