#include "linear_backward.h"

namespace rk::aten {
namespace {

struct LinearBackward : torch::autograd::Function<LinearBackward> {
  static Tensor forward(AutogradContext* ctx, const Tensor&, const Tensor&, const LinearMap& map) {
    ctx->save_for_backward(map.arguments.tensors);
    ctx->set_materialize_grads(false);
    auto& data = ctx->saved_data;
    // In a list: a number by itself is a variable to compiled autograd.
    data["transposed"] = std::vector<int64_t>{reinterpret_cast<int64_t>(map.transposed)};
    data["integers"] = c10::IValue(SymIntArrayRef(map.arguments.integers));
    data["numbers"] = map.arguments.numbers;
    data["zeros"] = materializes_zeros();  // a graph keeps the derivatives it was built with
    const at::AutoDispatchBelowADInplaceOrView below;
    return map.first();
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& cotangents) {
    const Tensor& u = cotangents[0];
    if (!u.defined()) return {Tensor(), Tensor(), Tensor()};
    auto& data = ctx->saved_data;
    Tensor grad_g, grad_x;
    if (ctx->needs_input_grad(0)) {
      const auto transposed = reinterpret_cast<Transposed>(data["transposed"].toIntVector()[0]);
      grad_g = transposed(
          u, {ctx->get_saved_variables(), data["integers"].toSymIntVector(), data["numbers"].toDoubleVector()});
    }
    if (ctx->needs_input_grad(1) && (data["zeros"].toBool() || in_compiled_autograd()))
      grad_x = at::zeros_like(u);  // which is of x's shape
    return {grad_g, grad_x, Tensor()};
  }
};

}  // namespace

Tensor linear_backward(const Tensor& g, const Tensor& x, const LinearMap& map) {
  if (!g.is_nested() && !x.is_nested()) return LinearBackward::apply(g, x, map);
  const UseStock guard;  // a nested tensor has no shape to make zeros of
  return map.first();
}

}  // namespace rk::aten
