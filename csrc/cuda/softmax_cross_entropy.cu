// softmax_cross_entropy for CUDA tensors: arguments checked, outputs allocated, kernels of softmax_cross_entropy.cuh
// launched on the current stream.
#include "softmax_cross_entropy.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "../arguments/softmax_cross_entropy.h"
#include "torch.cuh"

namespace rk::cuda {
namespace {

// The tensors of one call, kept alive until its kernel is launched.
struct CrossEntropyTensors {
  const char* op;
  Tensor logits, target;
  double label_smoothing, temperature;
  int64_t ignore_index;
  std::optional<Tensor> u, grad, statistics_in, per_row, statistics, out;

  CrossEntropyTensors(const char* name, const Tensor& z, const Tensor& t, double smoothing, double temp, int64_t ignore)
      : op(name),
        logits(with_dense_rows(z)),
        target(t.dim() == 2 ? with_dense_rows(t) : contiguous(t)),
        label_smoothing(smoothing),
        temperature(temp),
        ignore_index(ignore) {
    check_cross_entropy(op, z, t, label_smoothing, temperature);
  }

  ScalarType accumulation() const { return accumulation_type(logits.scalar_type()); }
  Tensor new_rows() const { return torch::stable::new_empty(logits, {logits.size(0)}, accumulation()); }
  Tensor new_logits() const { return torch::stable::new_empty(logits, {logits.size(0), logits.size(1)}); }

  void set_grad(const Tensor& g, const Tensor& s) {
    check_statistics(op, g, s, logits);
    grad = contiguous(g);
    statistics_in = contiguous(s);
  }

  void launch_on(Order order, cudaStream_t stream) {
    visit_storage(logits.scalar_type(), [&](auto element) {
      using S = decltype(element);
      using A = accumulation_t<S>;
      CrossEntropyCall<S> c{};
      c.rows = logits.size(0);
      c.classes = logits.size(1);
      c.logits = pointer<const S>(logits);
      c.logits_stride = logits.stride(0);
      c.u = pointer<const S>(u);
      c.u_stride = u ? u->stride(0) : 0;
      if (is_index_target(target))
        c.indices = pointer<const int64_t>(target);
      else if (target.scalar_type() == accumulation())
        c.wide_target = pointer<const A>(target);
      else
        c.narrow_target = pointer<const S>(target);
      c.target_stride = target.stride(0);
      c.ignore_index = ignore_index;
      c.label_smoothing = static_cast<A>(label_smoothing);
      c.inverse_t = static_cast<A>(1.0 / temperature);
      c.grad = pointer<const A>(grad);
      c.statistics_in = pointer<const A>(statistics_in);
      c.per_row = pointer<A>(per_row);
      c.statistics = pointer<A>(statistics);
      c.out = pointer<S>(out);
      check_launch(launch_softmax_cross_entropy(order, c, stream), op);
    });
  }
};

std::tuple<Tensor, Tensor> softmax_cross_entropy(Tensor logits, Tensor target, double label_smoothing,
                                                 double temperature, int64_t ignore_index) {
  const DeviceScope scope(logits);
  CrossEntropyTensors call("softmax_cross_entropy", logits, target, label_smoothing, temperature, ignore_index);
  Tensor loss = call.new_rows(),
         statistics = torch::stable::new_empty(logits, {logits.size(0), 2}, call.accumulation());
  call.per_row = loss;
  call.statistics = statistics;
  call.launch_on(Order::kValue, scope.stream());
  return {loss, statistics};
}

Tensor softmax_cross_entropy_backward(Tensor grad, Tensor logits, Tensor statistics, Tensor target,
                                      double label_smoothing, double temperature, int64_t ignore_index) {
  const DeviceScope scope(logits);
  CrossEntropyTensors call("softmax_cross_entropy_backward", logits, target, label_smoothing, temperature,
                           ignore_index);
  call.set_grad(grad, statistics);
  Tensor grad_logits = call.new_logits();
  call.out = grad_logits;
  call.launch_on(Order::kBackward, scope.stream());
  return grad_logits;
}

std::tuple<Tensor, Tensor> softmax_cross_entropy_double_backward(Tensor u, Tensor grad, Tensor logits,
                                                                 Tensor statistics, Tensor target,
                                                                 double label_smoothing, double temperature,
                                                                 int64_t ignore_index) {
  const DeviceScope scope(logits);
  CrossEntropyTensors call("softmax_cross_entropy_double_backward", logits, target, label_smoothing, temperature,
                           ignore_index);
  check_tensor(call.op, "u", u, sizes_of(logits), logits.scalar_type(), logits);
  call.set_grad(grad, statistics);
  call.u = with_dense_rows(u);
  Tensor gg_grad = call.new_rows(), grad_logits = call.new_logits();
  call.per_row = gg_grad;
  call.out = grad_logits;
  call.launch_on(Order::kDoubleBackward, scope.stream());
  return {gg_grad, grad_logits};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(robustkern, RK_CUDA_KEY, m) {
  m.impl("softmax_cross_entropy", TORCH_BOX(&softmax_cross_entropy));
  m.impl("softmax_cross_entropy_backward", TORCH_BOX(&softmax_cross_entropy_backward));
  m.impl("softmax_cross_entropy_double_backward", TORCH_BOX(&softmax_cross_entropy_double_backward));
}

}  // namespace rk::cuda
