// attention_double_backward for CUDA tensors, as an operator of its own, which writes into results that it is given:
// aten/kernels/attention_blocks.cpp has checked the arguments, allocates, and does what this one does not serve.
#include "attention.cuh"

#include <torch/csrc/stable/library.h>

#include "attention_tensors.cuh"

namespace rk::cuda {
namespace {

constexpr const char* kOp = "attention_double_backward";

// mask: [B, H, L, S] in the accumulation type.  Results that nobody needs are absent.
bool attention_double_backward(OptionalTensor a, OptionalTensor b, OptionalTensor c, Tensor grad, Tensor q, Tensor k,
                               Tensor v, OptionalTensor out, OptionalTensor logsumexp, OptionalTensor mask, bool causal,
                               double scale, OptionalTensor gg_grad, OptionalTensor grad_q, OptionalTensor grad_k,
                               OptionalTensor grad_v) {
  if (!has_tensor_cores(q)) return false;
  const DeviceScope scope(q);
  bool served = false;
  visit_storage(q.scalar_type(), [&](auto element) {
    using S = decltype(element);
    using A = accumulation_t<S>;
    served = fits<S>(q, k, v) && has_near_rows(gg_grad) && has_near_rows(grad_q) && has_near_rows(grad_k) &&
             has_near_rows(grad_v) && has_near_rows(mask);
    if (!served) return;
    const auto type = accumulation_type(q.scalar_type());
    const auto scratch = [&](std::int64_t numbers) {
      const std::vector<std::int64_t> sizes(1, numbers * q.size(0) * q.size(1) * q.size(2));
      return torch::stable::new_empty(q, sizes, type);
    };
    Views view;
    AttentionCall<S> x{};
    static_cast<AttentionSizes&>(x) = attention_sizes(q, k, causal);
    x.a = view.operator()<const S>(a);
    x.b = view.operator()<const S>(b);
    x.c = view.operator()<const S>(c);
    x.grad = view.operator()<const S>(grad);
    x.q = view.operator()<const S>(q);
    x.k = view.operator()<const S>(k);
    x.v = view.operator()<const S>(v);
    x.gg_grad = view.operator()<S>(gg_grad);
    x.grad_q = view.operator()<S>(grad_q);
    x.grad_k = view.operator()<S>(grad_k);
    x.grad_v = view.operator()<S>(grad_v);
    x.mask = view.operator()<const A>(mask, true);
    x.mask_column = mask ? mask->stride(3) : 0;
    x.scale = static_cast<A>(scale);
    const Tensor moments = scratch(sizeof(RowMoments<S>) / sizeof(A));
    x.moments = reinterpret_cast<RowMoments<S>*>(pointer<A>(moments));
    if (logsumexp) {
      logsumexp = torch::stable::contiguous(*logsumexp);
      x.logsumexp = pointer<const A>(logsumexp);
      x.out = view.operator()<const S>(out);
    } else {
      logsumexp = scratch(1);
      x.logsumexp = pointer<const A>(logsumexp);
      if (gg_grad && x.tangent()) out = torch::stable::empty_like(*gg_grad);
      const auto results = view.operator()<S>(out);
      x.out = view.operator()<const S>(out);
      x.aligned = view.all_aligned();
      check_launch(launch_attention_forward(x, pointer<A>(logsumexp), results, scope.stream()), kOp);
    }
    x.aligned = view.all_aligned();
    check_launch(launch_attention_double_backward(x, scope.stream()), kOp);
  });
  return served;
}

}  // namespace

// Known where it has kernels; returns whether it serves the call.
STABLE_TORCH_LIBRARY(robustkern_cuda, m) {
  m.def(
      "attention_double_backward(Tensor? a, Tensor? b, Tensor? c, Tensor grad, Tensor q, Tensor k, Tensor v, "
      "Tensor? out, Tensor? logsumexp, Tensor? mask, bool causal, float scale, Tensor(a!)? gg_grad, "
      "Tensor(b!)? grad_q, Tensor(c!)? grad_k, Tensor(d!)? grad_v) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(robustkern_cuda, RK_CUDA_KEY, m) {
  m.impl("attention_double_backward", TORCH_BOX(&attention_double_backward));
}

}  // namespace rk::cuda
