// batch_norm_double_backward for CUDA tensors: arguments checked, outputs allocated, kernels of batch_norm.cuh launched
// on the current stream.
#include "batch_norm.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../arguments/batch_norm.h"
#include "torch.cuh"

namespace rk::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor> batch_norm_double_backward(std::optional<Tensor> u, std::optional<Tensor> a,
                                                              std::optional<Tensor> b, Tensor grad, Tensor x,
                                                              std::optional<Tensor> weight, Tensor mean, Tensor invstd,
                                                              bool training, bool need_grad, bool need_x,
                                                              bool need_weight) {
  const char* op = "batch_norm_double_backward";
  const DeviceScope scope(x);
  const int64_t cotangents = check_batch_norm(op, u, a, b, grad, x, weight, mean, invstd);
  const auto sizes = sizes_of(x);
  const ScalarType accumulation = accumulation_type(x.scalar_type());
  const auto dense_u = contiguous(u), dense_weight = contiguous(weight), dense_a = contiguous(a),
             dense_b = contiguous(b);
  const Tensor g = contiguous(grad), dense_x = contiguous(x), m = contiguous(mean), r = contiguous(invstd);
  const auto output = [&](bool needed, const std::vector<int64_t>& shape, ScalarType dtype) {
    return torch::stable::new_empty(x, needed ? shape : std::vector<int64_t>{0}, dtype);
  };
  Tensor gg_grad = output(need_grad, sizes_of(grad), x.scalar_type()), grad_x = output(need_x, sizes, x.scalar_type());
  Tensor grad_weight = output(need_weight, {x.size(1)}, accumulation);
  std::optional<Tensor> partial, coefficients;

  visit_storage(x.scalar_type(), [&](auto element) {
    using S = decltype(element);
    using A = accumulation_t<S>;
    BatchNormCall<S> c{};
    c.images = x.size(0);
    c.channels = x.size(1);
    c.inner = x.size(2);
    c.u = pointer<const S>(dense_u);
    c.g = pointer<const S>(g);
    c.x = training || a || need_x ? pointer<const S>(dense_x) : nullptr;
    c.grad = need_grad ? pointer<S>(gg_grad) : nullptr;
    c.grad_x = need_x ? pointer<S>(grad_x) : nullptr;
    c.weight = pointer<const A>(dense_weight);
    c.a = pointer<const A>(dense_a);
    c.b = pointer<const A>(dense_b);
    c.mean = pointer<const A>(m);
    c.invstd = pointer<const A>(r);
    c.grad_weight = need_weight ? pointer<A>(grad_weight) : nullptr;
    c.training = training;
    c.cotangents = cotangents;
    if (cotangents * c.images * c.channels * c.inner == 0) {
      if (need_weight) torch::stable::zero_(grad_weight);
      if (need_x) torch::stable::zero_(grad_x);
      return;
    }
    arrange(c);
    if (!c.fused) {
      partial = torch::stable::new_empty(x, {partial_size(c)}, accumulation);
      coefficients = torch::stable::new_empty(x, {coefficients_size(c)}, accumulation);
      c.partial = pointer<A>(partial);
      c.coefficients = pointer<A>(coefficients);
    }
    check_launch(launch_batch_norm(c, scope.stream()), op);
  });
  return {gg_grad, grad_x, grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(robustkern, RK_CUDA_KEY, m) {
  m.impl("batch_norm_double_backward", TORCH_BOX(&batch_norm_double_backward));
}

}  // namespace rk::cuda
