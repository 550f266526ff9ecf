// margin_loss for CUDA tensors: arguments checked, outputs allocated, a kernel of margin_loss.cuh launched on the current
// stream.
#include "margin_loss.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "../arguments/margin_loss.h"
#include "attack_calls.cuh"

namespace rk::cuda {
namespace {

std::tuple<Tensor, Tensor> margin_loss(Tensor logits, Tensor target, std::optional<Tensor> towards, int64_t kind) {
  constexpr const char* op = "margin_loss";
  const DeviceScope scope(logits);
  const Margin margin = check_margin_loss(op, logits, target, towards, kind);
  RK_CHECK(logits.size(1) <= 2147483647, op, ": logits must have at most 2^31 - 1 classes, got ", describe(logits));
  logits = contiguous(logits);
  target = contiguous(target);
  towards = contiguous(towards);
  Tensor loss = torch::stable::new_empty(logits, {logits.size(0)}, accumulation_type(logits.scalar_type()));
  Tensor slopes = torch::stable::new_empty(logits, {logits.size(0), logits.size(1)});
  visit_storage(logits.scalar_type(), [&](auto element) {
    using S = decltype(element);
    MarginCall<S> c{};
    c.rows = logits.size(0);
    c.classes = static_cast<int>(logits.size(1));
    c.kind = margin;
    c.logits = pointer<const S>(logits);
    c.target = pointer<const int64_t>(target);
    c.towards = pointer<const int64_t>(towards);
    c.loss = pointer<accumulation_t<S>>(loss);
    c.slopes = pointer<S>(slopes);
    check_launch(launch_margin_loss(c, scope.stream()), op);
  });
  return {loss, slopes};
}

Tensor margin_loss_backward(Tensor grad, Tensor slopes) {
  constexpr const char* op = "margin_loss_backward";
  const DeviceScope scope(slopes);
  check_margin_loss_backward(op, grad, slopes);
  grad = contiguous(grad);
  slopes = contiguous(slopes);
  Tensor result = torch::stable::new_empty(slopes, {slopes.size(0), slopes.size(1)});
  visit_storage(slopes.scalar_type(), [&](auto element) {
    using S = decltype(element);
    MarginBackwardCall<S> c{};
    c.elements = slopes.numel();
    c.classes = slopes.size(1);
    c.grad = pointer<const accumulation_t<S>>(grad);
    c.slopes = pointer<const S>(slopes);
    c.result = pointer<S>(result);
    check_launch(launch_margin_loss_backward(c, scope.stream()), op);
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(robustkern, RK_CUDA_KEY, m) {
  m.impl("margin_loss", TORCH_BOX(&margin_loss));
  m.impl("margin_loss_backward", TORCH_BOX(&margin_loss_backward));
}

}  // namespace rk::cuda
