// Numbers that columns share: one for all, one for each channel, or one for each column.
#pragma once

#include <cstdint>

#include "divisor.cuh"
#include "launch.cuh"

namespace rk::cuda {

// Entry (j / inner) % count belongs to column j.
template <class A>
struct ColumnTable {
  const A* number = nullptr;
  std::int64_t count = 1, inner = 1;
  bool wide = false;  // an index of a column or of the table needs more than 31 bits
  Divisor by_inner, by_count;

  ColumnTable() = default;
  ColumnTable(const A* numbers, std::int64_t entries, std::int64_t run, std::int64_t columns)
      : number(numbers), count(entries), inner(run), wide(columns > 2147483647) {
    if (wide) return;
    by_inner = Divisor(run < 1 ? 1 : run < columns ? run : columns < 1 ? 1 : columns);
    by_count = Divisor(entries);
    inner = by_inner.d;
  }

  // The numbers of adjacent columns: the entry of the first, and how many columns still share it.
  struct Cursor {
    const A* number;
    std::int64_t count, entry;
    std::uint32_t inner, left;

    __device__ __forceinline__ A next() {
      const A value = number[entry];
      if (--left == 0) {
        left = inner;
        if (++entry == count) entry = 0;
      }
      return value;
    }
    // The numbers of the next kCount columns; one, if they share it.
    template <int kCount>
    __device__ __forceinline__ void fill(A (&values)[kCount]) {
      if (left >= kCount) {
        const A value = number[entry];
#pragma unroll
        for (int k = 0; k < kCount; ++k) values[k] = value;
      } else {
#pragma unroll
        for (int k = 0; k < kCount; ++k) values[k] = next();
      }
    }
    // The cursor of the column `columns` further on.
    __device__ __forceinline__ Cursor after(std::uint32_t columns) const {
      if (columns < left) return {number, count, entry, inner, left - columns};
      const std::uint32_t beyond = columns - left, runs = beyond / inner;
      std::int64_t to = entry + 1 + runs;
      if (to >= count) to -= count;
      if (to >= count) to = static_cast<std::uint32_t>(to) % static_cast<std::uint32_t>(count);  // a short table
      return {number, count, to, inner, inner - (beyond - runs * inner)};
    }
  };

  // Unless wide.
  __device__ __forceinline__ Cursor at(std::uint32_t column) const {
    if (count == 1) return {number, 1, 0, 0, ~0u};
    const std::uint32_t run = by_inner.quotient(column), length = static_cast<std::uint32_t>(inner);
    return {number, count, by_count.remainder(run), length, length - (column - run * length)};
  }
  // Of any column, by 64-bit divisions; runs count as 2^32 - 1 columns at most.
  __device__ __forceinline__ Cursor far(std::int64_t column) const {
    const std::int64_t run = column / inner;
    return {number, count, run % count, clipped(inner), clipped(inner - (column - run * inner))};
  }

 private:
  static __device__ __forceinline__ std::uint32_t clipped(std::int64_t v) {
    return v < 4294967295 ? static_cast<std::uint32_t>(v) : 4294967295u;
  }
};

}  // namespace rk::cuda
