// Second derivatives of scaled_dot_product_attention on its fused backends, where PyTorch has none: CPU flash, and on
// CUDA flash, memory-efficient and cuDNN.
//
// The first backward stays PyTorch's.  It is a function of (grad, q, k, v, bias) alone: out and logsumexp, which it is
// given too, are functions of these.  The operator's formula (math/attention.h) differentiates P and D through q, k and v,
// so what it is given of the forward are values that it need not compute again, and no graph leads from them: their edges
// would count the same paths twice.  The second backward takes memory linear in the sequence; a third order, or second derivatives in a bias, go through the scores
// of all heads, as PyTorch's own MATH backend does.
#include <cmath>
#include <functional>

#include "replacement.h"

namespace rk::aten {
namespace {

constexpr char kOperator[] = "robustkern::attention_double_backward";

struct Settings {
  bool causal;
  double scale, dropout;
};

SymInt heads_of(const Tensor& t) { return t.sym_size(1); }

Tensor per_head(const Tensor& t, const Tensor& q) {
  return heads_of(t) == heads_of(q) ? t : t.repeat_interleave_symint(heads_of(q) / heads_of(t), 1);
}

Tensor per_key_head(const Tensor& grad, const Tensor& k) {
  if (heads_of(grad) == heads_of(k)) return grad;
  auto shape = grad.sym_sizes().vec();
  shape[1] = heads_of(grad) / heads_of(k);
  shape.insert(shape.begin() + 1, heads_of(k));
  return grad.reshape_symint(shape).sum(2);
}

// What both backwards have in common, in operators that PyTorch differentiates any number of times; k and v are given to
// every head of q.
struct Composed {
  Tensor g, q, k, v, p, dp;

  Composed(const variable_list& in, const Settings& s) {
    const auto dtype = accumulation_type(in[0].scalar_type());
    const auto wide = [&](const Tensor& t) { return t.to(dtype); };
    g = wide(in[0]);
    q = wide(in[1]);
    k = wide(per_head(in[2], q));
    v = wide(per_head(in[3], q));
    Tensor scores = at::matmul(q, k.mT()) * s.scale;
    if (in[4].defined()) scores = scores + wide(in[4]);
    if (s.causal) {
      const auto ones = at::ones_symint({q.sym_size(2), k.sym_size(2)}, q.options().dtype(at::kBool));
      scores = scores.masked_fill(ones.triu(1), -std::numeric_limits<double>::infinity());
    }
    p = at::_safe_softmax(scores, -1);
    dp = at::matmul(g, v.mT());
  }
  static Tensor total(const Tensor& t) { return t.sum(-1, /*keepdim=*/true); }
};

variable_list narrowed(const variable_list& grads, const variable_list& in) {
  variable_list result;
  for (size_t i = 0; i < grads.size(); ++i) {
    Tensor grad = grads[i];
    if (i == 2 || i == 3) grad = per_key_head(grad, in[i]);
    if (i == 4) grad = at::sum_to(grad, in[i].sym_sizes());
    result.push_back(grad.to(in[i].scalar_type()));
  }
  return result;
}

// grad_q, grad_k, grad_v, and grad_bias where there is a bias.
variable_list first_backward(const variable_list& in, const Settings& s) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const Composed c(in, s);
  const Tensor ds = c.p * (c.dp - c.total(c.p * c.dp));
  variable_list grads{c.g, at::matmul(ds, c.k) * s.scale, at::matmul(ds.mT(), c.q) * s.scale,
                      at::matmul(c.p.mT(), c.g)};
  if (in[4].defined()) grads.push_back(ds);
  grads = narrowed(grads, in);
  grads.erase(grads.begin());
  return grads;
}

// grad_g, grad_q, grad_k, grad_v, and grad_bias where there is a bias, with all scores in memory: see math/attention.h.
// The cotangents of grad_q, grad_k, grad_v, grad_bias may be undefined.
variable_list second_backward(const Tensor* gg, const variable_list& in, const Settings& s) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const Composed m(in, s);
  const auto wide = [&](const Tensor& t, const Tensor& like) {
    return t.defined() ? per_head(t, m.q).to(like.scalar_type()) : at::zeros_like(like);
  };
  const Tensor a = wide(gg[0], m.q), b = wide(gg[1], m.k), c = wide(gg[2], m.v);
  Tensor t = (at::matmul(a, m.k.mT()) + at::matmul(m.q, b.mT())) * s.scale;
  if (gg[3].defined()) t = t + gg[3].to(t.scalar_type());
  const Tensor d = m.total(m.p * m.dp), ds = m.p * (m.dp - d), centred = t - m.total(m.p * t), pd = m.p * centred;
  const Tensor of_p = (m.dp - d) * centred + at::matmul(m.g, c.mT());
  const Tensor of_scores = m.p * (of_p - m.total(m.p * of_p));
  variable_list grads{at::matmul(pd, m.v) + at::matmul(m.p, c),
                      (at::matmul(of_scores, m.k) + at::matmul(ds, b)) * s.scale,
                      (at::matmul(of_scores.mT(), m.q) + at::matmul(ds.mT(), a)) * s.scale, at::matmul(pd.mT(), m.g)};
  if (in[4].defined()) grads.push_back(of_scores);
  return narrowed(grads, in);
}

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
    const at::AutoDispatchBelowADInplaceOrView below;
    return stock();
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

double scale_of(const std::optional<double>& scale, const Tensor& q) {
  return scale ? *scale : 1.0 / std::sqrt(static_cast<double>(q.sym_size(-1).guard_int(__FILE__, __LINE__)));
}

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
    if (transformed && (inner_levels > 0 || of_cotangent_alone(args...))) return composite(args...);
    if (ours && has_tangent(args...)) return composite(args...);
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
  static bool of_cotangent_alone(Args... args) {
    const Call c = Backend::call(args...);
    return c.g.requires_grad() && !c.q.requires_grad() && !c.k.requires_grad() && !c.v.requires_grad();
  }

  // In forward mode, and under torch.func.grad of torch.func.grad, where no Function can run.
  static R composite(Args... args) {
    const Call c = Backend::call(args...);
    if (c.settings.dropout != 0) return Op::call(args...);
    const auto grads = first_backward({c.g, c.q, c.k, c.v, optional_value(c.bias)}, c.settings);
    MaskOf<kOutputs> present{};
    std::fill_n(present.begin(), std::min(kOutputs, grads.size()), true);
    return spread(grads, present);
  }
};

}  // namespace

void register_attention(Registrar& r) {
  r.add<FlashCpu::Op, Attention<FlashCpu>::kernel>(kOperator);
  r.add<FlashCuda::Op, Attention<FlashCuda>::kernel>(kOperator);
  r.add<Efficient::Op, Attention<Efficient>::kernel>(kOperator);
  r.add<Cudnn::Op, Attention<Cudnn>::kernel>(kOperator);
}

}  // namespace rk::aten
