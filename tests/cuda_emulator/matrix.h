// The matrix instructions of csrc/cuda/mma.cuh: mma and ldmatrix. All 32 lanes of a warp take part, at one place.
//
// Lanes bring pointers to their fragments, or to the rows that they have read, and take their shares home through them.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "warp.h"

namespace cuda_emulator {

template <class T>
T& brought_by(const Exchange& exchange, int lane) {
  return *unpack<T*>(exchange.value[lane]);
}

// value + the sum of a[k] b[k] over 8 numbers, as the tensor cores of an A100 are known to add: products are exact; then
// all terms are cut off one bit below the last of the largest one, and so is their sum below its own. Later GPUs
// keep more bits.
CUDA_EMULATOR_RAW inline float add_products(float value, const float* a, const float* b) {
  double terms[9] = {value}, sum = value, largest = std::fabs(terms[0]);
  for (int k = 0; k < 8; ++k) {
    terms[k + 1] = static_cast<double>(a[k]) * b[k];
    sum += terms[k + 1];
    largest = std::fmax(largest, std::fabs(terms[k + 1]));
  }
  if (!std::isfinite(sum) || largest == 0) return static_cast<float>(sum);

  std::uint64_t bits = pack(largest) & 0x7ff0000000000000u;  // the power of two at or below it
  const double unit = unpack<double>(bits) * 0x1p-24;
  std::int64_t units = 0;
  for (const double term : terms) units += static_cast<std::int64_t>(term / unit);
  bits = pack(static_cast<double>(units) * unit) & ~std::uint64_t{0x1fffffff};  // the 24 bits of a float
  return static_cast<float>(unpack<double>(bits));
}

struct Fragments {
  float* d;
  const std::uint32_t *a, *b;
};

// The entry (row, column) of a matrix of S lies in a lane and register of its own; here the number itself.
template <class S>
CUDA_EMULATOR_RAW float number_in(std::uint32_t bits, int half) {
  const auto number = static_cast<std::uint16_t>(bits >> 16 * half);
  if constexpr (std::is_same_v<S, __half>) {
    return __half2float(__ushort_as_half(number));
  } else {
    return unpack<float>(std::uint32_t{number} << 16);
  }
}

template <class S>
CUDA_EMULATOR_RAW std::uint64_t multiply(const Exchange& exchange, int lane) {
  if (lane != 0) return 0;  // the first lane's turn is everyone's
  float a[16][16], b[8][16];
  for (int k = 0; k < 16; ++k) {
    const int within_group = k % 8 / 2, half = k % 2, later = k / 8;
    for (int row = 0; row < 16; ++row) {
      const auto& from = brought_by<Fragments>(exchange, row % 8 * 4 + within_group);
      a[row][k] = number_in<S>(from.a[row / 8 + 2 * later], half);
    }
    for (int column = 0; column < 8; ++column) {
      const auto& from = brought_by<Fragments>(exchange, column * 4 + within_group);
      b[column][k] = number_in<S>(from.b[later], half);
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      const auto& to = brought_by<Fragments>(exchange, row % 8 * 4 + column / 2);
      float& sum = to.d[row / 8 * 2 + column % 2];
      for (const int k : {0, 8}) sum = add_products(sum, a[row] + k, b[column] + k);
    }
  }
  return 0;
}

template <class S>
void mma_16816(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], CUDA_EMULATOR_CALLER) {
  static_assert(std::is_same_v<S, __half> || std::is_same_v<S, __nv_bfloat16>);
  Fragments fragments{d, a, b};
  wait(State::mma, ~0u, pack(&fragments), lane_index(), multiply<S>, where);
}

struct Row {
  Word words[2];  // 8 numbers
  std::uint32_t* to;
};

template <bool kTransposed>
CUDA_EMULATOR_RAW std::uint64_t distribute(const Exchange& exchange, int lane) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    std::uint32_t& pair = brought_by<Row>(exchange, lane).to[matrix] = 0;
    for (int half = 0; half < 2; ++half) {
      int row = lane / 4, column = lane % 4 * 2 + half;
      if (kTransposed) std::swap(row, column);
      const Word word = brought_by<Row>(exchange, matrix * 8 + row).words[column / 4];
      pair |= static_cast<std::uint32_t>(word >> column % 4 * 16 & 0xffff) << half * 16;
    }
  }
  return 0;
}

// Each lane reads the row that it names, before the others have come: what they write first needs a __syncwarp.
template <bool kTransposed>
void load_matrices(std::uint32_t (&r)[4], const void* row, const Location& where) {
  if (reinterpret_cast<std::uintptr_t>(row) % 16 != 0)
    stop("ldmatrix from an address that is no multiple of 16", where);
  const Word* const words = static_cast<const Word*>(row);
  Row own{{words[0], words[1]}, r};
  wait(State::ldmatrix, ~0u, pack(&own), lane_index(), distribute<kTransposed>, where);
}

inline void ldmatrix_x4(std::uint32_t (&r)[4], const void* shared_row, CUDA_EMULATOR_CALLER) {
  load_matrices<false>(r, shared_row, where);
}
inline void ldmatrix_x4_transposed(std::uint32_t (&r)[4], const void* shared_row, CUDA_EMULATOR_CALLER) {
  load_matrices<true>(r, shared_row, where);
}

}  // namespace cuda_emulator
