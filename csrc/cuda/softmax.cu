// softmax_double_backward for CUDA tensors: arguments checked, outputs allocated, a kernel of softmax.cuh launched on
// the current stream.
#include "softmax.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "../softmax_arguments.h"
#include "torch.cuh"

namespace rk::cuda {
namespace {

constexpr const char* kOp = "softmax_double_backward";

template <class S>
void launch_as(const SoftmaxTensors& t, bool log, bool need_grad, bool need_output, cudaStream_t stream) {
  SoftmaxCall<S> c{};
  c.batch = t.output.size(0);
  c.classes = t.output.size(1);
  c.inner = t.output.size(2);
  c.gg_x = static_cast<const S*>(t.gg_x.data_ptr());
  c.grad = static_cast<const S*>(t.grad.data_ptr());
  c.output = static_cast<const S*>(t.output.data_ptr());
  c.gg_grad = need_grad ? static_cast<S*>(t.gg_grad.data_ptr()) : nullptr;
  c.grad_output = need_output ? static_cast<S*>(t.grad_output.data_ptr()) : nullptr;
  check_launch(launch_softmax_double_backward(log, c, stream), kOp);
}

std::tuple<Tensor, Tensor> softmax_double_backward(Tensor gg_x, Tensor grad, Tensor output, bool log, bool need_grad,
                                                   bool need_output) {
  const DeviceScope scope(output);
  const SoftmaxTensors t(kOp, gg_x, grad, output, need_grad, need_output);
  switch (output.scalar_type()) {
    case ScalarType::Float: launch_as<float>(t, log, need_grad, need_output, scope.stream()); break;
    case ScalarType::Double: launch_as<double>(t, log, need_grad, need_output, scope.stream()); break;
    case ScalarType::Half: launch_as<__half>(t, log, need_grad, need_output, scope.stream()); break;
    default: launch_as<__nv_bfloat16>(t, log, need_grad, need_output, scope.stream()); break;
  }
  return {t.gg_grad, t.grad_output};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(robustkern, RK_CUDA_KEY, m) {
  m.impl("softmax_double_backward", TORCH_BOX(&softmax_double_backward));
}

}  // namespace rk::cuda
