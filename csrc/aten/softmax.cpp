// The second derivative of softmax and log_softmax, in one sweep over memory.
//
//   first backward   grad_x = J(output) g                                   cotangent: u
//   second backward  grad_g = J(output)^T u   grad_output = d <u, J g> / d output
#include <ATen/WrapDimUtils.h>

#include "replacement.h"

namespace rk::aten {
namespace {

constexpr char kKernel[] = "robustkern::softmax_double_backward";

Tensor first_backward(bool log, const Tensor& g, const Tensor& output, int64_t dim, at::ScalarType input_dtype) {
  return log ? at::_log_softmax_backward_data(g, output, dim, input_dtype)
             : at::_softmax_backward_data(g, output, dim, input_dtype);
}

// A tensor of any layout as [B, C, S] in the order of its memory, where C is dimension `dim`; and the way back.
class Rows {
 public:
  Rows(const Tensor& like, int64_t dim) : memory_(like) {
    int64_t* size = &shape_[0];  // of the dimensions outside of `dim`, then of `dim`, then inside
    for (const int64_t d : memory_.order) {
      permuted_.push_back(like.size(d));
      if (d == dim) size = &shape_[1];
      *size *= like.size(d);
      if (d == dim) size = &shape_[2];
    }
  }
  Tensor of(const Tensor& t) const { return t.permute(memory_.order).reshape(shape_); }  // copies what lies otherwise
  Tensor back(const Tensor& rows) const { return rows.view(permuted_).permute(memory_.back); }

 private:
  MemoryOrder memory_;
  std::vector<int64_t> permuted_;
  std::array<int64_t, 3> shape_{1, 1, 1};
};

// The second backward in differentiable operators.
std::tuple<Tensor, Tensor> composed(bool log, const Tensor& u, const Tensor& g, const Tensor& output, int64_t dim,
                                    bool need_grad, bool need_output) {
  const auto dtype = accumulation_type(output.scalar_type());
  const Tensor wide_u = u.to(dtype), wide_g = g.defined() ? g.to(dtype) : g, o = output.to(dtype);
  const auto total = [&](const Tensor& t) { return t.sum(dim, /*keepdim=*/true); };
  Tensor grad_g, grad_output;
  if (log) {
    const Tensor up = wide_u * o.exp();
    if (need_grad) grad_g = wide_u - total(up);
    if (need_output) grad_output = -up * total(wide_g);
  } else {
    const Tensor centred = wide_u - total(wide_u * o);
    if (need_grad) grad_g = o * centred;
    if (need_output) grad_output = wide_g * centred - wide_u * total(wide_g * o);
  }
  const auto narrow = [&](const Tensor& t) { return t.defined() ? t.to(output.scalar_type()) : t; };
  return {narrow(grad_g), narrow(grad_output)};
}

struct SoftmaxBackward : torch::autograd::Function<SoftmaxBackward> {
  static Tensor forward(AutogradContext* ctx, const Tensor& g, const Tensor& output, int64_t dim, bool log) {
    ctx->save_for_backward({output.requires_grad() ? g : Tensor(), output});
    ctx->set_materialize_grads(false);
    Kept().put(dim).put(log).save(ctx);
    const at::AutoDispatchBelowADInplaceOrView below;
    return first_backward(log, g, output, dim, output.scalar_type());
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& cotangents) {
    const Tensor& u = cotangents[0];
    if (!u.defined()) return {Tensor(), Tensor(), Tensor(), Tensor()};
    const auto saved = ctx->get_saved_variables();
    const Tensor &g = saved[0], &output = saved[1];
    Kept kept(ctx);
    const int64_t dim = kept.integer();
    const bool log = kept.flag();
    const bool need_grad = ctx->needs_input_grad(0), need_output = ctx->needs_input_grad(1);
    if (composes(cotangents)) {
      const auto [grad_g, grad_output] = composed(log, u, g, output, dim, need_grad, need_output);
      return {grad_g, grad_output, Tensor(), Tensor()};
    }
    const at::AutoDispatchBelowADInplaceOrView below;
    const Rows rows(output, dim);
    const auto [gg_grad, grad_output] = call_operator<kKernel, std::tuple<Tensor, Tensor>>(
        rows.of(u), rows.of(g.defined() ? g : u), rows.of(output), log, need_grad, need_output);
    return {need_grad ? rows.back(gg_grad) : Tensor(), need_output ? rows.back(grad_output) : Tensor(), Tensor(),
            Tensor()};
  }
};

template <bool kLog>
std::optional<Tensor> softmax_backward(const Tensor& g, const Tensor& output, int64_t dim, at::ScalarType input_dtype) {
  if (is_plain(output) && is_plain(g) && g.scalar_type() == output.scalar_type() &&
      input_dtype == output.scalar_type() && g.sizes() == output.sizes() && !is_small(output, kLog ? 1 << 14 : 1 << 15))
    return SoftmaxBackward::apply(g, output, at::maybe_wrap_dim(dim, output.dim()), kLog);
  return std::nullopt;
}

}  // namespace

void register_softmax(Registrar& r) {
  r.replace<at::_ops::_softmax_backward_data, softmax_backward<false>>(kKernel);
  r.replace<at::_ops::_log_softmax_backward_data, softmax_backward<true>>(kKernel);
}

}  // namespace rk::aten
