// What the normalisations have in common: both backwards in differentiable operators, for third and higher orders and for
// forward mode, and the Function that calls the fused second one.
#pragma once

#include <limits>

#include "cotangents.h"
#include "recomputed.h"
#include "replacement.h"

namespace rk::aten {

// Of a forward, one of each row.
struct Statistics {
  Tensor mean, rstd;
};

// t in the shape of `like`.  A single sample also gets its layout, and the first stride that dense images have: PyTorch's BatchNorm
// takes a gradient that differs in that for contiguous.
inline Tensor unflattened(const Tensor& t, const Tensor& like) {
  const Tensor result = t.reshape_symint(like.sym_sizes());
  if (result.dim() < 3 || is_batched(result) || is_batched(like) || result.sym_size(0) != 1) return result;
  if (like.is_contiguous()) return result.contiguous();
  return result.sym_stride(1) == 1 ? result.squeeze(0).movedim(0, -1).unsqueeze(0).movedim(-1, 1) : result;
}

inline SymInt product(SymIntArrayRef sizes) {
  SymInt result = 1;
  for (const auto& size : sizes) result = result * size;
  return result;
}

// The kernels' four types; a weight is of the data's type or of its sums'.
inline bool has_kernel(const Tensor& x, const std::optional<Tensor>& w) {
  const auto dtype = x.scalar_type();
  if (!is_floating_point(dtype)) return false;
  return !w || !w->defined() || w->scalar_type() == dtype || w->scalar_type() == accumulation_type(dtype);
}

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// How a normalisation sees its tensors: x as `shape`, which a parameter reshaped to `parameter` multiplies.  Dimensions are
// counted from the end, since several cotangents have one more in front.
struct NormView {
  std::vector<SymInt> shape, parameter;
  std::vector<SymInt> weight;  // the shape of a parameter itself
  // What a statistic is taken over: where one parameter holds, and from one to the next.
  std::vector<int64_t> along, across;
  std::vector<int64_t> others;  // what a parameter's gradient is summed over

  Tensor of(const Tensor& t, const Tensor& x) const {
    auto sizes = shape;
    if (t.dim() > x.dim()) sizes.insert(sizes.begin(), t.sym_size(0));
    return t.to(accumulation_type(x.scalar_type())).reshape_symint(sizes);
  }
  Tensor of_parameter(const Tensor& w, const Tensor& x) const {
    return w.to(accumulation_type(x.scalar_type())).reshape_symint(parameter);
  }
  // How many elements a statistic is taken over.
  SymInt count() const {
    SymInt result = 1;
    for (const auto* dims : {&along, &across})
      for (const int64_t d : *dims) result = result * shape[shape.size() + d];
    return result;
  }
};

// Both backwards of a normalisation in differentiable operators, as math/layer_norm.h has them, with means in the place of
// sums: all that depends on sums is small, and x, g and u are read as often as there are sums and results.  The statistics
// are functions of x, of the values that the forward found: eps is what is missing in the variance.  PyTorch's own formulas
// for LayerNorm and BatchNorm take them for constants, and their third orders are wrong.
class ComposedNorm {
 public:
  // mean, rstd: of the shape of a sum over a statistic's dimensions; no mean: RMSNorm; fixed: they do not depend on x.
  ComposedNorm(NormView view, const Tensor& x, const Tensor& w, const Tensor& mean, const Tensor& rstd, bool fixed)
      : view_(std::move(view)), x_(x), w_(w), fixed_(fixed), centred_(mean.defined() && !fixed), r_(rstd) {
    d_ = view_.of(x, x);
    if (mean.defined()) d_ = d_ - mean;
    if (w.defined()) weight_ = view_.of_parameter(w, x);
    if (fixed || (!at::GradMode::is_enabled() && !is_differentiated(x))) return;
    Tensor variance = mean_of(d_ * d_);
    if (centred_) {
      shift_ = mean_of(d_);
      shift_ = shift_ - shift_.detach();
      variance = variance - shift_ * shift_;
    }
    const Tensor found = (rstd.pow(-2) - variance).detach();  // not a number where both are infinite
    r_ = (variance + found.nan_to_num(0.0, kInfinity, -kInfinity)).rsqrt();
  }

  Triple first(const Tensor& grad, const Mask& mask) const {
    const Tensor g = view_.of(grad, x_), gd = mask[1] || !fixed_ ? g * d_ : Tensor();
    Triple result;
    if (mask[0]) {
      Sum of_x;
      if (!fixed_) {
        const Tensor mean_g = weighted_mean_of(g), mean_gx = with_r(weighted_mean_of(gd), mean_g);
        if (centred_) of_x.add(-r_ * mean_g);
        add_centred(of_x, -r_ * r_ * mean_gx);
      }
      of_x.add(weighted(r_), g);
      std::get<0>(result) = back(of_x.total, grad);
    }
    if (mask[1]) std::get<1>(result) = to_parameter(r_ * minus_shift(gd, g));
    if (mask[2]) std::get<2>(result) = to_parameter(g);
    return result;
  }

  // Cotangents u, a, b of grad_x, grad_w, grad_b; of several cotangents the sum over them where x or w is concerned.
  Triple second(const Tensor& u, const Tensor& a, const Tensor& b, const Tensor& grad, const Mask& need) const {
    const auto parameter = [&](const Tensor& t) { return t.defined() ? view_.of_parameter(t, x_) : t; };
    const Tensor of_w = parameter(a), of_b = parameter(b), g = view_.of(grad, x_),
                 v = u.defined() ? view_.of(u, x_) : u;
    // Sums of what the formulas read and no more: an infinity elsewhere stays where it is.
    const bool moves = v.defined() && !fixed_;  // the statistics, under P
    const Tensor gd = (need[1] || need[2]) && !fixed_ ? g * d_ : Tensor();
    Tensor mean_u, mean_ux, turn;  // P(u) = u - mean_u - turn d
    if (moves) {
      if (centred_) mean_u = mean_of(v);
      mean_ux = with_r(mean_of(v * d_), mean_u);
      turn = r_ * mean_ux;
    }
    Sum of_g, of_x;
    Tensor of_weight;
    if (need[0]) {
      Sum slope;
      if (of_b.defined()) of_g.add(of_b);
      if (moves && centred_) of_g.add(weighted(-r_ * mean_u));
      if (moves) slope.add(weighted(-r_ * turn));
      if (of_w.defined()) slope.add(of_w * r_);
      if (slope.total.defined()) add_centred(of_g, slope.total);
      if (v.defined()) of_g.add(weighted(r_), v);
    }
    if (need[1]) {
      Sum factor, slope;  // of g, and of d less the shift
      if (moves) {
        const Tensor mean_g = weighted_mean_of(g), mean_gx = with_r(weighted_mean_of(gd), mean_g);
        const Tensor q = r_ * r_, both = mean_ux * mean_gx;
        Tensor k = weighted_mean_of(v * g) - both;
        if (centred_) {
          k = k - mean_u * mean_g;
          of_x.add(q * (mean_gx * mean_u + mean_ux * mean_g));
        }
        of_x.add(-q * mean_gx, v);
        factor.add(weighted(-q * mean_ux));
        slope.add(-q * r_ * (k - 2 * both));
      }
      if (of_w.defined()) factor.add(of_w * r_);
      if (of_w.defined() && !fixed_) {
        const Tensor mean_g = mean_times(of_w, g), mean_gx = with_r(mean_times(of_w, gd), mean_g);
        if (centred_) of_x.add(-r_ * mean_g);
        slope.add(-r_ * r_ * mean_gx);
      }
      if (slope.total.defined()) add_centred(of_x, slope.total);
      if (factor.total.defined()) of_x.add(factor.total, g);
    }
    if (need[2] && v.defined()) {
      Tensor product = v * g;
      if (moves && centred_) product = product - mean_u * g;
      if (moves) product = product - turn * minus_shift(gd, g);
      of_weight = r_ * product;
    }
    const auto summed = [&](const Tensor& t) { return grad.dim() > x_.dim() ? t.sum(0) : t; };
    return {of_g.total.defined() ? back(of_g.total.expand_as(g), grad) : Tensor(),
            of_x.total.defined() ? back(summed(of_x.total), x_) : Tensor(),
            of_weight.defined() ? to_parameter(summed(of_weight)) : Tensor()};
  }

 private:
  struct Sum {
    Tensor total;
    void add(const Tensor& t) { total = total.defined() ? total + t : t; }
    void add(const Tensor& factor, const Tensor& t) {
      total = total.defined() ? at::addcmul(total, factor, t) : factor * t;
    }
  };
  Tensor weighted(const Tensor& t) const { return w_.defined() ? weight_ * t : t; }

  // Means over what a statistic is taken over; with a parameter before each, as few large products as there can be.  As
  // sums that are divided: the derivative of a sum is a view, that of a mean as large as what it was taken of.
  Tensor mean_of(const Tensor& t) const {
    auto dims = view_.along;
    dims.insert(dims.end(), view_.across.begin(), view_.across.end());
    return t.sum(dims, /*keepdim=*/true) / at::Scalar(view_.count());
  }
  Tensor mean_times(const Tensor& parameter, const Tensor& t) const {
    const Tensor products = parameter * (view_.along.empty() ? t : t.sum(view_.along, /*keepdim=*/true));
    return (view_.across.empty() ? products : products.sum(view_.across, /*keepdim=*/true)) / at::Scalar(view_.count());
  }
  Tensor weighted_mean_of(const Tensor& t) const { return w_.defined() ? mean_times(weight_, t) : mean_of(t); }

  // mean(t xh) of mean(t d) and mean(t)
  Tensor with_r(const Tensor& mean_td, const Tensor& mean_t) const { return r_ * minus_shift(mean_td, mean_t); }
  Tensor minus_shift(const Tensor& td, const Tensor& t) const { return shift_.defined() ? td - shift_ * t : td; }
  // factor (d - shift)
  void add_centred(Sum& sum, const Tensor& factor) const {
    if (shift_.defined()) sum.add(-factor * shift_);
    sum.add(factor, d_);
  }

  Tensor to_parameter(const Tensor& t) const {
    const auto dtype = w_.defined() ? w_.scalar_type() : x_.scalar_type();
    return t.sum(view_.others).reshape_symint(view_.weight).to(dtype);
  }
  Tensor back(const Tensor& t, const Tensor& like) const { return unflattened(t.to(like.scalar_type()), like); }

  NormView view_;
  Tensor x_, w_;
  bool fixed_, centred_;
  Tensor r_, d_, weight_, shift_;  // d: x less the mean that was found; shift: zero, with the derivative of that mean
};

// The Function of a normalisation's first backward.
//   Norm::statistics(), put_into(kept), Norm::of(kept, mean, rstd)   what a graph keeps of the norm
//   Norm::backward(g, x, w, mask)                      the first backward; below autograd
//   Norm::double_backward(u, a, b, g, x, w, need)      its derivatives in g, x, w; below autograd
//   Norm::composed(x, w)                               the ComposedNorm
//   Norm::bends(u, a)                                  whether there is a derivative in x at all
//   Norm::statistics_are_constant()                    whether x moves them
//   Norm::remembers_all()                              whether of(kept, ...) is all that backward() needs
template <class Norm>
struct NormBackward : torch::autograd::Function<NormBackward<Norm>> {
  static Triple run(const Tensor& g, const Tensor& x, const std::optional<Tensor>& w, const Norm& norm, Mask mask) {
    return spread(NormBackward::apply(g, x, w, norm, mask), mask);
  }

  // Sets grad_x of several cotangents, if g stands for them and nothing else is asked for; whether it did.
  static bool of_several(variable_list& grads, const Tensor& g, const Tensor& x, const Tensor& w, const Norm& norm,
                         const Mask& mask) {
    if (mask != Mask{true, false, false}) return false;
    const auto grad_x = for_several(
        g, [&](const Tensor& cotangents) { return NormBackward::apply(cotangents, x, if_defined(w), norm, mask)[0]; });
    if (grad_x) grads[0] = *grad_x;
    return grad_x.has_value();
  }

  static variable_list forward(AutogradContext* ctx, const Tensor& g, const Tensor& x, const std::optional<Tensor>& w,
                               const Norm& norm, Mask mask) {
    const bool weighted = w && w->defined();
    const bool reads_g = (mask[0] || mask[1]) && (x.requires_grad() || (weighted && w->requires_grad()));
    const auto [mean, rstd] = norm.statistics();
    const bool reads_w = mask[0];  // only grad_x has it
    ctx->save_for_backward({reads_g ? g : Tensor(), x, reads_w ? optional_value(w) : Tensor(), mean, rstd});
    ctx->set_materialize_grads(false);
    norm.put_into(Kept().put(to_bits({true, true, weighted})).put(to_bits(mask))).save(ctx);
    can_do_again(ctx, reads_g && mask[0] && !are_several(g, x) && norm.remembers_all());
    const at::AutoDispatchBelowADInplaceOrView below;
    return pick(norm.backward(g, x, optional_value(w), mask), mask);
  }

  static variable_list again(AutogradContext* ctx) {
    const auto saved = ctx->get_saved_variables();
    Kept kept(ctx);
    kept.integer();
    const Mask mask = kept.mask<3>();
    const Norm norm = Norm::of(kept, saved[3], saved[4]);
    return {std::get<0>(norm.backward(saved[0], saved[1], saved[2], {mask[0], false, false}))};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& cotangents) {
    const auto saved = ctx->get_saved_variables();
    Kept kept(ctx);
    const Mask asked_for = asked<3>(ctx, kept.integer());
    const auto [u, a, b] = spread(cotangents, kept.mask<3>());
    const Norm norm = Norm::of(kept, saved[3], saved[4]);
    const Tensor &x = saved[1], &w = saved[2], &g = saved[0].defined() ? saved[0] : u.defined() ? u : x;
    variable_list result(5);
    if (!u.defined() && !a.defined() && !b.defined()) return result;

    const Mask need{asked_for[0], asked_for[1] && norm.bends(u, a), asked_for[2] && u.defined()};
    // The kernel multiplies what a formula does not have by zero: an infinity there would become NaN.
    const bool is_sparse = !u.defined() || (a.defined() && norm.statistics_are_constant());
    const bool composed = is_sparse || composes(cotangents);
    const BelowAutogradIf below(!composed);
    assign(result,
           composed ? norm.composed(x, w).second(u, a, b, g, need) : norm.double_backward(u, a, b, g, x, w, need),
           need);
    fill_for_compiled_autograd(asked_for, result, {g, x, w});
    return result;
  }
};

}  // namespace rk::aten
