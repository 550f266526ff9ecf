// The second derivative of batch normalisation, native and cuDNN, and so of instance normalisation.
//
// The formulas stand in math/batch_norm.h.  Here PyTorch's arguments are brought into the shape that the operator
// robustkern::batch_norm_double_backward takes: [N, C, S]; channels_last images are [N * H * W, C, 1].  Views only.
// The forward is replaced too, by a node that can tell several cotangents.
#include "cotangents.h"
#include "normalization.h"
#include "operators.h"

namespace rk::aten {
namespace {

constexpr char kKernel[] = "robustkern::batch_norm_double_backward";

bool channels_innermost(const Tensor& x) {
  const auto format = x.suggest_memory_format();
  return format == at::MemoryFormat::ChannelsLast || format == at::MemoryFormat::ChannelsLast3d;
}

// x as [N, C, S], or several cotangents of it as [K, N, C, S]; copied only if the data lie otherwise than `innermost` says.
Tensor flattened(const Tensor& t, bool innermost, bool several = false) {
  const int64_t batch = several ? 1 : 0;
  const auto sizes = t.sym_sizes();
  const auto images = sizes[batch], channels = sizes[batch + 1], inner = product(sizes.slice(batch + 2));
  std::vector<SymInt> shape(sizes.begin(), sizes.begin() + batch);
  if (innermost) {
    shape.insert(shape.end(), {images * inner, channels, 1});
    return t.movedim(batch + 1, -1).contiguous().view_symint(shape);
  }
  shape.insert(shape.end(), {images, channels, inner});
  return t.contiguous().view_symint(shape);
}

Tensor unflattened(const Tensor& t, const Tensor& like, bool innermost, bool several = false) {
  if (!innermost) return t.view_symint(like.sym_sizes());
  const int64_t channels = several ? 2 : 1;
  auto shape = like.sym_sizes().vec();
  shape.push_back(shape[channels]);
  shape.erase(shape.begin() + channels);
  return t.view_symint(shape).movedim(-1, channels);
}

// What both first backwards are given besides grad, x and weight.
struct BatchNorm {
  std::optional<Tensor> running_mean, running_var, mean, invstd, reserve;  // reserve: cuDNN's
  bool training = true;
  double eps = 0;

  Triple backward(const Tensor& g, const Tensor& x, const std::optional<Tensor>& w, Mask mask) const {
    // w r P is symmetric: what it makes of u in the second backward, it makes of g in the first.
    if (are_several(g, x)) return double_backward(g, Tensor(), Tensor(), g, x, optional_value(w), {true, false, false});
    if (reserve)
      return at::cudnn_batch_norm_backward(x, g, w.value(), running_mean, running_var, mean, invstd, eps, *reserve);
    return at::native_batch_norm_backward(g, x, w, running_mean, running_var, mean, invstd, training, eps, mask);
  }

  // [C, M] or, of several cotangents, [K, C, M].
  RowsOfNorm as_rows(const Tensor& x) const {
    const auto accumulation = accumulation_type(x.scalar_type());
    return {[accumulation, dims = x.dim()](const Tensor& t) {
              const int64_t n = t.dim() - dims;
              return t.to(accumulation).transpose(n, n + 1).flatten(n + 1);
            },
            [accumulation](const Tensor& t) { return t.to(accumulation).unsqueeze(1); },
            [](const Tensor& t) { return t.sum(-1); },
            [dims = x.dim()](const Tensor& t, const Tensor& like) {
              const int64_t n = like.dim() - dims;
              return t.reshape_symint(like.transpose(n, n + 1).sym_sizes()).transpose(n, n + 1).to(like.scalar_type());
            }};
  }

  // PyTorch's second backward takes the statistics of a batch for constants when it is differentiated once more.
  Normalized normalized(const Tensor& x) const {
    const RowsOfNorm of = as_rows(x);
    if (training) return {of.rows(x), of.spread(*mean), of.spread(*invstd)};
    return Normalized::fixed(of.rows(x), of.spread(*running_mean), of.spread((*running_var + eps).rsqrt()));
  }

  bool bends(const Tensor& u, const Tensor& a) const { return a.defined() || (training && u.defined()); }

  // Below autograd.
  Triple double_backward(const Tensor& u, const Tensor& a, const Tensor& b, const Tensor& g, const Tensor& x,
                         const Tensor& w, const Mask& need) const {
    using Signature =
        Triple(const std::optional<Tensor>&, const std::optional<Tensor>&, const std::optional<Tensor>&, const Tensor&,
               const Tensor&, const std::optional<Tensor>&, const Tensor&, const Tensor&, bool, bool, bool, bool);
    static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(kKernel, "").typed<Signature>();
    const bool innermost = channels_innermost(x), several = are_several(g, x);
    const auto flat_u = u.defined() ? std::make_optional(flattened(u, innermost, several)) : std::nullopt;
    const auto channels = [&](const Tensor& t) { return in_accumulation_type(t, x.scalar_type()); };
    const Tensor center = *channels(training ? *mean : *running_mean);
    const Tensor scale = training ? *channels(*invstd) : channels(*running_var)->add(eps).rsqrt();
    auto [grad_g, grad_x, grad_w] =
        op.call(flat_u, channels(a), channels(b), flattened(g, innermost, several), flattened(x, innermost),
                channels(w), center, scale, training, need[0], need[1], need[2]);
    if (need[0]) grad_g = unflattened(grad_g, g, innermost, several);
    if (need[1]) grad_x = unflattened(grad_x, x, innermost);
    if (need[2]) grad_w = grad_w.to(w.scalar_type());
    return {grad_g, grad_x, grad_w};
  }
};

struct BatchNormBackward : torch::autograd::Function<BatchNormBackward> {
  static variable_list forward(AutogradContext* ctx, const Tensor& g, const Tensor& x, const std::optional<Tensor>& w,
                               const BatchNorm& norm, Mask mask) {
    ctx->save_for_backward({g, x, optional_value(w), optional_value(norm.running_mean),
                            optional_value(norm.running_var), optional_value(norm.mean), optional_value(norm.invstd),
                            optional_value(norm.reserve)});
    ctx->set_materialize_grads(false);
    ctx->saved_data["training"] = norm.training;
    ctx->saved_data["eps"] = norm.eps;
    ctx->saved_data["mask"] = to_bits(mask);
    const at::AutoDispatchBelowADInplaceOrView below;
    return pick(norm.backward(g, x, w, mask), mask);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& cotangents) {
    const auto saved = ctx->get_saved_variables();
    const BatchNorm norm{if_defined(saved[3]),
                         if_defined(saved[4]),
                         if_defined(saved[5]),
                         if_defined(saved[6]),
                         if_defined(saved[7]),
                         ctx->saved_data["training"].toBool(),
                         ctx->saved_data["eps"].toDouble()};
    return second_backward(ctx, saved, norm, from_bits(ctx->saved_data["mask"].toInt()), cotangents);
  }
};

Triple apply(const Tensor& g, const Tensor& x, const std::optional<Tensor>& w, const BatchNorm& norm, Mask mask) {
  // Without a weight PyTorch still asks for the gradients of both: it computes them, and nobody uses them.
  return spread(BatchNormBackward::apply(g, x, w, norm, mask), mask);
}

Triple native_batch_norm_backward(const Tensor& g, const Tensor& x, const std::optional<Tensor>& w,
                                  const std::optional<Tensor>& running_mean, const std::optional<Tensor>& running_var,
                                  const std::optional<Tensor>& mean, const std::optional<Tensor>& invstd, bool training,
                                  double eps, Mask mask) {
  return apply(g, x, w, {running_mean, running_var, mean, invstd, std::nullopt, training, eps}, mask);
}

Triple cudnn_batch_norm_backward(const Tensor& x, const Tensor& g, const Tensor& w,
                                 const std::optional<Tensor>& running_mean, const std::optional<Tensor>& running_var,
                                 const std::optional<Tensor>& mean, const std::optional<Tensor>& invstd, double eps,
                                 const Tensor& reserve) {
  return apply(g, x, w, {running_mean, running_var, mean, invstd, reserve, true, eps}, {true, true, true});
}

// The statistics are handed over by the side, as LayerNorm's.
struct ForwardBatchNorm : torch::autograd::Function<ForwardBatchNorm> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const std::optional<Tensor>& w,
                        const std::optional<Tensor>& b, const std::optional<Tensor>& running_mean,
                        const std::optional<Tensor>& running_var, bool training, double momentum, double eps,
                        Statistics* statistics) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [y, mean, invstd] = at::native_batch_norm(x, w, b, running_mean, running_var, training, momentum, eps);
    ctx->save_for_backward({x, optional_value(w), optional_value(b), optional_value(running_mean),
                            optional_value(running_var), mean, invstd});
    ctx->set_materialize_grads(false);
    ctx->saved_data["training"] = training;
    ctx->saved_data["eps"] = eps;
    *statistics = {mean, invstd};
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& cotangents) {
    variable_list result(9);
    const Tensor& g = cotangents[0];
    if (!g.defined()) return result;
    const auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &w = saved[1], &b = saved[2];
    size_t edge = 0;
    const bool need_x = needs(ctx, x, edge), need_w = needs(ctx, w, edge), need_b = needs(ctx, b, edge);
    const Mask mask{need_x, need_w, need_b};
    const BatchNorm norm{if_defined(saved[3]),
                         if_defined(saved[4]),
                         if_defined(saved[5]),
                         if_defined(saved[6]),
                         std::nullopt,
                         ctx->saved_data["training"].toBool(),
                         ctx->saved_data["eps"].toDouble()};
    if (mask == Mask{true, false, false})
      if (const auto several = for_several(g, [&](const Tensor& cotangents) {
            return BatchNormBackward::apply(cotangents, x, if_defined(w), norm, mask)[0];
          })) {
        result[0] = *several;
        return result;
      }
    std::tie(result[0], result[1], result[2]) = norm.backward(g, x, if_defined(w), mask);
    drop_unasked(result, mask);
    return result;
  }
};

Triple native_batch_norm(const Tensor& x, const std::optional<Tensor>& w, const std::optional<Tensor>& b,
                         const std::optional<Tensor>& running_mean, const std::optional<Tensor>& running_var,
                         bool training, double momentum, double eps) {
  if (!is_plain(x) || saves_through_hooks()) {
    const UseStock guard;
    return at::native_batch_norm(x, w, b, running_mean, running_var, training, momentum, eps);
  }
  Statistics statistics;
  const Tensor y = ForwardBatchNorm::apply(x, w, b, running_mean, running_var, training, momentum, eps, &statistics);
  return {y, statistics.mean, statistics.rstd};
}

}  // namespace

void register_batch_norm(Registrar& r) {
  add_folding<ForwardBatchNorm>(/*when_large=*/false);
  r.replace<at::_ops::native_batch_norm, native_batch_norm>(kKernel);
  r.replace<at::_ops::native_batch_norm_backward, native_batch_norm_backward>(kKernel);
  r.replace<at::_ops::cudnn_batch_norm_backward, cudnn_batch_norm_backward>(kKernel);
}

}  // namespace rk::aten
