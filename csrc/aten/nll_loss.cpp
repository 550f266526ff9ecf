// nll_loss, of rows and of images: the second backward is the loss of u.
#include "linear_backward.h"

namespace rk::aten {
namespace {

Tensor nll_loss_backward(const Tensor& g, const Tensor& x, const Tensor& target, const std::optional<Tensor>& weight,
                         int64_t reduction, SymInt ignore_index, const Tensor& total_weight) {
  const auto transposed = [](const Tensor& u, const MapArguments& a) {
    return at::nll_loss_symint(u, a.tensors[0], a.tensors[1], a.integers[0].expect_int(), a.integers[1]);
  };
  return linear_backward(
      g, x,
      {[&] { return at::nll_loss_backward_symint(g, x, target, weight, reduction, ignore_index, total_weight); },
       transposed,
       {{target, optional_value(weight)}, {reduction, ignore_index}, {}}});
}

Tensor nll_loss2d_backward(const Tensor& g, const Tensor& x, const Tensor& target, const std::optional<Tensor>& weight,
                           int64_t reduction, SymInt ignore_index, const Tensor& total_weight) {
  const auto transposed = [](const Tensor& u, const MapArguments& a) {
    // Its own derivative wants the layout that it was given.
    return at::nll_loss2d_symint(u.contiguous(), a.tensors[0], a.tensors[1], a.integers[0].expect_int(), a.integers[1]);
  };
  return linear_backward(
      g, x,
      {[&] { return at::nll_loss2d_backward_symint(g, x, target, weight, reduction, ignore_index, total_weight); },
       transposed,
       {{target, optional_value(weight)}, {reduction, ignore_index}, {}},
       /*differentiable=*/false});
}

}  // namespace

void register_nll_loss(Registrar& r) {
  r.replace<at::_ops::nll_loss_backward, nll_loss_backward>();
  r.replace<at::_ops::nll_loss2d_backward, nll_loss2d_backward>();
}

}  // namespace rk::aten
