// Rows that a block, or one warp of a block, works on alone, in chunks that stay in registers.
//
// Thread t of T takes the 16-byte vectors t, t + T, t + 2T, ... of a row; kChunk of them, from every input, are a chunk,
// and are loaded before the first is used.  A kernel that needs its row twice goes over the chunks from the last to the
// first, and back: the chunk that the first sweep ends with need not be loaded again, and the others are those that the
// caches have seen last.  A row of one chunk is read once.
//
// Where a thread has less than its share, `others` stands in the place of what is missing: numbers that change no sum and
// no maximum.  So it makes no difference to any bit whether a row's vectors may be loaded at once (kAligned, by
// `aligned_rows` on the host), and which threads have less to do.
#pragma once

#include <cstdint>

#include "reduce.cuh"
#include "vector.cuh"
#include "words.cuh"

namespace rk::cuda {

// Threads and rows of a block: one row to many threads, or several rows to a warp each.
template <class S>
dim3 block_for_rows(std::int64_t columns, int chunk) {
  constexpr std::int64_t most = 512;
  const std::int64_t per_thread = std::int64_t{Words<S>::kSize} * chunk;
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

// Where one thread's vectors of one chunk lie in a row of n elements.
template <bool kAligned, class S, int kChunk>
struct Share {
  static constexpr int V = Words<S>::kSize;
  std::int64_t first;  // element
  std::int64_t left;   // elements from there to the end of the row, if any
  int step;            // elements from one vector to the next

  static __device__ __forceinline__ std::int64_t chunks(std::int64_t n) {
    const std::int64_t size = std::int64_t{V * kChunk} * blockDim.x;
    return (n + size - 1) / size;
  }
  __device__ __forceinline__ Share(std::int64_t chunk, std::int64_t n)
      : first((chunk * kChunk * blockDim.x + threadIdx.x) * V),
        left(n - first),
        step(V * static_cast<int>(blockDim.x)) {}

  // Elements of vector i: all or none, if kAligned.
  __device__ __forceinline__ int count(int i) const {
    const std::int64_t rest = left - i * step;
    if constexpr (kAligned) return rest > 0 ? V : 0;
    return rest >= V ? V : rest > 0 ? static_cast<int>(rest) : 0;
  }
  __device__ __forceinline__ bool has(int i) const { return left > i * step; }

  __device__ __forceinline__ void load(Words<S> (&x)[kChunk], const S* row, const Words<S>& others) const {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const S* const from = row + first + i * step;
      if constexpr (kAligned) {
        x[i] = others;
        if (has(i)) x[i] = load_words<true>(from);
      } else {
        x[i] = load_some_words(from, count(i), others);
      }
    }
  }
  __device__ __forceinline__ void store(S* row, int i, const accumulation_t<S> (&values)[V]) const {
    S* const to = row + first + i * step;
    if constexpr (kAligned) {
      if (has(i)) store_words<true>(to, Words<S>::of(values));
    } else {
      store_some_words(to, Words<S>::of(values), count(i));
    }
  }
};

}  // namespace rk::cuda
