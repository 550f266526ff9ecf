// Tensors as arguments of the kernels of attack_step and attack_start.
#pragma once

#include "attack.cuh"
#include "torch.cuh"

namespace rk::cuda {

template <class A>
ColumnTable<A> table_of(const Tensor& table, int64_t inner, int64_t columns) {
  const int64_t count = table.size(0);
  return {pointer<const A>(table), static_cast<std::uint32_t>(count),
          static_cast<std::uint32_t>(count == columns || count == 1 ? 1 : inner)};
}

}  // namespace rk::cuda
