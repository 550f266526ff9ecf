// Rows that a block, or one warp of a block, works on alone, in rounds that stay in registers.
//
// A round of a row are kVectors 16-byte vectors to each thread, from every input, and all are loaded before the first is
// used.  A warp's vectors lie together, so that a thread's are 512 bytes apart: a constant.  A kernel that needs its row
// twice goes over the rounds from the last to the first, and back: the round that the first sweep ends with need not be
// loaded again, and the others are those that the caches have seen last.  A row of one round is read once.
//
// Where a thread has less than its share, `others` stands in the place of what is missing: numbers that change no sum and
// no maximum.  So it makes no difference to any bit whether a row's vectors may be loaded at once (kAligned, by
// `aligned_rows` on the host), and which threads have less to do.
#pragma once

#include <cstdint>

#include "reduce.cuh"
#include "words.cuh"

namespace rk::cuda {

// Threads and rows of a block, of `vectors` to a thread and round: many threads for a row, or a warp for each of several.
template <class S>
dim3 block_for_rows(std::int64_t columns, int vectors) {
  constexpr std::int64_t most = 512;
  const std::int64_t per_thread = std::int64_t{Words<S>::kSize} * vectors;
  const std::int64_t threads = ((columns + per_thread - 1) / per_thread + 31) / 32 * 32;
  return threads <= 32 ? dim3(32, 4) : dim3(static_cast<unsigned>(threads < most ? threads : most));
}

inline dim3 grid_for_rows(std::int64_t rows, dim3 block) { return grid_for((rows + block.y - 1) / block.y); }

// Whether vectors of rows of `columns` elements, `stride` apart, can be loaded at once, all of them whole.
template <class S, class... Pointers>
bool aligned_rows(std::int64_t columns, std::int64_t stride, const Pointers*... pointers) {
  return columns % Words<S>::kSize == 0 && aligned<S>(stride, pointers...);
}

// f(row) for every row of this warp or block.  All its threads take part.
template <class F>
__device__ __forceinline__ void for_rows(std::int64_t rows, const F& f) {
  for (std::int64_t row = std::int64_t{blockIdx.x} * blockDim.y + threadIdx.y; row < rows;
       row += std::int64_t{gridDim.x} * blockDim.y)
    f(row);
}

// The sums of several numbers over a row's threads, in each of them.
template <int kCount, class A>
__device__ __forceinline__ void row_sums(A (&v)[kCount]) {
  __shared__ A part[kCount][32];
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll
  for (int i = 0; i < kCount; ++i) v[i] = warp_sum(v[i]);
  if (warps == 1) return;
  __syncthreads();  // part may still be read from the sums before
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) part[i][warp] = v[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) v[i] = warp_sum(lane < warps ? part[i][lane] : A(0));
}

// The same number in every element.
template <class S>
__device__ __forceinline__ Words<S> words_of(accumulation_t<S> v) {
  accumulation_t<S> values[Words<S>::kSize];
#pragma unroll
  for (int k = 0; k < Words<S>::kSize; ++k) values[k] = v;
  return Words<S>::of(values);
}

// Where one thread's vectors of one round lie in a row of n elements.
template <bool kAligned, class S, int kVectors>
struct Share {
  static constexpr int V = Words<S>::kSize, kCount = kVectors;
  static constexpr int kStep = 32 * V;  // elements from one vector to the next
  std::int64_t first;                   // element
  int left;                             // elements from there to the end of the row, if any; many are enough

  // Of a row of n elements, less than 64 GB: 64-bit division would be a subroutine.
  static __device__ __forceinline__ int rounds(std::int64_t n) {
    const unsigned size = kVectors * blockDim.x;
    return static_cast<int>((static_cast<unsigned>((n + V - 1) / V) + (size - 1)) / size);
  }
  __device__ __forceinline__ Share(int round, std::int64_t n) {
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    first = std::int64_t{round} * kVectors * V * blockDim.x + (warp * kVectors * kStep + lane * V);
    constexpr std::int64_t many = kVectors * kStep;
    left = static_cast<int>(n - first < many ? n - first < 0 ? 0 : n - first : many);
  }

  // Elements of vector i: all or none, if kAligned.
  __device__ __forceinline__ int count(int i) const {
    const int rest = left - i * kStep;
    if constexpr (kAligned) return rest > 0 ? V : 0;
    return rest >= V ? V : rest > 0 ? rest : 0;
  }
  // Elements of the round; all are there but in the last of a row.
  __device__ __forceinline__ int count_all(bool is_last) const {
    if (!is_last) return V * kVectors;
    int total = 0;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) total += count(i);
    return total;
  }
  __device__ __forceinline__ bool has(int i) const { return left > i * kStep; }
  // The first element of vector i, and whether element j is one of its own.
  __device__ __forceinline__ std::int64_t element(int i) const { return first + i * kStep; }
  __device__ __forceinline__ bool contains(int i, std::int64_t j) const {
    return static_cast<std::uint64_t>(j - first - i * kStep) < std::uint64_t{V};
  }

  __device__ __forceinline__ void load(Words<S> (&x)[kVectors], const S* row, const Words<S>& others) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const S* const from = row + element(i);
      if constexpr (kAligned) {
        x[i] = others;
        if (has(i)) x[i] = load_words<true>(from);
      } else {
        x[i] = load_some_words(from, count(i), others);
      }
    }
  }
  __device__ __forceinline__ void store(S* row, int i, const accumulation_t<S> (&values)[V]) const {
    S* const to = row + element(i);
    if constexpr (kAligned) {
      if (has(i)) store_words<true>(to, Words<S>::of(values));
    } else {
      store_some_words(to, Words<S>::of(values), count(i));
    }
  }
};

}  // namespace rk::cuda
