// attention_jvp on any device, in PyTorch's own matrix products: for CUDA.  Formulas: math/attention.h.
//
// All heads at once, and rows of q in blocks, as in attention_blocks.cpp: three matrices of a block's scores exist at a time.
#include <torch/library.h>

#include <algorithm>

#include "attention_blocks.h"

namespace rk::aten {
namespace {

void run(const AttentionJvpCall& call) {
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
    const Tensor p = blocks.probabilities(scores);
    keep(at::bmm(p, v), out);

    Tensor moved;
    if (in.v_tangent) moved = at::bmm(p, seen(moved_values));
    if (in.scores_move()) {
      Tensor t = in.q_tangent ? at::bmm(q_tangent, k.mT()) : Tensor();
      if (in.k_tangent) t = t.defined() ? t.baddbmm_(q, seen(moved_keys).mT()) : at::bmm(q, seen(moved_keys).mT());
      t = t.defined() ? t.mul_(scale) : at::zeros_like(p);
      if (in.mask_tangent) blocks.per_head(t, rows).add_(moved_mask.narrow(2, first, rows).narrow(3, 0, cols));
      t.sub_((p * t).sum(-1, /*keepdim=*/true)).mul_(p);  // Pd
      moved = moved.defined() ? moved.baddbmm_(t, v) : at::bmm(t, v);
    }
    if (moved.defined())
      keep(moved, tangent);
    else
      tangent.narrow(2, first, rows).zero_();
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(robustkern, CUDA, m) { m.impl("attention_jvp", TORCH_FN(attention_jvp<run>)); }

}  // namespace rk::aten
