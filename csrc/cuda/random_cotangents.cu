// random_cotangents for CUDA tensors: arguments checked, results and workspaces allocated, kernels of
// random_cotangents.cuh and random_frames.cuh launched on the current stream.
#include "random_cotangents.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "../arguments/random_cotangents.h"
#include "random_frames.cuh"
#include "torch.cuh"

namespace rk::cuda {
namespace {

// One call: its shape, and the tensors that its kernels share, kept alive until they are launched.
template <class S>
class Call {
  using A = accumulation_t<S>;

 public:
  CotangentSums<S> sums{};

  Call(const char* op, const CotangentShape& shape, const Tensor& outputs, const Tensor& seed, const Tensor* grad,
       cudaStream_t stream)
      : op_(op), shape_(shape), like_(outputs), stream_(stream) {
    CotangentDraws<A>& draws = sums.draws;
    draws = {shape.law,    shape.projections, shape.batch, shape.classes, shape.positions,
             shape.size(), nullptr,           nullptr,     nullptr};
    draws.seed = pointer<const int64_t>(seed);
    sums.kind = shape.kind;
    if (grad) sums.grad = pointer<const S>(*grad);
    if (shape.law == Law::kSphere) {
      A* const scale = workspace<A>(shape.projections * shape.batch);
      check_launch(launch_sphere_scale(draws, scale, stream), op);
      draws.scale = scale;
    }
    if (shape.law == Law::kOrthonormal) make_frames();
    if (shape.kind == Kind::kPlain) return;
    const int64_t units = shape.projections * shape.batch * shape.positions;
    if (shape.kind == Kind::kCentred) sums.mean = workspace<A>(units);
    if (shape.kind == Kind::kFisher) {
      double* const root = workspace<double>(shape.batch * shape.size());
      const S* const z = pointer<const S>(outputs);
      check_launch(launch_roots(shape.batch, shape.classes, shape.positions, z, root, stream), op);
      sums.root = root;
      sums.d = workspace<double>(units);
      if (grad) sums.m = workspace<double>(units);
      if (grad) sums.b = workspace<double>(units);
    }
    check_launch(launch_cotangent_sums(sums, stream), op);
  }

 private:
  template <class T>
  T* workspace(int64_t numbers) {
    kept_.push_back(
        torch::stable::new_empty(like_, {numbers}, sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float));
    return pointer<T>(kept_.back());
  }

  void make_frames() {
    const int64_t K = shape_.projections, B = shape_.batch, D = shape_.size();
    FrameCall<A> c{K, B, D, sums.draws.seed, nullptr, workspace<A>(K * B * D), workspace<A>(K * B)};
    if (frame_shared<A>(K, D) == 0) c.workspace = workspace<A>(std::min(B, kFrameBlocks) * FrameLayout(K, D).size);
    check_launch(launch_random_frames(c, stream_), op_);
    sums.draws.frames = c.frames;
    sums.draws.scale = c.scale;
  }

  const char* op_;
  const CotangentShape& shape_;
  const Tensor& like_;
  cudaStream_t stream_;
  std::vector<Tensor> kept_;
};

Tensor random_cotangents(Tensor outputs, Tensor seed, int64_t projections, int64_t law, int64_t kind) {
  constexpr const char* op = "random_cotangents";
  const DeviceScope scope(outputs);
  const CotangentShape shape(op, outputs, seed, projections, law, kind);
  const Tensor z = shape.kind == Kind::kFisher ? contiguous(outputs) : outputs;
  Tensor w = torch::stable::new_empty(outputs, shape.of_cotangents());
  visit_storage(outputs.scalar_type(), [&](auto storage) {
    using S = decltype(storage);
    const Call<S> call(op, shape, z, seed, nullptr, scope.stream());
    check_launch(launch_cotangent_value(call.sums, pointer<S>(w), scope.stream()), op);
  });
  return w;
}

Tensor random_cotangents_backward(Tensor grad, Tensor outputs, Tensor seed, int64_t law) {
  constexpr const char* op = "random_cotangents_backward";
  const DeviceScope scope(outputs);
  const CotangentShape shape(op, outputs, seed, projections_of(op, grad), law, static_cast<int64_t>(Kind::kFisher));
  check_grad(op, grad, shape, outputs);
  const Tensor g = contiguous(grad), z = contiguous(outputs);
  Tensor grad_outputs = torch::stable::new_empty(outputs, shape.of_outputs);
  visit_storage(outputs.scalar_type(), [&](auto storage) {
    using S = decltype(storage);
    const Call<S> call(op, shape, z, seed, &g, scope.stream());
    check_launch(launch_cotangent_gradient(call.sums, pointer<S>(grad_outputs), scope.stream()), op);
  });
  return grad_outputs;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(robustkern, RK_CUDA_KEY, m) {
  m.impl("random_cotangents", TORCH_BOX(&random_cotangents));
  m.impl("random_cotangents_backward", TORCH_BOX(&random_cotangents_backward));
}

}  // namespace rk::cuda
