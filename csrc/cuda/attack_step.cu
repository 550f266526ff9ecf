// attack_step for CUDA tensors: arguments checked, a kernel of attack.cuh launched on the current stream.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "../attack_arguments.h"
#include "attack_calls.cuh"

namespace rk::cuda {
namespace {

void attack_step(Tensor adversary, Tensor x, std::optional<Tensor> grad, Tensor eps, Tensor step_size,
                 std::optional<Tensor> scale, int64_t inner, int64_t norm, int64_t coordinates) {
  constexpr const char* op = "attack_step";
  const DeviceScope scope(adversary);
  const Ball ball = check_attack_step(op, adversary, x, grad, eps, step_size, scale, inner, norm, coordinates);
  if (adversary.numel() == 0) return;
  x = torch::stable::contiguous(x);
  if (grad) grad = torch::stable::contiguous(*grad);
  if (scale) scale = torch::stable::contiguous(*scale);
  eps = torch::stable::contiguous(eps);
  step_size = torch::stable::contiguous(step_size);
  visit_storage(adversary.scalar_type(), [&](auto element) {
    using S = decltype(element);
    using A = accumulation_t<S>;
    AttackStepCall<S> c{};
    c.rows = adversary.size(0);
    c.columns = static_cast<std::uint32_t>(adversary.size(1));
    c.adversary = static_cast<S*>(adversary.data_ptr());
    c.x = static_cast<const S*>(x.data_ptr());
    c.grad = grad ? static_cast<const S*>(grad->data_ptr()) : nullptr;
    c.eps = table_of<A>(eps, inner, c.columns);
    c.step = table_of<A>(step_size, inner, c.columns);
    c.scale = scale ? static_cast<const A*>(scale->data_ptr()) : nullptr;
    c.coordinates = coordinates;
    check_launch(launch_attack_step(ball, c, scope.stream()), op);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(robustkern, RK_CUDA_KEY, m) { m.impl("attack_step", TORCH_BOX(&attack_step)); }

}  // namespace rk::cuda
