// attention_jvp for CUDA tensors, as an operator of its own, which writes into results that it is given:
// aten/kernels/attention_jvp_blocks.cpp has checked the arguments, allocates, and does what this one does not serve.
#include "attention_jvp.cuh"

#include <torch/csrc/stable/library.h>

#include "attention_tensors.cuh"

namespace rk::cuda {
namespace {

constexpr const char* kOp = "attention_jvp";

// mask, mask_tangent: [B, H, L, S] in the accumulation type.
bool attention_jvp(Tensor q, Tensor k, Tensor v, OptionalTensor q_tangent, OptionalTensor k_tangent,
                   OptionalTensor v_tangent, OptionalTensor mask, OptionalTensor mask_tangent, bool causal,
                   double scale, Tensor out, Tensor tangent, Tensor logsumexp) {
  if (!has_tensor_cores(q)) return false;
  const DeviceScope scope(q);
  bool served = false;
  visit_storage(q.scalar_type(), [&](auto element) {
    using S = decltype(element);
    using A = accumulation_t<S>;
    served = fits<S>(q, k, v) && has_near_rows(out) && has_near_rows(tangent) && has_near_rows(mask) &&
             has_near_rows(mask_tangent);
    if (!served) return;
    Views view;
    AttentionJvpCall<S> x{};
    static_cast<AttentionSizes&>(x) = attention_sizes(q, k, causal);
    x.q = view.operator()<const S>(q);
    x.k = view.operator()<const S>(k);
    x.v = view.operator()<const S>(v);
    x.q_tangent = view.operator()<const S>(q_tangent);
    x.k_tangent = view.operator()<const S>(k_tangent);
    x.v_tangent = view.operator()<const S>(v_tangent);
    x.out = view.operator()<S>(out);
    x.tangent = view.operator()<S>(tangent);
    x.aligned = view.all_aligned();
    x.mask = view.operator()<const A>(mask, true);
    x.mask_column = mask ? mask->stride(3) : 0;
    x.mask_tangent = view.operator()<const A>(mask_tangent, true);
    x.mask_tangent_column = mask_tangent ? mask_tangent->stride(3) : 0;
    x.logsumexp = pointer<A>(logsumexp);
    x.scale = static_cast<A>(scale);
    check_launch(launch_attention_jvp(x, scope.stream()), kOp);
  });
  return served;
}

}  // namespace

// Known where it has kernels; returns whether it serves the call.
STABLE_TORCH_LIBRARY_FRAGMENT(robustkern_cuda, m) {
  m.def(
      "attention_jvp(Tensor q, Tensor k, Tensor v, Tensor? q_tangent, Tensor? k_tangent, Tensor? v_tangent, Tensor? "
      "mask, Tensor? mask_tangent, bool causal, float scale, Tensor(a!) out, Tensor(b!) tangent, Tensor(c!) logsumexp) "
      "-> bool");
}

STABLE_TORCH_LIBRARY_IMPL(robustkern_cuda, RK_CUDA_KEY, m) { m.impl("attention_jvp", TORCH_BOX(&attention_jvp)); }

}  // namespace rk::cuda
