// attack_start for CUDA tensors: arguments checked, a kernel of attack_start.cuh launched on the current stream.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "../arguments/attack.h"
#include "attack_calls.cuh"
#include "attack_start.cuh"

namespace rk::cuda {
namespace {

void attack_start(Tensor adversary, Tensor x, Tensor eps, Tensor seed, std::optional<Tensor> samples, int64_t inner,
                  int64_t norm, int64_t restart) {
  constexpr const char* op = "attack_start";
  const DeviceScope scope(adversary);
  const Ball ball = check_attack_start(op, adversary, x, eps, seed, samples, inner, norm, restart);
  if (adversary.numel() == 0) return;
  x = contiguous(x);
  samples = contiguous(samples);
  eps = contiguous(eps);
  visit_storage(adversary.scalar_type(), [&](auto element) {
    using S = decltype(element);
    AttackStartCall<S> c{};
    c.rows = adversary.size(0);
    c.columns = static_cast<std::uint32_t>(adversary.size(1));
    c.adversary = pointer<S>(adversary);
    c.x = pointer<const S>(x);
    c.eps = table_of<accumulation_t<S>>(eps, inner, c.columns);
    c.seed = pointer<const int64_t>(seed);
    c.samples = pointer<const int64_t>(samples);
    c.stream = static_cast<std::uint32_t>(2 * restart);
    check_launch(launch_attack_start(ball, c, scope.stream()), op);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(robustkern, RK_CUDA_KEY, m) { m.impl("attack_start", TORCH_BOX(&attack_start)); }

}  // namespace rk::cuda
