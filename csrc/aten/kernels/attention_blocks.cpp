// attention_double_backward for CUDA: by the kernels of cuda/attention.cu where they serve the call, and otherwise, on any
// device, in PyTorch's own matrix products.  Formulas: math/attention.h.
//
// All heads at once, and rows of q in blocks: six matrices of a block's scores exist at a time, so memory is linear in
// the sequence.  Only shapes decide what is launched: nothing waits for the device, and a CUDA graph can hold all of it.
// Scores are computed in the accumulation type.  Products of 16 bits take 16-bit factors, to which P, Pd, W and dS are
// rounded as flash attention does, and give float32; those of float32 are what PyTorch is set to (TF32 too).
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/headeronly/version.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>

#include "attention_arguments.h"

namespace rk::aten {
namespace {

constexpr int64_t kBlockScores = 1 << 24;  // entries of one matrix of scores: 64 MiB in float32
constexpr int64_t kLeastRows = 16;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

Tensor mean_under(const Tensor& p, const Tensor& x) { return (p * x).sum(-1, /*keepdim=*/true); }

class Blocks {
 public:
  explicit Blocks(const AttentionCall& call) : call_(call) {
    k_ = flat(in_.k);
    b_ = flat(in_.b);
    if (in_.a && in_.b) keys_ = at::cat({k_, b_}, 2);
    v_ = flat(in_.v);
    c_ = flat(in_.c);
    if (in_.mask) mask_ = additive_mask(*in_.mask, s_);
    if (plan_.k) sum_k_ = at::zeros_like(wide(k_));
    if (plan_.v) sum_v_ = at::zeros_like(wide(v_));
  }

  void run() {
    const int64_t per_row = s_.batch * s_.heads * s_.keys;
    const int64_t rows = std::max(kLeastRows, kBlockScores / per_row);
    for (int64_t first = 0; first < s_.queries; first += rows) run_block(first, std::min(rows, s_.queries - first));
    const auto keep = [&](const Tensor& sum, const Tensor& to) { to.copy_(sum.view(to.sizes())); };
    if (plan_.k) keep(sum_k_, std::get<2>(call_.results));
    if (plan_.v) keep(sum_v_, std::get<3>(call_.results));
  }

 private:
  Tensor wide(const Tensor& t) const { return t.to(accumulation_type(s_.dtype)); }
  Tensor rounded(const Tensor& t) const { return t.defined() ? t.to(s_.dtype) : t; }

  // x y, in the accumulation type.
  Tensor product(const Tensor& x, const Tensor& y) const {
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 11
    const auto dtype = accumulation_type(s_.dtype);
    if (x.is_cuda() && dtype != s_.dtype) return at::bmm(x, y, dtype);
#endif
    return at::bmm(wide(x), wide(y));
  }

  // x y + z w, without terms whose first factor is not defined.
  Tensor products(const Tensor& x, const Tensor& y, const Tensor& z, const Tensor& w) const {
    if (!x.defined()) return product(z, w);
    Tensor sum = product(x, y);
    return z.defined() ? sum.add_(product(z, w)) : sum;
  }

  // [B G, rows, D]: the heads of q that share a head of k are so many more rows.
  Tensor flat(const Tensor& t) const { return t.reshape({s_.batch * s_.key_heads, -1, t.size(3)}); }
  Tensor flat(const std::optional<Tensor>& t) const { return t ? flat(*t) : Tensor(); }

  Tensor rows_of(const Tensor& t, int64_t first, int64_t rows) const { return flat(t.narrow(2, first, rows)); }
  Tensor rows_of(const std::optional<Tensor>& t, int64_t first, int64_t rows) const {
    return t ? rows_of(*t, first, rows) : Tensor();
  }

  // [B G, group rows, S] as [B, H, rows, S]
  Tensor per_head(const Tensor& scores, int64_t rows) const {
    return scores.view({s_.batch, s_.heads, rows, scores.size(2)});
  }

  Tensor probabilities(const Tensor& q, const Tensor& k, int64_t first, int64_t rows) const {
    Tensor s = product(q, k.mT()).mul_(call_.scale);
    const int64_t cols = k.size(1);
    if (mask_.defined()) per_head(s, rows).add_(mask_.narrow(2, first, rows).narrow(3, 0, cols));
    if (call_.causal) {
      const auto hidden = at::ones({rows, cols}, s.options().dtype(at::kBool)).triu_(first + 1);
      per_head(s, rows).masked_fill_(hidden, -kInfinity);
    }
    if (!mask_.defined()) return at::softmax(s, -1);
    const Tensor masked = s.amax(-1, /*keepdim=*/true) == -kInfinity;  // everywhere: the row attends to nothing
    return at::softmax(s, -1).masked_fill_(masked, 0.0);
  }

  void run_block(int64_t first, int64_t rows) {
    const int64_t cols = call_.causal ? std::min(s_.keys, first + rows) : s_.keys;
    const auto head = [&](const Tensor& t) { return t.defined() ? t.narrow(1, 0, cols) : t; };
    const Tensor k = head(k_), b = head(b_), v = head(v_), c = head(c_);
    const Tensor q = rows_of(in_.q, first, rows), a = rows_of(in_.a, first, rows), g = rows_of(in_.grad, first, rows);
    const Tensor p = probabilities(q, k, first, rows);
    Tensor t, slope, bend;  // T - t, dP - D, G - g
    if (plan_.tangent()) {
      const Tensor left = plan_.a && plan_.b ? at::cat({a, q}, 2) : plan_.a ? a : q;
      const Tensor right = plan_.a && plan_.b ? head(keys_) : plan_.a ? k : b;
      t = product(left, right.mT()).mul_(call_.scale);
      t.sub_(mean_under(p, t));
    }
    if (plan_.slope()) {
      slope = product(g, v.mT());
      slope.sub_(in_.out ? (wide(g) * rows_of(in_.out, first, rows)).sum(-1, /*keepdim=*/true) : mean_under(p, slope));
    }
    if (plan_.mixed()) bend = product(g, c.mT());
    if (plan_.slope()) bend = bend.defined() ? bend.addcmul_(slope, t) : slope * t;
    if (plan_.bend()) bend.sub_(mean_under(p, bend)).mul_(p);
    if (slope.defined()) slope.mul_(p);
    if (t.defined()) t.mul_(p);
    const Tensor moved = rounded(t), w = rounded(bend), ds = rounded(slope);  // Pd, W, dS
    const auto keep = [&](const Tensor& block, const Tensor& to) {
      to.narrow(2, first, rows).copy_(per_head(block, rows));
    };
    if (plan_.grad) keep(products(moved, v, plan_.c ? rounded(p) : Tensor(), c), std::get<0>(call_.results));
    if (plan_.q) {
      const Tensor out = products(w, k, plan_.b ? ds : Tensor(), b);
      keep(out.mul(call_.scale), std::get<1>(call_.results));
    }
    if (plan_.k) {
      const Tensor ds_turned = plan_.a ? ds.mT() : Tensor();
      head(sum_k_).add_(products(w.mT(), q, ds_turned, a), call_.scale);
    }
    if (plan_.v) head(sum_v_).add_(product(moved.mT(), g));
  }

  const AttentionCall& call_;
  const AttentionArguments& in_ = call_.in;
  const AttentionShape& s_ = call_.shape;
  const AttentionPlan& plan_ = call_.plan;
  Tensor k_, b_, v_, c_, keys_, mask_, sum_k_, sum_v_;  // keys_: k and B beside each other
};

// Whether the kernels have done it.  The extension that has them may be absent.
bool fused(const AttentionCall& call) {
  const auto& [in, shape, plan, causal, scale, results] = call;
  const auto op = c10::Dispatcher::singleton().findSchema({"robustkern_cuda::attention_double_backward", ""});
  if (!op || !op->hasKernelForDispatchKey(in.q.is_cuda() ? c10::DispatchKey::CUDA : c10::DispatchKey::CPU))
    return false;
  // With TF32, PyTorch's products are several times as fast as any in float32.
  if (shape.dtype == at::kFloat && in.q.is_cuda() && at::globalContext().allowTF32CuBLAS()) return false;
  using Optional = std::optional<Tensor>;
  const auto result = [](bool computed, const Tensor& t) { return computed ? Optional(t) : std::nullopt; };
  return op
      ->typed<bool(const Optional&, const Optional&, const Optional&, const Tensor&, const Tensor&, const Tensor&,
                   const Tensor&, const Optional&, const Optional&, const Optional&, bool, double, const Optional&,
                   const Optional&, const Optional&, const Optional&)>()
      .call(in.a, in.b, in.c, in.grad, in.q, in.k, in.v, in.out, in.logsumexp,
            in.mask ? Optional(additive_mask(*in.mask, shape)) : std::nullopt, causal, scale,
            result(plan.grad, std::get<0>(results)), result(plan.q, std::get<1>(results)),
            result(plan.k, std::get<2>(results)), result(plan.v, std::get<3>(results)));
}

void run(const AttentionCall& call) {
  if (!fused(call)) Blocks(call).run();
}

}  // namespace

TORCH_LIBRARY_IMPL(robustkern, CUDA, m) {
  m.impl("attention_double_backward", TORCH_FN(attention_double_backward<run>));
}

}  // namespace rk::aten
