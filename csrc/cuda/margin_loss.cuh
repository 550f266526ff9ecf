// The kernels of margin_loss.  Formulas: math/margin_loss.h.
//
// A warp to a row, whose logits it reads once, many to a lane; the four largest are taken out one after the other.  Slopes
// are zeros but for five.
#pragma once

#include <cstdint>

#include "../math/margin_loss.h"
#include "divisor.cuh"
#include "reduce.cuh"
#include "words.cuh"

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

// Logits as whole numbers in their order; 0 is none.  Where NaN stands does not matter: it makes its row NaN.
template <class A>
using LogitKey = std::conditional_t<sizeof(A) == 8, std::uint64_t, std::uint32_t>;
template <class A>
__device__ __forceinline__ LogitKey<A> key_of(A logit) {
  constexpr auto sign = LogitKey<A>(1) << (8 * sizeof(A) - 1);
  const auto bits = bit_cast<LogitKey<A>>(logit);
  return bits & sign ? ~bits : bits | sign;
}
template <class A>
__device__ __forceinline__ A logit_of(LogitKey<A> key) {
  constexpr auto sign = LogitKey<A>(1) << (8 * sizeof(A) - 1);
  return bit_cast<A>(key & sign ? key ^ sign : ~key);
}

// The four largest logits of a row and their classes, one in each of the first four lanes.
template <class A>
struct MarginLeaders {
  static constexpr int kNone = 2147483647;
  LogitKey<A> key = 0;
  int index = kNone;

  // Takes the largest of a warp's logits out of `keys`; those of one lane are in the order of their classes, index(s),
  // and behind those met before.
  template <int kSlots, class Index>
  __device__ __forceinline__ void meet(LogitKey<A> (&keys)[kSlots], const Index& index_of) {
    const int lane = threadIdx.x % 32;
    LogitKey<A> top = keys[0];
#pragma unroll
    for (int s = 1; s < kSlots; ++s) top = keys[s] > top ? keys[s] : top;
    if (!__any_sync(0xffffffffu, top > __shfl_sync(0xffffffffu, key, 3))) return;
    MarginLeaders next;
#pragma unroll 1
    for (int place = 0; place < 4; ++place) {
      top = key;
#pragma unroll
      for (int s = 0; s < kSlots; ++s) top = keys[s] > top ? keys[s] : top;
      const LogitKey<A> most = warp_reduce(top, Larger{});
      int mine = kNone;
      if (top == most && most != 0) {
#pragma unroll
        for (int s = kSlots - 1; s >= 0; --s) mine = keys[s] == most ? index_of(s) : mine;
        mine = key == most ? index : mine;
      }
      const int first = -warp_reduce(-mine, Larger{});
      if (mine == first && mine != kNone) {
#pragma unroll
        for (int s = 0; s < kSlots; ++s) keys[s] = index_of(s) == mine ? 0 : keys[s];
        key = index == mine ? 0 : key;
      }
      if (lane == place) next.key = most, next.index = first;
    }
    *this = next;
  }
  __device__ __forceinline__ Leaders<A, int> all() const {
    Leaders<A, int> best;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const LogitKey<A> its = __shfl_sync(0xffffffffu, key, k);
      const int at = __shfl_sync(0xffffffffu, index, k);
      if (its != 0) best.value[k] = logit_of<A>(its), best.index[k] = at;
    }
    return best;
  }
};

template <bool kAligned, class S>
__global__ void __launch_bounds__(kMarginThreads) margin_loss_kernel(const MarginCall<S> c) {
  using A = accumulation_t<S>;
  constexpr int V = Words<S>::kSize, kUnroll = sizeof(S) == 4 ? 8 : 4, kSlots = kUnroll * V;
  const int lane = threadIdx.x % 32, vectors = (c.classes + V - 1) / V;
  const std::int64_t warps = std::int64_t{gridDim.x} * (blockDim.x / 32);
  for (std::int64_t row = blockIdx.x * std::int64_t{blockDim.x / 32} + threadIdx.x / 32; row < c.rows; row += warps) {
    const S* const z = c.logits + row * c.classes;
    S* const slopes = c.slopes + row * c.classes;
    MarginLeaders<A> leaders;
    bool has_nan = false;
    for (int begin = 0; begin < vectors; begin += 32 * kUnroll) {
      const int first = begin + lane;
      Words<S> words[kUnroll] = {};
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        const int v = first + 32 * i;
        if constexpr (kAligned) {
          if (v < vectors) words[i] = load_words<true>(z + v * V);
        } else {
          if (v < vectors) words[i] = load_some_words(z + v * V, c.classes - v * V);
        }
      }
      LogitKey<A> keys[kSlots];
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        const int left = c.classes - (first + 32 * i) * V;
#pragma unroll
        for (int k = 0; k < V; ++k) {
          const A value = words[i][k];
          keys[i * V + k] = left > (kAligned ? 0 : k) ? key_of(value) : 0;
          has_nan |= value != value;
        }
      }
      leaders.meet(keys, [&](int s) { return (first + 32 * (s / V)) * V + s % V; });
    }
    const Leaders<A, int> best = leaders.all();
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
    for (int v = lane; v < vectors; v += 32) {
      if constexpr (kAligned)
        store_words<true>(slopes + v * V, rest_words);
      else
        store_some_words(slopes + v * V, rest_words, c.classes - v * V);
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

template <class S>
cudaError_t launch_margin_loss(const MarginCall<S>& c, cudaStream_t stream) {
  constexpr std::int64_t rows = kMarginThreads / 32;
  const bool whole = aligned<S>(c.classes, c.logits, static_cast<const S*>(c.slopes));
  return launch(whole ? margin_loss_kernel<true, S> : margin_loss_kernel<false, S>,
                grid_for((c.rows + rows - 1) / rows), dim3(kMarginThreads), 0, stream, c);
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
