// Second derivatives of scaled_dot_product_attention on its fused backends, where PyTorch has none: CPU flash, and on
// CUDA flash, memory-efficient and cuDNN.
//
// The first backward stays PyTorch's.  It is a function of (grad, q, k, v, bias) alone: out and logsumexp, which it is
// given too, are functions of these.  The operator's formula (math/attention.h) differentiates P and D through q, k and v,
// so what it is given of the forward are values that it need not compute again, and no graph leads from them: their edges
// would count the same paths twice.  The second backward takes memory linear in the sequence; a third order, or second
// derivatives in a bias, go through the scores of all heads, as PyTorch's own MATH backend does.
#include <functional>

#include "attention.h"
#include "recomputed.h"
#include "replacement.h"

namespace rk::aten {
namespace {

using namespace attention;

constexpr char kOperator[] = "robustkern::attention_double_backward";

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Results double_backward(const Tensor* gg, const variable_list& in, const Settings& s, const MaskOf<5>& need) {
  return call_operator<kOperator, Results>(if_defined(gg[0]), if_defined(gg[1]), if_defined(gg[2]), in[0], in[1], in[2],
                                           in[3], if_defined(in[5]), if_defined(in[6]), if_defined(in[4]), s.causal,
                                           s.scale, need[0], need[1], need[2], need[3]);
}

// What a backend's forward left: out like grad and logsumexp [B, H, L], or neither.
struct Saved {
  Tensor out, logsumexp;
};

using Stock = std::function<variable_list()>;  // PyTorch's first backward

struct AttentionBackward : torch::autograd::Function<AttentionBackward> {
  static variable_list forward(AutogradContext* ctx, const Tensor& g, const Tensor& q, const Tensor& k, const Tensor& v,
                               const std::optional<Tensor>& bias, const Saved& saved, const Settings& s,
                               const Stock& stock) {
    ctx->save_for_backward({g, q, k, v, optional_value(bias), saved.out, saved.logsumexp});
    ctx->set_materialize_grads(false);
    Kept kept;
    kept.put(to_bits({true, true, true, true, bias && bias->defined()})).put(s.causal);
    kept.put_number(s.scale).put_number(s.dropout).save(ctx);
    can_do_again(ctx, g.is_cpu() && saved.out.defined() && s.dropout == 0);
    const at::AutoDispatchBelowADInplaceOrView below;
    return stock();
  }

  static variable_list again(AutogradContext* ctx) {
    const auto in = ctx->get_saved_variables();
    Kept kept(ctx);
    kept.integer();
    const bool causal = kept.flag();
    const double scale = kept.number();
    const auto [of_q, of_k, of_v] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
        in[0], in[1], in[2], in[3], in[5], in[6], /*dropout_p=*/0.0, causal, std::nullopt, scale);
    return {of_q, of_k, of_v};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& cotangents) {
    const auto in = ctx->get_saved_variables();
    Kept kept(ctx);
    auto need = asked<5>(ctx, kept.integer());
    const Settings s{kept.flag(), kept.number(), kept.number()};
    TORCH_CHECK_NOT_IMPLEMENTED(s.dropout == 0,
                                "robustkern: the second derivative of scaled_dot_product_attention with dropout needs "
                                "sdpa_kernel(SDPBackend.MATH) around the forward");
    Tensor gg[4];
    std::copy(cotangents.begin(), cotangents.end(), gg);
    variable_list result(8);
    const auto asked_for = need;
    if (std::none_of(gg, gg + 4, [](const Tensor& t) { return t.defined(); })) return result;

    if (composes(cotangents) || need[4] || gg[3].defined()) {
      const auto grads = second_backward(gg, in, s);
      need[3] = need[3] && (gg[0].defined() || gg[1].defined() || gg[3].defined());  // v is linear
      for (size_t i = 0; i < grads.size(); ++i)
        if (need[i]) result[i] = grads[i];
      fill_for_compiled_autograd(asked_for, result, in);
      return result;
    }

    const at::AutoDispatchBelowADInplaceOrView below;
    need[3] = need[3] && (gg[0].defined() || gg[1].defined());  // v is linear
    assign(result, double_backward(gg, in, s, need), {need[0], need[1], need[2], need[3]});
    fill_for_compiled_autograd(asked_for, result, in);
    return result;
  }
};

// What the four backends have in common.  A backend is one of the structs below.
struct Call {
  Tensor g, q, k, v;
  std::optional<Tensor> bias;
  Saved saved;
  Settings settings;
};

// A row that a bias hides entirely has a logsumexp of its own in every backend: with a bias it is computed again.  Without
// one every row sees its first key.
Saved unless(const std::optional<Tensor>& bias, const Tensor& out, const Tensor& logsumexp) {
  if (bias && bias->defined()) return {};
  return {out.detach(), logsumexp.detach()};
}

struct FlashCpu {
  using Op = at::_ops::_scaled_dot_product_flash_attention_for_cpu_backward;
  static Call call(const Tensor& g, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                   const Tensor& logsumexp, double dropout, bool causal, const std::optional<Tensor>& bias,
                   std::optional<double> scale) {
    return {g, q, k, v, bias, unless(bias, out, logsumexp), {causal, scale_of(scale, q), dropout}};
  }
};

struct FlashCuda {
  using Op = at::_ops::_scaled_dot_product_flash_attention_backward;
  static Call call(const Tensor& g, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                   const Tensor& logsumexp, const Tensor&, const Tensor&, const SymInt&, const SymInt&, double dropout,
                   bool causal, const Tensor&, const Tensor&, std::optional<double> scale) {
    return {g, q, k, v, std::nullopt, unless({}, out, logsumexp), {causal, scale_of(scale, q), dropout}};
  }
};

struct Efficient {
  using Op = at::_ops::_scaled_dot_product_efficient_attention_backward;
  // Rows of logsumexp are as many as fill its kernel's blocks.
  static Call call(const Tensor& g, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias,
                   const Tensor& out, const Tensor& logsumexp, const Tensor&, const Tensor&, double dropout,
                   std::array<bool, 4>, bool causal, std::optional<double> scale) {
    const Tensor rows = logsumexp.narrow_symint(2, 0, q.sym_size(2));
    return {g, q, k, v, if_defined(bias), unless(bias, out, rows), {causal, scale_of(scale, q), dropout}};
  }
};

struct Cudnn {
  using Op = at::_ops::_scaled_dot_product_cudnn_attention_backward;
  static Call call(const Tensor& g, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                   const Tensor& logsumexp, const Tensor&, const Tensor&, const Tensor& bias, const Tensor&,
                   const Tensor&, const SymInt&, const SymInt&, double dropout, bool causal,
                   std::optional<double> scale) {
    const Tensor rows = logsumexp.dim() == 4 ? logsumexp.squeeze(3) : logsumexp;
    return {g, q, k, v, if_defined(bias), unless(bias, out, rows), {causal, scale_of(scale, q), dropout}};
  }
};

// torch.func.grad runs a backward once at each of its levels, from the inside out.  The outer levels are those that
// differentiate what the inner ones have computed; how many lie above the one at hand:
thread_local int inner_levels = 0;

class InnerLevel {
 public:
  explicit InnerLevel(bool entered) : entered_(entered) { inner_levels += entered_; }
  ~InnerLevel() { inner_levels -= entered_; }
  InnerLevel(const InnerLevel&) = delete;
  InnerLevel& operator=(const InnerLevel&) = delete;

 private:
  const bool entered_;
};

template <class Backend, class Schema = typename Backend::Op::schema>
struct Attention;

template <class Backend, class R, class... Args>
struct Attention<Backend, R(Args...)> {
  using Op = typename Backend::Op;
  static constexpr size_t kOutputs = std::tuple_size_v<R>;

  static R kernel(c10::DispatchKeySet keys, Args... args) {
    if (serves(args...)) return fused(args...);
    const bool ours = enabled() && !uses_stock_kernels() && all_known(args...) && has_cotangent(args...);
    const bool transformed = ours && under_functorch_grad();
    if (ours && (transformed || has_tangent(args...))) {
      const Call c = Backend::call(args...);
      if (c.settings.dropout == 0) {
        if (has_tangent(args...)) return has_linear_tangents(c, args...) ? with_tangents(keys, args...) : composite(c);
        if (inner_levels > 0 || of_cotangent_alone(c)) return composite(c);
      }
    }
    const InnerLevel level(transformed);
    return Op::redispatch(stock_keys<Op>(keys), args...);
  }

 private:
  static R fused(Args... args) {
    const Call c = Backend::call(args...);
    MaskOf<kOutputs> present;
    const Stock stock = [&] {
      const R outputs = Op::call(args...);
      present = are_defined(outputs);
      return pick(outputs, present);
    };
    const auto outputs = AttentionBackward::apply(c.g, c.q, c.k, c.v, c.bias, c.saved, c.settings, stock);
    return spread(outputs, present);
  }

  // Whether a transform differentiates by the cotangent, while the graph is older than the transform.
  static bool of_cotangent_alone(const Call& c) {
    return c.g.requires_grad() && !c.q.requires_grad() && !c.k.requires_grad() && !c.v.requires_grad();
  }

  // Whether the tangents are all that is asked for, and those of kernels suffice.
  static bool has_linear_tangents(const Call& c, Args... args) {
    const auto moves_or_needed = c.bias && c.bias->defined() && (kOutputs > 3 || tangent_of(*c.bias).defined());
    return !moves_or_needed &&
           !any_tensor([](const Tensor& t) { return is_differentiated_beside_tangent(t); }, args...);
  }

  // How the first backward moves along (dg, dq, dk, dv): it is linear in g, and by q, k and v it is differentiated as the
  // second backward differentiates it for the cotangents dq, dk, dv, as <dq, grad_q> + <dk, grad_k> + <dv, grad_v> is
  // how <g, out> moves.
  static R with_tangents(c10::DispatchKeySet keys, Args... args) {
    const auto stock = [&](const auto&... primals) { return Op::redispatch(stock_keys<Op>(keys), primals...); };
    std::tuple<std::decay_t<Args>...> primals(primal_of(args)...);
    const Call moved = Backend::call(args...), c = std::apply(Backend::call, primals);
    const R grads = std::apply(stock, primals);
    const Tensor gg[] = {tangent_of(moved.q), tangent_of(moved.k), tangent_of(moved.v)};
    std::array<Tensor, 3> tangents;
    const auto add = [&](const auto& terms) {
      size_t i = 0;
      for (const Tensor& term : {std::get<0>(terms), std::get<1>(terms), std::get<2>(terms)}) {
        if (term.defined()) tangents[i] = tangents[i].defined() ? tangents[i] + term : term;
        ++i;
      }
    };
    if (const Tensor dg = tangent_of(moved.g); dg.defined()) {
      std::get<0>(primals) = dg;
      add(std::apply(stock, primals));
    }
    if (gg[0].defined() || gg[1].defined() || gg[2].defined()) {
      const auto [_, of_q, of_k, of_v] =
          double_backward(gg, {c.g, c.q, c.k, c.v, optional_value(c.bias), c.saved.out, c.saved.logsumexp}, c.settings,
                          {false, true, true, true, false});
      add(std::tuple(of_q, of_k, of_v));
    }
    const Tensor* const results[] = {&std::get<0>(grads), &std::get<1>(grads), &std::get<2>(grads)};
    for (size_t i = 0; i < 3; ++i)
      if (results[i]->defined() && tangents[i].defined()) results[i]->_set_fw_grad(tangents[i], 0, false);
    return grads;
  }

  // Under torch.func.grad of torch.func.grad, where no Function can run, and in forward mode of further orders.
  static R composite(const Call& c) {
    const auto grads = first_backward({c.g, c.q, c.k, c.v, optional_value(c.bias)}, c.settings);
    MaskOf<kOutputs> present{};
    std::fill_n(present.begin(), std::min(kOutputs, grads.size()), true);
    return spread(grads, present);
  }
};

}  // namespace

void register_attention(Registrar& r) {
  add_again<AttentionBackward>(3);
  r.add<FlashCpu::Op, Attention<FlashCpu>::kernel>(kOperator);
  r.add<FlashCuda::Op, Attention<FlashCuda>::kernel>(kOperator);
  r.add<Efficient::Op, Attention<Efficient>::kernel>(kOperator);
  r.add<Cudnn::Op, Attention<Cudnn>::kernel>(kOperator);
}

}  // namespace rk::aten
