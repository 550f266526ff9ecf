// activation_double_backward for CUDA tensors: arguments checked, outputs allocated, the kernel of activation.cuh
// launched on the current stream.
#include "activation.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>
#include <tuple>
#include <vector>

#include "../arguments/activation.h"
#include "torch.cuh"

namespace rk::cuda {
namespace {

constexpr const char* kOp = "activation_double_backward";

std::tuple<Tensor, Tensor> activation_double_backward(Tensor u, Tensor grad, Tensor x, std::string function,
                                                      std::vector<double> parameters, bool need_grad, bool need_x) {
  const DeviceScope scope(x);
  const ActivationChoice choice = activation_choice(kOp, function, parameters);
  const ActivationTensors t(kOp, u, grad, x, need_grad, need_x);
  visit_storage(x.scalar_type(), [&](auto element) {
    using S = decltype(element);
    ActivationCall<S> c{};
    c.elements = t.x.numel();
    c.cotangents = t.cotangents;
    c.u = pointer<const S>(t.u);
    c.grad = pointer<const S>(t.grad);
    c.x = pointer<const S>(t.x);
    c.gg_grad = need_grad ? pointer<S>(t.gg_grad) : nullptr;
    c.grad_x = need_x ? pointer<S>(t.grad_x) : nullptr;
    c.parameters = choice.as<accumulation_t<S>>();
    check_launch(launch_activation_double_backward(choice.function, c, scope.stream()), kOp);
  });
  return {t.gg_grad, t.grad_x};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(robustkern, RK_CUDA_KEY, m) {
  m.impl("activation_double_backward", TORCH_BOX(&activation_double_backward));
}

}  // namespace rk::cuda
