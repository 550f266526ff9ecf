// activation_double_backward for CUDA tensors: arguments checked, outputs allocated, the kernel of activation.cuh
// launched on the current stream.
#include "activation.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>
#include <tuple>
#include <vector>

#include "../activation_arguments.h"
#include "torch.cuh"

namespace rk::cuda {
namespace {

constexpr const char* kOp = "activation_double_backward";

template <class S>
void launch_as(const ActivationChoice& choice, const ActivationTensors& t, bool need_grad, bool need_x,
               cudaStream_t stream) {
  ActivationCall<S> c{};
  c.elements = t.x.numel();
  c.cotangents = t.cotangents;
  c.gg_x = static_cast<const S*>(t.gg_x.data_ptr());
  c.grad = static_cast<const S*>(t.grad.data_ptr());
  c.x = static_cast<const S*>(t.x.data_ptr());
  c.gg_grad = need_grad ? static_cast<S*>(t.gg_grad.data_ptr()) : nullptr;
  c.grad_x = need_x ? static_cast<S*>(t.grad_x.data_ptr()) : nullptr;
  c.parameters = choice.as<accumulation_t<S>>();
  check_launch(launch_activation_double_backward(choice.function, c, stream), kOp);
}

std::tuple<Tensor, Tensor> activation_double_backward(Tensor gg_x, Tensor grad, Tensor x, std::string function,
                                                      std::vector<double> parameters, bool need_grad, bool need_x) {
  const DeviceScope scope(x);
  const ActivationChoice choice = activation_choice(kOp, function, parameters);
  const ActivationTensors t(kOp, gg_x, grad, x, need_grad, need_x);
  switch (x.scalar_type()) {
    case ScalarType::Float: launch_as<float>(choice, t, need_grad, need_x, scope.stream()); break;
    case ScalarType::Double: launch_as<double>(choice, t, need_grad, need_x, scope.stream()); break;
    case ScalarType::Half: launch_as<__half>(choice, t, need_grad, need_x, scope.stream()); break;
    default: launch_as<__nv_bfloat16>(choice, t, need_grad, need_x, scope.stream()); break;
  }
  return {t.gg_grad, t.grad_x};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(robustkern, RK_CUDA_KEY, m) {
  m.impl("activation_double_backward", TORCH_BOX(&activation_double_backward));
}

}  // namespace rk::cuda
