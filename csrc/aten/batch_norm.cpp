// The second derivative of batch normalisation, native and cuDNN, and so of instance normalisation.
//
// The formulas stand in math/batch_norm.h.  Here PyTorch's arguments are brought into the shape that the operator
// robustkern::batch_norm_double_backward takes: [N, C, S]; channels_last images are [N * H * W, C, 1].  Views only.
// The forward is replaced too, by a node that takes several cotangents at once.
#include "normalization.h"

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

  // Those that the formulas read: of the batch, or what was collected before.
  std::array<Tensor, 2> statistics() const {
    return training ? std::array{mean.value(), invstd.value()} : std::array{running_mean.value(), running_var.value()};
  }
  Kept put_into(Kept kept) const { return kept.put(training).put_number(eps); }
  static BatchNorm of(Kept& kept, const Tensor& center, const Tensor& scale) {
    BatchNorm norm;
    norm.training = kept.flag();
    norm.eps = kept.number();
    (norm.training ? norm.mean : norm.running_mean) = center;
    (norm.training ? norm.invstd : norm.running_var) = scale;
    return norm;
  }

  Triple backward(const Tensor& g, const Tensor& x, const Tensor& w, Mask mask) const {
    // w r P is symmetric: what it makes of u in the second backward, it makes of g in the first.
    if (are_several(g, x)) return double_backward(g, Tensor(), Tensor(), g, x, w, {true, false, false});
    if (reserve) return at::cudnn_batch_norm_backward(x, g, w, running_mean, running_var, mean, invstd, eps, *reserve);
    return at::native_batch_norm_backward(g, x, if_defined(w), running_mean, running_var, mean, invstd, training, eps,
                                          mask);
  }

  ComposedNorm composed(const Tensor& x, const Tensor& w) const {
    const SymInt channels = x.sym_size(1);
    const auto per_channel = [&](const Tensor& t) {
      return t.to(accumulation_type(x.scalar_type())).reshape_symint({1, channels, 1});
    };
    const Tensor scale = training ? per_channel(*invstd) : (per_channel(*running_var) + eps).rsqrt();
    return {
        {{x.sym_size(0), channels, product(x.sym_sizes().slice(2))}, {channels, 1}, {channels}, {-3, -1}, {}, {-3, -1}},
        x,
        w,
        per_channel(training ? *mean : *running_mean),
        scale,
        !training};
  }

  bool statistics_are_constant() const { return !training; }
  bool remembers_all() const { return !reserve; }
  bool bends(const Tensor& u, const Tensor& a) const { return a.defined() || (training && u.defined()); }

  // Below autograd.
  Triple double_backward(const Tensor& u, const Tensor& a, const Tensor& b, const Tensor& g, const Tensor& x,
                         const Tensor& w, const Mask& need) const {
    const bool innermost = channels_innermost(x), several = are_several(g, x);
    const auto flat_u = if_defined(u, [&](const Tensor& t) { return flattened(t, innermost, several); });
    const auto channels = [&](const Tensor& t) { return in_accumulation_type(t, x.scalar_type()); };
    const Tensor center = *channels(training ? *mean : *running_mean);
    const Tensor scale = training ? *channels(*invstd) : channels(*running_var)->add(eps).rsqrt();
    auto [grad_g, grad_x, grad_w] = call_operator<kKernel, Triple>(
        flat_u, channels(a), channels(b), flattened(g, innermost, several), flattened(x, innermost), channels(w),
        center, scale, training, need[0], need[1], need[2]);
    if (need[0]) grad_g = unflattened(grad_g, g, innermost, several);
    if (need[1]) grad_x = unflattened(grad_x, x, innermost);
    if (need[2]) grad_w = grad_w.to(w.scalar_type());
    return {grad_g, grad_x, grad_w};
  }
};

using BatchNormBackward = NormBackward<BatchNorm>;

// Without a weight PyTorch still asks for the gradients of both: it computes them, and nobody uses them.
std::optional<Triple> native_batch_norm_backward(const Tensor& g, const Tensor& x, const std::optional<Tensor>& w,
                                                 const std::optional<Tensor>& running_mean,
                                                 const std::optional<Tensor>& running_var,
                                                 const std::optional<Tensor>& mean, const std::optional<Tensor>& invstd,
                                                 bool training, double eps, Mask mask) {
  return BatchNormBackward::run(g, x, w, {running_mean, running_var, mean, invstd, std::nullopt, training, eps}, mask);
}

std::optional<Triple> cudnn_batch_norm_backward(const Tensor& x, const Tensor& g, const Tensor& w,
                                                const std::optional<Tensor>& running_mean,
                                                const std::optional<Tensor>& running_var,
                                                const std::optional<Tensor>& mean, const std::optional<Tensor>& invstd,
                                                double eps, const Tensor& reserve) {
  return BatchNormBackward::run(g, x, w, {running_mean, running_var, mean, invstd, reserve, true, eps},
                                {true, true, true});
}

// The statistics, and cuDNN's reserve, are handed over by the side, as LayerNorm's.
struct Forward {
  Tensor y, mean, invstd, reserve;
};

Forward run_forward(bool by_cudnn, const Tensor& x, const std::optional<Tensor>& w, const std::optional<Tensor>& b,
                    const std::optional<Tensor>& running_mean, const std::optional<Tensor>& running_var, bool training,
                    double momentum, double eps) {
  Forward f;
  if (by_cudnn)
    std::tie(f.y, f.mean, f.invstd, f.reserve) =
        at::cudnn_batch_norm(x, *w, b, running_mean, running_var, training, momentum, eps);
  else
    std::tie(f.y, f.mean, f.invstd) =
        at::native_batch_norm(x, w, b, running_mean, running_var, training, momentum, eps);
  return f;
}

struct ForwardBatchNorm : torch::autograd::Function<ForwardBatchNorm> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const std::optional<Tensor>& w,
                        const std::optional<Tensor>& b, const std::optional<Tensor>& running_mean,
                        const std::optional<Tensor>& running_var, bool training, double momentum, double eps,
                        bool by_cudnn, Forward* result) {
    const at::AutoDispatchBelowADInplaceOrView below;
    *result = run_forward(by_cudnn, x, w, b, running_mean, running_var, training, momentum, eps);
    // In eval mode PyTorch's own kernel is the derivative of cuDNN's.  On CUDA it takes what the forward gave in place of
    // the running statistics, unless that is empty.
    const Tensor bias = saves_memory() ? optional_value(b) : Tensor();
    if (training)
      ctx->save_for_backward(
          {x, optional_value(w), result->mean, result->invstd, result->reserve, Tensor(), Tensor(), bias});
    else
      ctx->save_for_backward(
          {x, optional_value(w), *running_mean, *running_var, Tensor(), result->mean, result->invstd, bias});
    can_do_again(ctx, !by_cudnn || training);
    ctx->set_materialize_grads(false);
    Kept().put(to_bits({true, w && w->defined(), b && b->defined()})).put(training).put_number(eps).save(ctx);
    return result->y;
  }

  static variable_list again(AutogradContext* ctx) {
    const auto saved = ctx->get_saved_variables();
    Kept kept(ctx);
    kept.integer();
    const bool training = kept.flag();
    const double eps = kept.number();
    const auto running = [&](const Tensor& t) { return training ? std::nullopt : if_defined(t); };
    return {run_forward(saved[4].defined(), saved[0], if_defined(saved[1]), if_defined(saved[7]), running(saved[2]),
                        running(saved[3]), training, /*momentum=*/0.0, eps)
                .y};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& cotangents) {
    variable_list result(10);
    if (!cotangents[0].defined()) return result;
    const auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &w = saved[1], &reserve = saved[4];
    Kept kept(ctx);
    const Mask mask = asked<3>(ctx, kept.integer());
    auto norm = BatchNorm::of(kept, saved[2], saved[3]);
    if (!norm.training) {
      norm.mean = saved[5];
      norm.invstd = saved[6];
    }
    if (BatchNormBackward::of_several(result, cotangents[0], x, w, norm, mask)) return result;
    // PyTorch's batching rule takes the statistics for constants.
    const bool composed = at::GradMode::is_enabled() && is_batched(cotangents[0]);
    const BelowAutogradIf below(is_final(cotangents[0]));
    Tensor g = cotangents[0];
    if (reserve.defined() && !composed) {  // cuDNN wants g as x lies, and may write into its reserve
      norm.reserve = reserve.numel() ? reserve.clone() : reserve;
      g = g.contiguous(x.suggest_memory_format());
    }
    assign(result, composed ? norm.composed(x, w).first(g, mask) : norm.backward(g, x, w, mask), mask);
    return result;
  }
};

std::optional<Forward> batch_norm(bool by_cudnn, const Tensor& x, const std::optional<Tensor>& w,
                                  const std::optional<Tensor>& b, const std::optional<Tensor>& running_mean,
                                  const std::optional<Tensor>& running_var, bool training, double momentum,
                                  double eps) {
  if (!is_plain(x) || is_small(x, 1 << 15) || saves_through_hooks()) return std::nullopt;
  Forward result;
  result.y = ForwardBatchNorm::apply(x, w, b, running_mean, running_var, training, momentum, eps, by_cudnn, &result);
  return result;
}

std::optional<Triple> native_batch_norm(const Tensor& x, const std::optional<Tensor>& w, const std::optional<Tensor>& b,
                                        const std::optional<Tensor>& running_mean,
                                        const std::optional<Tensor>& running_var, bool training, double momentum,
                                        double eps) {
  const auto f = batch_norm(false, x, w, b, running_mean, running_var, training, momentum, eps);
  return f ? std::optional(Triple{f->y, f->mean, f->invstd}) : std::nullopt;
}

std::optional<std::tuple<Tensor, Tensor, Tensor, Tensor>> cudnn_batch_norm(const Tensor& x, const Tensor& w,
                                                                           const std::optional<Tensor>& b,
                                                                           const std::optional<Tensor>& running_mean,
                                                                           const std::optional<Tensor>& running_var,
                                                                           bool training, double momentum, double eps) {
  const auto f = batch_norm(true, x, w, b, running_mean, running_var, training, momentum, eps);
  return f ? std::optional(std::tuple(f->y, f->mean, f->invstd, f->reserve)) : std::nullopt;
}

}  // namespace

void register_batch_norm(Registrar& r) {
  add_folding<ForwardBatchNorm>(/*when_large=*/false);
  add_again<ForwardBatchNorm>();
  add_again<BatchNormBackward>();
  r.replace<at::_ops::native_batch_norm, native_batch_norm, Kind::kForward>(kKernel);
  r.replace<at::_ops::cudnn_batch_norm, cudnn_batch_norm, Kind::kForward>(kKernel);
  r.replace<at::_ops::native_batch_norm_backward, native_batch_norm_backward>(kKernel);
  r.replace<at::_ops::cudnn_batch_norm_backward, cudnn_batch_norm_backward>(kKernel);
}

}  // namespace rk::aten
