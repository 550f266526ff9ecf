// attention_jvp for CUDA: by the kernel of cuda/attention_jvp.cu where it serves the call, and otherwise, on any device,
// in PyTorch's own matrix products.  Formulas: math/attention.h.
//
// All heads at once, and rows of q in blocks, as in attention_blocks.cpp: three matrices of a block's scores exist at a
// time.
#include <torch/library.h>

#include <algorithm>

#include "attention_blocks.h"

namespace rk::aten {
namespace {

// Whether the kernel has done it.
bool fused(const AttentionJvpCall& call) {
  const auto& [in, shape, causal, scale, results] = call;
  const auto& [out, tangent, logsumexp] = results;
  const auto op = cuda_operator("robustkern_cuda::attention_jvp", in.q);
  if (!op) return false;
  using Optional = std::optional<Tensor>;
  const auto additive = [&](const Optional& mask) {
    return mask ? Optional(additive_mask(*mask, call.shape)) : std::nullopt;
  };
  return op
      ->typed<bool(const Tensor&, const Tensor&, const Tensor&, const Optional&, const Optional&, const Optional&,
                   const Optional&, const Optional&, bool, double, const Tensor&, const Tensor&, const Tensor&)>()
      .call(in.q, in.k, in.v, in.q_tangent, in.k_tangent, in.v_tangent, additive(in.mask), additive(in.mask_tangent),
            causal, scale, out, tangent, logsumexp);
}

void run_blocks(const AttentionJvpCall& call) {
  const auto& [in, s, causal, scale, results] = call;
  const auto& [out, tangent, logsumexp] = results;
  const AttentionBlocks blocks(s, in.mask, causal, scale);
  const Tensor keys = blocks.flat(in.k), values = blocks.flat(in.v);
  const Tensor moved_keys = blocks.flat(in.k_tangent), moved_values = blocks.flat(in.v_tangent);
  const Tensor moved_mask = in.mask_tangent ? additive_mask(*in.mask_tangent, s) : Tensor();

  for (int64_t first = 0; first < s.queries; first += blocks.rows()) {
    const int64_t rows = std::min(blocks.rows(), s.queries - first), cols = blocks.cols(first, rows);
    const auto seen = [&](const Tensor& t) { return t.defined() ? t.narrow(1, 0, cols) : t; };
    const auto keep = [&](const Tensor& block, const Tensor& to) {
      to.narrow(2, first, rows).copy_(blocks.per_head(block, rows));
    };
    const Tensor k = seen(keys), v = seen(values);
    const Tensor q = blocks.rows_of(in.q, first, rows), q_tangent = blocks.rows_of(in.q_tangent, first, rows);
    const Tensor scores = blocks.scores(q, k, first, rows);
    logsumexp.narrow(2, first, rows).copy_(blocks.per_head(scores, rows).logsumexp(-1));
    const Tensor p = blocks.probabilities(scores), weights = blocks.rounded(p);
    keep(blocks.product(weights, v), out);

    Tensor moved;  // P (T - t)
    if (in.scores_move()) {
      const Tensor k_tangent = in.k_tangent ? seen(moved_keys).mT() : Tensor();
      Tensor t = in.q_tangent || in.k_tangent
                     ? blocks.products(q_tangent, k.mT(), in.k_tangent ? q : Tensor(), k_tangent).mul_(scale)
                     : at::zeros_like(p);
      if (in.mask_tangent) blocks.per_head(t, rows).add_(moved_mask.narrow(2, first, rows).narrow(3, 0, cols));
      moved = blocks.rounded(t.sub_((p * t).sum(-1, /*keepdim=*/true)).mul_(p));
    }
    if (moved.defined() || in.v_tangent)
      keep(blocks.products(moved, v, in.v_tangent ? weights : Tensor(), seen(moved_values)), tangent);
    else
      tangent.narrow(2, first, rows).zero_();
  }
}

void run(const AttentionJvpCall& call) {
  if (!fused(call)) run_blocks(call);
}

}  // namespace

TORCH_LIBRARY_IMPL(robustkern, CUDA, m) { m.impl("attention_jvp", TORCH_FN(attention_jvp<run>)); }

}  // namespace rk::aten
