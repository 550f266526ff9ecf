// relu, leaky_relu, hardtanh (relu6), hardsigmoid, hardshrink and softshrink: the second backward is the first backward
// of u.
#include "linear_backward.h"

namespace rk::aten {
namespace {

using Numbers = std::vector<double>;

// `backward` as a function of the cotangent, x and its numbers: a first backward, and its own transpose.
template <class Backward>
std::optional<Tensor> masked(const Tensor& g, const Tensor& x, const Numbers& numbers, const Backward& backward,
                             bool differentiable = true) {
  static_assert(std::is_empty_v<Backward>, "the function is made anew from its type");
  const auto transposed = [](const Tensor& u, const variable_list& saved, Kept& kept) {
    return Backward{}(u, saved[0], kept.numbers());
  };
  return linear_backward(
      g, x, {[&] { return backward(g, x, numbers); }, transposed, {x}, Kept().put_numbers(numbers), differentiable});
}

std::optional<Tensor> threshold_backward(const Tensor& g, const Tensor& x, const at::Scalar& threshold) {
  return masked(g, x, {threshold.toDouble()}, [](const Tensor& v, const Tensor& at, const Numbers& n) {
    return at::threshold_backward(v, at, n[0]);
  });
}
std::optional<Tensor> leaky_relu_backward(const Tensor& g, const Tensor& x, const at::Scalar& slope, bool x_is_result) {
  return masked(g, x, {slope.toDouble(), x_is_result ? 1.0 : 0.0},
                [](const Tensor& v, const Tensor& at, const Numbers& n) {
                  return at::leaky_relu_backward(v, at, n[0], n[1] != 0);
                });
}
std::optional<Tensor> hardtanh_backward(const Tensor& g, const Tensor& x, const at::Scalar& low,
                                        const at::Scalar& high) {
  return masked(g, x, {low.toDouble(), high.toDouble()}, [](const Tensor& v, const Tensor& at, const Numbers& n) {
    return at::hardtanh_backward(v, at, n[0], n[1]);
  });
}
std::optional<Tensor> hardsigmoid_backward(const Tensor& g, const Tensor& x) {
  return masked(
      g, x, {}, [](const Tensor& v, const Tensor& at, const Numbers&) { return at::hardsigmoid_backward(v, at); },
      /*differentiable=*/false);
}
std::optional<Tensor> hardshrink_backward(const Tensor& g, const Tensor& x, const at::Scalar& lambda) {
  return masked(g, x, {lambda.toDouble()}, [](const Tensor& v, const Tensor& at, const Numbers& n) {
    return at::hardshrink_backward(v, at, n[0]);
  });
}
std::optional<Tensor> softshrink_backward(const Tensor& g, const Tensor& x, const at::Scalar& lambda) {
  return masked(g, x, {lambda.toDouble()}, [](const Tensor& v, const Tensor& at, const Numbers& n) {
    return at::softshrink_backward(v, at, n[0]);
  });
}

}  // namespace

void register_piecewise_linear(Registrar& r) {
  r.replace<at::_ops::threshold_backward, threshold_backward>();
  r.replace<at::_ops::leaky_relu_backward, leaky_relu_backward>();
  r.replace<at::_ops::hardtanh_backward, hardtanh_backward>();
  r.replace<at::_ops::hardsigmoid_backward, hardsigmoid_backward>();
  r.replace<at::_ops::hardshrink_backward, hardshrink_backward>();
  r.replace<at::_ops::softshrink_backward, softshrink_backward>();
}

}  // namespace rk::aten
