// attention_double_backward for CUDA: by the kernels of cuda/attention.cu where they serve the call, and otherwise, on any
// device, in PyTorch's own matrix products.  Formulas: math/attention.h.
//
// All heads at once, and rows of q in blocks: six matrices of a block's scores exist at a time, so memory is linear in
// the sequence.  Only shapes decide what is launched: nothing waits for the device, and a CUDA graph can hold all of it.
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
    if (in_.a && in_.b) keys_ = at::cat({k_, b_}, 2);
    v_ = flat(in_.v);
    c_ = flat(in_.c);
    if (plan_.k) sum_k_ = at::zeros_like(wide(k_));
    if (plan_.v) sum_v_ = at::zeros_like(wide(v_));
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
  const AttentionPlan& plan_ = call_.plan;
  Tensor k_, b_, v_, c_, keys_, sum_k_, sum_v_;  // keys_: k and B beside each other
};

// Whether the kernels have done it.
bool fused(const AttentionCall& call) {
  const auto& [in, shape, plan, causal, scale, results] = call;
  const auto op = cuda_operator("robustkern_cuda::attention_double_backward", in.q);
  if (!op) return false;
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
