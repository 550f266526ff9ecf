// nll_loss, of rows and of images: the second backward is the loss of u.
#include "linear_backward.h"

namespace rk::aten {
namespace {

// `loss` of rows or of images, and its first backward.
template <auto loss, auto first_backward>
std::optional<Tensor> loss_backward(const Tensor& g, const Tensor& x, const Tensor& target,
                                    const std::optional<Tensor>& weight, int64_t reduction, SymInt ignore_index,
                                    const Tensor& total_weight) {
  const auto transposed = [](const Tensor& u, const variable_list& saved, Kept& kept) {
    const int64_t reduction = kept.integer();
    // The loss of images wants the layout that it was given.
    return loss(u.dim() == 4 ? u.contiguous() : u, saved[0], if_defined(saved[1]), reduction, kept.symbol());
  };
  return linear_backward(g, x,
                         {[&] { return first_backward(g, x, target, weight, reduction, ignore_index, total_weight); },
                          transposed,
                          {target, optional_value(weight)},
                          Kept().put(reduction).put(ignore_index),
                          /*differentiable=*/x.dim() < 4});
}

}  // namespace

void register_nll_loss(Registrar& r) {
  r.replace<at::_ops::nll_loss_backward, loss_backward<at::nll_loss_symint, at::nll_loss_backward_symint>>();
  r.replace<at::_ops::nll_loss2d_backward, loss_backward<at::nll_loss2d_symint, at::nll_loss2d_backward_symint>>();
}

}  // namespace rk::aten
