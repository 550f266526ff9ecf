// Tensors as arguments of the kernels of attack_step and attack_start.
#pragma once

#include "attack.cuh"
#include "torch.cuh"

namespace rk::cuda {

template <class A>
ColumnTable<A> table_of(const Tensor& table, int64_t inner, int64_t columns) {
  const int64_t count = table.size(0);
  return {static_cast<const A*>(table.data_ptr()), static_cast<std::uint32_t>(count),
          static_cast<std::uint32_t>(count == columns ? 1 : inner)};
}

// Calls f(S{}) with the storage type of `dtype`; entry points have checked that it is one of the four.
template <class F>
void visit_storage(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::Half: return f(__half{});
    default: return f(__nv_bfloat16{});
  }
}

}  // namespace rk::cuda
