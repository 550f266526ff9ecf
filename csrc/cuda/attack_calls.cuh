// Tensors as arguments of the kernels of attack_step and attack_start.
#pragma once

#include "attack.cuh"
#include "torch.cuh"

namespace rk::cuda {

template <class A>
ColumnTable<A> table_of(const Tensor& table, int64_t inner, int64_t columns) {
  const int64_t count = table.size(0);
  return {pointer<const A>(table), count, count == columns ? 1 : inner, columns};
}

}  // namespace rk::cuda
