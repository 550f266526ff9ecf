// group_norm_backward and its derivative for CUDA tensors: arguments checked, outputs allocated, kernels of
// group_norm.cuh launched on the current stream.
#include "group_norm.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../arguments/group_norm.h"
#include "norm_calls.cuh"

namespace rk::cuda {
namespace {

struct Tensors : NormTensors {
  bool second, innermost;
  int64_t groups;
  std::optional<Tensor> scratch, sample_weight, sample_bias;

  Tensors(const char* name, bool second_derivative, const Tensor& images, const Tensor& g,
          const std::optional<Tensor>& w, const Tensor& means, const Tensor& rstds, int64_t count)
      : NormTensors{name, images, g, contiguous(rstds), contiguous(means), contiguous(w)},
        second(second_derivative),
        innermost(channels_innermost(images)),
        groups(count) {
    x = on_vectors(dense_in(innermost, images));
    grad = on_vectors(dense_in(innermost, g));
  }

  Tensor image() const { return empty_in(innermost, x); }

  void launch_on(cudaStream_t stream) {
    visit_storage(x.scalar_type(), [&](auto element) {
      using S = decltype(element);
      using A = accumulation_t<S>;
      GroupNormCall<S> c{};
      c.second = second;
      c.samples = x.size(0);
      c.channels = x.size(1);
      c.positions = x.size(2);
      c.groups = groups;
      put_into(c);
      const bool rows = innermost || c.positions == 1;  // planes of one position are rows of channels
      set_units(c, rows);
      // Named, since nvcc takes the commas of a list in a template's argument for operators.
      const std::vector<int64_t> sample_sizes{c.samples, c.channels};
      if (const int64_t size = scratch_size(c, rows)) scratch = sums({size});
      if (grad_weight) sample_weight = sums(sample_sizes);
      if (grad_bias) sample_bias = sums(sample_sizes);
      c.scratch = pointer<A>(scratch);
      c.sample_weight = pointer<A>(sample_weight);
      c.sample_bias = pointer<A>(sample_bias);
      check_launch(launch_group_norm(rows, c, stream), op);
    });
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
  if (need_x) call.grad_x = call.image();
  if (need_weight) call.grad_weight = call.sums({x.size(1)});
  if (need_bias) call.grad_bias = call.sums({x.size(1)});
  call.launch_on(scope.stream());
  return call.slopes();
}

std::tuple<Tensor, Tensor, Tensor> group_norm_double_backward(std::optional<Tensor> u, std::optional<Tensor> a,
                                                              std::optional<Tensor> b, Tensor grad, Tensor x,
                                                              std::optional<Tensor> weight, Tensor mean, Tensor rstd,
                                                              int64_t groups, bool need_grad, bool need_x,
                                                              bool need_weight) {
  const DeviceScope scope(x);
  const char* op = "group_norm_double_backward";
  check_group_norm(op, u, a, b, grad, x, weight, mean, rstd, groups);
  Tensors call(op, true, x, grad, weight, mean, rstd, groups);
  if (u) call.u = on_vectors(dense_in(call.innermost, *u));
  call.a = contiguous(a);
  call.b = contiguous(b);
  if (need_grad) call.gg_grad = call.image();
  if (need_x) call.grad_x = call.image();
  if (need_weight) call.grad_weight = call.sums({x.size(1)});
  call.launch_on(scope.stream());
  return call.bends();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(robustkern, RK_CUDA_KEY, m) {
  m.impl("group_norm_backward", TORCH_BOX(&group_norm_backward));
  m.impl("group_norm_double_backward", TORCH_BOX(&group_norm_double_backward));
}

}  // namespace rk::cuda
