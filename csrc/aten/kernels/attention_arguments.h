// attention_double_backward and attention_jvp but for their kernels: arguments are checked, results allocated, once for every implementation.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../../arguments/dtype.h"

namespace rk::aten {

using at::Tensor;

// q: [B, H, L, D]; k: [B, G, S, D]; v: [B, G, S, E]; head h of q attends to head h / (H / G) of k and v.
struct AttentionShape {
  int64_t batch, heads, key_heads, queries, keys, key_size, value_size;
  at::ScalarType dtype;

  std::vector<int64_t> like_q() const { return {batch, heads, queries, key_size}; }
  std::vector<int64_t> like_k() const { return {batch, key_heads, keys, key_size}; }
  std::vector<int64_t> like_v() const { return {batch, key_heads, keys, value_size}; }
  std::vector<int64_t> like_out() const { return {batch, heads, queries, value_size}; }
  int64_t group() const { return heads / key_heads; }  // heads of q that share a head of k and v
  bool empty() const { return batch == 0 || heads == 0 || queries == 0 || keys == 0; }
};

struct AttentionArguments {
  const std::optional<Tensor>&a, &b, &c;
  const Tensor &grad, &q, &k, &v;
  const std::optional<Tensor>&out, &logsumexp;  // both or neither
  const std::optional<Tensor>& mask;
};

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

using AttentionResults = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // gg_grad, grad_q, grad_k, grad_v

struct AttentionCall {
  AttentionArguments in;
  AttentionShape shape;
  AttentionPlan plan;
  bool causal;
  double scale;
  AttentionResults results;  // the plan's; others are zeros where the gradient vanishes, [0] where nobody asks for it
};

AttentionCall attention_call(const AttentionArguments& in, bool causal, double scale, bool need_grad, bool need_q,
                             bool need_k, bool need_v);

// What an implementation registers: `run` writes the results that the plan has.
template <void (*run)(const AttentionCall&)>
AttentionResults attention_double_backward(const std::optional<Tensor>& a, const std::optional<Tensor>& b,
                                           const std::optional<Tensor>& c, const Tensor& grad, const Tensor& q,
                                           const Tensor& k, const Tensor& v, const std::optional<Tensor>& out,
                                           const std::optional<Tensor>& logsumexp, const std::optional<Tensor>& mask,
                                           bool causal, double scale, bool need_grad, bool need_q, bool need_k,
                                           bool need_v) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const AttentionCall call =
      attention_call({a, b, c, grad, q, k, v, out, logsumexp, mask}, causal, scale, need_grad, need_q, need_k, need_v);
  if (!call.plan.nothing()) run(call);
  return call.results;
}

// ------------------------------------------------------------------ forward mode

struct AttentionJvpArguments {
  const Tensor &q, &k, &v;
  const std::optional<Tensor>&q_tangent, &k_tangent, &v_tangent;
  const std::optional<Tensor>&mask, &mask_tangent;

  bool scores_move() const { return q_tangent || k_tangent || mask_tangent; }
};

using AttentionJvpResults = std::tuple<Tensor, Tensor, Tensor>;  // out, tangent, logsumexp

struct AttentionJvpCall {
  AttentionJvpArguments in;
  AttentionShape shape;
  bool causal;
  double scale;
  AttentionJvpResults results;
};

AttentionJvpCall attention_jvp_call(const AttentionJvpArguments& in, bool causal, double scale);
void attends_to_nothing(const AttentionJvpResults& results);

template <void (*run)(const AttentionJvpCall&)>
AttentionJvpResults attention_jvp(const Tensor& q, const Tensor& k, const Tensor& v,
                                  const std::optional<Tensor>& q_tangent, const std::optional<Tensor>& k_tangent,
                                  const std::optional<Tensor>& v_tangent, const std::optional<Tensor>& mask,
                                  const std::optional<Tensor>& mask_tangent, bool causal, double scale) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const AttentionJvpCall call =
      attention_jvp_call({q, k, v, q_tangent, k_tangent, v_tangent, mask, mask_tangent}, causal, scale);
  if (call.shape.empty() || call.shape.value_size == 0)
    attends_to_nothing(call.results);
  else
    run(call);
  return call.results;
}

}  // namespace rk::aten
