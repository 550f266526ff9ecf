// Layouts of elementwise operators, which work in the order of memory: any permutation of a contiguous tensor is as
// good as another, if only all tensors of a call share it.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "check.h"

namespace rk {

// Whether the elements of `t` fill a block of memory without gaps or overlaps.
inline bool is_dense(const Tensor& t) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int64_t d = 0; d < t.dim(); ++d)
    if (t.size(d) != 1) dims.emplace_back(t.stride(d), t.size(d));
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return t.numel() == 0;
    expected *= size;
  }
  return true;
}

inline bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  return true;
}

inline Tensor dense(const Tensor& t) { return is_dense(t) ? t : torch::stable::contiguous(t); }

// `t` with its elements in memory in the order of `like`, which is dense; the same tensor where they are so already.
inline Tensor in_layout_of(const Tensor& like, const Tensor& t) {
  if (same_strides(like, t)) return t;
  Tensor copy = torch::stable::empty_like(like);
  torch::stable::copy_(copy, t);
  return copy;
}

}  // namespace rk
