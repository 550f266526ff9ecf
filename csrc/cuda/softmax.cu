// softmax_double_backward for CUDA tensors: arguments checked, outputs allocated, a kernel of softmax.cuh launched on
// the current stream.
#include "softmax.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "../arguments/softmax.h"
#include "torch.cuh"

namespace rk::cuda {
namespace {

constexpr const char* kOp = "softmax_double_backward";

std::tuple<Tensor, Tensor> softmax_double_backward(Tensor u, Tensor grad, Tensor output, bool log, bool need_grad,
                                                   bool need_output) {
  const DeviceScope scope(output);
  const SoftmaxTensors t(kOp, u, grad, output, need_grad, need_output);
  visit_storage(output.scalar_type(), [&](auto element) {
    using S = decltype(element);
    SoftmaxCall<S> c{};
    c.batch = t.output.size(0);
    c.classes = t.output.size(1);
    c.inner = t.output.size(2);
    c.u = pointer<const S>(t.u);
    c.grad = pointer<const S>(t.grad);
    c.output = pointer<const S>(t.output);
    c.gg_grad = need_grad ? pointer<S>(t.gg_grad) : nullptr;
    c.grad_output = need_output ? pointer<S>(t.grad_output) : nullptr;
    check_launch(launch_softmax_double_backward(log, c, scope.stream()), kOp);
  });
  return {t.gg_grad, t.grad_output};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(robustkern, RK_CUDA_KEY, m) {
  m.impl("softmax_double_backward", TORCH_BOX(&softmax_double_backward));
}

}  // namespace rk::cuda
