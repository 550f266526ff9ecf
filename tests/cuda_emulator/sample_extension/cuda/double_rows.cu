#include <torch/csrc/stable/ops.h>

#include "torch.cuh"

namespace {

using torch::stable::Tensor;

enum Bug : std::int64_t { none, early_return, write_past_end };

// y = 2 x, through shared memory, so that there is a barrier to miss.
__global__ void double_kernel(const float* x, float* y, std::int64_t n, std::int64_t bug) {
  __shared__ float values[128];
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (bug == early_return && i >= n) return;
  values[threadIdx.x] = i < n ? x[i] : 0.0f;
  __syncthreads();
  if (i < n + (bug == write_past_end)) y[i] = 2.0f * values[threadIdx.x];
}

Tensor double_rows(const Tensor& x, std::int64_t bug) {
  const rk::cuda::DeviceScope scope(x);
  Tensor y = torch::stable::empty_like(x);
  const auto blocks = static_cast<unsigned>((x.numel() + 127) / 128);
  rk::cuda::check_launch(rk::cuda::launch(double_kernel, dim3(blocks), dim3(128), 0, scope.stream(),
                                          static_cast<const float*>(x.const_data_ptr()),
                                          static_cast<float*>(y.mutable_data_ptr()), x.numel(), bug),
                         "double_rows");
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(emulator_sample, RK_CUDA_KEY, m) { m.impl("double_rows", TORCH_BOX(&double_rows)); }
