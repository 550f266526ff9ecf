// The second derivative of every convolution: 1d to 3d, transposed, grouped, dilated, in any memory format.
//
// PyTorch computes the weight gradient of the second backward as a convolution whose kernel is the whole feature map,
// group by group, on transposed copies (3 to 50 times the cost of a weight gradient).  It is an ordinary weight
// gradient, with u in the place of the input:
//
//   first backward   grad_x = dgrad(g, w)   grad_w = wgrad(g, x)   grad_b = sum g       cotangents of these: u, a, b
//   second backward  grad_g = conv(u, w) + conv(x, a) + b   grad_x = dgrad(g, a)   grad_w = wgrad(g, u)
//
// Written in operators that are themselves replaced, so it can be differentiated any number of times.
#include <algorithm>

#include "recomputed.h"
#include "replacement.h"

namespace rk::aten {
namespace {

struct Geometry {
  std::vector<SymInt> stride, padding, dilation, output_padding;
  bool transposed;
  SymInt groups;

  Kept put_into(Kept kept) const {
    for (const auto* list : {&stride, &padding, &dilation, &output_padding}) kept.put_list(*list);
    return kept.put(transposed).put(groups);
  }
  static Geometry of(Kept& kept) {
    return {kept.list(), kept.list(), kept.list(), kept.list(), kept.flag(), kept.symbol()};
  }

  Tensor convolve(const Tensor& x, const Tensor& w) const {
    return at::convolution_symint(x, w, std::nullopt, stride, padding, dilation, transposed, output_padding, groups);
  }
  Triple backward(const Tensor& g, const Tensor& x, const Tensor& w, at::OptionalSymIntArrayRef bias_sizes,
                  Mask mask) const {
    return at::convolution_backward_symint(g, x, w, bias_sizes, stride, padding, dilation, transposed, output_padding,
                                           groups, mask);
  }
};

// On the CPU oneDNN reorders contiguous images before a weight gradient.  The copies of large ones are where the memory of
// a penalised step is at its peak, so they are made for a part of the batch at a time: no slower from 6 MiB on.
int64_t parts_of_batch(const Tensor& g, const Tensor& u) {
  if (!u.is_cpu() || !is_plain(u) || is_batched(u) || is_batched(g) || at::GradMode::is_enabled()) return 1;
  if (under_functorch_grad()) return 1;
  if (u.dim() < 4 || !u.is_contiguous() || !g.is_contiguous()) return 1;
  constexpr int64_t most = 4, large = 3 << 19;
  return u.numel() < large ? 1 : std::min({most, u.numel() / (large / 6), u.size(0)});
}

Tensor plus(const Tensor& a, const Tensor& b) { return a.defined() ? a + b : b; }

Tensor weight_gradient(const Geometry& geometry, const Tensor& g, const Tensor& u, const Tensor& w) {
  const auto of = [&](const Tensor& part_of_g, const Tensor& part_of_u) {
    return std::get<1>(geometry.backward(part_of_g, part_of_u, w, std::nullopt, {false, true, false}));
  };
  const int64_t parts = parts_of_batch(g, u);
  if (parts == 1) return of(g, u);
  const auto of_g = g.tensor_split(parts), of_u = u.tensor_split(parts);
  Tensor sum = of(of_g[0], of_u[0]);
  for (int64_t i = 1; i < parts; ++i) sum.add_(of(of_g[i], of_u[i]));
  return sum;
}

Tensor in_parts(const Geometry& geometry, const Tensor& g, const Tensor& u, const Tensor& w) {
  const int64_t parts = parts_of_batch(g, u);
  if (parts == 1) return geometry.convolve(u, w);
  Tensor result = at::empty_like(g);
  const auto of_u = u.tensor_split(parts), of_result = result.tensor_split(parts);
  for (int64_t i = 0; i < parts; ++i) of_result[i].copy_(geometry.convolve(of_u[i], w));
  return result;
}

// Whether PyTorch's way to the weight gradient, a convolution with the feature map as its kernel, is as fast on the CPU: where
// kernels are large, and oneDNN's weight gradient of depthwise ones is slow.
bool stock_is_as_fast(const Tensor& x, const Tensor& w, const SymInt& groups) {
  if (!x.is_cpu() || being_compiled(x) || being_compiled(w) || however_small()) return false;
  const auto product_of = [](at::IntArrayRef sizes) { return c10::multiply_integers(sizes.slice(2)); };
  const int64_t area = product_of(w.sizes()), positions = product_of(x.sizes());
  if (area >= 196 || (area == 1 && is_small(x, 1 << 12))) return true;
  if (groups == 1 || w.size(1) != 1) return false;
  if (x.dim() != 4) return area >= (x.dim() == 3 ? 31 : 100);
  return x.is_contiguous() && area >= 49 && area * positions >= 40'000;
}

struct ConvolutionBackward : torch::autograd::Function<ConvolutionBackward> {
  static variable_list forward(AutogradContext* ctx, const Tensor& g, const Tensor& x, const Tensor& w,
                               const at::OptionalSymIntArrayRef& bias_sizes, const Geometry& geometry, Mask mask) {
    const bool of_input_alone = mask[0] && !mask[1] && !mask[2];  // linear in g and w
    ctx->save_for_backward({g, of_input_alone ? Tensor() : x, w});
    ctx->set_materialize_grads(false);
    geometry.put_into(Kept().put(to_bits(mask))).save(ctx);
    const at::AutoDispatchBelowADInplaceOrView below;
    return pick(geometry.backward(g, x, w, bias_sizes, mask), mask);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& cotangents) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &g = saved[0], &x = saved[1], &w = saved[2];
    Kept kept(ctx);
    const auto [u, a, b] = spread(cotangents, kept.mask<3>());
    const auto geometry = Geometry::of(kept);
    const Mask need = asked<3>(ctx);

    Tensor grad_g, grad_x, grad_w;
    // First, before grad_g takes memory: here is the step's peak.
    if (need[2] && u.defined()) grad_w = weight_gradient(geometry, g, u, w);
    if (need[0]) {
      if (u.defined()) grad_g = in_parts(geometry, g, u, w);
      if (a.defined()) grad_g = plus(grad_g, geometry.convolve(x, a));
      if (b.defined()) {
        std::vector<SymInt> shape(g.dim(), 1);
        shape[1] = -1;
        grad_g = plus(grad_g, b.view_symint(shape).expand_as(g));
      }
    }
    if (need[1] && a.defined()) grad_x = std::get<0>(geometry.backward(g, x, a, std::nullopt, {true, false, false}));
    variable_list grads{grad_g, grad_x, grad_w, Tensor(), Tensor(), Tensor()};
    fill_for_compiled_autograd(need, grads, {g, x.defined() ? x : u, w});
    return grads;
  }
};

std::optional<Triple> convolution_backward(const Tensor& g, const Tensor& x, const Tensor& w,
                                           at::OptionalSymIntArrayRef bias_sizes, SymIntArrayRef stride,
                                           SymIntArrayRef padding, SymIntArrayRef dilation, bool transposed,
                                           SymIntArrayRef output_padding, SymInt groups, Mask mask) {
  if (stock_is_as_fast(x, w, groups)) return std::nullopt;
  const Geometry geometry{stride.vec(), padding.vec(), dilation.vec(), output_padding.vec(), transposed, groups};
  const KeepLess less(g);
  return spread(ConvolutionBackward::apply(g, x, w, bias_sizes, geometry, mask), mask);
}

}  // namespace

void register_convolution(Registrar& r) { r.replace<at::_ops::convolution_backward, convolution_backward>(); }

}  // namespace rk::aten
