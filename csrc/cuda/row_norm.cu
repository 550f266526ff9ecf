// row_norm for CUDA tensors: arguments checked, outputs allocated, kernels of row_norm.cuh launched on the current
// stream.
#include "row_norm.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "../arguments/row_norm.h"
#include "torch.cuh"

namespace rk::cuda {
namespace {

// The tensors of one call, kept alive until its kernels are launched.
struct Tensors {
  const char* op;
  Tensor x;
  std::optional<Tensor> weight;
  int64_t inner;
  double p;
  Norm norm;
  std::optional<Tensor> u, grad, norms, per_row, out, partial, ties, queue;

  Tensors(const char* name, const Tensor& rows, const std::optional<Tensor>& weights, int64_t run, double exponent,
          bool squared)
      : op(name), x(with_dense_rows(rows)), weight(weights), inner(run), p(exponent) {
    check_matrix(op, "x", rows);
    check_weight(op, weight, inner, rows);
    norm = norm_kind(op, p, squared);
    weight = contiguous(weight);
  }

  ScalarType accumulation() const { return accumulation_type(x.scalar_type()); }

  void set_grad(const Tensor& g, const Tensor& n) {
    check_tensor(op, "grad", g, {x.size(0)}, accumulation(), x);
    check_tensor(op, "norm", n, {x.size(0)}, accumulation(), x);
    grad = contiguous(g);
    norms = contiguous(n);
  }

  void launch_on(Order order, cudaStream_t stream) {
    visit_storage(x.scalar_type(), [&](auto element) {
      using S = decltype(element);
      using A = accumulation_t<S>;
      RowNormCall<S> c{};
      c.norm = norm;
      c.p = static_cast<A>(p);
      c.rows = x.size(0);
      c.cols = x.size(1);
      c.chunks = std::max<int64_t>(1, (c.cols + row_chunk<S>(norm) - 1) / row_chunk<S>(norm));
      c.x = pointer<const S>(x);
      c.x_stride = x.stride(0);
      c.u = pointer<const S>(u);
      c.u_stride = u ? u->stride(0) : 0;
      c.grad = pointer<const A>(grad);
      c.norms = pointer<const A>(norms);
      if (weight) c.weights = {pointer<const A>(weight), weight->size(0), inner, c.cols};
      if (c.chunks > 1) {
        partial = torch::stable::new_empty(x, {c.rows * c.chunks}, accumulation());
        if (norm == Norm::kInf) ties = torch::stable::new_empty(x, {c.rows * c.chunks}, accumulation());
        if (order == Order::kDoubleBackward)
          queue = torch::stable::new_empty(x, {RowQueue::words(c.rows)}, ScalarType::Int);
      }
      c.queue = pointer<std::uint32_t>(queue);
      c.partial = pointer<A>(partial);
      c.ties = pointer<A>(ties);
      c.per_row = pointer<A>(per_row);
      c.out = pointer<S>(out);
      check_launch(launch_row_norm(order, c, stream), op);
    });
  }
};

Tensor row_norm(Tensor x, std::optional<Tensor> weight, int64_t inner, double p, bool squared) {
  const DeviceScope scope(x);
  Tensors call("row_norm", x, weight, inner, p, squared);
  Tensor norm = torch::stable::new_empty(x, {x.size(0)}, call.accumulation());
  call.per_row = norm;
  call.launch_on(Order::kValue, scope.stream());
  return norm;
}

Tensor row_norm_backward(Tensor grad, Tensor x, Tensor norm, std::optional<Tensor> weight, int64_t inner, double p,
                         bool squared) {
  const DeviceScope scope(x);
  Tensors call("row_norm_backward", x, weight, inner, p, squared);
  call.set_grad(grad, norm);
  Tensor grad_x = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  call.out = grad_x;
  call.launch_on(Order::kBackward, scope.stream());
  return grad_x;
}

std::tuple<Tensor, Tensor> row_norm_double_backward(Tensor u, Tensor grad, Tensor x, Tensor norm,
                                                    std::optional<Tensor> weight, int64_t inner, double p,
                                                    bool squared) {
  const DeviceScope scope(x);
  Tensors call("row_norm_double_backward", x, weight, inner, p, squared);
  check_tensor(call.op, "u", u, {x.size(0), x.size(1)}, x.scalar_type(), x);
  call.set_grad(grad, norm);
  call.u = with_dense_rows(u);
  const bool flat = call.norm == Norm::kL1 || call.norm == Norm::kInf;
  Tensor gg_grad = torch::stable::new_empty(x, {x.size(0)}, call.accumulation());
  Tensor grad_x = flat ? torch::stable::new_empty(x, {0}) : torch::stable::new_empty(x, {x.size(0), x.size(1)});
  call.per_row = gg_grad;
  call.out = grad_x;
  call.launch_on(Order::kDoubleBackward, scope.stream());
  return {gg_grad, grad_x};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(robustkern, RK_CUDA_KEY, m) {
  m.impl("row_norm", TORCH_BOX(&row_norm));
  m.impl("row_norm_backward", TORCH_BOX(&row_norm_backward));
  m.impl("row_norm_double_backward", TORCH_BOX(&row_norm_double_backward));
}

}  // namespace rk::cuda
