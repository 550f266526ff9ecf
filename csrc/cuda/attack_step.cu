// attack_step for CUDA tensors: arguments checked, kernels of attack_step.cuh launched on the current stream.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "../arguments/attack.h"
#include "attack_calls.cuh"
#include "attack_step.cuh"

namespace rk::cuda {
namespace {

void attack_step(Tensor adversary, Tensor x, std::optional<Tensor> grad, Tensor eps, Tensor step_size,
                 std::optional<Tensor> scale, int64_t inner, int64_t norm, int64_t coordinates) {
  constexpr const char* op = "attack_step";
  const DeviceScope scope(adversary);
  const Ball ball = check_attack_step(op, adversary, x, grad, eps, step_size, scale, inner, norm, coordinates);
  if (adversary.numel() == 0) return;
  x = contiguous(x);
  grad = contiguous(grad);
  scale = contiguous(scale);
  eps = contiguous(eps);
  step_size = contiguous(step_size);
  visit_storage(adversary.scalar_type(), [&](auto element) {
    using S = decltype(element);
    using A = accumulation_t<S>;
    AttackStepCall<S> c{};
    c.rows = adversary.size(0);
    c.columns = static_cast<std::uint32_t>(adversary.size(1));
    c.adversary = pointer<S>(adversary);
    c.x = pointer<const S>(x);
    c.grad = pointer<const S>(grad);
    c.eps = table_of<A>(eps, inner, c.columns);
    c.step = table_of<A>(step_size, inner, c.columns);
    c.scale = pointer<const A>(scale);
    c.coordinates = coordinates;
    const AttackWorkspace<S> space(ball, c.rows, c.columns);
    std::optional<Tensor> queue, partial, steps;
    // Of named sizes: nvcc's host code has no list in braces within a generic lambda.
    const auto scratch = [&x](std::int64_t count, ScalarType type) {
      const std::vector<std::int64_t> sizes(1, count);
      return torch::stable::new_empty(x, sizes, type);
    };
    if (space.queue > 0) {
      queue = scratch(space.queue, ScalarType::Int);
      partial = scratch(space.partial, accumulation_type(x.scalar_type()));
      steps = scratch(space.steps, accumulation_type(x.scalar_type()));
      c.queue = pointer<std::uint32_t>(queue);
      c.partial = pointer<A>(partial);
      c.steps = reinterpret_cast<L2Step<A>*>(pointer<A>(steps));
    }
    check_launch(launch_attack_step(ball, c, scope.stream()), op);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(robustkern, RK_CUDA_KEY, m) { m.impl("attack_step", TORCH_BOX(&attack_step)); }

}  // namespace rk::cuda
