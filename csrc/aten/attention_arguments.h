// The arguments of attention_double_backward, checked once for every implementation.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <string>
#include <tuple>

namespace rk::aten {

using at::Tensor;

// q: [B, H, L, D]; k: [B, G, S, D]; v: [B, G, S, E]; head h of q attends to head h / (H / G) of k and v.
struct AttentionShape {
  int64_t batch, heads, key_heads, queries, keys, key_size, value_size;
  at::ScalarType dtype;

  int64_t group() const { return heads / key_heads; }  // heads of q that share a head of k and v
  bool empty() const { return batch == 0 || heads == 0 || queries == 0 || keys == 0; }
};

struct AttentionArguments {
  const std::optional<Tensor>&gg_q, &gg_k, &gg_v;
  const Tensor &grad, &q, &k, &v;
  const std::optional<Tensor>& mask;
};

AttentionShape check_attention(const AttentionArguments& a);

// The mask as [B, H, L, S] in the accumulation type, no entry of a broadcast dimension stored twice.
Tensor additive_mask(const Tensor& mask, const AttentionShape& shape);

// Which gradients are asked for, and which matrices of scores they take.  T vanishes without A and B, X without C.
struct AttentionPlan {
  bool a, b, c;                                       // cotangents of grad_q, grad_k, grad_v that are there
  bool grad, q, k, v;                                 // gradients asked for that are not identically zero
  bool tangent() const { return a || b; }             // T, hence Pd
  bool bend() const { return q || k; }                // W
  bool slope() const { return tangent() && bend(); }  // dP, dS
  bool mixed() const { return c && bend(); }          // X
  bool nothing() const { return !(grad || q || k || v); }
};

inline AttentionPlan attention_plan(const AttentionArguments& x, bool grad, bool q, bool k, bool v) {
  AttentionPlan p{x.gg_q.has_value(), x.gg_k.has_value(), x.gg_v.has_value(), false, false, false, false};
  const bool any = p.a || p.b || p.c;
  p.grad = grad && any;
  p.q = q && any;
  p.k = k && any;
  p.v = v && p.tangent();
  return p;
}

using AttentionResults = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // gg_grad, grad_q, grad_k, grad_v

// The gradient's memory: laid out like its tensor, with adjacent columns; zeros where the gradient vanishes, [0] where
// nobody asks for it.
inline Tensor attention_result(const Tensor& like, bool asked, bool computed) {
  if (!asked) return at::empty({0}, like.options());
  Tensor result = at::empty_like(like);
  if (like.size(3) > 1 && result.stride(3) != 1) result = at::empty(like.sizes(), like.options());
  return computed ? result : result.zero_();
}

}  // namespace rk::aten
