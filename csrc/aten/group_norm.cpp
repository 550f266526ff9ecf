// GroupNorm.
//
// Under create_graph PyTorch's first backward is not its operator native_group_norm_backward, which has no derivative,
// but a chain of 27 kernels.  So the forward is replaced: it runs PyTorch's own below autograd, and its backward is that
// operator, or, where a graph is built for a second derivative, ours.  Formulas: math/group_norm.h.
#include <ATen/SavedTensorHooks.h>
#include <torch/csrc/autograd/autograd.h>

#include <functional>

#include "normalization.h"

namespace rk::aten {
namespace {

constexpr char kBackward[] = "robustkern::group_norm_backward";
constexpr char kDoubleBackward[] = "robustkern::group_norm_double_backward";

// Tensors are saved past the hooks of a checkpoint.
class WithoutHooks {
 public:
  WithoutHooks() : before_(at::SavedTensorDefaultHooks::set_tracing(true)) {}
  ~WithoutHooks() { at::SavedTensorDefaultHooks::set_tracing(before_); }
  WithoutHooks(const WithoutHooks&) = delete;
  WithoutHooks& operator=(const WithoutHooks&) = delete;

 private:
  bool before_;
};

// The gradients of `outputs` in those of `inputs` that are wanted, themselves differentiable to any order: PyTorch's
// forward is run once more and differentiated.  For cotangents of mean and rstd, which native_group_norm returns too, and in
// a checkpoint, which counts what PyTorch's derivative saves.
//   forward    from tensors standing for `inputs` to the outputs, in the order of `cotangents`
variable_list derivative_of_forward(const std::function<variable_list(const variable_list&)>& forward,
                                    const variable_list& inputs, const variable_list& cotangents,
                                    const std::vector<bool>& wanted) {
  // The stand-ins keep apart what the inputs' own graphs may have in common: gradients stop at them.
  variable_list stand_ins, asked;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const bool differentiable = inputs[i].defined() && inputs[i].requires_grad();
    stand_ins.push_back(differentiable ? inputs[i].view_as(inputs[i]) : inputs[i]);
    if (wanted[i] && differentiable) asked.push_back(stand_ins.back());
  }
  variable_list outputs, grads;
  {
    const UseStock guard;
    const WithoutHooks nothing_is_counted;
    for (auto& output : forward(stand_ins)) outputs.push_back(output);
  }
  variable_list roots;
  for (size_t i = 0; i < cotangents.size(); ++i) {
    if (!cotangents[i].defined() || !outputs[i].requires_grad()) continue;
    roots.push_back(outputs[i]);
    grads.push_back(cotangents[i]);
  }
  variable_list result(inputs.size());
  if (roots.empty() || asked.empty()) return result;
  const auto found = torch::autograd::grad(roots, asked, grads, /*retain_graph=*/true, /*create_graph=*/true,
                                           /*allow_unused=*/true);
  for (size_t i = 0, k = 0; i < inputs.size(); ++i)
    if (wanted[i] && inputs[i].defined() && inputs[i].requires_grad()) result[i] = found[k++];
  return result;
}

// What the backward is given besides grad, x and weight.
struct GroupNorm {
  SymInt samples, channels, positions;
  int64_t groups;
  Tensor mean, rstd;

  std::array<Tensor, 2> statistics() const { return {mean, rstd}; }
  Kept put_into(Kept kept) const { return kept.put(samples).put(channels).put(positions).put(groups); }
  static GroupNorm of(Kept& kept, const Tensor& mean, const Tensor& rstd) {
    return {kept.symbol(), kept.symbol(), kept.symbol(), kept.integer(), mean.detach(), rstd.detach()};
  }

  // [N, C, S], a view of both layouts.
  Tensor flat(const Tensor& t) const { return t.reshape_symint({samples, channels, positions}); }
  std::optional<Tensor> vector(const Tensor& t, const Tensor& x) const {
    return in_accumulation_type(t, x.scalar_type());
  }
  Tensor statistic(const Tensor& t, const Tensor& x) const {
    return t.reshape_symint({samples, groups}).to(accumulation_type(x.scalar_type()));
  }

  // Without grad mode: PyTorch's in a plain step.  Ours for a bias without a weight, whose type PyTorch takes for the bias's
  // gradient; and for channels_last images on the CPU where PyTorch's crashes (it writes to a gradient that nobody asked
  // for), and in a penalised step, since it takes two thirds of the time.
  Triple plain_backward(const Tensor& g, const Tensor& x, const Tensor& w, const Mask& mask, bool penalised) const {
    const bool bias_alone = mask[2] && !w.defined();
    const bool innermost = x.is_cpu() && x.suggest_memory_format() != at::MemoryFormat::Contiguous;
    // Nor can PyTorch's be asked under vmap where channels lie innermost, or where the weight is of another type.
    const bool mixed = w.defined() && w.scalar_type() != x.scalar_type();
    if (is_batched(g) && (innermost || mixed)) return composed(x, w).first(g, mask);
    const BelowAutogradIf below(is_final(g));
    const bool ours = bias_alone || (innermost && (!mask[0] || (penalised && !is_batched(g))));
    if (!ours || being_compiled(x)) return stock_backward(g, x, w, mask);
    return backward(g, x, w, mask);
  }
  Triple stock_backward(const Tensor& g, const Tensor& x, const Tensor& w, const Mask& mask) const {
    const auto format = x.is_cpu() ? x.suggest_memory_format() : at::MemoryFormat::Contiguous;
    const Tensor same = g.to(x.scalar_type());  // a batched one may be wider under autocast
    return at::native_group_norm_backward_symint(same.contiguous(format), x.contiguous(format), mean, rstd,
                                                 if_defined(w), samples, channels, positions, groups, mask);
  }

  // Below autograd.
  Triple backward(const Tensor& g, const Tensor& x, const Tensor& w, const Mask& mask) const {
    if (being_compiled(x)) return stock_backward(g, x, w, mask);
    auto [grad_x, grad_w, grad_b] = call_operator<kBackward, Triple>(
        flat(g), flat(x), vector(w, x), statistic(mean, x), statistic(rstd, x), groups, mask[0], mask[1], mask[2]);
    if (mask[0]) grad_x = unflattened(grad_x, x);
    const auto dtype = w.defined() ? w.scalar_type() : x.scalar_type();
    if (mask[1]) grad_w = grad_w.to(dtype);
    if (mask[2]) grad_b = grad_b.to(dtype);
    return {grad_x, grad_w, grad_b};
  }

  ComposedNorm composed(const Tensor& x, const Tensor& w) const {
    const SymInt width = channels / groups;
    const auto statistic_of = [&](const Tensor& t) {
      return t.to(accumulation_type(x.scalar_type())).reshape_symint({samples, groups, 1, 1});
    };
    return {{{samples, groups, width, positions}, {groups, width, 1}, {channels}, {-1}, {-2}, {-4, -1}},
            x,
            w,
            statistic_of(mean),
            statistic_of(rstd),
            false};
  }

  static constexpr bool statistics_are_constant() { return false; }
  static constexpr bool remembers_all() { return true; }
  static bool bends(const Tensor& u, const Tensor& a) { return u.defined() || a.defined(); }

  // Below autograd.
  Triple double_backward(const Tensor& u, const Tensor& a, const Tensor& b, const Tensor& g, const Tensor& x,
                         const Tensor& w, const Mask& need) const {
    const auto flat_u = if_defined(u, [&](const Tensor& t) { return flat(t); });
    auto [grad_g, grad_x, grad_w] = call_operator<kDoubleBackward, Triple>(
        flat_u, vector(a, x), vector(b, x), flat(g), flat(x), vector(w, x), statistic(mean, x), statistic(rstd, x),
        groups, need[0], need[1], need[2]);
    if (need[0]) grad_g = unflattened(grad_g, g);
    if (need[1]) grad_x = unflattened(grad_x, x);
    if (need[2]) grad_w = grad_w.to(w.scalar_type());
    return {grad_g, grad_x, grad_w};
  }
};

using GroupNormBackward = NormBackward<GroupNorm>;

struct NativeGroupNorm : torch::autograd::Function<NativeGroupNorm> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const std::optional<Tensor>& w,
                               const std::optional<Tensor>& b, const GroupNorm& norm, double eps) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [y, mean, rstd] =
        at::native_group_norm_symint(x, w, b, norm.samples, norm.channels, norm.positions, norm.groups, eps);
    variable_list kept_tensors{x, optional_value(w), mean,
                               rstd};  // as PyTorch's node, in its order: a checkpoint counts them
    if (saves_memory() && !saves_through_hooks()) {
      kept_tensors.push_back(optional_value(b));
      can_do_again(ctx);
    }
    ctx->save_for_backward(std::move(kept_tensors));
    ctx->set_materialize_grads(false);
    norm.put_into(Kept().put(to_bits({true, w && w->defined(), b && b->defined()})).put_number(eps)).save(ctx);
    return {y, mean, rstd};
  }

  static variable_list again(AutogradContext* ctx) {
    const auto saved = ctx->get_saved_variables();
    Kept kept(ctx);
    kept.integer();
    const double eps = kept.number();
    const GroupNorm norm = GroupNorm::of(kept, saved[2], saved[3]);
    return {std::get<0>(at::native_group_norm_symint(saved[0], if_defined(saved[1]), if_defined(saved[4]), norm.samples,
                                                     norm.channels, norm.positions, norm.groups, eps))};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& cotangents) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &w = saved[1], &g = cotangents[0];
    Kept kept(ctx);
    const Mask mask = asked<3>(ctx, kept.integer());
    const double eps = kept.number();
    const GroupNorm norm = GroupNorm::of(kept, saved[2], saved[3]);
    variable_list result(5);
    const bool of_statistics = cotangents[1].defined() || cotangents[2].defined();
    if (!g.defined() && !of_statistics) return result;

    const bool builds_graph = at::GradMode::is_enabled();
    if (of_statistics || (builds_graph && in_checkpoint())) {
      const auto forward = [&](const variable_list& in) -> variable_list {
        const auto [y, mean, rstd] = at::native_group_norm_symint(
            in[0], if_defined(in[1]), if_defined(in[2]), norm.samples, norm.channels, norm.positions, norm.groups, eps);
        return {y, mean, rstd};
      };
      const at::AutoGradMode grad_mode(true);
      Tensor b;  // any: its gradient does not depend on it
      if (mask[2]) b = at::zeros_symint({norm.channels}, (w.defined() ? w : x).options()).requires_grad_();
      const auto grads = derivative_of_forward(forward, {x, w, b}, cotangents, {mask[0], mask[1], mask[2]});
      std::copy(grads.begin(), grads.end(), result.begin());
      return result;
    }
    Triple grads;
    if (builds_graph) ctx->saved_data["penalised"] = true;  // the engine runs a node in one thread at a time
    if (is_differentiated(g) || (builds_graph && (is_batched(g) || under_functorch_grad())))
      grads = norm.composed(x, w).first(g, mask);
    else if (builds_graph)
      grads = GroupNormBackward::run(g, x, if_defined(w), norm, mask);
    else
      grads = norm.plain_backward(g, x, w, mask, ctx->saved_data.count("penalised") > 0);
    assign(result, grads, mask);
    return result;
  }
};

std::optional<Triple> native_group_norm(const Tensor& x, const std::optional<Tensor>& w, const std::optional<Tensor>& b,
                                        SymInt samples, SymInt channels, SymInt positions, int64_t groups, double eps) {
  // Where channels lie innermost PyTorch's own crashes, or knows no batches, as said above.
  const bool small = is_small(x, 1 << 14) && x.suggest_memory_format() == at::MemoryFormat::Contiguous;
  if (!has_kernel(x, w) || small) return std::nullopt;
  const GroupNorm norm{samples, channels, positions, groups, Tensor(), Tensor()};
  const auto outputs = NativeGroupNorm::apply(x, w, b, norm, eps);
  return Triple{outputs[0], outputs[1], outputs[2]};
}

std::optional<Triple> native_group_norm_backward(const Tensor& g, const Tensor& x, const Tensor& mean,
                                                 const Tensor& rstd, const std::optional<Tensor>& w, SymInt samples,
                                                 SymInt channels, SymInt positions, int64_t groups, Mask mask) {
  if (!has_kernel(x, w)) return std::nullopt;
  const GroupNorm norm{samples, channels, positions, groups, mean.detach(), rstd.detach()};
  return GroupNormBackward::run(g, x, w, norm, mask);
}

}  // namespace

void register_group_norm(Registrar& r) {
  add_again<NativeGroupNorm>();
  add_again<GroupNormBackward>();
  r.replace<at::_ops::native_group_norm, native_group_norm, Kind::kForward>(kDoubleBackward);
  r.replace<at::_ops::native_group_norm_backward, native_group_norm_backward>(kDoubleBackward);
}

}  // namespace rk::aten
