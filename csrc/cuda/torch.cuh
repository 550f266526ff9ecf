// What the host entry of a CUDA op needs from PyTorch: a dispatch key, the device and stream to launch on, and the
// check after a launch. PyTorch's stable headers only, so that the file also compiles against a CPU-only PyTorch.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "../arguments/storage.h"
#include "launch.cuh"

#if defined(__CUDACC__)
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#endif

// The dispatch key of the ops in csrc/cuda: STABLE_TORCH_LIBRARY_IMPL(robustkern, RK_CUDA_KEY, m) { ... }.
// Under the emulator the same kernels serve CPU tensors, in place of csrc/cpu.
#if defined(__CUDACC__)
#define RK_CUDA_KEY CUDA
#else
#define RK_CUDA_KEY CPU
#endif

namespace rk::cuda {

#if defined(__CUDACC__)
namespace detail {

using CurrentStreamFunction = AOTITorchError (*)(int32_t device_index, void** stream);

// aoti_torch_get_current_cuda_stream is defined in libtorch_cuda.so only. Linking to it would keep this library from
// loading in a CPU-only PyTorch, so it is looked up when the first kernel is launched. The second attempt serves
// builds whose linker dropped libtorch.so, the library that makes libtorch_cuda.so visible here.
inline CurrentStreamFunction find_current_stream_function() {
  constexpr const char* name = "aoti_torch_get_current_cuda_stream";
  void* function = dlsym(RTLD_DEFAULT, name);
  if (function == nullptr) {
    if (void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD)) {
      function = dlsym(library, name);  // the handle stays open: PyTorch does not unload its libraries either
    }
  }
  return reinterpret_cast<CurrentStreamFunction>(function);
}

inline cudaStream_t current_stream(int32_t device_index) {
  static const CurrentStreamFunction function = find_current_stream_function();
  RK_CHECK(function != nullptr, "this PyTorch was built without CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(device_index, &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace detail
#endif

template <class F>
void visit_storage(ScalarType dtype, const F& f) {
  visit_storage_of<__half, __nv_bfloat16>(dtype, f);
}

// Makes a tensor's device the current one while in scope, and gives PyTorch's current stream there. Every entry opens
// one before it allocates or launches. In the emulator there is neither device nor stream.
class DeviceScope {
 public:
#if defined(__CUDACC__)
  explicit DeviceScope(const torch::stable::Tensor& tensor)
      : guard_(tensor.get_device_index()), stream_(detail::current_stream(tensor.get_device_index())) {}
#else
  explicit DeviceScope(const torch::stable::Tensor&) {}
#endif
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

  cudaStream_t stream() const { return stream_; }

 private:
#if defined(__CUDACC__)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  cudaStream_t stream_ = nullptr;
};

// Raises unless the launch of `op` went through: check_launch(row_norm_forward(..., scope.stream()), "row_norm").
// In the emulator cudaGetErrorString is the report of what went wrong inside the kernel, by block, thread and line.
inline void check_launch(cudaError_t status, const char* op) {
  RK_CHECK(status == cudaSuccess, op, ": ", cudaGetErrorString(status));
}

}  // namespace rk::cuda
