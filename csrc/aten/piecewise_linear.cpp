// relu, leaky_relu, hardtanh (relu6), hardsigmoid, hardshrink and softshrink: the second backward is the first backward
// of u.
#include "linear_backward.h"

namespace rk::aten {
namespace {

void keep(Kept& kept, const at::Scalar& number) { kept.put_number(number.toDouble()); }
void keep(Kept& kept, bool flag) { kept.put(flag); }

template <class T>
T take(Kept& kept) {
  if constexpr (std::is_same_v<T, bool>)
    return kept.flag();
  else
    return kept.number();
}

// PyTorch's first backward, a function of the cotangent, x and some numbers, is its own transpose.
template <auto backward, bool differentiable = true, class... Numbers>
std::optional<Tensor> masked(const Tensor& g, const Tensor& x, Numbers... numbers) {
  const auto transposed = [](const Tensor& u, const variable_list& saved, Kept& kept) {
    const std::tuple<Tensor, Tensor, std::decay_t<Numbers>...> arguments{u, saved[0],
                                                                         take<std::decay_t<Numbers>>(kept)...};
    return std::apply(backward, arguments);
  };
  Kept kept;
  (keep(kept, numbers), ...);
  return linear_backward(g, x, {[&] { return backward(g, x, numbers...); }, transposed, {x}, kept, differentiable});
}

}  // namespace

void register_piecewise_linear(Registrar& r) {
  r.replace<at::_ops::threshold_backward, masked<at::threshold_backward>>();
  r.replace<at::_ops::leaky_relu_backward, masked<at::leaky_relu_backward>>();
  r.replace<at::_ops::hardtanh_backward, masked<at::hardtanh_backward>>();
  r.replace<at::_ops::hardsigmoid_backward, masked<at::hardsigmoid_backward, /*differentiable=*/false>>();
  r.replace<at::_ops::hardshrink_backward, masked<at::hardshrink_backward>>();
  r.replace<at::_ops::softshrink_backward, masked<at::softshrink_backward>>();
}

}  // namespace rk::aten
