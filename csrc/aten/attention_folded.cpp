// Attention's forward on the CPU, by a node that takes several cotangents at once.
//
//   forward           PyTorch's own, which saves q, k, v, out and logsumexp, as PyTorch's node does
//   first backward    of one cotangent PyTorch's operator, whose replacement is in attention.cpp; of K of them here
//   second backward   the operator, once for each cotangent
//
// What K cotangents share, q, k and v and with them the scores, is a twelfth of the second backward's products: attention itself
// works on one after the other, in place.  What is gained lies in the layers around it, which fold only if it does.
#include "attention.h"
#include "cotangents.h"
#include "replacement.h"

namespace rk::aten {
namespace {

using namespace attention;

constexpr char kDoubleBackward[] = "robustkern::attention_double_backward";

// What a graph keeps of a forward: q, k, v, out, logsumexp and the mask, which may be undefined.
struct Forward {
  Tensor q, k, v, out, logsumexp, mask;
  bool causal;
  double scale;

  static Forward of(const variable_list& saved, Kept& kept) {
    const bool causal = kept.flag();
    return {saved[0], saved[1], saved[2], saved[3], saved[4], saved[5], causal, kept.number()};
  }
  void save(AutogradContext* ctx, Tensor g = {}) const {
    ctx->save_for_backward({q, k, v, out, logsumexp, mask, g});
    ctx->set_materialize_grads(false);
    Kept().put(causal).put_number(scale).save(ctx);
  }
  auto backward(const Tensor& g) const {
    return at::_scaled_dot_product_flash_attention_for_cpu_backward(g, q, k, v, out, logsumexp, /*dropout_p=*/0.0,
                                                                    causal, if_defined(mask), scale);
  }
};

// The first backward of cotangents [K, B, H, L, E].
struct SeveralBackward : torch::autograd::Function<SeveralBackward> {
  static variable_list forward(AutogradContext* ctx, const Tensor& g, const Tensor& q, const Tensor& k, const Tensor& v,
                               const Forward& f) {
    const at::AutoDispatchBelowADInplaceOrView below;
    Forward saved = f;
    std::tie(saved.q, saved.k, saved.v) = std::tie(q, k, v);
    saved.save(ctx, g);
    variable_list grads;
    for (int64_t i = 0; i < g.size(0); ++i) {
      const auto [of_q, of_k, of_v] = f.backward(g[i]);
      const Tensor* const each[] = {&of_q, &of_k, &of_v};
      for (size_t j = 0; j < 3; ++j) {
        if (i == 0) grads.push_back(several_like(*each[j], g.size(0)));
        grads[j][i].copy_(*each[j]);
      }
    }
    return grads;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gg) {
    const auto saved = ctx->get_saved_variables();
    const Tensor& g = saved[6];
    Kept kept(ctx);
    const Forward f = Forward::of(saved, kept);
    const auto need = asked<4>(ctx);
    variable_list result(5);
    const bool scores_move = gg[0].defined() || gg[1].defined();
    if (!scores_move && !gg[2].defined()) return result;

    const bool composed = composes(gg);
    const BelowAutogradIf below(!composed);
    const auto add = [&](size_t i, const Tensor& term) { result[i] = result[i].defined() ? result[i] + term : term; };
    variable_list of_g;
    for (int64_t i = 0; i < g.size(0); ++i) {
      const auto one = [&](const Tensor& t) { return t.defined() ? t[i] : t; };
      const Tensor cotangents[] = {one(gg[0]), one(gg[1]), one(gg[2]), Tensor()};
      if (composed) {
        const auto grads = second_backward(cotangents, {g[i], f.q, f.k, f.v, f.mask}, {f.causal, f.scale, 0});
        of_g.push_back(grads[0]);
        for (size_t j = 1; j < 4; ++j) add(j, grads[j]);
        continue;
      }
      const bool trusted = !f.mask.defined();  // see attention.cpp
      const auto [of_grad, of_q, of_k, of_v] =
          call_operator<kDoubleBackward, std::tuple<Tensor, Tensor, Tensor, Tensor>>(
              if_defined(cotangents[0]), if_defined(cotangents[1]), if_defined(cotangents[2]), g[i], f.q, f.k, f.v,
              if_defined(trusted ? f.out : Tensor()), if_defined(trusted ? f.logsumexp : Tensor()), if_defined(f.mask),
              f.causal, f.scale, need[0], need[1], need[2], need[3]);
      if (need[0]) {
        if (i == 0) result[0] = several_like(of_grad, g.size(0));
        result[0][i].copy_(of_grad);
      }
      const Tensor* const shared[] = {&of_q, &of_k, &of_v};
      for (size_t j = 1; j < 4; ++j)
        if (need[j]) result[j].defined() ? void(result[j].add_(*shared[j - 1])) : void(result[j] = *shared[j - 1]);
    }
    if (composed) result[0] = at::stack(of_g);
    if (!scores_move) result[3] = Tensor();  // v is linear
    for (size_t j = 0; j < 4; ++j)
      if (!need[j]) result[j] = Tensor();
    return result;
  }

 private:
  // K of them in the layout of one.
  static Tensor several_like(const Tensor& one, int64_t count) {
    auto shape = one.sizes().vec(), strides = one.strides().vec();
    shape.insert(shape.begin(), count);
    strides.insert(strides.begin(), one.numel());
    return at::empty_strided(shape, strides, one.options());
  }
};

// logsumexp, which nobody differentiates, is handed over by the side, as LayerNorm's statistics are.
struct ForwardAttention : torch::autograd::Function<ForwardAttention> {
  static Tensor forward(AutogradContext* ctx, const Tensor& q, const Tensor& k, const Tensor& v,
                        const std::optional<Tensor>& mask, bool causal, double scale, Tensor* logsumexp) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [out, sums] =
        at::_scaled_dot_product_flash_attention_for_cpu(q, k, v, /*dropout_p=*/0.0, causal, mask, scale);
    Forward{q, k, v, out, sums, optional_value(mask), causal, scale}.save(ctx);
    *logsumexp = sums;
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& cotangents) {
    variable_list result(7);
    const Tensor& g = cotangents[0];
    if (!g.defined()) return result;
    Kept kept(ctx);
    const Forward f = Forward::of(ctx->get_saved_variables(), kept);
    const auto several = for_several(g, [&](const Tensor& gs) {
      Forward detached = f;
      detached.out = f.out.detach();
      return SeveralBackward::apply(gs, f.q, f.k, f.v, detached);
    });
    const BelowAutogradIf below(is_final(g));
    const auto need = asked<3>(ctx);
    if (several) {
      for (size_t i = 0; i < 3; ++i)
        if (need[i]) result[i] = (*several)[i];
    } else {
      assign(result, f.backward(g), need);
    }
    return result;
  }
};

}  // namespace

namespace attention {

std::optional<std::tuple<Tensor, Tensor>> forward_that_folds(const Tensor& q, const Tensor& k, const Tensor& v,
                                                             double dropout, bool causal,
                                                             const std::optional<Tensor>& mask,
                                                             std::optional<double> scale) {
  if (!is_plain(q) || !is_plain(k) || !is_plain(v) || dropout != 0 ||
      (mask && mask->defined() && mask->requires_grad()) || saves_through_hooks())
    return std::nullopt;
  Tensor logsumexp;
  const Tensor out = ForwardAttention::apply(q, k, v, mask, causal, scale_of(scale, q), &logsumexp);
  return std::tuple(out, logsumexp);
}

void add_attention_folding() { add_folding<ForwardAttention>(); }

}  // namespace attention
}  // namespace rk::aten
