// LayerNorm and RMSNorm.
//
// LayerNorm's first backward is an operator, which is replaced.  So is its forward, by a node that takes several cotangents at
// once.  RMSNorm is a composition of a dozen operators on the CPU, and becomes one under create_graph on CUDA.  Its forward
// runs PyTorch's own below autograd and keeps 1 / rms.  Where a graph is built for a second derivative, the first one is our
// kernel too, which reads each tensor once.  Formulas: math/layer_norm.h.
#include "normalization.h"

namespace rk::aten {
namespace {

constexpr char kBackward[] = "robustkern::layer_norm_backward";
constexpr char kDoubleBackward[] = "robustkern::layer_norm_double_backward";

// A normalisation over the last dimensions: what its backward is given besides grad, x and weight.
struct LayerNorm {
  std::vector<SymInt> shape;
  Tensor mean, rstd, bias{};  // mean: undefined for RMSNorm; bias: what the first backward is given

  std::array<Tensor, 2> statistics() const { return {mean, rstd}; }
  Kept put_into(Kept kept) const { return kept.put_list(shape); }
  static LayerNorm of(Kept& kept, const Tensor& mean, const Tensor& rstd) { return {kept.list(), mean, rstd}; }

  SymInt columns() const { return product(shape); }
  SymInt rows(const Tensor& x) const {
    return product(x.sym_sizes().slice(0, static_cast<size_t>(x.dim()) - shape.size()));
  }
  Tensor matrix(const Tensor& t) const { return t.reshape_symint({rows(t), columns()}); }
  // Of a cotangent, or of several: [K, rows, columns].
  Tensor matrix(const Tensor& g, const Tensor& x) const {
    return are_several(g, x) ? g.reshape_symint({g.sym_size(0), rows(x), columns()}) : matrix(g);
  }
  std::optional<Tensor> vector(const Tensor& t, const Tensor& x) const {
    return in_accumulation_type(t.defined() ? t.reshape_symint({columns()}) : t, x.scalar_type());
  }
  std::optional<Tensor> per_row(const Tensor& t, const Tensor& x) const {
    return in_accumulation_type(t.defined() ? t.reshape_symint({rows(x)}) : t, x.scalar_type());
  }
  Tensor like_weight(const Tensor& t, const Tensor& weight) const {
    return t.reshape_symint(shape).to(weight.scalar_type());
  }

  // Below autograd.
  Triple backward(const Tensor& g, const Tensor& x, const Tensor& w, const Mask& mask) const {
    if (mean.defined() && being_compiled(x))
      return at::native_layer_norm_backward_symint(g, x, shape, mean, rstd, if_defined(w), if_defined(bias), mask);
    auto [grad_x, grad_w, grad_b] = call_operator<kBackward, Triple>(
        matrix(g, x), matrix(x), vector(w, x), per_row(mean, x), *per_row(rstd, x), mask[0], mask[1], mask[2]);
    if (mask[0]) grad_x = grad_x.reshape_symint(g.sym_sizes());
    if (mask[1]) grad_w = like_weight(grad_w, w);
    if (mask[2]) grad_b = like_weight(grad_b, bias);
    return {grad_x, grad_w, grad_b};
  }

  ComposedNorm composed(const Tensor& x, const Tensor& w) const {
    const auto column = [&](const Tensor& t) { return t.defined() ? per_row(t, x)->unsqueeze(1) : t; };
    return {{{rows(x), columns()}, {columns()}, shape, {}, {-1}, {-2}}, x, w, column(mean), column(rstd), false};
  }

  static constexpr bool statistics_are_constant() { return false; }
  static constexpr bool remembers_all() { return true; }
  static bool bends(const Tensor& u, const Tensor& a) { return u.defined() || a.defined(); }

  // Below autograd.
  Triple double_backward(const Tensor& u, const Tensor& a, const Tensor& b, const Tensor& g, const Tensor& x,
                         const Tensor& w, const Mask& need) const {
    const auto rows_of_u = if_defined(u, [&](const Tensor& t) { return matrix(t, x); });
    auto [grad_g, grad_x, grad_w] = call_operator<kDoubleBackward, Triple>(
        rows_of_u, vector(a, x), vector(b, x), matrix(g, x), matrix(x), vector(w, x), per_row(mean, x),
        *per_row(rstd, x), need[0], need[1], need[2]);
    if (need[0]) grad_g = grad_g.reshape_symint(g.sym_sizes());
    if (need[1]) grad_x = grad_x.reshape_symint(x.sym_sizes());
    if (need[2]) grad_w = like_weight(grad_w, w);
    return {grad_g, grad_x, grad_w};
  }
};

using LayerNormBackward = NormBackward<LayerNorm>;

std::optional<Triple> native_layer_norm_backward(const Tensor& g, const Tensor& x, SymIntArrayRef shape,
                                                 const Tensor& mean, const Tensor& rstd, const std::optional<Tensor>& w,
                                                 const std::optional<Tensor>& bias, Mask mask) {
  if (!has_kernel(x, w)) return std::nullopt;
  mask[1] = mask[1] && w && w->defined();
  mask[2] = mask[2] && bias && bias->defined();
  const Tensor plain_bias = bias && bias->defined() ? bias->detach() : Tensor();
  const LayerNorm norm{shape.vec(), mean.detach(), rstd.detach(), plain_bias};
  return LayerNormBackward::run(g, x, w, norm, mask);
}

// The statistics, which nobody differentiates, are handed over by the side: compiled autograd refuses nodes with outputs
// that are marked as such.
struct ForwardLayerNorm : torch::autograd::Function<ForwardLayerNorm> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const std::optional<Tensor>& w,
                        const std::optional<Tensor>& b, const std::vector<SymInt>& shape, double eps,
                        Statistics* statistics) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [y, mean, rstd] = at::native_layer_norm_symint(x, shape, w, b, eps);
    ctx->save_for_backward({x, optional_value(w), mean, rstd, saves_memory() ? optional_value(b) : Tensor()});
    ctx->set_materialize_grads(false);
    can_do_again(ctx);
    const bool biased = b && b->defined();
    Kept kept;
    kept.put(to_bits({true, w && w->defined(), biased})).put(static_cast<int64_t>((biased ? *b : x).scalar_type()));
    kept.put_list(shape).put_number(eps).save(ctx);
    *statistics = {mean, rstd};
    return y;
  }

  static variable_list again(AutogradContext* ctx) {
    const auto saved = ctx->get_saved_variables();
    Kept kept(ctx);
    kept.integer();
    kept.integer();
    const auto shape = kept.list();
    return {std::get<0>(
        at::native_layer_norm_symint(saved[0], shape, if_defined(saved[1]), if_defined(saved[4]), kept.number()))};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& cotangents) {
    variable_list result(6);
    const Tensor& g = cotangents[0];
    if (!g.defined()) return result;
    const auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &w = saved[1];
    Kept kept(ctx);
    const Mask mask = asked<3>(ctx, kept.integer());
    const auto bias_type = static_cast<at::ScalarType>(kept.integer());
    const auto shape = kept.list();
    LayerNorm norm{shape, saved[2], saved[3]};
    if (mask[2])  // of whose bias PyTorch's operator reads shape and type
      norm.bias = at::empty({1}, x.options().dtype(bias_type)).expand_symint(shape);
    if (LayerNormBackward::of_several(result, g, x, w, norm, mask)) return result;
    // PyTorch's batching rule takes the statistics for constants.
    const bool composed = at::GradMode::is_enabled() && is_batched(g);
    const BelowAutogradIf below(is_final(g));
    assign(result,
           composed ? norm.composed(x, w).first(g, mask)
                    : at::native_layer_norm_backward_symint(g, x, shape, norm.mean, norm.rstd, if_defined(w),
                                                            if_defined(norm.bias), mask),
           mask);
    return result;
  }
};

std::optional<Triple> native_layer_norm(const Tensor& x, SymIntArrayRef shape, const std::optional<Tensor>& w,
                                        const std::optional<Tensor>& b, double eps) {
  if (!is_plain(x) || !has_kernel(x, w) || is_small(x, 1 << 15) || saves_through_hooks()) return std::nullopt;
  Statistics statistics;
  const Tensor y = ForwardLayerNorm::apply(x, w, b, shape.vec(), eps, &statistics);
  return Triple{y, statistics.mean, statistics.rstd};
}

struct RmsNorm : torch::autograd::Function<RmsNorm> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const std::optional<Tensor>& w,
                        const std::vector<SymInt>& shape, std::optional<double> eps) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [y, rstd] = at::_fused_rms_norm(x, C10_AS_INTARRAYREF_SLOW(SymIntArrayRef(shape)), w, eps);
    ctx->save_for_backward({x, optional_value(w), rstd});
    ctx->set_materialize_grads(false);
    Kept().put(to_bits({true, w && w->defined()})).put_list(shape).save(ctx);
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& cotangents) {
    variable_list result(4);
    const Tensor& g = cotangents[0];
    if (!g.defined()) return result;
    const auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &w = saved[1];
    Kept kept(ctx);
    const auto [need_x, need_w] = asked<2>(ctx, kept.integer());
    const LayerNorm norm{kept.list(), Tensor(), saved[2]};
    const Mask mask{need_x, need_w, false};

    if (LayerNormBackward::of_several(result, g, x, w, norm, mask)) return result;
    Triple grads;
    if (is_differentiated(g)) {
      grads = norm.composed(x, w).first(g, mask);
    } else if (!at::GradMode::is_enabled()) {
      const at::AutoDispatchBelowADInplaceOrView below;
      grads = norm.backward(g, x, w, mask);
    } else if (under_functorch_grad() || is_batched(g)) {
      grads = norm.composed(x, w).first(g, mask);
    } else {
      grads = LayerNormBackward::run(g, x, if_defined(w), norm, mask);
    }
    assign(result, grads, mask);
    return result;
  }
};

std::optional<std::tuple<Tensor, Tensor>> fused_rms_norm_backward(const Tensor& g, const Tensor& x,
                                                                  at::IntArrayRef shape, const Tensor& rstd,
                                                                  const std::optional<Tensor>& w,
                                                                  std::array<bool, 2> wanted) {
  if (!has_kernel(x, w)) return std::nullopt;
  const Mask mask{wanted[0], wanted[1] && w && w->defined(), false};
  const LayerNorm norm{c10::fromIntArrayRefSlow(shape).vec(), Tensor(), rstd.detach()};
  const auto [grad_x, grad_w, none] = LayerNormBackward::run(g, x, w, norm, mask);
  return std::tuple(grad_x, grad_w);
}

std::optional<Tensor> rms_norm(const Tensor& x, SymIntArrayRef shape, const std::optional<Tensor>& w,
                               std::optional<double> eps) {
  // On CUDA PyTorch has its fused kernel only where the types agree, and for no channels_last images.
  const auto format = x.suggest_memory_format();
  const bool fused = (!w || !w->defined() || w->scalar_type() == x.scalar_type()) &&
                     format != at::MemoryFormat::ChannelsLast && format != at::MemoryFormat::ChannelsLast3d;
  // Where x needs no gradient, PyTorch does not keep it.
  if (!has_kernel(x, w) || (!x.is_cpu() && !fused) || saves_through_hooks() || !x.requires_grad() ||
      is_small(x, 1 << 12))
    return std::nullopt;
  // Refuses shapes that do not fit, with PyTorch's own words.
  TORCH_CHECK(x.dim() >= static_cast<int64_t>(shape.size()) && !shape.empty() &&
                  x.sym_sizes().slice(static_cast<size_t>(x.dim()) - shape.size()).equals(shape) &&
                  (!w || !w->defined() || w->sym_sizes().equals(shape)),
              "rms_norm: the last dimensions of the input ", x.sym_sizes(), " must be ", shape, ", as the weight's");
  return RmsNorm::apply(x, w, shape.vec(), eps);
}

}  // namespace

void register_layer_norm(Registrar& r) {
  add_folding<ForwardLayerNorm>();
  add_again<ForwardLayerNorm>();
  add_again<LayerNormBackward>();
  add_folding<RmsNorm>();
  r.replace<at::_ops::native_layer_norm, native_layer_norm, Kind::kForward>(kDoubleBackward);
  r.replace<at::_ops::native_layer_norm_backward, native_layer_norm_backward>(kDoubleBackward);
  r.replace<at::_ops::rms_norm, rms_norm, Kind::kForward>(kDoubleBackward);
  r.replace<at::_ops::_fused_rms_norm_backward, fused_rms_norm_backward>(kDoubleBackward);
}

}  // namespace rk::aten
