// kl_divergence for CUDA tensors: arguments checked, outputs allocated, a kernel of kl_divergence.cuh launched on the
// current stream.
#include "kl_divergence.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "../arguments/kl_divergence.h"
#include "attack_calls.cuh"

namespace rk::cuda {
namespace {

// The tensors of a call besides its logits; those that are not of its order stay empty.
struct KlOthers {
  std::optional<Tensor> u, v, grad, statistics_in, per_row, statistics, grad_p, grad_q;
};

void launch_on(Order order, const KlTensors& t, double temperature, const KlOthers& o, cudaStream_t stream) {
  visit_storage(t.p.scalar_type(), [&](auto element) {
    using S = decltype(element);
    using A = accumulation_t<S>;
    KlCall<S> c{};
    c.rows = t.p.size(0);
    c.classes = t.p.size(1);
    c.inverse_t = static_cast<A>(1.0 / temperature);
    c.p_logits = pointer<const S>(t.p);
    c.q_logits = pointer<const S>(t.q);
    c.u = pointer<const S>(o.u);
    c.v = pointer<const S>(o.v);
    c.grad = pointer<const A>(o.grad);
    c.statistics_in = pointer<const A>(o.statistics_in);
    c.per_row = pointer<A>(o.per_row);
    c.statistics = pointer<A>(o.statistics);
    c.grad_p = o.grad_p && o.grad_p->numel() ? pointer<S>(o.grad_p) : nullptr;
    c.grad_q = o.grad_q && o.grad_q->numel() ? pointer<S>(o.grad_q) : nullptr;
    check_launch(launch_kl_divergence(order, c, stream), t.op);
  });
}

std::tuple<Tensor, Tensor> kl_divergence(Tensor p_logits, Tensor q_logits, double temperature) {
  const DeviceScope scope(p_logits);
  const KlTensors t("kl_divergence", p_logits, q_logits, temperature);
  KlOthers o;
  o.per_row = t.new_rows();
  o.statistics = t.new_statistics();
  launch_on(Order::kValue, t, temperature, o, scope.stream());
  return {*o.per_row, *o.statistics};
}

std::tuple<Tensor, Tensor> kl_divergence_backward(Tensor grad, Tensor p_logits, Tensor q_logits, Tensor statistics,
                                                  double temperature, bool need_p, bool need_q) {
  const DeviceScope scope(p_logits);
  const KlTensors t("kl_divergence_backward", p_logits, q_logits, temperature);
  KlOthers o;
  o.grad = t.per_row(grad);
  o.statistics_in = t.saved(statistics);
  o.grad_p = t.new_logits(need_p);
  o.grad_q = t.new_logits(need_q);
  launch_on(Order::kBackward, t, temperature, o, scope.stream());
  return {*o.grad_p, *o.grad_q};
}

std::tuple<Tensor, Tensor, Tensor> kl_divergence_double_backward(std::optional<Tensor> u, std::optional<Tensor> v,
                                                                 Tensor grad, Tensor p_logits, Tensor q_logits,
                                                                 Tensor statistics, double temperature, bool need_p,
                                                                 bool need_q) {
  const DeviceScope scope(p_logits);
  const KlTensors t("kl_divergence_double_backward", p_logits, q_logits, temperature);
  KlOthers o;
  o.u = t.cotangent("u", u);
  o.v = t.cotangent("v", v);
  o.grad = t.per_row(grad);
  o.statistics_in = t.saved(statistics);
  o.per_row = t.new_rows();
  o.grad_p = t.new_logits(need_p);
  o.grad_q = t.new_logits(need_q);
  launch_on(Order::kDoubleBackward, t, temperature, o, scope.stream());
  return {*o.per_row, *o.grad_p, *o.grad_q};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(robustkern, RK_CUDA_KEY, m) {
  m.impl("kl_divergence", TORCH_BOX(&kl_divergence));
  m.impl("kl_divergence_backward", TORCH_BOX(&kl_divergence_backward));
  m.impl("kl_divergence_double_backward", TORCH_BOX(&kl_divergence_double_backward));
}

}  // namespace rk::cuda
