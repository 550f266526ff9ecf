// The products of a linear layer's second derivative, where PyTorch's BLAS has none of full width: matmul_cpu.h.
//
//   first backward   grad_x = g W   grad_W = g^T x            each a product a b, with the cotangent u:
//   second backward  grad_a = u b^T   grad_b = a^T u
//
// The derivative is PyTorch's, written in the same products: it can be differentiated any number of times.
#include "matmul_cpu.h"
#include "operators.h"

namespace rk::aten {
namespace {

struct Matmul : torch::autograd::Function<Matmul> {
  static Tensor forward(AutogradContext* ctx, const Tensor& a, const Tensor& b) {
    ctx->save_for_backward({a, b});
    ctx->set_materialize_grads(false);
    const at::AutoDispatchBelowADInplaceOrView below;
    return matrix_product(a, b);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& cotangents) {
    const Tensor& u = cotangents[0];
    if (!u.defined()) return {Tensor(), Tensor()};
    const auto saved = ctx->get_saved_variables();
    const Tensor &a = saved[0], &b = saved[1];
    const bool composed = at::GradMode::is_enabled() || !is_plain(u) || is_batched(u);
    const auto product = [&](const Tensor& x, const Tensor& y) {
      if (composed) return at::mm(x, y);
      const at::AutoDispatchBelowADInplaceOrView below;
      return matrix_product(x, y);
    };
    return {ctx->needs_input_grad(0) ? product(u, b.t()) : Tensor(),
            ctx->needs_input_grad(1) ? product(a.t(), u) : Tensor()};
  }
};

Tensor mm(const Tensor& a, const Tensor& b) {
  const auto served = [](const Tensor& t) {
    return is_plain(t) && !is_batched(t) && t.is_cpu() && t.scalar_type() == at::kFloat;
  };
  if (has_faster_matmul() && served(a) && served(b)) return Matmul::apply(a, b);
  const UseStock guard;
  return at::mm(a, b);
}

}  // namespace

void register_matmul(Registrar& r) {
  if (has_faster_matmul()) r.replace<at::_ops::mm, mm>(kOnCpuOnly);
}

}  // namespace rk::aten
