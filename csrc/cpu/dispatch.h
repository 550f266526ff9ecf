// From a run-time dtype to the C++ type of its elements.
#pragma once

#include "../check.h"
#include "half.h"

namespace rk::cpu {

// Calls f(S{}) with the storage type of `dtype`; entry points have checked that it is one of the four.
template <class F>
RK_HOST_DEVICE void visit_storage(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::Half: return f(Half{});
    default: return f(BFloat16{});
  }
}

// f(A{}) with the accumulation type of `dtype`.
template <class F>
auto visit_accumulation(ScalarType dtype, const F& f) {
  return dtype == ScalarType::Double ? f(double{}) : f(float{});
}

// Bytes of a stored element.
inline std::int64_t item_size(ScalarType dtype) {
  return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
}

// The elements of a tensor that stores S; null where there is none.
template <class S>
S* pointer(const Tensor& t) {
  return static_cast<S*>(t.data_ptr());
}
template <class S>
S* pointer(const std::optional<Tensor>& t) {
  return t ? pointer<S>(*t) : nullptr;
}

// Rows a thread should take at least, so that starting it costs less than it saves.
inline std::int64_t rows_per_thread(std::int64_t elements_per_row) {
  const std::int64_t elements = 32768;
  return elements_per_row >= elements ? 1 : elements / (elements_per_row > 0 ? elements_per_row : 1);
}

}  // namespace rk::cpu
