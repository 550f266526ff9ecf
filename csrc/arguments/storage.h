// From a tensor to what a kernel takes: the C++ type of its elements, and a pointer to them.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>

#include "check.h"

namespace rk {

// Calls f(S{}) with the storage type of `dtype`; entry points have checked that it is one of the four.  Inlined, since a
// kernel that is compiled for several instruction sets may call it.
template <class Half, class BFloat16, class F>
inline __attribute__((always_inline)) void visit_storage_of(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::Half: return f(Half{});
    default: return f(BFloat16{});
  }
}

template <class T>
T* pointer(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

// nullptr for what is absent.
template <class T>
T* pointer(const std::optional<Tensor>& t) {
  return t ? pointer<T>(*t) : nullptr;
}

inline std::optional<Tensor> contiguous(const std::optional<Tensor>& t) {
  return t ? std::make_optional(torch::stable::contiguous(*t)) : std::nullopt;
}

}  // namespace rk
