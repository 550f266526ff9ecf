// What the kernels of attack_step and attack_start have in common: their calls, numbers for columns, rounding inwards.
#pragma once

#include <cstdint>
#include <cstring>

#include "../math/attack_step.h"
#include "divisor.cuh"
#include "vector.cuh"
#include "words.cuh"

namespace rk::cuda {

// Numbers for columns: [1], [C] or [N].  Entry (j / inner) % count belongs to column j.
template <class A>
struct ColumnTable {
  const A* number = nullptr;
  std::uint32_t count = 1, inner = 1;
  Divisor by_inner, by_count;

  ColumnTable() = default;
  ColumnTable(const A* numbers, std::uint32_t entries, std::uint32_t run)
      : number(numbers), count(entries), inner(run), by_inner(run), by_count(entries) {}

  // The numbers of adjacent columns: the entry of the first, and how many columns still share it.
  struct Cursor {
    const A* number;
    std::uint32_t count, inner, entry, left;

    __device__ __forceinline__ A next() {
      const A value = number[entry];
      if (--left == 0) {
        left = inner;
        if (++entry == count) entry = 0;
      }
      return value;
    }
  };
  __device__ __forceinline__ Cursor at(std::uint32_t column) const {
    if (count == 1) return {number, 1, 0, 0, ~0u};
    const std::uint32_t run = by_inner.quotient(column);
    return {number, count, inner, by_count.remainder(run), inner - (column - run * inner)};
  }
};

// All elements in slabs of whole rows, fewer than 2^31 elements each, so that indices within one have 32 bits.
struct Slabs {
  std::int64_t rows, slab_rows;
  std::uint32_t columns;

  Slabs(std::int64_t rows_, std::uint32_t columns_)
      : rows(rows_), slab_rows(most(columns_) < rows_ ? most(columns_) : rows_), columns(columns_) {}
  std::int64_t count() const { return (rows + slab_rows - 1) / slab_rows; }
  std::int64_t most_elements() const { return slab_rows * columns; }

  __device__ __forceinline__ std::int64_t first_row() const { return blockIdx.y * slab_rows; }
  // Rows of this block's slab.
  __device__ __forceinline__ std::uint32_t rows_here() const {
    const std::int64_t left = rows - first_row();
    return static_cast<std::uint32_t>(left < slab_rows ? left : slab_rows);
  }

 private:
  static std::int64_t most(std::uint32_t columns) { return 2147483647 / columns; }  // at least 1
};

// The nearest number that S stores within [low, high], 0 <= low: the bits of numbers that are not negative count steps.
template <class S>
__device__ __forceinline__ accumulation_t<S> stored_between(accumulation_t<S> v, Interval<accumulation_t<S>> to) {
  if constexpr (sizeof(S) == 2) {
    S s = store<S>(v);
    const float back = load(s);
    std::uint16_t bits;
    std::memcpy(&bits, &s, sizeof bits);
    bits = static_cast<std::uint16_t>(bits + (back < to.low ? 1 : 0) - (back > to.high ? 1 : 0));
    std::memcpy(static_cast<void*>(&s), &bits, sizeof bits);
    return load(s);
  } else {
    return v;
  }
}

}  // namespace rk::cuda
