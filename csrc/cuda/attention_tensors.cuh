// PyTorch's tensors as the kernels of attention take them, and which of them these serve.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

#include "attention_tiles.cuh"
#include "torch.cuh"

namespace rk::cuda {

using OptionalTensor = std::optional<Tensor>;

// Since 8.0 there are the instructions of mma.cuh, and a block may have 99 KiB of shared memory.
inline bool has_tensor_cores([[maybe_unused]] const Tensor& t) {
#if defined(__CUDACC__)
  int major = 0;
  return cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, t.get_device_index()) == cudaSuccess &&
         major >= 8;
#else
  return true;
#endif
}

// Whether the kernels' 32 bits reach from a row to the next.
inline bool has_near_rows(const OptionalTensor& t) {
  return !t || t->size(2) <= 1 || t->stride(2) <= std::numeric_limits<int>::max();
}

// The tensors as the kernels take them; copies live as long as this.  Of results, and of masks, there must be none: they
// have adjacent columns, or such as they are, and near rows.
class Views {
 public:
  template <class T>
  Heads<T> operator()(const OptionalTensor& tensor, bool any_columns = false) {
    if (!tensor) return {};
    const Tensor& t = held_.emplace_back(serves(*tensor, any_columns) ? *tensor : torch::stable::contiguous(*tensor));
    T* const data = pointer<T>(t);
    const int rows = static_cast<int>(t.size(2)), row = rows > 1 ? static_cast<int>(t.stride(2)) : 0;
    if (any_columns) return {{data, row, rows, 0}, t.stride(0), t.stride(1)};
    aligned_ = aligned_ && aligned<std::remove_const_t<T>>(t.size(3), data);
    for (int64_t d = 0; d < 3; ++d) aligned_ = aligned_ && (t.size(d) == 1 || t.stride(d) % (16 / sizeof(T)) == 0);
    return {{data, row, rows, static_cast<int>(t.size(3))}, t.stride(0), t.stride(1)};
  }

  // Whether rows of all of them can be copied by 16 bytes.
  bool all_aligned() const { return aligned_; }

 private:
  static bool serves(const Tensor& t, bool any_columns) {
    return (any_columns || t.size(3) <= 1 || t.stride(3) == 1) && has_near_rows(t);
  }
  std::vector<Tensor> held_;
  bool aligned_ = true;
};

inline AttentionSizes attention_sizes(const Tensor& q, const Tensor& k, bool causal) {
  const auto size = [](const Tensor& t, int64_t d) { return static_cast<int>(t.size(d)); };
  return {size(q, 0), size(q, 1), size(k, 1), size(q, 2), size(k, 2), causal};
}

// Whether the kernels serve these sizes: rows that they can hold, and few enough rows for 32 bits.
template <class S>
bool fits(const Tensor& q, const Tensor& k, const Tensor& v) {
  const int64_t most = int64_t{1} << 30, tile = 32;  // the fewest rows that a block has
  const auto few = [&](const Tensor& t) {
    return t.size(2) <= most && t.size(0) * t.size(1) <= most / (t.size(2) / tile + 1);
  };
  return q.size(3) <= kLargestHead<S> && v.size(3) <= kLargestHead<S> && few(q) && few(k);
}

}  // namespace rk::cuda
