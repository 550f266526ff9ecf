// attention_double_backward on any device, in PyTorch's own matrix products: for CUDA.  Formulas: math/attention.h.
//
// All heads at once, and rows of q in blocks: six matrices of a block's scores exist at a time, so memory is linear in
// the sequence.  Only shapes decide what is launched: nothing waits for the device, and a CUDA graph can hold all of it.
// Everything is computed in the accumulation type, which for float32 products means what PyTorch is set to (TF32 too).
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
    v_ = flat(in_.v);
    c_ = flat(in_.c);
    if (in_.mask) mask_ = additive_mask(*in_.mask, s_);
    if (plan_.k) sum_k_ = at::zeros_like(k_);
    if (plan_.v) sum_v_ = at::zeros_like(v_);
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

  // [B G, rows, D]: the heads of q that share a head of k are so many more rows.
  Tensor flat(const Tensor& t) const { return wide(t).reshape({s_.batch * s_.key_heads, -1, t.size(3)}); }
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
    Tensor s = at::bmm(q, k.mT()).mul_(call_.scale);
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
      t = plan_.a ? at::bmm(a, k.mT()) : at::bmm(q, b.mT());
      if (plan_.a && plan_.b) t.baddbmm_(q, b.mT());
      t.mul_(call_.scale);
      t.sub_(mean_under(p, t));
    }
    if (plan_.slope()) {
      slope = at::bmm(g, v.mT());
      slope.sub_(in_.out ? (g * rows_of(in_.out, first, rows)).sum(-1, /*keepdim=*/true) : mean_under(p, slope));
      bend = slope * t;
    }
    if (plan_.mixed()) bend = bend.defined() ? bend.baddbmm_(g, c.mT()) : at::bmm(g, c.mT());
    if (plan_.bend()) bend.sub_(mean_under(p, bend)).mul_(p);  // W
    if (slope.defined()) slope.mul_(p);                        // dS
    if (t.defined()) t.mul_(p);                                // Pd
    const auto keep = [&](const Tensor& block, const Tensor& to) {
      to.narrow(2, first, rows).copy_(per_head(block, rows));
    };
    if (plan_.grad) {
      Tensor out = t.defined() ? at::bmm(t, v) : Tensor();
      if (plan_.c) out = out.defined() ? out.baddbmm_(p, c) : at::bmm(p, c);
      keep(out, std::get<0>(call_.results));
    }
    if (plan_.q) {
      Tensor out = at::bmm(bend, k);
      if (plan_.b) out.baddbmm_(slope, b);
      keep(out.mul_(call_.scale), std::get<1>(call_.results));
    }
    if (plan_.k) {
      Tensor sum = head(sum_k_);
      sum.baddbmm_(bend.mT(), q, 1, call_.scale);
      if (plan_.a) sum.baddbmm_(slope.mT(), a, 1, call_.scale);
    }
    if (plan_.v) head(sum_v_).baddbmm_(t.mT(), g);
  }

  const AttentionCall& call_;
  const AttentionArguments& in_ = call_.in;
  const AttentionShape& s_ = call_.shape;
  const AttentionPlan& plan_ = call_.plan;
  Tensor k_, b_, v_, c_, mask_, sum_k_, sum_v_;
};

void run(const AttentionCall& call) { Blocks(call).run(); }

}  // namespace

TORCH_LIBRARY_IMPL(robustkern, CUDA, m) {
  m.impl("attention_double_backward", TORCH_FN(attention_double_backward<run>));
}

}  // namespace rk::aten
