// Pooling of every kind: the second backward pools u as the forward pooled the input, maxima at the places that won
// there.  Pooling in one dimension is made of pooling in two.
#include "linear_backward.h"

namespace rk::aten {
namespace {

// The arguments of an average pooling as numbers: each list with its length before it.
class AveragingWindow {
 public:
  AveragingWindow(at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding, bool ceil_mode,
                  bool count_pad, std::optional<int64_t> divisor)
      : kernel(kernel.vec()),
        stride(stride.vec()),
        padding(padding.vec()),
        ceil_mode(ceil_mode),
        count_pad(count_pad),
        divisor(divisor) {}

  explicit AveragingWindow(const MapArguments& from) {
    auto next = from.integers.begin();
    const auto number = [&] { return (next++)->expect_int(); };
    for (auto* list : {&kernel, &stride, &padding}) {
      list->resize(number());
      for (int64_t& value : *list) value = number();
    }
    ceil_mode = number() != 0;
    count_pad = number() != 0;
    if (number() != 0) divisor = number();
  }

  MapArguments arguments() const {
    MapArguments to;
    for (const auto* list : {&kernel, &stride, &padding}) {
      to.integers.emplace_back(static_cast<int64_t>(list->size()));
      to.integers.insert(to.integers.end(), list->begin(), list->end());
    }
    for (const int64_t value : {int64_t{ceil_mode}, int64_t{count_pad}, int64_t{divisor.has_value()}})
      to.integers.emplace_back(value);
    if (divisor) to.integers.emplace_back(*divisor);
    return to;
  }

  std::vector<int64_t> kernel, stride, padding;
  bool ceil_mode, count_pad;
  std::optional<int64_t> divisor;
};

Tensor avg_pool2d_backward(const Tensor& g, const Tensor& x, at::IntArrayRef kernel, at::IntArrayRef stride,
                           at::IntArrayRef padding, bool ceil_mode, bool count_pad, std::optional<int64_t> divisor) {
  const auto transposed = [](const Tensor& u, const MapArguments& a) {
    const AveragingWindow w(a);
    return at::avg_pool2d(u, w.kernel, w.stride, w.padding, w.ceil_mode, w.count_pad, w.divisor);
  };
  return linear_backward(
      g, x,
      {[&] { return at::avg_pool2d_backward(g, x, kernel, stride, padding, ceil_mode, count_pad, divisor); },
       transposed, AveragingWindow(kernel, stride, padding, ceil_mode, count_pad, divisor).arguments()});
}

Tensor avg_pool3d_backward(const Tensor& g, const Tensor& x, at::IntArrayRef kernel, at::IntArrayRef stride,
                           at::IntArrayRef padding, bool ceil_mode, bool count_pad, std::optional<int64_t> divisor) {
  const auto transposed = [](const Tensor& u, const MapArguments& a) {
    const AveragingWindow w(a);
    return at::avg_pool3d(u, w.kernel, w.stride, w.padding, w.ceil_mode, w.count_pad, w.divisor);
  };
  return linear_backward(
      g, x,
      {[&] { return at::avg_pool3d_backward(g, x, kernel, stride, padding, ceil_mode, count_pad, divisor); },
       transposed, AveragingWindow(kernel, stride, padding, ceil_mode, count_pad, divisor).arguments()});
}

Tensor adaptive_avg_pool2d_backward(const Tensor& g, const Tensor& x) {
  const auto transposed = [](const Tensor& u, const MapArguments& a) {
    return at::_adaptive_avg_pool2d_symint(u, a.integers);
  };
  return linear_backward(g, x,
                         {[&] { return at::_adaptive_avg_pool2d_backward(g, x); },
                          transposed,
                          {{}, {g.sym_size(-2), g.sym_size(-1)}, {}}});
}

Tensor adaptive_avg_pool3d_backward(const Tensor& g, const Tensor& x) {
  const auto transposed = [](const Tensor& u, const MapArguments& a) {
    return at::_adaptive_avg_pool3d_symint(u, a.integers);
  };
  return linear_backward(g, x,
                         {[&] { return at::_adaptive_avg_pool3d_backward(g, x); },
                          transposed,
                          {{}, {g.sym_size(-3), g.sym_size(-2), g.sym_size(-1)}, {}}});
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
  const auto transposed = [](const Tensor& u, const MapArguments& a) {
    return at_maxima(u, a.tensors[0], a.integers[0].expect_int());
  };
  return linear_backward(g, x, {first, transposed, {{indices}, {dims}, {}}});
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
