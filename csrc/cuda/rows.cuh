// Rows that a block, or one warp of a block, works on alone, in rounds that stay in registers.
//
// A round of a row are kVectors 16-byte vectors to each thread, from every input, and all are loaded before the first is
// used.  A warp's vectors lie together, so that a thread's are 512 bytes apart: a constant.  A kernel that needs its row
// twice goes over the rounds from the last to the first, and back: the round that the first sweep ends with need not be
// loaded again, nor those that shared memory keeps (KeptRounds), and the others are those that the caches have seen last.
// A row of one round is read once.
//
// Where a thread has less than its share, `other` stands in the place of what is missing: a number that changes no sum and
// no maximum.  So it makes no difference to any bit where a row's tensors begin, and which threads have less to do.
#pragma once

#include <cstdint>

#include "reduce.cuh"
#include "words.cuh"

namespace rk::cuda {

// Which elements are a thread's, and how it loads them.
enum class Layout {
  kVectors,   // whole vectors
  kParts,     // the same, element by element: tensors that do not begin at a multiple of 16 bytes
  kElements,  // rows that are not whole vectors: one element in 32, so that a warp's loads are of adjacent elements
};

template <class S, class... Pointers>
Layout layout_of_rows(std::int64_t columns, std::int64_t stride, const Pointers*... pointers) {
  if (columns % Words<S>::kSize != 0) return Layout::kElements;
  return aligned<S>(stride, pointers...) ? Layout::kVectors : Layout::kParts;
}

// f(std::integral_constant<Layout, ...>); doubles, for which few care, have one piece of code.
template <class S, class F>
cudaError_t with_layout(Layout layout, const F& f) {
  if constexpr (sizeof(S) < 8) {
    if (layout == Layout::kVectors) return f(std::integral_constant<Layout, Layout::kVectors>());
    if (layout == Layout::kElements) return f(std::integral_constant<Layout, Layout::kElements>());
  }
  return f(std::integral_constant<Layout, Layout::kParts>());
}

// Vectors of a round where whole vectors are `vectors`: single elements are that many 32-bit numbers, of any size.
template <Layout kLayout, class S>
constexpr int round_vectors(int vectors) {
  const int narrow = vectors * static_cast<int>(sizeof(S)) / 4;
  return kLayout == Layout::kElements && sizeof(S) == 2 ? (narrow > 1 ? narrow : 1) : vectors;
}

// Threads of a block, at most: half where single elements need more registers, and few where a row is swept once, since
// less is spent on joining them.
template <Layout kLayout, class S>
inline constexpr int kMostRowThreads = sizeof(S) == 8 || (sizeof(S) == 2 && kLayout == Layout::kElements) ? 512 : 1024;
inline constexpr int kMostThreadsOfOneSweep = 256;

// Rounds of a row, elements of the last, and how many rounds shared memory keeps.
struct RowRounds {
  int all, last, kept = 0;

  // Of so many columns, of which a round takes `together`.
  RowRounds(std::int64_t columns, std::int64_t together)
      : all(static_cast<int>((columns + together - 1) / together)),
        last(static_cast<int>(columns - (all - 1) * together)) {}
};

// A kernel's rows: threads for each, and what shared memory keeps of it.
struct RowsGeometry {
  dim3 grid, block;
  RowRounds rounds;
  std::size_t shared = 0;  // bytes
};

// For a kernel whose round is `vectors` of each of so many tensors to a thread, and which sweeps its rows more than once or
// not.  Many threads to a row, or a warp for each of several; threads depend on the row's length alone.
template <Layout kLayout, class S>
RowsGeometry rows_geometry(std::int64_t rows, std::int64_t columns, int vectors, int tensors, bool swept_again,
                           int most_threads = kMostRowThreads<kLayout, S>) {
  const std::int64_t per_thread = std::int64_t{Words<S>::kSize} * vectors;
  const std::int64_t warps = ((columns + per_thread - 1) / per_thread + 31) / 32;
  // Half a multiprocessor's registers and shared memory, or all where a row does not fit in half.
  constexpr std::int64_t half = 128 << 10;
  const std::int64_t bytes = columns * tensors * static_cast<std::int64_t>(sizeof(S));
  const bool whole = swept_again && sizeof(S) < 8 && bytes > half;
  const std::int64_t most = (whole ? most_threads : swept_again ? 512 : kMostThreadsOfOneSweep) / 32;
  const dim3 block = warps <= 1 ? dim3(32, 4) : dim3(static_cast<unsigned>(32 * (warps < most ? warps : most)));
  RowsGeometry g{grid_for((rows + block.y - 1) / block.y), block, RowRounds(columns, block.x * per_thread)};
  if (!swept_again) return g;
  constexpr std::int64_t sums = 2 << 10;  // of shared memory, what reductions take at most
  const std::int64_t round = std::int64_t{block.x} * vectors * tensors * 16;
  const std::int64_t room = (shared_memory_of_block() / (whole ? 1 : 2) - sums) / round;
  g.rounds.kept = static_cast<int>(room < g.rounds.all - 1 ? room : g.rounds.all - 1);
  g.shared = static_cast<std::size_t>(g.rounds.kept * round);
  return g;
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

// Numbers that came one by one.
template <class S>
struct Loose {
  accumulation_t<S> values[Words<S>::kSize];
  __device__ __forceinline__ accumulation_t<S> operator[](int k) const { return values[k]; }
};

// load_some_words; of 16-bit elements two at a time, since those of several vectors would take more registers than there
// are.
template <class S>
__device__ __forceinline__ Words<S> load_parts(const S* from, int count, const Words<S>& others) {
  if constexpr (sizeof(S) != 2) {
    return load_some_words(from, count, others);
  } else {
    Words<S> result = others;
#pragma unroll 1
    for (int k = 0; k < Words<S>::kSize; k += 2) {
      S pair[2];
      memcpy(static_cast<void*>(pair), &result.raw.x, sizeof(pair));
      if (k < count) pair[0] = from[k];
      if (k + 1 < count) pair[1] = from[k + 1];
      result.raw.x = result.raw.y;
      result.raw.y = result.raw.z;
      result.raw.z = result.raw.w;
      memcpy(&result.raw.w, pair, sizeof(pair));
    }
    return result;
  }
}

// Where one thread's vectors of one round lie in a row.
template <Layout kLayout, class S, int kVectors>
struct Share {
  using A = accumulation_t<S>;
  using Vector = std::conditional_t<kLayout == Layout::kElements, Loose<S>, Words<S>>;
  static constexpr int V = Words<S>::kSize, kCount = kVectors;
  static constexpr int kStep = 32 * V;                                  // elements from one vector to the next
  static constexpr int kApart = kLayout == Layout::kElements ? 32 : 1;  // from one element of a vector to the next
  std::int64_t first;                                                   // element
  int left;  // elements from there to the end of the round or row, if any

  // Of a row that begins at the element `row` of tensors that are given whole.
  __device__ __forceinline__ Share(int round, RowRounds rounds, std::int64_t row = 0) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, all = kVectors * V * blockDim.x;
    const int place = warp * kVectors * kStep + lane * (kLayout == Layout::kElements ? 1 : V);
    first = row + (std::int64_t{round} * all + place);
    left = (round + 1 == rounds.all ? rounds.last : all) - place;
  }

  // The place of element k of vector i, and whether there is one.
  __device__ __forceinline__ std::int64_t element(int i, int k = 0) const { return first + (i * kStep + k * kApart); }
  __device__ __forceinline__ bool has(int i, int k = 0) const {
    return left > i * kStep + (kLayout == Layout::kVectors ? 0 : k * kApart);
  }
  // Whether the warp has nothing from vector i on; asked where half of a large round may be left out.
  __device__ __forceinline__ bool ends_at(int i) const {
    if (kVectors < 8 || i != kVectors / 2) return false;
    return left + static_cast<int>(threadIdx.x % 32) * (kLayout == Layout::kElements ? 1 : V) <= i * kStep;
  }
  // Elements of vector i, and of the round; all are there but in the last of a row.
  __device__ __forceinline__ int count(int i) const {
    const int rest = left - i * kStep;
    if constexpr (kLayout == Layout::kVectors) return rest > 0 ? V : 0;
    const int some = kLayout == Layout::kElements ? (rest + kApart - 1) / kApart : rest;
    return rest <= 0 ? 0 : some < V ? some : V;
  }
  __device__ __forceinline__ int count_all(bool is_last) const {
    if (!is_last) return V * kVectors;
    int total = 0;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) total += count(i);
    return total;
  }
  // Whether element j of the row is one of vector i.
  __device__ __forceinline__ bool contains(int i, std::int64_t j) const {
    const auto away = static_cast<std::uint64_t>(j - first - i * kStep);
    if constexpr (kLayout == Layout::kElements) return away < std::uint64_t{kStep} && away % 32 == 0;
    return away < std::uint64_t{V};
  }

  // Whether vector i is to be looked at, where `load_there` has loaded it: a whole one may be left out.
  __device__ __forceinline__ bool there(int i) const { return kLayout != Layout::kVectors || has(i); }
  // `load`, but that a whole vector that does not exist stays as it is.
  __device__ __forceinline__ void load_there(Vector (&x)[kVectors], const S* row, A other) const {
    if constexpr (kLayout != Layout::kVectors) {
      load(x, row, other);
    } else {
#pragma unroll
      for (int i = 0; i < kVectors; ++i)
        if (has(i)) x[i] = load_words<true>(row + element(i));
    }
  }
  __device__ __forceinline__ void load(Vector (&x)[kVectors], const S* row, A other) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const S* const from = row + element(i);
      if constexpr (kLayout == Layout::kVectors) {
        x[i] = words_of<S>(other);
        if (has(i)) x[i] = load_words<true>(from);
      } else if constexpr (kLayout == Layout::kParts) {
        x[i] = load_parts(from, count(i), words_of<S>(other));
      } else {
        S elements[V];
#pragma unroll
        for (int k = 0; k < V; ++k) elements[k] = has(i, k) ? from[k * kApart] : cuda::store<S>(other);
#pragma unroll
        for (int k = 0; k < V; ++k) x[i].values[k] = cuda::load(elements[k]);
      }
    }
  }
  __device__ __forceinline__ void store(S* row, int i, const A (&values)[V]) const {
    S* const to = row + element(i);
    if constexpr (kLayout == Layout::kVectors) {
      if (has(i)) store_words<true>(to, Words<S>::of(values));
    } else if constexpr (kLayout == Layout::kParts) {
      store_some_words(to, Words<S>::of(values), count(i));
    } else {
      S elements[V];
      const Words<S> words = Words<S>::of(values);  // rounded before it is known who stores what: no branches
      memcpy(static_cast<void*>(elements), &words, sizeof(words));
#pragma unroll
      for (int k = 0; k < V; ++k)
        if (has(i, k)) to[k * kApart] = elements[k];
    }
  }
};

// Rounds 1, 2, ... of a row in shared memory, kWords words of each thread in its own places: what a later sweep need not
// load again.  The caller has round 0 in registers.
template <class S, int kWords>
class KeptRounds {
 public:
  explicit __device__ __forceinline__ KeptRounds(RowRounds rounds) : rounds_(rounds.kept) {
    RK_DYNAMIC_SHARED(uint4, memory);
    mine_ = memory + threadIdx.x;
  }
  __device__ __forceinline__ bool has(int round) const { return round > 0 && round <= rounds_; }
  template <class... Inputs>  // each a round's vectors
  __device__ __forceinline__ void keep(int round, const Inputs&... x) const {
    uint4* to = mine_ + (round - 1) * kWords * blockDim.x;
    (keep_one(to, x), ...);
  }
  template <class... Inputs>
  __device__ __forceinline__ void take(int round, Inputs&... x) const {
    const uint4* from = mine_ + (round - 1) * kWords * blockDim.x;
    (take_one(from, x), ...);
  }

 private:
  uint4* mine_;
  int rounds_;

  static __device__ __forceinline__ uint4 raw(const Words<S>& x) { return x.raw; }
  static __device__ __forceinline__ uint4 raw(const Loose<S>& x) { return Words<S>::of(x.values).raw; }
  static __device__ __forceinline__ void set(Words<S>& x, uint4 raw) { x.raw = raw; }
  static __device__ __forceinline__ void set(Loose<S>& x, uint4 raw) {
    const Words<S> words{raw};
#pragma unroll
    for (int k = 0; k < Words<S>::kSize; ++k) x.values[k] = words[k];
  }
  template <class Vector, int kCount>
  static __device__ __forceinline__ void keep_one(uint4*& to, const Vector (&x)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i, to += blockDim.x) *to = raw(x[i]);
  }
  template <class Vector, int kCount>
  static __device__ __forceinline__ void take_one(const uint4*& from, Vector (&x)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i, from += blockDim.x) set(x[i], *from);
  }
};

}  // namespace rk::cuda
