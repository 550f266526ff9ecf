// The kernels of margin_loss.  Formulas: math/margin_loss.h.
//
// A warp to a row, whose logits it reads once.  A lane sorts its own four by four, and keeps the four largest; those of the
// lanes are merged at the end.  Slopes are zeros but for five.
#pragma once

#include <cstdint>

#include "../math/margin_loss.h"
#include "divisor.cuh"
#include "rows.cuh"

namespace rk::cuda {

constexpr unsigned kMarginThreads = 128;  // four rows at a time

template <class S>
struct MarginCall {
  using A = accumulation_t<S>;
  std::int64_t rows;
  int classes;
  Margin kind;
  const S* logits;                       // [rows, classes]
  const std::int64_t *target, *towards;  // [rows]; towards null: the best class but target
  A* loss;                               // [rows]
  S* slopes;                             // [rows, classes]
};

// A logit and its class as a whole number, in the order of logits, and of equal ones the lower class first.  Where NaN stands
// does not matter: it makes its row NaN.
template <class S>
struct ShortRank {  // of 16 bits, and of at most 2^16 classes
  static constexpr int kMostClasses = 1 << 16;
  std::int32_t of_both;

  static __device__ __forceinline__ ShortRank of(const Words<S>& words, int k, int c) {
    const auto bits = static_cast<std::int32_t>(words.upper_bits(k));
    return {(bits ^ (bits >> 31 & 0x7fff0000)) + (kMostClasses - 1 - c)};
  }
  __device__ __forceinline__ int index() const { return kMostClasses - 1 - (of_both & 0xffff); }
  __device__ __forceinline__ float logit() const {
    const auto bits = static_cast<std::uint16_t>((of_both ^ (of_both >> 31 & 0x7fff0000)) >> 16);
    S value;
    memcpy(static_cast<void*>(&value), &bits, sizeof(value));
    return load(value);
  }
  __device__ __forceinline__ bool operator==(ShortRank other) const { return of_both == other.of_both; }
  // The largest of a warp's.
  __device__ __forceinline__ ShortRank of_warp() const { return {__reduce_max_sync(0xffffffffu, of_both)}; }
  static __device__ __forceinline__ ShortRank larger(ShortRank a, ShortRank b) { return {::max(a.of_both, b.of_both)}; }
  static __device__ __forceinline__ ShortRank smaller(ShortRank a, ShortRank b) {
    return {::min(a.of_both, b.of_both)};
  }
};

template <class S>
struct LongRank {
  using A = accumulation_t<S>;
  using Key = std::conditional_t<sizeof(A) == 8, std::uint64_t, std::uint32_t>;
  static constexpr Key kSign = Key(1) << (8 * sizeof(A) - 1);
  Key key;
  std::uint32_t behind;  // the class, the last one first

  static __device__ __forceinline__ LongRank of(const Words<S>& words, int k, int c) {
    const auto bits = bit_cast<Key>(words[k]);
    return {bits & kSign ? ~bits : bits | kSign, ~static_cast<std::uint32_t>(c)};
  }
  __device__ __forceinline__ int index() const { return static_cast<int>(~behind); }
  __device__ __forceinline__ A logit() const { return bit_cast<A>(key & kSign ? key ^ kSign : ~key); }
  __device__ __forceinline__ LongRank of_warp() const {
    Key most;
    if constexpr (sizeof(Key) == 4)
      most = __reduce_max_sync(0xffffffffu, key);
    else
      most = warp_reduce(key, Larger{});
    return {most, __reduce_max_sync(0xffffffffu, key == most ? behind : 0u)};
  }
  __device__ __forceinline__ bool operator==(const LongRank& other) const {
    return key == other.key && behind == other.behind;
  }
  __device__ __forceinline__ bool operator>(const LongRank& other) const {
    if constexpr (sizeof(Key) == 4)
      return (std::uint64_t{key} << 32 | behind) > (std::uint64_t{other.key} << 32 | other.behind);
    else
      return key > other.key || (key == other.key && behind > other.behind);
  }
  static __device__ __forceinline__ LongRank larger(LongRank a, LongRank b) { return a > b ? a : b; }
  static __device__ __forceinline__ LongRank smaller(LongRank a, LongRank b) { return a > b ? b : a; }
};

// Four ranks, the largest first.
template <class Rank>
struct FourLargest {
  Rank at[4];

  __device__ __forceinline__ void order(int i, int j) {
    const Rank first = Rank::larger(at[i], at[j]);
    at[j] = Rank::smaller(at[i], at[j]);
    at[i] = first;
  }
  __device__ __forceinline__ void sort() {
    order(0, 1), order(2, 3);
    order(0, 2), order(1, 3);
    order(1, 2);
  }
  // The four largest of both.
  __device__ __forceinline__ void merge(const FourLargest& other) {
#pragma unroll
    for (int k = 0; k < 4; ++k) at[k] = Rank::larger(at[k], other.at[3 - k]);
    order(0, 2), order(1, 3);
    order(0, 1), order(2, 3);
  }
  // The same of a warp, in each of its lanes: its largest leaves the lane that has it, one after the other.
  __device__ __forceinline__ void join() {
    FourLargest of_all;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      of_all.at[k] = at[0].of_warp();
      if (at[0] == of_all.at[k]) {
#pragma unroll
        for (int i = 0; i < 3 - k; ++i) at[i] = at[i + 1];
      }
    }
    *this = of_all;
  }
};

template <bool kAligned, class Rank, class S>
__global__ void __launch_bounds__(kMarginThreads) margin_loss_kernel(const MarginCall<S> c) {
  using A = accumulation_t<S>;
  constexpr int V = Words<S>::kSize, kUnroll = sizeof(S) == 4 ? 8 : 4, kSlots = kUnroll * V;
  const int lane = threadIdx.x % 32, vectors = (c.classes + V - 1) / V;
  const std::int64_t warps = std::int64_t{gridDim.x} * (blockDim.x / 32);
  for (std::int64_t row = blockIdx.x * std::int64_t{blockDim.x / 32} + threadIdx.x / 32; row < c.rows; row += warps) {
    const S* const z = c.logits + row * c.classes;
    S* const slopes = c.slopes + row * c.classes;
    const Words<S> none = words_of<S>(-Limits<A>::largest * A(2));  // behind all classes, whatever their logits
    FourLargest<Rank> largest;
#pragma unroll
    for (int k = 0; k < 4; ++k) largest.at[k] = Rank::of(none, 0, vectors * V + k);
    bool has_nan = false;
    for (int begin = 0; begin < vectors; begin += 32 * kUnroll) {
      const int first = begin + lane;
      Words<S> words[kUnroll];
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        const int v = first + 32 * i;
        words[i] = none;
        if constexpr (kAligned) {
          if (v < vectors) words[i] = load_words<true>(z + v * V);
        } else {
          if (v < vectors) words[i] = load_some_words(z + v * V, c.classes - v * V, none);
        }
      }
#pragma unroll
      for (int s = 0; s < kSlots; s += 4) {
        FourLargest<Rank> four;
        A value[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int i = (s + k) / V, j = (s + k) % V;
          four.at[k] = Rank::of(words[i], j, (first + 32 * i) * V + j);
          value[k] = words[i][j];
        }
        has_nan |= std::isunordered(value[0], value[1]) | std::isunordered(value[2], value[3]);
        four.sort();
        largest.merge(four);
      }
    }
    largest.join();
    Leaders<A, int> best;
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (largest.at[k].index() < c.classes)
        best.value[k] = largest.at[k].logit(), best.index[k] = largest.at[k].index();
    A poison = __any_sync(0xffffffffu, has_nan) ? A(NAN) : A(0);
    const std::int64_t target = c.target[row], towards = c.towards ? c.towards[row] : 0;
    const bool exist = target >= 0 && target < c.classes && towards >= 0 && towards < c.classes;
    const int y = exist ? static_cast<int>(target) : -1;
    const int o = exist && c.towards ? static_cast<int>(towards) : (best.index[0] == y ? best.index[1] : best.index[0]);
    if (!exist || o < 0) poison = A(NAN);
    const bool known = y >= 0 && o >= 0;
    const MarginSlopes<A, int> s(c.kind, best, y, known ? load(z[y]) : A(0), o, known ? load(z[o]) : A(0),
                                 c.towards != nullptr);
    if (lane == 0) c.loss[row] = s.loss + poison;
    A rest[V];
#pragma unroll
    for (int k = 0; k < V; ++k) rest[k] = poison;
    const Words<S> rest_words = Words<S>::of(rest);
#pragma unroll 1
    for (int first = lane; first < vectors; first += 32 * kUnroll) {
      S* const to = slopes + first * V;
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        const int v = first + 32 * i;
        if constexpr (kAligned) {
          if (v < vectors) store_words<true>(to + 32 * i * V, rest_words);
        } else {
          store_some_words(to + 32 * i * V, rest_words, c.classes - v * V);
        }
      }
    }
    __syncwarp();  // what follows overwrites some of them
    const int places[5] = {s.other, s.own, s.top_index, s.third_index, s.fourth_index};
    if (lane == 0)
      for (const int place : places)
        if (place >= 0) slopes[place] = store<S>(s.at(place) + poison);
    __syncwarp();
  }
}

template <class S>
struct MarginBackwardCall {
  using A = accumulation_t<S>;
  std::int64_t elements, classes;
  const A* grad;  // [rows]
  const S* slopes;
  S* result;
};

// A vector a thread; without kAligned an element.
template <bool kAligned, class S>
__global__ void __launch_bounds__(256) margin_loss_backward_kernel(const MarginBackwardCall<S> c, Divisor by_classes) {
  using A = accumulation_t<S>;
  constexpr int V = kAligned ? Words<S>::kSize : 1;
  const std::int64_t step = std::int64_t{gridDim.x} * blockDim.x * V;
  for (std::int64_t j = (blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x) * V; j < c.elements; j += step) {
    const std::int64_t row =
        c.elements <= 2147483647 ? by_classes.quotient(static_cast<std::uint32_t>(j)) : j / c.classes;
    if constexpr (kAligned) {
      const Words<S> words = load_words<true>(c.slopes + j);
      const A grad = c.grad[row];
      A result[V];
#pragma unroll
      for (int k = 0; k < V; ++k) result[k] = grad * words[k];
      store_words<true>(c.result + j, Words<S>::of(result));
    } else {
      c.result[j] = store<S>(c.grad[row] * load(c.slopes[j]));
    }
  }
}

template <class Rank, class S>
cudaError_t launch_margin_loss_with(const MarginCall<S>& c, cudaStream_t stream) {
  constexpr std::int64_t rows = kMarginThreads / 32;
  const bool whole = aligned<S>(c.classes, c.logits, static_cast<const S*>(c.slopes));
  return launch(whole ? margin_loss_kernel<true, Rank, S> : margin_loss_kernel<false, Rank, S>,
                grid_for((c.rows + rows - 1) / rows), dim3(kMarginThreads), 0, stream, c);
}

template <class S>
cudaError_t launch_margin_loss(const MarginCall<S>& c, cudaStream_t stream) {
  if constexpr (sizeof(S) == 2)
    if (c.classes <= ShortRank<S>::kMostClasses) return launch_margin_loss_with<ShortRank<S>>(c, stream);
  return launch_margin_loss_with<LongRank<S>>(c, stream);
}

template <class S>
cudaError_t launch_margin_loss_backward(const MarginBackwardCall<S>& c, cudaStream_t stream) {
  const bool whole = aligned<S>(c.classes, c.slopes, static_cast<const S*>(c.result));
  const std::int64_t per_block = 256 * (whole ? Words<S>::kSize : 1);
  return launch(whole ? margin_loss_backward_kernel<true, S> : margin_loss_backward_kernel<false, S>,
                grid_for((c.elements + per_block - 1) / per_block), dim3(256), 0, stream, c,
                Divisor(c.classes > 0 && c.classes <= 2147483647 ? c.classes : 1));
}

}  // namespace rk::cuda
