// Forward mode of attention: the derivatives of attention_jvp, and scaled_dot_product_attention on its fused backends, where
// PyTorch has no tangents.
//
// L = <g, out> + <u, tangent>.  Along a direction, the tangent is what the second backward gives for the cotangent of the
// output, so that L's gradients are those of derivatives that exist already:
//
//   in q, k, v          the first backward of g, and the second backward of u, whose cotangents a, b, c are the tangents
//   in their tangents   the first backward of u
//
// The second backward is our operator, the first one PyTorch's own; both take memory linear in the sequence.  What moves a
// mask or is differentiated further is composed, with the scores of all heads in memory.
#include <torch/csrc/autograd/autograd.h>

#include <limits>

#include "attention.h"
#include "python.h"
#include "replacement.h"

namespace rk::aten {
namespace {

using namespace attention;

constexpr char kJvp[] = "robustkern::attention_jvp", kDoubleBackward[] = "robustkern::attention_double_backward";

using Maybe = std::optional<Tensor>;
using Results = std::tuple<Tensor, Tensor, Tensor>;  // out, tangent, logsumexp

// Below autograd or above: as the caller stands.
Results call_jvp(const Inputs& in, const Inputs& tangents, const Settings& s) {
  return call_operator<kJvp, Results>(in.q, in.k, in.v, if_defined(tangents.q), if_defined(tangents.k),
                                      if_defined(tangents.v), if_defined(in.bias), if_defined(tangents.bias), s.causal,
                                      s.scale);
}

// ------------------------------------------------------------------ the operator's derivatives

// As the backward of the CPU's kernel expects it: zero of a row that attends to nothing.
Tensor finite(const Tensor& logsumexp) {
  return logsumexp.masked_fill(logsumexp == -std::numeric_limits<double>::infinity(), 0.0);
}

// Gradients of the cotangent g of the output in q, k and v, by PyTorch's fused kernels.
variable_list stock_backward(const Tensor& g, const variable_list& in, const Settings& s) {
  const Tensor &q = in[0], &k = in[1], &v = in[2];
  Tensor bias = in[6];
  if (bias.defined()) bias = bias.to(accumulation_type(q.scalar_type()));
  if (q.is_cpu() && q.sym_size(3) == v.sym_size(3) && q.sym_numel() != 0 && k.sym_numel() != 0) {
    while (bias.defined() && bias.dim() < 4) bias = bias.unsqueeze(0);
    const auto [of_q, of_k, of_v] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
        g, q, k, v, in[8], finite(in[9]), /*dropout_p=*/0.0, s.causal, if_defined(bias), s.scale);
    return {of_q, of_k, of_v};
  }
  // Whatever kernel it chooses keeps for its backward what we do not have.
  const at::AutoGradMode record(true);
  const variable_list leaves{q.detach().requires_grad_(), k.detach().requires_grad_(), v.detach().requires_grad_()};
  const Tensor out =
      at::scaled_dot_product_attention(leaves[0], leaves[1], leaves[2], if_defined(bias), /*dropout_p=*/0.0, s.causal,
                                       s.scale, /*enable_gqa=*/q.sym_size(1) != k.sym_size(1));
  const python::WithoutGil free;  // which compiled autograd holds, and the engine must not
  return torch::autograd::grad({out}, leaves, {g});
}

struct AttentionJvp : torch::autograd::Function<AttentionJvp> {
  static constexpr size_t kInputs = 8;  // q, k, v, their tangents, the mask and its tangent

  static variable_list forward(AutogradContext* ctx, const Tensor& q, const Tensor& k, const Tensor& v,
                               const Maybe& q_tangent, const Maybe& k_tangent, const Maybe& v_tangent,
                               const Maybe& mask, const Maybe& mask_tangent, const Settings& s, Tensor* logsumexp) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const variable_list in{q,
                           k,
                           v,
                           optional_value(q_tangent),
                           optional_value(k_tangent),
                           optional_value(v_tangent),
                           optional_value(mask),
                           optional_value(mask_tangent)};
    Tensor out, tangent;
    std::tie(out, tangent, *logsumexp) = call_jvp({q, k, v, in[6]}, {in[3], in[4], in[5], in[7]}, s);
    ctx->set_materialize_grads(false);
    MaskOf<kInputs> given;
    for (size_t i = 0; i < kInputs; ++i) given[i] = in[i].defined();
    Kept().put(to_bits(given)).put(s.causal).put_number(s.scale).save(ctx);
    variable_list saved = in;
    saved.insert(saved.end(), {out, *logsumexp});
    ctx->save_for_backward(std::move(saved));
    return {out, tangent};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& cotangents) {
    const Tensor &g = cotangents[0], &u = cotangents[1];
    variable_list result(kInputs + 2);
    const auto in = ctx->get_saved_variables();
    Kept kept(ctx);
    const auto need = asked<kInputs>(ctx, kept.integer());
    const bool causal = kept.flag();
    const Settings s{causal, kept.number(), 0};
    const bool primal = need[0] || need[1] || need[2], tangent = need[3] || need[4] || need[5];
    if (composes({g, u}) || need[6] || need[7] || in[7].defined())
      composed(result, g, u, in, s);
    else
      by_kernels(result, primal ? g : Tensor(), u, in, s, need, tangent);
    for (size_t i = 0; i < kInputs; ++i)
      if (!need[i]) result[i] = Tensor();
    fill_for_compiled_autograd(need, result, in);
    return result;
  }

 private:
  static void add(Tensor& sum, const Tensor& term) { sum = sum.defined() ? sum + term : term; }

  static void by_kernels(variable_list& result, const Tensor& g, const Tensor& u, const variable_list& in,
                         const Settings& s, const MaskOf<kInputs>& need, bool of_tangents) {
    const auto put = [&](size_t first, const variable_list& grads) {
      for (size_t i = 0; i < 3; ++i) add(result[first + i], grads[i]);
    };
    if (g.defined()) put(0, stock_backward(g, in, s));
    if (!u.defined()) return;
    if (of_tangents) put(3, stock_backward(u, in, s));
    if (!(need[0] || need[1] || need[2]) || !(in[3].defined() || in[4].defined() || in[5].defined())) return;
    const at::AutoDispatchBelowADInplaceOrView below;
    const bool masked = in[6].defined();  // hidden rows have no logsumexp: it computes them again
    const auto [_, of_q, of_k, of_v] = call_operator<kDoubleBackward, std::tuple<Tensor, Tensor, Tensor, Tensor>>(
        if_defined(in[3]), if_defined(in[4]), if_defined(in[5]), u, in[0], in[1], in[2],
        masked ? Maybe() : Maybe(in[8]), masked ? Maybe() : Maybe(in[9]), if_defined(in[6]), s.causal, s.scale, false,
        need[0], need[1], need[2]);
    const Tensor* const second[] = {&of_q, &of_k, &of_v};
    for (size_t i = 0; i < 3; ++i)
      if (need[i]) add(result[i], *second[i]);
  }

  static void composed(variable_list& result, const Tensor& g, const Tensor& u, const variable_list& in,
                       const Settings& s) {
    const auto to = [&](std::initializer_list<size_t> inputs, const variable_list& grads, size_t skipped) {
      size_t k = skipped;
      for (const size_t i : inputs)
        if (k < grads.size()) add(result[i], grads[k++]);
    };
    if (g.defined()) to({0, 1, 2, 6}, first_backward({g, in[0], in[1], in[2], in[6]}, s), 0);
    if (!u.defined()) return;
    const Tensor along[] = {in[3], in[4], in[5], in[7]};
    to({0, 1, 2, 6}, second_backward(along, {u, in[0], in[1], in[2], in[6]}, s), 1);
    to({3, 4, 5, 7}, first_backward({u, in[0], in[1], in[2], in[6]}, s), 0);
  }
};

Results attention_jvp(c10::DispatchKeySet keys, const Tensor& q, const Tensor& k, const Tensor& v,
                      const Maybe& q_tangent, const Maybe& k_tangent, const Maybe& v_tangent, const Maybe& mask,
                      const Maybe& mask_tangent, bool causal, double scale) {
  const Settings s{causal, scale, 0};
  const auto any = [&](const auto& holds) {
    return any_tensor(holds, q, k, v, q_tangent, k_tangent, v_tangent, mask, mask_tangent);
  };
  const bool tracked = at::GradMode::is_enabled() && any([](const Tensor& t) { return t.requires_grad(); });
  const bool moves = any([](const Tensor& t) { return t._fw_grad(0).defined(); });
  if (!tracked && !moves) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow(kJvp, "")
                               .typed<Results(const Tensor&, const Tensor&, const Tensor&, const Maybe&, const Maybe&,
                                              const Maybe&, const Maybe&, const Maybe&, bool, double)>();
    const at::AutoDispatchBelowADInplaceOrView below;
    return op.redispatch(keys & c10::after_autograd_keyset, q, k, v, q_tangent, k_tangent, v_tangent, mask,
                         mask_tangent, causal, scale);
  }
  const Inputs in{q, k, v, optional_value(mask)};
  const Inputs tangents{optional_value(q_tangent), optional_value(k_tangent), optional_value(v_tangent),
                        optional_value(mask_tangent)};
  if (moves || under_functorch_grad()) return forward_mode(in, tangents, s);
  Tensor logsumexp;  // not a result of the Function: nothing differentiates it
  const auto results = AttentionJvp::apply(q, k, v, q_tangent, k_tangent, v_tangent, mask, mask_tangent, s, &logsumexp);
  return {results[0], results[1], logsumexp};
}

// ------------------------------------------------------------------ PyTorch's operators

struct Call {
  Inputs in;
  Settings settings;
};

struct FlashCpu {
  using Op = at::_ops::_scaled_dot_product_flash_attention_for_cpu;
  static Call call(const Tensor& q, const Tensor& k, const Tensor& v, double dropout, bool causal, const Maybe& bias,
                   std::optional<double> scale) {
    return {{q, k, v, optional_value(bias)}, {causal, scale_of(scale, q), dropout}};
  }
};

struct FlashCuda {
  using Op = at::_ops::_scaled_dot_product_flash_attention;
  static Call call(const Tensor& q, const Tensor& k, const Tensor& v, double dropout, bool causal, bool,
                   std::optional<double> scale) {
    return {{q, k, v, Tensor()}, {causal, scale_of(scale, q), dropout}};
  }
};

struct Efficient {
  using Op = at::_ops::_scaled_dot_product_efficient_attention;
  static Call call(const Tensor& q, const Tensor& k, const Tensor& v, const Maybe& bias, bool, double dropout,
                   bool causal, std::optional<double> scale) {
    return {{q, k, v, optional_value(bias)}, {causal, scale_of(scale, q), dropout}};
  }
};

struct Cudnn {
  using Op = at::_ops::_scaled_dot_product_cudnn_attention;
  static Call call(const Tensor& q, const Tensor& k, const Tensor& v, const Maybe& bias, bool, double dropout,
                   bool causal, bool, std::optional<double> scale) {
    return {{q, k, v, optional_value(bias)}, {causal, scale_of(scale, q), dropout}};
  }
};

template <class Backend, class Schema = typename Backend::Op::schema>
struct ForwardMode;

template <class Backend, class R, class... Args>
struct ForwardMode<Backend, R(Args...)> {
  using Op = typename Backend::Op;

  static R kernel(c10::DispatchKeySet keys, Args... args) {
    if constexpr (std::is_same_v<Backend, FlashCpu>)
      if (serves(args...))
        if (const auto results = forward_that_folds(args...)) return *results;
    if (!enabled() || uses_stock_kernels() || !has_tangent(args...) || !all_known(args...))
      return Op::redispatch(stock_keys<Op>(keys), args...);
    const Call c = Backend::call(args...);
    TORCH_CHECK_NOT_IMPLEMENTED(c.settings.dropout == 0,
                                "robustkern: the derivative of scaled_dot_product_attention in forward mode with "
                                "dropout needs sdpa_kernel(SDPBackend.MATH) around it");
    const auto each = [&](const auto& f) { return Inputs{f(c.in.q), f(c.in.k), f(c.in.v), f(c.in.bias)}; };
    const auto [out, tangent, logsumexp] =
        call_jvp(each([](const Tensor& t) { return primal_of(t); }), each(tangent_of), c.settings);
    const R results = values(out, logsumexp, args...);
    std::get<0>(results)._set_fw_grad(tangent, /*level=*/0, /*is_inplace_op=*/false);
    return results;
  }

 private:
  // As the backend's own backward expects them; where it asks for more than these two, by the backend itself.
  static R values(const Tensor& out, const Tensor& logsumexp, Args... args) {
    if constexpr (std::tuple_size_v<R> == 2)
      return {out, finite(logsumexp)};
    else
      return Op::call(primal_of(args)...);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(robustkern, Autograd, m) { m.impl("attention_jvp", TORCH_FN(attention_jvp)); }

void register_attention_jvp(Registrar& r) {
  add_attention_folding();
  r.add<FlashCpu::Op, ForwardMode<FlashCpu>::kernel>(kJvp);
  r.add<FlashCuda::Op, ForwardMode<FlashCuda>::kernel>(kJvp);
  r.add<Efficient::Op, ForwardMode<Efficient>::kernel>(kJvp);
  r.add<Cudnn::Op, ForwardMode<Cudnn>::kernel>(kJvp);
}

}  // namespace rk::aten
