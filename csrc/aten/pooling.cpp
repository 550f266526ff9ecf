// Pooling of every kind: the second backward pools u as the forward pooled the input, maxima at the places that won
// there.  Pooling in one dimension is made of pooling in two.
#include "linear_backward.h"

namespace rk::aten {
namespace {

// A copy of the list, for functions that outlive the call.
using List = std::vector<int64_t>;

Tensor avg_pool2d_backward(const Tensor& g, const Tensor& x, at::IntArrayRef kernel, at::IntArrayRef stride,
                           at::IntArrayRef padding, bool ceil_mode, bool count_pad, std::optional<int64_t> divisor) {
  return linear_backward(
      g, x,
      {[&] { return at::avg_pool2d_backward(g, x, kernel, stride, padding, ceil_mode, count_pad, divisor); },
       [k = List(kernel.vec()), s = List(stride.vec()), p = List(padding.vec()), ceil_mode, count_pad, divisor](
           const Tensor& u, const variable_list&) { return at::avg_pool2d(u, k, s, p, ceil_mode, count_pad, divisor); },
       {}});
}

Tensor avg_pool3d_backward(const Tensor& g, const Tensor& x, at::IntArrayRef kernel, at::IntArrayRef stride,
                           at::IntArrayRef padding, bool ceil_mode, bool count_pad, std::optional<int64_t> divisor) {
  return linear_backward(
      g, x,
      {[&] { return at::avg_pool3d_backward(g, x, kernel, stride, padding, ceil_mode, count_pad, divisor); },
       [k = List(kernel.vec()), s = List(stride.vec()), p = List(padding.vec()), ceil_mode, count_pad, divisor](
           const Tensor& u, const variable_list&) { return at::avg_pool3d(u, k, s, p, ceil_mode, count_pad, divisor); },
       {}});
}

Tensor adaptive_avg_pool2d_backward(const Tensor& g, const Tensor& x) {
  return linear_backward(g, x,
                         {[&] { return at::_adaptive_avg_pool2d_backward(g, x); },
                          [h = g.sym_size(-2), w = g.sym_size(-1)](const Tensor& u, const variable_list&) {
                            return at::_adaptive_avg_pool2d_symint(u, {h, w});
                          },
                          {}});
}

Tensor adaptive_avg_pool3d_backward(const Tensor& g, const Tensor& x) {
  return linear_backward(
      g, x,
      {[&] { return at::_adaptive_avg_pool3d_backward(g, x); },
       [d = g.sym_size(-3), h = g.sym_size(-2), w = g.sym_size(-1)](const Tensor& u, const variable_list&) {
         return at::_adaptive_avg_pool3d_symint(u, {d, h, w});
       },
       {}});
}

// u at the places where the maxima were; `dims` dimensions were pooled, and are one in the numbers of the places.
Tensor at_maxima(const Tensor& u, const Tensor& indices, int64_t dims) {
  if (indices.sym_numel() == 0) return at::empty_like(indices, u.options());
  auto flat = indices.sym_sizes().slice(0, indices.dim() - dims).vec();
  flat.emplace_back(-1);
  return u.reshape_symint(flat).gather(-1, indices.reshape_symint(flat)).reshape_symint(indices.sym_sizes());
}

template <class First>
Tensor max_pool_backward(const Tensor& g, const Tensor& x, const Tensor& indices, int64_t dims, const First& first) {
  return linear_backward(
      g, x,
      {first, [dims](const Tensor& u, const variable_list& saved) { return at_maxima(u, saved[0], dims); }, {indices}});
}

Tensor max_pool2d_backward(const Tensor& g, const Tensor& x, at::IntArrayRef kernel, at::IntArrayRef stride,
                           at::IntArrayRef padding, at::IntArrayRef dilation, bool ceil_mode, const Tensor& indices) {
  return max_pool_backward(g, x, indices, 2, [&] {
    return at::max_pool2d_with_indices_backward(g, x, kernel, stride, padding, dilation, ceil_mode, indices);
  });
}

Tensor max_pool3d_backward(const Tensor& g, const Tensor& x, at::IntArrayRef kernel, at::IntArrayRef stride,
                           at::IntArrayRef padding, at::IntArrayRef dilation, bool ceil_mode, const Tensor& indices) {
  return max_pool_backward(g, x, indices, 3, [&] {
    return at::max_pool3d_with_indices_backward(g, x, kernel, stride, padding, dilation, ceil_mode, indices);
  });
}

Tensor adaptive_max_pool2d_backward(const Tensor& g, const Tensor& x, const Tensor& indices) {
  return max_pool_backward(g, x, indices, 2, [&] { return at::adaptive_max_pool2d_backward(g, x, indices); });
}

Tensor adaptive_max_pool3d_backward(const Tensor& g, const Tensor& x, const Tensor& indices) {
  return max_pool_backward(g, x, indices, 3, [&] { return at::adaptive_max_pool3d_backward(g, x, indices); });
}

}  // namespace

void register_pooling(Registrar& r) {
  r.replace<at::_ops::avg_pool2d_backward, avg_pool2d_backward>();
  r.replace<at::_ops::avg_pool3d_backward, avg_pool3d_backward>();
  r.replace<at::_ops::_adaptive_avg_pool2d_backward, adaptive_avg_pool2d_backward>();
  r.replace<at::_ops::_adaptive_avg_pool3d_backward, adaptive_avg_pool3d_backward>();
  r.replace<at::_ops::max_pool2d_with_indices_backward, max_pool2d_backward>();
  r.replace<at::_ops::max_pool3d_with_indices_backward, max_pool3d_backward>();
  r.replace<at::_ops::adaptive_max_pool2d_backward, adaptive_max_pool2d_backward>();
  r.replace<at::_ops::adaptive_max_pool3d_backward, adaptive_max_pool3d_backward>();
}

}  // namespace rk::aten
