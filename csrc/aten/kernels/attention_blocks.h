// All heads of attention at once, and rows of q in blocks, in PyTorch's own matrix products on any device.
//
// Scores are computed in the accumulation type.  Products of 16 bits take 16-bit factors, to which what is made of scores
// is rounded as flash attention does, and give float32; those of float32 are what PyTorch is set to (TF32 too).
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/headeronly/version.h>

#include <algorithm>
#include <limits>

#include "attention_arguments.h"

namespace rk::aten {

class AttentionBlocks {
 public:
  AttentionBlocks(const AttentionShape& shape, const std::optional<Tensor>& mask, bool causal, double scale)
      : s_(shape), causal_(causal), scale_(scale) {
    if (mask) mask_ = additive_mask(*mask, shape);
  }

  // Rows of q in a block, and the keys that those from `first` on may see.
  int64_t rows() const { return std::max(kLeastRows, kBlockScores / (s_.batch * s_.heads * s_.keys)); }
  int64_t cols(int64_t first, int64_t rows) const { return causal_ ? std::min(s_.keys, first + rows) : s_.keys; }

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
  Tensor per_head(const Tensor& block, int64_t rows) const {
    return block.view({s_.batch, s_.heads, rows, block.size(2)});
  }

  // Of the rows from `first` on: scale q k^T + mask, -inf behind the causal mask.
  Tensor scores(const Tensor& q, const Tensor& k, int64_t first, int64_t rows) const {
    Tensor s = product(q, k.mT()).mul_(scale_);
    const int64_t cols = k.size(1);
    if (mask_.defined()) per_head(s, rows).add_(mask_.narrow(2, first, rows).narrow(3, 0, cols));
    if (causal_) {
      const auto hidden = at::ones({rows, cols}, s.options().dtype(at::kBool)).triu_(first + 1);
      per_head(s, rows).masked_fill_(hidden, -kInfinity);
    }
    return s;
  }

  Tensor probabilities(const Tensor& scores) const {
    if (!mask_.defined()) return at::softmax(scores, -1);
    const Tensor masked = scores.amax(-1, /*keepdim=*/true) == -kInfinity;  // everywhere: the row attends to nothing
    return at::softmax(scores, -1).masked_fill_(masked, 0.0);
  }

 private:
  static constexpr int64_t kBlockScores = 1 << 24;  // entries of one matrix of scores: 64 MiB in float32
  static constexpr int64_t kLeastRows = 16;
  static constexpr double kInfinity = std::numeric_limits<double>::infinity();

  const AttentionShape& s_;
  const bool causal_;
  const double scale_;
  Tensor mask_;  // [B, H, L, S], accumulation type, or undefined
};

// An operator of cuda/ that serves tensors like this one, if the extension that has it is there.
inline std::optional<c10::OperatorHandle> cuda_operator(const char* name, const Tensor& like) {
  auto op = c10::Dispatcher::singleton().findSchema({name, ""});
  if (op && !op->hasKernelForDispatchKey(like.is_cuda() ? c10::DispatchKey::CUDA : c10::DispatchKey::CPU)) op.reset();
  // With TF32, PyTorch's products are several times as fast as any in float32.
  if (like.is_cuda() && like.scalar_type() == at::kFloat && at::globalContext().allowTF32CuBLAS()) op.reset();
  return op;
}

}  // namespace rk::aten
