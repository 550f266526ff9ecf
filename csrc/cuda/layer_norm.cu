// layer_norm_backward and its derivative for CUDA tensors: arguments checked, outputs allocated, kernels of
// layer_norm.cuh launched on the current stream.
#include "layer_norm.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../layer_norm_arguments.h"
#include "torch.cuh"

namespace rk::cuda {
namespace {

using torch::stable::Tensor;

std::optional<Tensor> dense(const std::optional<Tensor>& t) {
  return t ? std::make_optional(torch::stable::contiguous(*t)) : std::nullopt;
}

// The tensors of one call, kept alive until its kernels are launched.
struct Tensors {
  const char* op;
  int64_t cotangents;
  Tensor x, grad, rstd;
  std::optional<Tensor> gg_x, gg_weight, gg_bias, weight, mean;
  std::optional<Tensor> gg_grad, grad_x, grad_weight, grad_bias, t, bends, partial_weight, partial_bias;

  Tensors(const char* name, int64_t count, const Tensor& rows, const Tensor& g, const std::optional<Tensor>& w,
          const std::optional<Tensor>& means, const Tensor& rstds)
      : op(name),
        cotangents(count),
        x(torch::stable::contiguous(rows)),
        grad(torch::stable::contiguous(g)),
        rstd(torch::stable::contiguous(rstds)),
        weight(dense(w)),
        mean(dense(means)) {}

  int64_t rows() const { return x.size(0); }
  int64_t cols() const { return x.size(1); }

  Tensor matrix(const Tensor& like) const { return torch::stable::new_empty(like, sizes_of(like)); }
  Tensor sums(int64_t a, int64_t b) const {
    return torch::stable::new_empty(x, {a, b}, accumulation_type(x.scalar_type()));
  }
  Tensor vector() const { return torch::stable::new_empty(x, {cols()}, accumulation_type(x.scalar_type())); }
  Tensor nothing(bool of_sums) const {
    return torch::stable::new_empty(x, {0}, of_sums ? accumulation_type(x.scalar_type()) : x.scalar_type());
  }

  template <class T>
  static T* pointer(const std::optional<Tensor>& t) {
    return t ? static_cast<T*>(t->data_ptr()) : nullptr;
  }

  template <class S>
  void launch_as(bool second, cudaStream_t stream) {
    using A = accumulation_t<S>;
    LayerNormCall<S> c{};
    c.rows = rows();
    c.cols = cols();
    c.cotangents = cotangents;
    set_chunks(c, second || grad_x, grad_weight.has_value(), grad_bias.has_value());
    if (grad_weight) partial_weight = sums(c.chunks, cols());
    if (grad_bias) partial_bias = sums(c.chunks, cols());
    if (grad_weight && second) t = sums(cotangents * rows(), 2);
    if (cotangents != 1 && second)
      bends = sums(cotangents * rows(), static_cast<int64_t>(sizeof(NormBends<A>) / sizeof(A)));
    c.x = static_cast<const S*>(x.data_ptr());
    c.g = static_cast<const S*>(grad.data_ptr());
    c.u = pointer<const S>(gg_x);
    c.weight = pointer<const A>(weight);
    c.gg_weight = pointer<const A>(gg_weight);
    c.gg_bias = pointer<const A>(gg_bias);
    c.mean = pointer<const A>(mean);
    c.rstd = static_cast<const A*>(rstd.data_ptr());
    c.gg_grad = pointer<S>(gg_grad);
    c.grad_x = pointer<S>(grad_x);
    c.t = pointer<A>(t);
    c.bends = pointer<NormBends<A>>(bends);
    c.partial_weight = pointer<A>(partial_weight);
    c.partial_bias = pointer<A>(partial_bias);
    c.grad_weight = pointer<A>(grad_weight);
    c.grad_bias = pointer<A>(grad_bias);
    check_launch(launch_layer_norm(second, c, stream), op);
  }

  void launch_on(bool second, cudaStream_t stream) {
    switch (x.scalar_type()) {
      case ScalarType::Float: return launch_as<float>(second, stream);
      case ScalarType::Double: return launch_as<double>(second, stream);
      case ScalarType::Half: return launch_as<__half>(second, stream);
      default: return launch_as<__nv_bfloat16>(second, stream);
    }
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
  if (need_weight) call.grad_weight = call.vector();
  if (need_bias) call.grad_bias = call.vector();
  call.launch_on(false, scope.stream());
  return {call.grad_x.value_or(call.nothing(false)), call.grad_weight.value_or(call.nothing(true)),
          call.grad_bias.value_or(call.nothing(true))};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_double_backward(std::optional<Tensor> gg_x,
                                                              std::optional<Tensor> gg_weight,
                                                              std::optional<Tensor> gg_bias, Tensor grad, Tensor x,
                                                              std::optional<Tensor> weight, std::optional<Tensor> mean,
                                                              Tensor rstd, bool need_grad, bool need_x,
                                                              bool need_weight) {
  const DeviceScope scope(x);
  const char* op = "layer_norm_double_backward";
  const int64_t cotangents = check_layer_norm(op, gg_x, gg_weight, gg_bias, grad, x, weight, mean, rstd);
  Tensors call(op, cotangents, x, grad, weight, mean, rstd);
  call.gg_x = dense(gg_x);
  call.gg_weight = dense(gg_weight);
  call.gg_bias = dense(gg_bias);
  if (need_grad) call.gg_grad = call.matrix(call.grad);
  if (need_x) call.grad_x = call.matrix(call.x);
  if (need_weight) call.grad_weight = call.vector();
  call.launch_on(true, scope.stream());
  return {call.gg_grad.value_or(call.nothing(false)), call.grad_x.value_or(call.nothing(false)),
          call.grad_weight.value_or(call.nothing(true))};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(robustkern, RK_CUDA_KEY, m) {
  m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
  m.impl("layer_norm_double_backward", TORCH_BOX(&layer_norm_double_backward));
}

}  // namespace rk::cuda
