// The products of a linear layer's second derivative, where PyTorch's BLAS has none of full width: matmul_cpu.h.
//
//   first backward   grad_x = g W   grad_W = g^T x            each a product a b, with the cotangent u:
//   second backward  grad_a = u b^T   grad_b = a^T u
//
// The derivative is PyTorch's, written in the same products: it can be differentiated any number of times.
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/graph_task.h>

#include "kernels/matmul_cpu.h"
#include "recomputed.h"
#include "replacement.h"

namespace rk::aten {
namespace {

// Tensors with memory, and nothing but numbers in it.  Not while a TorchDispatchMode looks on, such as one that counts
// operations: it is to see PyTorch's operator.
bool served(const Tensor& t) {
  return t.is_cpu() && t.scalar_type() == at::kFloat && is_plain(t) && !is_batched(t) && !t._is_zerotensor() &&
         !is_differentiated(t) && !c10::impl::dispatch_mode_enabled();
}

// Whether half the time of PyTorch's product is more than what our node takes.
bool pays(const Tensor& a, const Tensor& b) { return a.numel() * b.size(1) >= 1 << 20 || however_small(); }

struct Matmul : torch::autograd::Function<Matmul> {
  static Tensor forward(AutogradContext* ctx, const Tensor& a, const Tensor& b) {
    ctx->save_for_backward({b.requires_grad() ? a : Tensor(), a.requires_grad() ? b : Tensor()});
    ctx->set_materialize_grads(false);
    const at::AutoDispatchBelowADInplaceOrView below;
    return matrix_product(a, b);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& cotangents) {
    const Tensor& u = cotangents[0];
    if (!u.defined()) return {Tensor(), Tensor()};
    const auto saved = ctx->get_saved_variables();
    const Tensor &a = saved[0], &b = saved[1];
    const bool composed = at::GradMode::is_enabled() || !served(u);
    const auto product = [&](const Tensor& x, const Tensor& y) {
      if (composed) return at::mm(x, y);
      const at::AutoDispatchBelowADInplaceOrView below;
      return matrix_product(x, y);
    };
    return {ctx->needs_input_grad(0) ? product(u, b.t()) : Tensor(),
            ctx->needs_input_grad(1) ? product(a.t(), u) : Tensor()};
  }
};

// Only while a backward pass runs: the products of a model's forward are PyTorch's, as in a plain step.  A checkpoint, which
// computes its forward again there, does so under hooks.
std::optional<Tensor> mm(const Tensor& a, const Tensor& b) {
  const bool in_backward = torch::autograd::get_current_graph_task_id() >= 0 && !saves_through_hooks();
  const KeepLess less(a);
  if (in_backward && has_faster_matmul() && served(a) && served(b) && pays(a, b)) return Matmul::apply(a, b);
  if (!saves_memory()) return std::nullopt;
  const UseStock stock;
  return at::mm(a, b);
}

}  // namespace

void register_matmul(Registrar& r) {
  if (has_faster_matmul()) r.replace<at::_ops::mm, mm>(nullptr, Devices::kCpu);
}

}  // namespace rk::aten
