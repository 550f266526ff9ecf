// From a run-time dtype to the C++ type of its elements.
#pragma once

#include "../arguments/storage.h"
#include "half.h"

namespace rk::cpu {

template <class F>
RK_HOST_DEVICE void visit_storage(ScalarType dtype, const F& f) {
  visit_storage_of<Half, BFloat16>(dtype, f);
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

// Rows a thread should take at least, so that starting it costs less than it saves.
inline std::int64_t rows_per_thread(std::int64_t elements_per_row) {
  const std::int64_t elements = 32768;
  return elements_per_row >= elements ? 1 : elements / (elements_per_row > 0 ? elements_per_row : 1);
}

}  // namespace rk::cpu
