// The second derivative of gelu, silu, mish, softplus, elu (selu, celu), hardswish, tanh and sigmoid: one fused sweep.
//
//   first backward   grad_x = f'(x) g                      cotangent: u
//   second backward  grad_g = f'(x) u   grad_x = f''(x) u g
//
// PyTorch has a first backward of one kernel for silu and mish, but takes it apart where it is to be differentiated.
// Here the forward is replaced too, by one whose backward is that kernel.
#include <algorithm>

#include "cotangents.h"
#include "recomputed.h"
#include "replacement.h"

namespace rk::aten {
namespace {

constexpr char kKernel[] = "robustkern::activation_double_backward";

// What PyTorch's own nodes compute where silu's and mish's first backwards are differentiated.  In a checkpoint ours have to
// save the same.
Tensor composed_silu_backward(const Tensor& g, const Tensor& x) {
  const Tensor s = x.sigmoid();
  return g * s * (1.0 + x * (1.0 - s));
}
Tensor composed_mish_backward(const Tensor& g, const Tensor& x) {
  const Tensor s = x.sigmoid(), t = (in_checkpoint() ? x.exp().log1p() : at::softplus(x)).tanh();
  return g * (t + x * s * (1.0 - t * t));
}

// PyTorch has no batching rule for its own.
Tensor first_mish_backward(const Tensor& g, const Tensor& x) {
  return is_batched(g) || is_batched(x) ? composed_mish_backward(g, x) : at::mish_backward(g, x);
}

constexpr c10::string_view kFunctions[] = {"gelu", "gelu_tanh", "silu", "mish",   "softplus",
                                           "elu",  "hardswish", "tanh", "sigmoid"};

// Which activation: the arguments of activation_double_backward.
struct Choice {
  c10::string_view function;  // one of kFunctions
  std::vector<double> parameters;

  void save(AutogradContext* ctx) const {
    Kept kept;
    kept.put(std::find(std::begin(kFunctions), std::end(kFunctions), function) - std::begin(kFunctions));
    kept.put_numbers(parameters).save(ctx);
  }
  static Choice load(AutogradContext* ctx) {
    Kept kept(ctx);
    const auto function = kFunctions[kept.integer()];
    return {function, kept.numbers()};
  }

  // Elements; measured in second and third derivatives on a thread of an AMD EPYC with AVX-512.
  int64_t pays_from() const {
    if (function == "sigmoid") return 1 << 16;
    if (function == "tanh") return 1 << 15;
    if (function == "softplus" || function == "hardswish") return 1 << 14;
    return function == "elu" ? 1 << 13 : 0;
  }

  // PyTorch's first backward.
  Tensor backward(const Tensor& g, const Tensor& x) const {
    const auto& p = parameters;
    if (function == "gelu") return at::gelu_backward(g, x, "none");
    if (function == "gelu_tanh") return at::gelu_backward(g, x, "tanh");
    if (function == "silu") return at::silu_backward(g, x);
    if (function == "mish") return first_mish_backward(g, x);
    if (function == "softplus") return at::softplus_backward(g, x, p[0], p[1]);
    if (function == "elu") return at::elu_backward(g, p[0], p[1], p[2], p[3] != 0.0, x);
    if (function == "hardswish") return at::hardswish_backward(g, x);
    if (function == "tanh") return at::tanh_backward(g, x);
    TORCH_INTERNAL_ASSERT(function == "sigmoid");
    return at::sigmoid_backward(g, x);
  }

  // f''(x) u g in differentiable operators; of what is saved, see math/activation.h.
  Tensor bent(const Tensor& u, const Tensor& g, const Tensor& x) const {
    const auto& p = parameters;
    if (function == "elu") {  // as PyTorch has it
      const Tensor product = u * g * p[2], below = (x < 0).to(x.scalar_type());
      return p[3] != 0.0 ? product * below : backward(product, x) * below;
    }
    if (function == "hardswish") return (u * g / 3.0).masked_fill((x <= -3).logical_or(x >= 3), 0);
    return bend(x) * u * g;
  }
  Tensor bend(const Tensor& x) const {
    const auto& p = parameters;
    if (function == "gelu") {
      const Tensor h = x.clamp(-40, 40), square = h * h;
      return (square * -0.5).exp() * (2 - square) * 0.39894228040143267794;
    }
    if (function == "gelu_tanh") {
      const double root = 0.79788456080286535588;  // sqrt(2 / pi)
      const Tensor h = x.clamp(-25, 25), square = h * h, z = root * h * (1 + 0.044715 * square), t = z.tanh();
      const Tensor slope = root * (1 + 0.134145 * square), bend = root * 0.26829 * h;
      // 1 - t^2, without the digits that it loses where t is near 1
      return 4 * (2 * z).sigmoid() * (-2 * z).sigmoid() * (slope + 0.5 * h * (bend - 2 * t * slope * slope));
    }
    if (function == "silu") {
      const Tensor s = x.sigmoid();
      return s * (-x).sigmoid() * (2 + x.clamp(-1000, 1000) * (1 - 2 * s));
    }
    if (function == "mish") {
      const Tensor s = x.sigmoid(), t = at::softplus(x).tanh();
      return (1 - t * t) * s * (2 + x.clamp(-1000, 1000) * (1 - s - 2 * t * s));
    }
    if (function == "softplus") {
      const Tensor z = p[0] * x;
      return (p[0] * z.sigmoid() * (-z).sigmoid()).masked_fill(z >= p[1], 0);
    }
    if (function == "tanh") return -2 * x;
    TORCH_INTERNAL_ASSERT(function == "sigmoid");
    return 1 - 2 * x;
  }
};

std::tuple<Tensor, Tensor> call_kernel(const Tensor& u, const Tensor& g, const Tensor& x, const Choice& choice,
                                       bool need_grad, bool need_x) {
  return call_operator<kKernel, std::tuple<Tensor, Tensor>>(u, g, x, choice.function,
                                                            at::ArrayRef<double>(choice.parameters), need_grad, need_x);
}

// Several cotangents [K, *x.shape] are contiguous to the kernel: they are shown to it in the order of memory of x.
std::tuple<Tensor, Tensor> double_backward(const Tensor& u, const Tensor& g, const Tensor& x, const Choice& choice,
                                           bool need_grad, bool need_x) {
  if (!are_several(g, x)) return call_kernel(u, g, x, choice, need_grad, need_x);
  const auto [order, back] = MemoryOrder(x);
  const auto of_several = [](const std::vector<int64_t>& dims) {
    std::vector<int64_t> result{0};
    for (const int64_t d : dims) result.push_back(d + 1);
    return result;
  };
  auto [gg_grad, grad_x] = call_kernel(u.permute(of_several(order)), g.permute(of_several(order)), x.permute(order),
                                       choice, need_grad, need_x);
  return {need_grad ? gg_grad.permute(of_several(back)) : gg_grad, need_x ? grad_x.permute(back) : grad_x};
}

struct ActivationBackward : torch::autograd::Function<ActivationBackward> {
  static Tensor forward(AutogradContext* ctx, const Tensor& g, const Tensor& x, const Choice& choice) {
    ctx->save_for_backward({x.requires_grad() ? g : Tensor(), x});
    ctx->set_materialize_grads(false);
    choice.save(ctx);
    can_do_again(ctx, x.requires_grad() && !are_several(g, x));
    const at::AutoDispatchBelowADInplaceOrView below;
    // f'(x) once for all of several
    return are_several(g, x) ? std::get<0>(double_backward(g, g, x, choice, true, false)) : choice.backward(g, x);
  }

  static variable_list again(AutogradContext* ctx) {
    const auto saved = ctx->get_saved_variables();
    return {Choice::load(ctx).backward(saved[0], saved[1])};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& cotangents) {
    const Tensor& u = cotangents[0];
    if (!u.defined()) return {Tensor(), Tensor(), Tensor()};
    const auto saved = ctx->get_saved_variables();
    const Tensor &g = saved[0], &x = saved[1];
    const auto choice = Choice::load(ctx);
    const bool need_grad = ctx->needs_input_grad(0), need_x = ctx->needs_input_grad(1);
    if (composes(cotangents)) {
      Tensor grad_g, grad_x;
      // PyTorch's own does not broadcast GELU in float32.
      if (need_grad) grad_g = choice.backward(u, are_several(u, x) ? x.expand_as(u) : x);
      if (need_x) {
        const auto dtype = accumulation_type(x.scalar_type());
        grad_x = choice.bent(u.to(dtype), g.to(dtype), x.to(dtype)).to(x.scalar_type());
        if (are_several(u, x)) grad_x = grad_x.sum(0);
      }
      return {grad_g, grad_x, Tensor()};
    }
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [gg_grad, grad_x] = double_backward(u, g.defined() ? g : u, x, choice, need_grad, need_x);
    return {need_grad ? gg_grad : Tensor(), need_x ? grad_x : Tensor(), Tensor()};
  }
};

std::optional<Tensor> apply(const Tensor& g, const Tensor& x, const Choice& choice) {
  const bool fused = is_plain(x) && is_plain(g) && g.scalar_type() == x.scalar_type() && g.sizes() == x.sizes() &&
                     !is_small(x, choice.pays_from());
  return fused ? std::make_optional(ActivationBackward::apply(g, x, choice)) : std::nullopt;
}

std::optional<Tensor> gelu_backward(const Tensor& g, const Tensor& x, c10::string_view approximate) {
  return apply(g, x, {approximate == "tanh" ? "gelu_tanh" : "gelu", {}});
}
std::optional<Tensor> softplus_backward(const Tensor& g, const Tensor& x, const at::Scalar& beta,
                                        const at::Scalar& threshold) {
  return apply(g, x, {"softplus", {beta.toDouble(), threshold.toDouble()}});
}
std::optional<Tensor> elu_backward(const Tensor& g, const at::Scalar& alpha, const at::Scalar& scale,
                                   const at::Scalar& input_scale, bool is_result, const Tensor& x) {
  const Choice choice{"elu", {alpha.toDouble(), scale.toDouble(), input_scale.toDouble(), is_result ? 1.0 : 0.0}};
  const bool grows = choice.parameters[2] < 0.0;  // an exponential that PyTorch does
  return grows ? std::nullopt : apply(g, x, choice);
}
std::optional<Tensor> tanh_backward(const Tensor& g, const Tensor& y) { return apply(g, y, {"tanh", {}}); }
std::optional<Tensor> sigmoid_backward(const Tensor& g, const Tensor& y) { return apply(g, y, {"sigmoid", {}}); }
std::optional<Tensor> hardswish_backward(const Tensor& g, const Tensor& x) { return apply(g, x, {"hardswish", {}}); }
std::optional<Tensor> silu_backward(const Tensor& g, const Tensor& x) { return apply(g, x, {"silu", {}}); }
std::optional<Tensor> mish_backward(const Tensor& g, const Tensor& x) { return apply(g, x, {"mish", {}}); }

// gelu, silu and mish: operators that leave the input alone, and for the last two their twins that overwrite it.
struct Gelu {
  static constexpr c10::string_view name = "gelu";
  static Tensor forward(const Tensor& x) { return at::gelu(x, "none"); }
};
struct GeluTanh {
  static constexpr c10::string_view name = "gelu_tanh";
  static Tensor forward(const Tensor& x) { return at::gelu(x, "tanh"); }
};
struct Silu {
  static constexpr c10::string_view name = "silu";
  static Tensor forward(const Tensor& x) { return at::silu(x); }
  static Tensor& forward_(Tensor& x) { return at::silu_(x); }
};
struct Mish {
  static constexpr c10::string_view name = "mish";
  static Tensor forward(const Tensor& x) { return at::mish(x); }
  static Tensor& forward_(Tensor& x) { return at::mish_(x); }
};

template <class Activation>
Tensor first_backward(const Tensor& g, const Tensor& x) {
  if constexpr (std::is_same_v<Activation, Silu> || std::is_same_v<Activation, Mish>)
    if (at::GradMode::is_enabled() && in_checkpoint())
      return std::is_same_v<Activation, Silu> ? composed_silu_backward(g, x) : composed_mish_backward(g, x);
  return Choice{Activation::name, {}}.backward(g, x);
}

template <class Activation>
struct Forward : torch::autograd::Function<Forward<Activation>> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x) {
    note_hooks(ctx);
    ctx->save_for_backward({x});
    ctx->set_materialize_grads(false);
    can_do_again(ctx);
    const at::AutoDispatchBelowADInplaceOrView below;
    return Activation::forward(x);
  }
  static variable_list again(AutogradContext* ctx) { return {Activation::forward(ctx->get_saved_variables()[0])}; }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Tensor& g = grads[0];
    if (!g.defined()) return {Tensor()};
    const Tensor x = ctx->get_saved_variables()[0];
    const auto several = for_several(g, [&](const Tensor& cotangents) {
      return ActivationBackward::apply(cotangents, x, Choice{Activation::name, {}});
    });
    const BelowAutogradIf below(is_final(g));
    return {several ? *several : first_backward<Activation>(g, x)};
  }
};

// `before` is a copy of self, which PyTorch makes too; gradients go through it to where self came from.
template <class Activation>
struct ForwardInPlace : torch::autograd::Function<ForwardInPlace<Activation>> {
  static Tensor forward(AutogradContext* ctx, const Tensor& before, Tensor& self) {
    ctx->save_for_backward({before});
    ctx->set_materialize_grads(false);
    ctx->mark_dirty({self});
    const at::AutoDispatchBelowAutograd below;  // what counts the versions of self is not to be left out
    return Activation::forward_(self);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    if (!grads[0].defined()) return {Tensor(), Tensor()};
    return {first_backward<Activation>(grads[0], ctx->get_saved_variables()[0]), Tensor()};
  }
};

template <class Activation>
std::optional<Tensor> forward(const Tensor& x) {
  if (!is_plain(x) || is_small(x, 1 << 14)) return std::nullopt;
  return Forward<Activation>::apply(x);
}

std::optional<Tensor> gelu(const Tensor& x, c10::string_view approximate) {
  if (saves_through_hooks()) return std::nullopt;
  if (approximate == "tanh") return forward<GeluTanh>(x);
  if (approximate == "none") return forward<Gelu>(x);
  return std::nullopt;  // PyTorch has an error message for other approximations
}

template <class Activation>
Tensor* forward_(Tensor& self) {
  // A checkpoint that repeats its forward stops at the last tensor to be saved: PyTorch saves before it overwrites, a Function
  // after that.  And PyTorch has an error message for leaves.
  if (!is_plain(self) || self.is_leaf() || is_small(self, 1 << 14) || saves_through_hooks()) return nullptr;
  ForwardInPlace<Activation>::apply(self.clone(), self);
  return &self;
}

}  // namespace

void register_activation(Registrar& r) {
  add_folding<Forward<Gelu>>();
  add_folding<Forward<GeluTanh>>();
  add_folding<Forward<Silu>>();
  add_folding<Forward<Mish>>();
  add_again<Forward<Gelu>>();
  add_again<Forward<GeluTanh>>();
  add_again<Forward<Silu>>();
  add_again<Forward<Mish>>();
  add_again<ActivationBackward>();
  r.replace<at::_ops::gelu_backward, gelu_backward>(kKernel);
  r.replace<at::_ops::softplus_backward, softplus_backward>(kKernel);
  r.replace<at::_ops::elu_backward, elu_backward>(kKernel);
  r.replace<at::_ops::hardswish_backward, hardswish_backward>(kKernel);
  r.replace<at::_ops::tanh_backward, tanh_backward>(kKernel);
  r.replace<at::_ops::sigmoid_backward, sigmoid_backward>(kKernel);
  r.replace<at::_ops::gelu, gelu, Kind::kForward>(kKernel);
  r.replace<at::_ops::silu, forward<Silu>, Kind::kForward>(kKernel);
  r.replace<at::_ops::mish, forward<Mish>, Kind::kForward>(kKernel);
  r.replace<at::_ops::silu_, forward_<Silu>, Kind::kForward>(kKernel);
  r.replace<at::_ops::mish_, forward_<Mish>, Kind::kForward>(kKernel);
  r.replace<at::_ops::silu_backward, silu_backward, Kind::kDecomposed>(kKernel);
  r.replace<at::_ops::mish_backward, mish_backward, Kind::kDecomposed>(kKernel);
}

}  // namespace rk::aten
