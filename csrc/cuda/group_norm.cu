// group_norm_backward and its derivative for CUDA tensors: arguments checked, outputs allocated, kernels of
// group_norm.cuh launched on the current stream.
#include "group_norm.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../group_norm_arguments.h"
#include "torch.cuh"

namespace rk::cuda {
namespace {

using torch::stable::Tensor;

std::optional<Tensor> contiguous(const std::optional<Tensor>& t) {
  return t ? std::make_optional(torch::stable::contiguous(*t)) : std::nullopt;
}

// The tensors of one call, kept alive until its kernels are launched.
struct Tensors {
  const char* op;
  int64_t groups;
  bool innermost, second;
  Tensor x, grad, mean, rstd;
  std::optional<Tensor> weight, gg_x, gg_weight, gg_bias;
  std::optional<Tensor> gg_grad, grad_x, grad_weight, grad_bias, sums, sample_weight, sample_bias;

  Tensors(const char* name, bool second_derivative, const Tensor& images, const Tensor& g,
          const std::optional<Tensor>& w, const Tensor& means, const Tensor& rstds, int64_t count)
      : op(name),
        groups(count),
        innermost(channels_innermost(images)),
        second(second_derivative),
        x(dense_in(innermost, images)),
        grad(dense_in(innermost, g)),
        mean(torch::stable::contiguous(means)),
        rstd(torch::stable::contiguous(rstds)),
        weight(contiguous(w)) {}

  ScalarType accumulation() const { return accumulation_type(x.scalar_type()); }
  Tensor like_x() const { return empty_in(innermost, x); }
  Tensor vector() const { return torch::stable::new_empty(x, {x.size(1)}, accumulation()); }
  Tensor nothing(bool of_sums) const {
    return torch::stable::new_empty(x, {0}, of_sums ? accumulation() : x.scalar_type());
  }

  template <class T>
  static T* pointer(const std::optional<Tensor>& t) {
    return t ? static_cast<T*>(t->data_ptr()) : nullptr;
  }

  template <class S>
  void launch_as(cudaStream_t stream) {
    using A = accumulation_t<S>;
    GroupNormCall<S> c{};
    c.second = second;
    c.samples = x.size(0);
    c.channels = x.size(1);
    c.positions = x.size(2);
    c.groups = groups;
    const bool rows = innermost || c.positions == 1;  // planes of one position are rows of channels
    set_units(c, rows);
    // Named, since nvcc takes the commas of a list in a template's argument for operators.
    const std::vector<int64_t> sum_sizes{c.samples, c.channels, c.slots, 5}, sample_sizes{c.samples, c.channels};
    sums = torch::stable::new_empty(x, sum_sizes, accumulation());
    if (grad_weight) sample_weight = torch::stable::new_empty(x, sample_sizes, accumulation());
    if (grad_bias) sample_bias = torch::stable::new_empty(x, sample_sizes, accumulation());
    c.x = static_cast<const S*>(x.data_ptr());
    c.g = static_cast<const S*>(grad.data_ptr());
    c.u = pointer<const S>(gg_x);
    c.weight = pointer<const A>(weight);
    c.gg_weight = pointer<const A>(gg_weight);
    c.gg_bias = pointer<const A>(gg_bias);
    c.mean = static_cast<const A*>(mean.data_ptr());
    c.rstd = static_cast<const A*>(rstd.data_ptr());
    c.gg_grad = pointer<S>(gg_grad);
    c.grad_x = pointer<S>(grad_x);
    c.sums = pointer<A>(sums);
    c.sample_weight = pointer<A>(sample_weight);
    c.sample_bias = pointer<A>(sample_bias);
    c.grad_weight = pointer<A>(grad_weight);
    c.grad_bias = pointer<A>(grad_bias);
    check_launch(launch_group_norm(rows, c, stream), op);
  }

  void launch_on(cudaStream_t stream) {
    switch (x.scalar_type()) {
      case ScalarType::Float: return launch_as<float>(stream);
      case ScalarType::Double: return launch_as<double>(stream);
      case ScalarType::Half: return launch_as<__half>(stream);
      default: return launch_as<__nv_bfloat16>(stream);
    }
  }
};

std::tuple<Tensor, Tensor, Tensor> group_norm_backward(Tensor grad, Tensor x, std::optional<Tensor> weight, Tensor mean,
                                                       Tensor rstd, int64_t groups, bool need_x, bool need_weight,
                                                       bool need_bias) {
  const DeviceScope scope(x);
  const std::optional<Tensor> none;
  const char* op = "group_norm_backward";
  check_group_norm(op, none, none, none, grad, x, weight, mean, rstd, groups);
  Tensors call(op, false, x, grad, weight, mean, rstd, groups);
  if (need_x) call.grad_x = call.like_x();
  if (need_weight) call.grad_weight = call.vector();
  if (need_bias) call.grad_bias = call.vector();
  call.launch_on(scope.stream());
  return {call.grad_x.value_or(call.nothing(false)), call.grad_weight.value_or(call.nothing(true)),
          call.grad_bias.value_or(call.nothing(true))};
}

std::tuple<Tensor, Tensor, Tensor> group_norm_double_backward(std::optional<Tensor> gg_x,
                                                              std::optional<Tensor> gg_weight,
                                                              std::optional<Tensor> gg_bias, Tensor grad, Tensor x,
                                                              std::optional<Tensor> weight, Tensor mean, Tensor rstd,
                                                              int64_t groups, bool need_grad, bool need_x,
                                                              bool need_weight) {
  const DeviceScope scope(x);
  const char* op = "group_norm_double_backward";
  check_group_norm(op, gg_x, gg_weight, gg_bias, grad, x, weight, mean, rstd, groups);
  Tensors call(op, true, x, grad, weight, mean, rstd, groups);
  if (gg_x) call.gg_x = dense_in(call.innermost, *gg_x);
  call.gg_weight = contiguous(gg_weight);
  call.gg_bias = contiguous(gg_bias);
  if (need_grad) call.gg_grad = call.like_x();
  if (need_x) call.grad_x = call.like_x();
  if (need_weight) call.grad_weight = call.vector();
  call.launch_on(scope.stream());
  return {call.gg_grad.value_or(call.nothing(false)), call.grad_x.value_or(call.nothing(false)),
          call.grad_weight.value_or(call.nothing(true))};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(robustkern, RK_CUDA_KEY, m) {
  m.impl("group_norm_backward", TORCH_BOX(&group_norm_backward));
  m.impl("group_norm_double_backward", TORCH_BOX(&group_norm_double_backward));
}

}  // namespace rk::cuda
