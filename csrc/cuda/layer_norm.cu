// layer_norm_backward and its derivative for CUDA tensors: arguments checked, outputs allocated, kernels of
// layer_norm.cuh launched on the current stream.
#include "layer_norm.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../arguments/layer_norm.h"
#include "norm_calls.cuh"

namespace rk::cuda {
namespace {

struct Tensors : NormTensors {
  int64_t cotangents;
  std::optional<Tensor> bends_of_rows, partial_weight, partial_bias;

  Tensors(const char* name, int64_t count, const Tensor& rows, const Tensor& g, const std::optional<Tensor>& w,
          const std::optional<Tensor>& means, const Tensor& rstds)
      : NormTensors{name, vectors_of(rows), vectors_of(g), contiguous(rstds), contiguous(means), vectors_of(w)},
        cotangents(count) {}

  Tensor matrix(const Tensor& like) const { return torch::stable::new_empty(like, sizes_of(like)); }

  void launch_on(bool second, cudaStream_t stream) {
    visit_storage(x.scalar_type(), [&](auto element) {
      using S = decltype(element);
      using A = accumulation_t<S>;
      LayerNormCall<S> c{};
      c.rows = x.size(0);
      c.cols = x.size(1);
      c.cotangents = cotangents;
      put_into(c);
      set_shares(c);
      // Named, since nvcc takes the commas of a list in a template's argument for operators.
      const std::vector<int64_t> partial_sizes{c.chunks, c.cols};
      const std::vector<int64_t> bends_sizes{cotangents * c.rows,
                                             static_cast<int64_t>(sizeof(NormBends<A>) / sizeof(A))};
      if (grad_weight) partial_weight = sums(partial_sizes);
      if (grad_bias) partial_bias = sums(partial_sizes);
      if (second && c.team == 0) bends_of_rows = sums(bends_sizes);
      c.bends = pointer<NormBends<A>>(bends_of_rows);
      c.partial_weight = pointer<A>(partial_weight);
      c.partial_bias = pointer<A>(partial_bias);
      check_launch(launch_layer_norm(second, c, stream), op);
    });
  }
};

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(Tensor grad, Tensor x, std::optional<Tensor> weight,
                                                       std::optional<Tensor> mean, Tensor rstd, bool need_x,
                                                       bool need_weight, bool need_bias) {
  const DeviceScope scope(x);
  const std::optional<Tensor> none;
  const char* op = "layer_norm_backward";
  const int64_t cotangents = check_layer_norm(op, none, none, none, grad, x, weight, mean, rstd);
  check_several(op, cotangents, need_weight || need_bias);
  Tensors call(op, cotangents, x, grad, weight, mean, rstd);
  if (need_x) call.grad_x = call.matrix(call.grad);
  if (need_weight) call.grad_weight = call.sums({x.size(1)});
  if (need_bias) call.grad_bias = call.sums({x.size(1)});
  call.launch_on(false, scope.stream());
  return call.slopes();
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_double_backward(std::optional<Tensor> u, std::optional<Tensor> a,
                                                              std::optional<Tensor> b, Tensor grad, Tensor x,
                                                              std::optional<Tensor> weight, std::optional<Tensor> mean,
                                                              Tensor rstd, bool need_grad, bool need_x,
                                                              bool need_weight) {
  const DeviceScope scope(x);
  const char* op = "layer_norm_double_backward";
  const int64_t cotangents = check_layer_norm(op, u, a, b, grad, x, weight, mean, rstd);
  Tensors call(op, cotangents, x, grad, weight, mean, rstd);
  call.u = vectors_of(u);
  call.a = vectors_of(a);
  call.b = vectors_of(b);
  if (need_grad) call.gg_grad = call.matrix(call.grad);
  if (need_x) call.grad_x = call.matrix(call.x);
  if (need_weight) call.grad_weight = call.sums({x.size(1)});
  call.launch_on(true, scope.stream());
  return call.bends();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(robustkern, RK_CUDA_KEY, m) {
  m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
  m.impl("layer_norm_double_backward", TORCH_BOX(&layer_norm_double_backward));
}

}  // namespace rk::cuda
