// Pooling of every kind: the second backward pools u as the forward pooled the input, maxima at the places that won
// there.  Pooling in one dimension is made of pooling in two.
#include "linear_backward.h"

namespace rk::aten {
namespace {

template <auto pool, auto first_backward>
std::optional<Tensor> avg_pool_backward(const Tensor& g, const Tensor& x, at::IntArrayRef kernel,
                                        at::IntArrayRef stride, at::IntArrayRef padding, bool ceil_mode, bool count_pad,
                                        std::optional<int64_t> divisor) {
  const auto transposed = [](const Tensor& u, const variable_list&, Kept& kept) {
    const auto kernel = kept.integers(), stride = kept.integers(), padding = kept.integers();
    const bool ceil_mode = kept.flag(), count_pad = kept.flag();
    const auto divisor = kept.flag() ? std::make_optional(kept.integer()) : std::nullopt;
    return pool(u, kernel, stride, padding, ceil_mode, count_pad, divisor);
  };
  Kept kept;
  for (const auto& list : {kernel, stride, padding}) kept.put_list(c10::fromIntArrayRefSlow(list));
  kept.put(ceil_mode).put(count_pad).put(divisor.has_value()).put(divisor.value_or(0));
  return linear_backward(g, x,
                         {[&] { return first_backward(g, x, kernel, stride, padding, ceil_mode, count_pad, divisor); },
                          transposed,
                          {},
                          kept});
}

template <int64_t dims, auto pool, auto first_backward>
std::optional<Tensor> adaptive_avg_pool_backward(const Tensor& g, const Tensor& x) {
  const auto transposed = [](const Tensor& u, const variable_list&, Kept& kept) { return pool(u, kept.list()); };
  const Kept sizes = Kept().put_list(g.sym_sizes().slice(g.dim() - dims));
  return linear_backward(g, x, {[&] { return first_backward(g, x); }, transposed, {}, sizes});
}

// u at the places where the maxima were; `dims` dimensions were pooled, and are one in the numbers of the places.
Tensor at_maxima(const Tensor& u, const Tensor& indices, int64_t dims) {
  if (indices.sym_numel() == 0) return at::empty_like(indices, u.options());
  auto flat = indices.sym_sizes().slice(0, indices.dim() - dims).vec();
  flat.emplace_back(-1);
  return u.reshape_symint(flat).gather(-1, indices.reshape_symint(flat)).reshape_symint(indices.sym_sizes());
}

template <class First>
std::optional<Tensor> max_pool_backward(const Tensor& g, const Tensor& x, const Tensor& indices, int64_t dims,
                                        const First& first) {
  const auto transposed = [](const Tensor& u, const variable_list& saved, Kept& kept) {
    return at_maxima(u, saved[0], kept.integer());
  };
  return linear_backward(g, x, {first, transposed, {indices}, Kept().put(dims)});
}

template <int64_t dims, auto first_backward>
std::optional<Tensor> window_max_pool_backward(const Tensor& g, const Tensor& x, at::IntArrayRef kernel,
                                               at::IntArrayRef stride, at::IntArrayRef padding,
                                               at::IntArrayRef dilation, bool ceil_mode, const Tensor& indices) {
  return max_pool_backward(g, x, indices, dims,
                           [&] { return first_backward(g, x, kernel, stride, padding, dilation, ceil_mode, indices); });
}

template <int64_t dims, auto first_backward>
std::optional<Tensor> adaptive_max_pool_backward(const Tensor& g, const Tensor& x, const Tensor& indices) {
  return max_pool_backward(g, x, indices, dims, [&] { return first_backward(g, x, indices); });
}

}  // namespace

void register_pooling(Registrar& r) {
  r.replace<at::_ops::avg_pool2d_backward, avg_pool_backward<at::avg_pool2d, at::avg_pool2d_backward>>();
  r.replace<at::_ops::avg_pool3d_backward, avg_pool_backward<at::avg_pool3d, at::avg_pool3d_backward>>();
  r.replace<at::_ops::_adaptive_avg_pool2d_backward,
            adaptive_avg_pool_backward<2, at::_adaptive_avg_pool2d_symint, at::_adaptive_avg_pool2d_backward>>();
  r.replace<at::_ops::_adaptive_avg_pool3d_backward,
            adaptive_avg_pool_backward<3, at::_adaptive_avg_pool3d_symint, at::_adaptive_avg_pool3d_backward>>();
  r.replace<at::_ops::max_pool2d_with_indices_backward,
            window_max_pool_backward<2, at::max_pool2d_with_indices_backward>>();
  r.replace<at::_ops::max_pool3d_with_indices_backward,
            window_max_pool_backward<3, at::max_pool3d_with_indices_backward>>();
  r.replace<at::_ops::adaptive_max_pool2d_backward, adaptive_max_pool_backward<2, at::adaptive_max_pool2d_backward>>();
  r.replace<at::_ops::adaptive_max_pool3d_backward, adaptive_max_pool_backward<3, at::adaptive_max_pool3d_backward>>();
}

}  // namespace rk::aten
