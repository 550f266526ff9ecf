// The kernels of attack_step.  Formulas: math/attack_step.h.
//
// linf: adversary, x and grad are read once, adversary written once, a vector a thread.  l2 and l1: a block holds a row
// in registers.  Longer rows: l2 twice through a queue of chunks (row_queue.cuh), the second time from the L2 cache; l1
// sweeps the row.
#pragma once

#include <cstdint>
#include <cstring>

#include "../math/fixed.h"
#include "../math/row_norm.h"
#include "attack.cuh"
#include "held.cuh"
#include "reduce.cuh"
#include "row_queue.cuh"

namespace rk::cuda {

template <class S>
struct AttackStepCall {
  using A = accumulation_t<S>;
  std::int64_t rows;
  std::uint32_t columns;
  S* adversary;
  const S *x, *grad;  // grad null: projection only
  ColumnTable<A> eps, step;
  const A* scale;  // [rows] or null
  std::int64_t coordinates;
  std::uint32_t* queue;  // [RowQueue::words(rows)], for l2 where rows are long
  A* partial;            // [rows, chunks, warps of a block, 3], likewise
  L2Step<A>* steps;      // [rows], likewise
  bool aligned;          // all rows of all three

  __device__ __forceinline__ A scale_of(std::int64_t row) const { return scale ? scale[row] : A(1); }
};

template <bool kAligned, class S>
__global__ void __launch_bounds__(256)
    attack_step_linf_kernel(const AttackStepCall<S> c, const Slabs slabs, const Divisor by_columns) {
  using A = accumulation_t<S>;
  constexpr int V = kAligned ? Words<S>::kSize : 1;
  const std::uint32_t j = (blockIdx.x * 256 + threadIdx.x) * V;
  if (j >= slabs.rows_here() * c.columns) return;
  const std::int64_t at = slabs.first_row() * c.columns + j;
  A a[Words<S>::kSize], x[Words<S>::kSize], g[Words<S>::kSize];
  if constexpr (kAligned) {
    const Words<S> a_words = load_words<true>(c.adversary + at), x_words = load_words<true>(c.x + at);
    Words<S> g_words = {make_uint4(0, 0, 0, 0)};
    if (c.grad) g_words = load_words<true>(c.grad + at);
#pragma unroll
    for (int k = 0; k < V; ++k) a[k] = a_words[k], x[k] = x_words[k], g[k] = g_words[k];
  } else {
    a[0] = load(c.adversary[at]), x[0] = load(c.x[at]), g[0] = c.grad ? load(c.grad[at]) : A(0);
  }
  const auto move = [&](int k, A eps, A step) {
    a[k] = linf_step(a[k], g[k], step, stored_ends<S>(linf_interval(x[k], eps)));
  };
  const std::uint32_t row = by_columns.quotient(j), column = j - row * c.columns;
  auto eps = c.eps.at(column), step = c.step.at(column);
  const A scale = c.scale_of(slabs.first_row() + row);
  if (eps.left >= V && step.left >= V) {  // a number for all of them
    const A eps_here = eps.next(), step_here = step.next() * scale;
#pragma unroll
    for (int k = 0; k < V; ++k) move(k, eps_here, step_here);
  } else {
    A eps_of[V], step_of[V];
    eps.fill(eps_of);
    step.fill(step_of);
#pragma unroll
    for (int k = 0; k < V; ++k) move(k, eps_of[k], step_of[k] * scale);
  }
  if constexpr (kAligned)
    store_words<true>(c.adversary + at, Words<S>::of(a));
  else
    c.adversary[at] = store<S>(a[0]);
}

// A tile of a row of adversary, x and grad in a block's registers.
template <class S, int kVectorsOfEach = 2, unsigned kThreads = 0>
struct AttackTile {
  using A = accumulation_t<S>;
  static constexpr int kVectors = kVectorsOfEach, V = Words<S>::kSize;
  static constexpr unsigned kMostThreads = 512;
  Held<S, kVectors, kThreads> adversary, x, grad;

  __device__ __forceinline__ void load(const AttackStepCall<S>& c, std::int64_t begin, std::uint32_t count) {
    adversary.load(c.adversary + begin, count, c.aligned);
    x.load(c.x + begin, count, c.aligned);
    if (c.grad)
      grad.load(c.grad + begin, count, c.aligned);
    else
      grad.zero();
  }
  // f(adversary, x, grad); beyond the row's end all are 0.
  template <class F>
  __device__ __forceinline__ void each(const F& f) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
#pragma unroll
      for (int k = 0; k < V; ++k) f(adversary.words[i][k], x.words[i][k], grad.words[i][k]);
  }
  // adversary = f(adversary, x, grad), rounded towards x.
  template <class F>
  __device__ __forceinline__ void rewrite(const AttackStepCall<S>& c, std::int64_t begin, std::uint32_t count,
                                          const F& f) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      A to[V], clean[V];
#pragma unroll
      for (int k = 0; k < V; ++k) {
        clean[k] = x.words[i][k];
        to[k] = f(adversary.words[i][k], clean[k], grad.words[i][k]);
      }
      adversary.words[i] = words_towards<S>(to, clean);
    }
    adversary.store(c.adversary + begin, count, c.aligned);
  }
  __device__ __forceinline__ void begin_pass() {
    adversary.begin_pass();
    x.begin_pass();
    grad.begin_pass();
  }
};

// A whole row: one tile, loaded once, or (kTiles) several, loaded whenever they are wanted.
template <bool kTiles, class S, int kVectors = 2>
struct AttackRow {
  using A = accumulation_t<S>;
  using Tile = AttackTile<S, kVectors>;
  const AttackStepCall<S>& c;
  std::int64_t begin;
  Tile tile;

  __device__ __forceinline__ AttackRow(const AttackStepCall<S>& call, std::int64_t row)
      : c(call), begin(row * call.columns) {
    if constexpr (!kTiles) tile.load(c, begin, c.columns);
  }
  template <class F>
  __device__ __forceinline__ void each_tile(const F& f) {
    if constexpr (kTiles) {
      const std::uint32_t step = blockDim.x * Tile::kVectors * Tile::V;
      for (std::uint32_t at = 0; at < c.columns; at += step) {
        const std::uint32_t left = c.columns - at, count = left < step ? left : step;
        tile.load(c, begin + at, count);
        f(begin + at, count);
      }
    } else {
      tile.begin_pass();
      f(begin, c.columns);
    }
  }
  // The sums over the row that f(sums, adversary, x, grad) adds to, in every thread.
  template <int kCount, class Total, class F>
  __device__ __forceinline__ void sum(Total (&total)[kCount], const F& f) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) total[i] = 0;
    each_tile([&](std::int64_t, std::uint32_t) {
      Total part[kCount] = {};
      tile.each([&](A a, A x, A g) { f(part, a, x, g); });
#pragma unroll
      for (int i = 0; i < kCount; ++i) total[i] += part[i];
    });
    block_sums(total);
  }
  // The same in the first pass over a row of one tile.
  template <int kCount, class F>
  __device__ __forceinline__ void sum_first(A (&total)[kCount], const F& f) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) total[i] = 0;
    tile.each([&](A a, A x, A g) { f(total, a, x, g); });
    block_sums(total);
  }
  template <class F>  // f(adversary, x, grad) >= 0
  __device__ __forceinline__ A largest(const F& f) {
    A most = A(0);
    each_tile([&](std::int64_t, std::uint32_t) {
      tile.each([&](A a, A x, A g) {
        const A size = f(a, x, g);
        most = size > most ? size : most;
      });
    });
    return block_max(most, A(0));
  }
  template <class F>
  __device__ __forceinline__ void rewrite(const F& f) {
    each_tile([&](std::int64_t at, std::uint32_t count) { tile.rewrite(c, at, count, f); });
  }
};

template <class A>
__device__ __forceinline__ void add_l2(A (&s)[3], A adversary, A x, A grad) {
  const A d = adversary - x, g = without_nan(grad);
  s[0] = fused(g, g, s[0]);
  s[1] = fused(g, d, s[1]);
  s[2] = fused(d, d, s[2]);
}

// Whether no square of a gradient vanished or left the range.
template <class S>
__device__ __forceinline__ bool l2_in_range(const AttackStepCall<S>& c, const accumulation_t<S> (&s)[3]) {
  using A = accumulation_t<S>;
  return (!c.grad || in_safe_range(s[0], A(c.columns))) && s[0] <= Limits<A>::largest && s[2] <= Limits<A>::largest;
}

template <class S, class T>
__device__ __forceinline__ L2Step<accumulation_t<S>> l2_step_of(const AttackStepCall<S>& c, std::int64_t row,
                                                                const T (&s)[3], T scale_of_g) {
  return {L2SumsIn<T>{s[0], s[1], s[2]}, T(c.step.number[0]) * T(c.scale_of(row)), T(c.eps.number[0]), scale_of_g};
}

// The same for the few rows whose squares need more room: in double, and with the gradient scaled where that is not
// enough.
template <class S, class Row>
__device__ __forceinline__ L2Step<accumulation_t<S>> l2_step_in_double(const AttackStepCall<S>& c, std::int64_t row,
                                                                       Row& r) {
  using A = accumulation_t<S>;
  double scale = 1.0;
  if (sizeof(A) == 8) {
    const A largest = r.largest([](A, A, A g) { return absolute(without_nan(g)); });
    if (largest > A(0) && largest <= Limits<A>::largest) scale = 1.0 / double(largest);
  }
  double s[3];
  r.sum(s, [&](double (&part)[3], A a, A x, A grad) {
    const double d = double(a) - double(x), g = double(without_nan(grad)) * scale;
    part[0] += g * g;
    part[1] += g * d;
    part[2] += d * d;
  });
  return l2_step_of(c, row, s, scale);
}

// Vectors of each tensor to a thread, where a block holds a row: more of 16 bits, whose sums take longer to join.
template <class S>
inline constexpr int kL2Vectors = sizeof(S) == 2 ? 4 : 2;

template <class S>
__global__ void __launch_bounds__(1024 / kL2Vectors<S>, sizeof(S) == 8 ? 1 : 2)
    attack_step_l2_kernel(const AttackStepCall<S> c) {
  using A = accumulation_t<S>;
  for (std::int64_t row = blockIdx.x; row < c.rows; row += gridDim.x) {
    AttackRow<false, S, kL2Vectors<S>> r(c, row);
    A s[3];
    r.sum_first(s, [](A(&part)[3], A a, A x, A g) { add_l2(part, a, x, g); });
    L2Step<A> step = l2_step_of(c, row, s, A(1));
    if (!l2_in_range(c, s)) {  // few rows: loaded again, so that the others need not keep theirs meanwhile
      AttackRow<true, S> tiles(c, row);
      step = l2_step_in_double(c, row, tiles);
      r.tile.load(c, r.begin, c.columns);
    }
    r.rewrite([&](A a, A x, A g) { return l2_step(a, x, g, step); });
  }
}

template <class S>
inline constexpr unsigned kQueuedThreads = 1024 / kL2Vectors<S>;
template <class S>
constexpr std::uint32_t kAttackChunk = 1024 * Words<S>::kSize;

template <class S>
__global__ void __launch_bounds__(kQueuedThreads<S>, 2)
    attack_step_l2_queue_kernel(const AttackStepCall<S> c, const RowQueue q) {
  using A = accumulation_t<S>;
  constexpr std::uint32_t kChunk = kAttackChunk<S>;
  constexpr std::uint32_t kWarps = kQueuedThreads<S> / 32;
  AttackTile<S, kL2Vectors<S>, kQueuedThreads<S>> tile;
  const auto first = [&](std::uint32_t row, std::uint32_t chunk) {
    return row * std::int64_t{c.columns} + chunk * kChunk;
  };
  const auto count = [&](std::uint32_t chunk) {
    const std::uint32_t left = c.columns - chunk * kChunk;
    return left < kChunk ? left : kChunk;
  };
  run_queue(
      q,
      [&](std::uint32_t row, std::uint32_t chunk) {
        tile.load(c, first(row, chunk), count(chunk));
        A s[3] = {};
        tile.each([&](A a, A x, A g) { add_l2(s, a, x, g); });
        for (int i = 0; i < 3; ++i) s[i] = warp_sum(s[i]);
        if (threadIdx.x % 32 != 0) return;
        A* const partial = c.partial + (std::int64_t{row * q.chunks + chunk} * kWarps + threadIdx.x / 32) * 3;
        for (int i = 0; i < 3; ++i) partial[i] = s[i];
      },
      [&](std::uint32_t row) {
        A s[3] = {};
        const std::uint32_t parts = q.chunks * kWarps;
        for (std::uint32_t k = threadIdx.x; k < parts; k += blockDim.x)
          for (int i = 0; i < 3; ++i) s[i] += __ldcg(c.partial + (std::int64_t{row} * parts + k) * 3 + i);
        block_sums(s);
        L2Step<A> step = l2_step_of(c, row, s, A(1));
        if (!l2_in_range(c, s)) {
          AttackRow<true, S> r(c, row);
          step = l2_step_in_double(c, row, r);
        }
        if (threadIdx.x == 0) c.steps[row] = step;
      },
      [&](std::uint32_t row, std::uint32_t chunk) { tile.load(c, first(row, chunk), count(chunk)); },
      [&](std::uint32_t row, std::uint32_t chunk) {
        L2Step<A> step;
        step.along = __ldcg(&c.steps[row].along);
        step.shrink = __ldcg(&c.steps[row].shrink);
        tile.rewrite(c, first(row, chunk), count(chunk), [&](A a, A x, A g) { return l2_step(a, x, g, step); });
      });
}

template <class A>
struct BitsOf;
template <>
struct BitsOf<float> {
  using type = std::uint32_t;
  static constexpr int kMantissa = 23;
};
template <>
struct BitsOf<double> {
  using type = std::uint64_t;
  static constexpr int kMantissa = 52;
};

// Of numbers that are not negative, bits are in their order.
template <class A>
__device__ __forceinline__ typename BitsOf<A>::type bits_of(A v) {
  typename BitsOf<A>::type bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}
template <class A>
__device__ __forceinline__ A from_bits(typename BitsOf<A>::type bits) {
  A v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

// The coordinates that share a step in l1: those of this size and more, and how many they are.
template <class A>
struct L1Choice {
  A least;
  std::uint32_t count;
};

// The largest `wanted` positive sizes of a row, by histograms of their bits, counted from the largest down: eight
// octaves at first, then within the bin that holds the one looked for.  Most rows need two.
template <class Row>
__device__ __forceinline__ L1Choice<typename Row::A> l1_choice(Row& r, std::uint32_t wanted) {
  using A = typename Row::A;
  using Bits = typename BitsOf<A>::type;
  constexpr int kLog = 9;
  constexpr unsigned kBins = 1u << kLog;
  __shared__ unsigned bins[kBins];
  __shared__ unsigned shared_bin, shared_above, shared_reached;
  const auto size_of = [](A a, A, A g) { return l1_size(a, g); };
  const A largest = r.largest(size_of);
  Bits high = bits_of(largest), low = 1;  // between which, both included, the one looked for lies
  std::uint32_t above = 0;                // sizes beyond
  int shift = BitsOf<A>::kMantissa - (kLog - 3);
  while (high >= low) {
    for (unsigned b = threadIdx.x; b < kBins; b += blockDim.x) bins[b] = 0;
    __syncthreads();
    r.each_tile([&](std::int64_t, std::uint32_t) {
      r.tile.each([&](A a, A x, A g) {
        const Bits bits = bits_of(size_of(a, x, g)), bin = (high - bits) >> shift;
        if (bits <= high && bits >= low && bin < kBins) atomicAdd(bins + bin, 1u);
      });
    });
    __syncthreads();
    if (threadIdx.x < 32) {
      constexpr unsigned kShare = kBins / 32;
      const unsigned* const mine = bins + threadIdx.x * kShare;
      unsigned total = 0;
      for (unsigned b = 0; b < kShare; ++b) total += mine[b];
      unsigned until = total;  // of this lane's bins and all before
#pragma unroll
      for (unsigned d = 1; d < 32; d *= 2) {
        const unsigned before = __shfl_up_sync(0xffffffffu, until, d);
        if (threadIdx.x >= d) until += before;
      }
      const unsigned reaching = __ballot_sync(0xffffffffu, above + until >= wanted);
      const int finder = reaching ? __ffs(static_cast<int>(reaching)) - 1 : 31;
      if (threadIdx.x == static_cast<unsigned>(finder)) {
        unsigned bin = threadIdx.x * kShare, before = above + until - total;
        if (reaching)
          while (before + bins[bin] < wanted) before += bins[bin++];
        shared_bin = reaching ? bin : kBins;
        shared_above = reaching ? before : above + until;
        shared_reached = reaching ? before + bins[bin] : 0;
      }
    }
    __syncthreads();
    const unsigned bin = shared_bin, reached = shared_reached;
    above = shared_above;
    __syncthreads();  // they and the bins are written again
    const Bits width = Bits(1) << shift;
    if (bin == kBins) {  // none of these bins
      if (high - low < width * kBins) break;
      high -= width * kBins;
      shift = 0;
      while (((high - low) >> shift) >= kBins) ++shift;
    } else {
      high -= width * bin;
      if (high - low >= width) low = high - (width - 1);
      if (reached == wanted || low == high) return {from_bits<A>(low), reached};
      shift = shift > kLog ? shift - kLog : 0;
    }
  }
  return {from_bits<A>(1), above};  // fewer than wanted are free to move
}

// The threshold t of the projection on the ball in l1, by Newton steps from below, halved intervals where they fail, and
// steps of the last place where they end.
template <class Row, class Moved>
__device__ __forceinline__ typename Row::A l1_threshold(Row& r, typename Row::A eps, const Moved& moved) {
  using A = typename Row::A;
  constexpr A tolerance = 4 * Limits<A>::epsilon;
  // How far the row is outside for a threshold, and how many coordinates it would shorten.
  const auto excess_at = [&](A t, A& inside) {
    A s[2];
    r.sum(s, [&](A(&part)[2], A a, A x, A g) {
      const A v = moved(a, g) - x, size = absolute(v) - t, room = l1_room(v, x);
      part[0] += size > A(0) ? (size < room ? size : room) : A(0);
      part[1] += size > A(0) && size < room ? A(1) : A(0);
    });
    inside = s[1];
    return s[0] - eps;
  };
  A low = A(0), inside, excess = excess_at(low, inside);
  if (!(excess > A(0))) return low;
  A high = r.largest([&](A a, A x, A g) { return absolute(moved(a, g) - x); });
  unsigned places = 1;
  for (int trial = 0; trial < 100; ++trial) {
    A t = inside > A(0) ? low + excess / inside : high;
    if (!(t > low)) t = from_bits<A>(bits_of(low) + places), places *= 2;
    if (!(t < high)) t = low + (high - low) / A(2);
    if (!(t > low && t < high)) break;
    A count;
    const A total = excess_at(t, count);
    if (total > A(0)) {
      low = t, excess = total, inside = count;
    } else {
      high = t;
      if (total >= -tolerance * eps) break;
    }
  }
  return high;
}

template <bool kTiles, class S>
__global__ void __launch_bounds__(512, 1) attack_step_l1_kernel(const AttackStepCall<S> c) {
  using A = accumulation_t<S>;
  for (std::int64_t row = blockIdx.x; row < c.rows; row += gridDim.x) {
    AttackRow<kTiles, S> r(c, row);
    L1Choice<A> choice{A(0), 0};
    A step = A(0);
    if (c.grad) {
      const auto wanted = static_cast<std::uint32_t>(c.coordinates < c.columns ? c.coordinates : c.columns);
      choice = l1_choice(r, wanted);
      step = c.step.number[0] * c.scale_of(row) / A(choice.count ? choice.count : 1);
    }
    const auto moved = [&](A a, A g) { return c.grad ? l1_moved(a, g, choice.least, step) : a; };
    const A t = l1_threshold(r, c.eps.number[0], moved);
    r.rewrite([&](A a, A x, A g) { return l1_point(moved(a, g), x, t); });
  }
}

// How a row of l1 or l2 is shared.
template <class S>
struct AttackRows {
  unsigned threads;
  std::int64_t chunks;  // 1: one block holds the row

  explicit AttackRows(std::int64_t columns) {
    constexpr unsigned most = AttackTile<S>::kMostThreads;
    threads = threads_to_hold<S, AttackTile<S>::kVectors>(columns, most);
    const bool held = columns <= std::int64_t{most} * AttackTile<S>::kVectors * Words<S>::kSize;
    chunks = held ? 1 : (columns + kAttackChunk<S> - 1) / kAttackChunk<S>;
  }
};

// What a call needs of memory: numbers of elements of queue, partial and steps.
template <class S>
struct AttackWorkspace {
  std::int64_t queue = 0, partial = 0, steps = 0;

  AttackWorkspace(Ball ball, std::int64_t rows, std::int64_t columns) {
    const std::int64_t chunks = AttackRows<S>(columns).chunks;
    if (ball != Ball::kL2 || chunks == 1) return;
    queue = RowQueue::words(rows);
    partial = rows * chunks * (kQueuedThreads<S> / 32) * 3;
    steps = rows * 2;
  }
};

template <class S>
cudaError_t launch_attack_step_linf(const AttackStepCall<S>& c, cudaStream_t stream) {
  const Slabs slabs(c.rows, c.columns);
  const std::int64_t per_block = 256 * (c.aligned ? Words<S>::kSize : 1);
  const dim3 grid(static_cast<unsigned>((slabs.most_elements() + per_block - 1) / per_block),
                  static_cast<unsigned>(slabs.count()));
  return launch(c.aligned ? attack_step_linf_kernel<true, S> : attack_step_linf_kernel<false, S>, grid, dim3(256), 0,
                stream, c, slabs, Divisor(c.columns));
}

template <class S>
cudaError_t launch_attack_step_l2(const AttackStepCall<S>& c, cudaStream_t stream) {
  const AttackRows<S> rows(c.columns);
  if (rows.chunks == 1) {
    const dim3 block(threads_to_hold<S, kL2Vectors<S>>(c.columns, 1024 / kL2Vectors<S>));
    return launch(attack_step_l2_kernel<S>, grid_for(c.rows), block, 0, stream, c);
  }
  const RowQueue queue(c.rows, rows.chunks, RowQueue::group_of(3 * std::int64_t{c.columns} * sizeof(S)), c.queue);
  const cudaError_t status = clear_queue(c.queue, c.rows, stream);
  if (status != cudaSuccess) return status;
  return launch(attack_step_l2_queue_kernel<S>, queue_grid(queue), dim3(kQueuedThreads<S>), 0, stream, c, queue);
}

template <class S>
cudaError_t launch_attack_step_l1(const AttackStepCall<S>& c, cudaStream_t stream) {
  const AttackRows<S> rows(c.columns);
  return launch(rows.chunks == 1 ? attack_step_l1_kernel<false, S> : attack_step_l1_kernel<true, S>, grid_for(c.rows),
                dim3(rows.threads), 0, stream, c);
}

template <class S>
cudaError_t launch_attack_step(Ball ball, AttackStepCall<S> c, cudaStream_t stream) {
  if (c.rows == 0 || c.columns == 0) return cudaSuccess;
  c.aligned = aligned<S>(c.columns, static_cast<const S*>(c.adversary), c.x, c.grad);
  switch (ball) {
    case Ball::kLinf: return launch_attack_step_linf(c, stream);
    case Ball::kL2: return launch_attack_step_l2(c, stream);
    default: return launch_attack_step_l1(c, stream);
  }
}

}  // namespace rk::cuda
