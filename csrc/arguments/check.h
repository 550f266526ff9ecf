// Every argument check of every entry point.  A message names the operator, the argument, what was expected and what
// came:
//   row_norm_backward: grad must be [4] float32 on cuda:0, got [4] float64 on cpu
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "dtype.h"

// Raises RuntimeError in Python with this message and nothing else: STD_TORCH_CHECK would put a C++ file and line in front.
#define RK_CHECK(condition, ...) ((condition) ? void() : ::rk::fail(__VA_ARGS__))

namespace rk {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

using torch::stable::Tensor;

inline std::string device_of(const Tensor& t) {
  const auto device = t.device();
  switch (device.type()) {
    case torch::headeronly::DeviceType::CPU: return "cpu";
    case torch::headeronly::DeviceType::CUDA: return "cuda:" + std::to_string(device.index());
    case torch::headeronly::DeviceType::Meta: return "meta";
    default: return "device type " + std::to_string(static_cast<int>(device.type()));
  }
}

inline std::string shape_text(const std::vector<int64_t>& sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

inline std::vector<int64_t> sizes_of(const Tensor& t) {
  return std::vector<int64_t>(t.sizes().begin(), t.sizes().end());
}

inline std::string describe(const Tensor& t) {
  return shape_text(sizes_of(t)) + " " + name_of(t.scalar_type()) + " on " + device_of(t);
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.device().type() == b.device().type() && a.device().index() == b.device().index();
}

inline void check_floating(const char* op, const char* name, const Tensor& t) {
  RK_CHECK(is_floating_point(t.scalar_type()), op, ": ", name, " must be float32, float64, float16 or bfloat16, got ",
           describe(t));
}

inline void check_matrix(const char* op, const char* name, const Tensor& t) {
  RK_CHECK(t.dim() == 2, op, ": ", name, " must have 2 dimensions, got ", describe(t));
  check_floating(op, name, t);
}

// `t` must have exactly this shape and dtype, and live where `like` lives.
inline void check_tensor(const char* op, const char* name, const Tensor& t, const std::vector<int64_t>& sizes,
                         ScalarType dtype, const Tensor& like) {
  RK_CHECK(sizes_of(t) == sizes && t.scalar_type() == dtype && same_device(t, like), op, ": ", name, " must be ",
           shape_text(sizes), " ", name_of(dtype), " on ", device_of(like), ", got ", describe(t));
}

// The same for an argument that may be absent.
inline void check_optional(const char* op, const char* name, const std::optional<Tensor>& t,
                           const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like) {
  if (t) check_tensor(op, name, *t, sizes, dtype, like);
}

// Rows that a kernel can read where they lie: columns adjacent, rows at any distance.  Anything else is copied once.
inline Tensor with_dense_rows(const Tensor& t) {
  return t.dim() != 2 || t.size(1) <= 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t);
}

inline void check_number(const char* op, const char* name, bool ok, const char* expected, double got) {
  RK_CHECK(ok, op, ": ", name, " must be ", expected, ", got ", got);
}

}  // namespace rk
