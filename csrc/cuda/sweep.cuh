// One pass of a block over adjacent elements: `read` calls a function for each element, `transform` stores what it
// returns.
//
//     read<kAligned>(Inputs{x, y}, n, Counter{}, [&](std::int64_t j, A x, A y) { sum += x * y; });
//     transform<kAligned>(Inputs{x, y}, Outputs{a, b}, n, Counter{},
//                         [&](std::int64_t j, A x, A y) { return Values<A, 2>{{x + y, x - y}}; });
//
// kAligned is chosen on the host: `aligned(stride, pointers...)` of words.cuh for all rows, inputs and outputs.  Rows lie
// where they like then; n is any.  kUnroll vectors of every row are loaded before the first is used: a thread has
// 16 kUnroll bytes of each row in flight.  The last elements of a row, less than a vector, come after the loop, one a
// thread.
//
// A thread gets the same elements in the same order whatever kAligned and kUnroll are: the order of a sum, and every bit
// of it, depends on n and blockDim.x alone.
//
// The cursor's at(j) gives an iterator whose next() is what the function needs to know of elements j, j + 1, ...: an
// index (Counter), a weight.
#pragma once

#include <cstdint>

#include "vector.cuh"
#include "words.cuh"

namespace rk::cuda {

template <class S, int kCount>
struct Inputs {
  const S* row[kCount];
};
template <class S, class... More>
Inputs(const S*, More...) -> Inputs<S, 1 + sizeof...(More)>;

template <class S, int kCount>
struct Outputs {
  S* row[kCount];
};
template <class S, class... More>
Outputs(S*, More...) -> Outputs<S, 1 + sizeof...(More)>;

// What a function of `transform` returns for several outputs.
template <class A, int kCount>
struct Values {
  A value[kCount];
};

namespace sweep_detail {

// f(tag, x[0], ..., x[kInputs - 1]), with x(i) the element of row i.
template <class Tag, class F, class X, int... i>
__device__ __forceinline__ auto call(const F& f, const Tag& tag, const X& x, std::integer_sequence<int, i...>) {
  return f(tag, x(i)...);
}

template <int kOutputs, class A>
__device__ __forceinline__ Values<A, 1> values_of(A v) {
  static_assert(kOutputs == 1);
  return {{v}};
}
template <int kOutputs, class A>
__device__ __forceinline__ Values<A, kOutputs> values_of(const Values<A, kOutputs>& v) {
  return v;
}

// The vectors that have been loaded from vector v on, one from each row.
template <bool kAligned, int kOutputs, int kInputs, class S, class Cursor, class F>
__device__ __forceinline__ void use(const Words<S> (&x)[kInputs], const Outputs<S, (kOutputs ? kOutputs : 1)>& out,
                                    std::int64_t v, const Cursor& cursor, const F& f) {
  using A = accumulation_t<S>;
  constexpr int V = Words<S>::kSize;
  auto tags = cursor.at(v * V);
  [[maybe_unused]] A results[kOutputs ? kOutputs : 1][V];
#pragma unroll
  for (int k = 0; k < V; ++k) {
    const auto element = [&](int i) { return x[i][k]; };
    if constexpr (kOutputs == 0) {
      call(f, tags.next(), element, std::make_integer_sequence<int, kInputs>{});
    } else {
      const auto y = values_of<kOutputs>(call(f, tags.next(), element, std::make_integer_sequence<int, kInputs>{}));
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) results[o][k] = y.value[o];
    }
  }
  if constexpr (kOutputs != 0) {
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) store_words<kAligned>(out.row[o] + v * V, Words<S>::of(results[o]));
  }
}

template <bool kAligned, int kUnroll, int kOutputs, int kInputs, class S, class Cursor, class F>
__device__ __forceinline__ void sweep(const Inputs<S, kInputs>& in, const Outputs<S, (kOutputs ? kOutputs : 1)>& out,
                                      std::int64_t n, const Cursor& cursor, const F& f) {
  constexpr int V = Words<S>::kSize;
  const std::int64_t vectors = n / V;
  const unsigned threads = blockDim.x;
  std::int64_t v = threadIdx.x;
  if constexpr (kUnroll > 1) {
    for (; v + std::int64_t{kUnroll - 1} * threads < vectors; v += std::int64_t{kUnroll} * threads) {
      Words<S> x[kUnroll][kInputs];
#pragma unroll
      for (int i = 0; i < kUnroll; ++i)
#pragma unroll
        for (int r = 0; r < kInputs; ++r)
          x[i][r] = load_words<kAligned>(in.row[r] + (v + i * std::int64_t{threads}) * V);
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) use<kAligned, kOutputs>(x[i], out, v + i * std::int64_t{threads}, cursor, f);
    }
  }
#pragma unroll 1
  for (; v < vectors; v += threads) {
    Words<S> x[kInputs];
#pragma unroll
    for (int r = 0; r < kInputs; ++r) x[r] = load_words<kAligned>(in.row[r] + v * V);
    use<kAligned, kOutputs>(x, out, v, cursor, f);
  }
  for (std::int64_t j = vectors * V + threadIdx.x; j < n; j += threads) {
    auto tags = cursor.at(j);
    const auto element = [&](int i) { return load(in.row[i][j]); };
    if constexpr (kOutputs == 0) {
      call(f, tags.next(), element, std::make_integer_sequence<int, kInputs>{});
    } else {
      const auto y = values_of<kOutputs>(call(f, tags.next(), element, std::make_integer_sequence<int, kInputs>{}));
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) out.row[o][j] = store<S>(y.value[o]);
    }
  }
}

}  // namespace sweep_detail

template <bool kAligned, int kUnroll = 4, class S, int kInputs, class Cursor, class F>
__device__ __forceinline__ void read(const Inputs<S, kInputs>& in, std::int64_t n, const Cursor& cursor, const F& f) {
  sweep_detail::sweep<kAligned, kUnroll, 0>(in, Outputs<S, 1>{}, n, cursor, f);
}

// An output may be one of the inputs.
template <bool kAligned, int kUnroll = 2, class S, int kInputs, int kOutputs, class Cursor, class F>
__device__ __forceinline__ void transform(const Inputs<S, kInputs>& in, const Outputs<S, kOutputs>& out, std::int64_t n,
                                          const Cursor& cursor, const F& f) {
  sweep_detail::sweep<kAligned, kUnroll, kOutputs>(in, out, n, cursor, f);
}

}  // namespace rk::cuda
