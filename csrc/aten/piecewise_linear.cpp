// relu, leaky_relu, hardtanh (relu6), hardsigmoid, hardshrink and softshrink: the second backward is the first backward
// of u.
#include "linear_backward.h"

namespace rk::aten {
namespace {

// `backward` as a function of the cotangent and x: a first backward, and its own transpose.
template <class Backward>
Tensor masked(const Tensor& g, const Tensor& x, const Backward& backward) {
  return linear_backward(g, x,
                         {[&] { return backward(g, x); },
                          [backward](const Tensor& u, const variable_list& saved) { return backward(u, saved[0]); },
                          {x}});
}

Tensor threshold_backward(const Tensor& g, const Tensor& x, const at::Scalar& threshold) {
  return masked(g, x, [=](const Tensor& v, const Tensor& at) { return at::threshold_backward(v, at, threshold); });
}
Tensor leaky_relu_backward(const Tensor& g, const Tensor& x, const at::Scalar& slope, bool x_is_result) {
  return masked(g, x,
                [=](const Tensor& v, const Tensor& at) { return at::leaky_relu_backward(v, at, slope, x_is_result); });
}
Tensor hardtanh_backward(const Tensor& g, const Tensor& x, const at::Scalar& low, const at::Scalar& high) {
  return masked(g, x, [=](const Tensor& v, const Tensor& at) { return at::hardtanh_backward(v, at, low, high); });
}
Tensor hardsigmoid_backward(const Tensor& g, const Tensor& x) {
  return masked(g, x, [](const Tensor& v, const Tensor& at) { return at::hardsigmoid_backward(v, at); });
}
Tensor hardshrink_backward(const Tensor& g, const Tensor& x, const at::Scalar& lambda) {
  return masked(g, x, [=](const Tensor& v, const Tensor& at) { return at::hardshrink_backward(v, at, lambda); });
}
Tensor softshrink_backward(const Tensor& g, const Tensor& x, const at::Scalar& lambda) {
  return masked(g, x, [=](const Tensor& v, const Tensor& at) { return at::softshrink_backward(v, at, lambda); });
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
