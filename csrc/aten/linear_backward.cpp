#include "linear_backward.h"

namespace rk::aten {
namespace {

// How a node keeps a function.
struct Kept : torch::CustomClassHolder {
  Transposed transposed;
  std::vector<SymInt> sizes;  // of x
  at::TensorOptions options;
  bool zeros = materializes_zeros();  // a graph keeps the derivatives it was built with
  Kept(Transposed f, const Tensor& x) : transposed(std::move(f)), sizes(x.sym_sizes().vec()), options(x.options()) {}
};

struct LinearBackward : torch::autograd::Function<LinearBackward> {
  static Tensor forward(AutogradContext* ctx, const Tensor&, const Tensor& x, const LinearMap& map) {
    ctx->save_for_backward(map.saved);
    ctx->set_materialize_grads(false);
    ctx->saved_data["kept"] = c10::IValue::make_capsule(c10::make_intrusive<Kept>(map.transposed, x));
    const at::AutoDispatchBelowADInplaceOrView below;
    return map.first();
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& cotangents) {
    const Tensor& u = cotangents[0];
    if (!u.defined()) return {Tensor(), Tensor(), Tensor()};
    const auto capsule = ctx->saved_data["kept"].toCapsule();
    const Kept& kept = static_cast<const Kept&>(*capsule);
    Tensor grad_g, grad_x;
    if (ctx->needs_input_grad(0)) grad_g = kept.transposed(u, ctx->get_saved_variables());
    if (ctx->needs_input_grad(1) && kept.zeros) grad_x = at::zeros_symint(kept.sizes, kept.options);
    return {grad_g, grad_x, Tensor()};
  }
};

}  // namespace

Tensor linear_backward(const Tensor& g, const Tensor& x, LinearMap map) {
  if (!g.is_nested() && !x.is_nested()) return LinearBackward::apply(g, x, map);
  const UseStock guard;  // a nested tensor has no sizes to make zeros of
  return map.first();
}

}  // namespace rk::aten
