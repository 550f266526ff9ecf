// attention_double_backward on any device, in PyTorch's own matrix products: for CUDA.  Formulas: math/attention.h.
//
// All heads at once, and rows of q in blocks: six matrices of a block's scores exist at a time, so memory is linear in
// the sequence.  Only shapes decide what is launched: nothing waits for the device, and a CUDA graph can hold all of it.
// Everything is computed in the accumulation type, which for float32 products means what PyTorch is set to (TF32 too).
#include <torch/library.h>

#include <algorithm>

#include "attention_blocks.h"

namespace rk::aten {
namespace {

Tensor mean_under(const Tensor& p, const Tensor& x) { return (p * x).sum(-1, /*keepdim=*/true); }

class Blocks : AttentionBlocks {
 public:
  explicit Blocks(const AttentionCall& call)
      : AttentionBlocks(call.shape, call.in.mask, call.causal, call.scale), call_(call) {
    k_ = flat(in_.k);
    b_ = flat(in_.b);
    v_ = flat(in_.v);
    c_ = flat(in_.c);
    if (plan_.k) sum_k_ = at::zeros_like(k_);
    if (plan_.v) sum_v_ = at::zeros_like(v_);
  }

  void run() {
    const int64_t queries = call_.shape.queries;
    for (int64_t first = 0; first < queries; first += rows()) run_block(first, std::min(rows(), queries - first));
    const auto keep = [&](const Tensor& sum, const Tensor& to) { to.copy_(sum.view(to.sizes())); };
    if (plan_.k) keep(sum_k_, std::get<2>(call_.results));
    if (plan_.v) keep(sum_v_, std::get<3>(call_.results));
  }

 private:
  void run_block(int64_t first, int64_t rows) {
    const int64_t seen = cols(first, rows);
    const auto head = [&](const Tensor& t) { return t.defined() ? t.narrow(1, 0, seen) : t; };
    const Tensor k = head(k_), b = head(b_), v = head(v_), c = head(c_);
    const Tensor q = rows_of(in_.q, first, rows), a = rows_of(in_.a, first, rows), g = rows_of(in_.grad, first, rows);
    const Tensor p = probabilities(scores(q, k, first, rows));
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
  const AttentionPlan& plan_ = call_.plan;
  Tensor k_, b_, v_, c_, sum_k_, sum_v_;
};

void run(const AttentionCall& call) { Blocks(call).run(); }

}  // namespace

TORCH_LIBRARY_IMPL(robustkern, CUDA, m) {
  m.impl("attention_double_backward", TORCH_FN(attention_double_backward<run>));
}

}  // namespace rk::aten
