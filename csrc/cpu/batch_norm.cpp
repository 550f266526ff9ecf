// batch_norm_double_backward on the CPU.  Formulas: math/batch_norm.h.
//
// Two sweeps, one for five sums a channel and one for the results: u, g and x are read twice and two tensors written, 8
// elements moved for each element of x, and 5 where the second sweep finds its channel in the cache.  Of K cotangents a
// thread takes one channel after the other, so that x and the sum of grad_x stay in its cache: 3 K + 2.  Work is cut into
// units of fixed size, whose sums are added in order: the same bits for every number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "../arguments/batch_norm.h"
#include "batch_norm_sweeps.h"

namespace rk::cpu {
namespace {

template <class A>
const A* pointer(const std::optional<Tensor>& t) {
  return t ? static_cast<const A*>(t->data_ptr()) : nullptr;
}

std::optional<Tensor> dense(const std::optional<Tensor>& t) {
  return t ? std::make_optional(torch::stable::contiguous(*t)) : std::nullopt;
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_double_backward(std::optional<Tensor> gg_x,
                                                              std::optional<Tensor> gg_weight,
                                                              std::optional<Tensor> gg_bias, Tensor grad, Tensor x,
                                                              std::optional<Tensor> weight, Tensor mean, Tensor invstd,
                                                              bool training, bool need_grad, bool need_x,
                                                              bool need_weight) {
  const int64_t cotangents =
      check_batch_norm("batch_norm_double_backward", gg_x, gg_weight, gg_bias, grad, x, weight, mean, invstd);
  const auto sizes = sizes_of(x), sizes_of_grad = sizes_of(grad);
  const ScalarType dtype = x.scalar_type(), wide = accumulation_type(dtype);
  const bool several = grad.dim() == 4;
  const Tensor u = gg_x ? torch::stable::contiguous(*gg_x) : torch::stable::new_zeros(x, sizes_of_grad);
  const Tensor g = torch::stable::contiguous(grad), dense_x = torch::stable::contiguous(x);
  const Tensor dense_mean = torch::stable::contiguous(mean), dense_invstd = torch::stable::contiguous(invstd);
  const auto w = dense(weight), a = dense(gg_weight), b = dense(gg_bias);
  const auto output = [&](bool needed, const std::vector<int64_t>& shape, ScalarType type) {
    return torch::stable::new_empty(x, needed ? shape : std::vector<int64_t>{0}, type);
  };
  Tensor gg_grad = output(need_grad, sizes_of_grad, dtype), grad_x = output(need_x, sizes, dtype);
  Tensor grad_weight = output(need_weight, {x.size(1)}, wide);
  Tensor sum_x = need_x && several && wide != dtype ? output(true, sizes, wide) : grad_x;  // over the cotangents

  const auto run = [&](auto number) {
    using A = decltype(number);
    Call<A> call{};
    call.images = x.size(0);
    call.channels = x.size(1);
    call.inner = x.size(2);
    call.dtype = dtype;
    call.item = dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
    call.training = training;
    call.u = static_cast<const char*>(u.data_ptr());
    call.g = static_cast<const char*>(g.data_ptr());
    call.x = training || gg_weight || need_x ? static_cast<const char*>(dense_x.data_ptr()) : nullptr;
    call.grad = need_grad ? static_cast<char*>(gg_grad.data_ptr()) : nullptr;
    call.grad_x = need_x && !several ? static_cast<char*>(grad_x.data_ptr()) : nullptr;
    call.weight = pointer<A>(w);
    call.a = pointer<A>(a);
    call.b = pointer<A>(b);
    call.mean = static_cast<const A*>(dense_mean.data_ptr());
    call.invstd = static_cast<const A*>(dense_invstd.data_ptr());
    call.grad_weight = need_weight ? static_cast<A*>(grad_weight.data_ptr()) : nullptr;
    call.cotangents = cotangents;
    if (need_x && several) call.sum_x = static_cast<A*>(sum_x.data_ptr());
    call.run();
  };
  dtype == ScalarType::Double ? run(double{}) : run(float{});
  if (sum_x.data_ptr() != grad_x.data_ptr()) torch::stable::copy_(grad_x, sum_x);
  return {gg_grad, grad_x, grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(robustkern, CPU, m) {
  m.impl("batch_norm_double_backward", TORCH_BOX(&batch_norm_double_backward));
}

}  // namespace rk::cpu
