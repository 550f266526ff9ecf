// Tiles of attention's matrices in shared memory, and products of them: a warp has 16 rows of its block's and meets 16
// columns at a time.
//
// Scores and results lie in registers as mma.cuh says of D: with g = lane / 4 and t = lane % 4, a thread has rows g and
// g + 8, and of each 8 columns those from 2t on.  16-bit numbers are multiplied by the tensor cores; float and double by
// plain multiply-adds on the same layout, which have nothing to be rounded to.
#pragma once

#include <cstdint>
#include <type_traits>

#include "mma.cuh"
#include "words.cuh"

namespace rk::cuda {

// How many rows of what there are, at most 2^30, and who sees whom.
struct AttentionSizes {
  int batch, heads, key_heads, queries, keys;
  bool causal;

  // How many keys the queries up to this one see.
  __device__ __forceinline__ int keys_seen(int query) const { return causal && query + 1 < keys ? query + 1 : keys; }
};

// One matrix of rows with adjacent columns.
template <class S>
struct Matrix {
  S* data;
  int stride;  // from row to row, in elements
  int rows, columns;
};

// [B, H, rows, columns]: a matrix for each head.
template <class S>
struct Heads {
  Matrix<S> first;
  std::int64_t batch, head;  // strides, in elements

  __host__ __device__ __forceinline__ explicit operator bool() const { return first.data != nullptr; }
  __device__ __forceinline__ Matrix<S> of(int b, int h) const {
    Matrix<S> m = first;
    m.data += b * batch + h * head;
    return m;
  }
};

// Tiles of matrices with up to kSize columns, which are at most 256 bytes: then blocks fit the shared memory of every GPU
// since sm_80.
template <class S, int kSize>
struct TileShape {
  static constexpr int kBytes = kSize * static_cast<int>(sizeof(S));  // of a row
  static_assert(kBytes <= 256);
  static constexpr int kThreads = 128;
  static constexpr int kRows = kThreads / 32 * 16;          // of what a block stays with
  static constexpr int kColumns = kBytes <= 128 ? 32 : 16;  // of what passes by
  static constexpr int kStages = 2;                         // tiles of those at a time
  static constexpr int kStride = kSize + 16 / sizeof(S);    // 8 rows at one column lie in different banks
  static constexpr int kRowTile = kRows * kStride;          // elements
  static constexpr int kColumnTile = kColumns * kStride;
  static constexpr int kBlocks = sizeof(S) > 2 ? 1 : kBytes <= 128 ? 3 : 2;  // on an SM, for rows of q
  static constexpr bool kHeld = sizeof(S) == 2 && kBytes <= 128;             // a warp's rows, in registers
};

// Rows `first` and on of a matrix, in shared memory after the next arrival(); zeros where there are none.  The work of so
// many threads: of the block's or of a warp's.
template <int kRows, int kSize, class S, int kThreads = TileShape<S, kSize>::kThreads>
class TileCopy {
 public:
  static __device__ __forceinline__ void begin(S* tile, const Matrix<const S>& m, int first, bool aligned) {
    if (kThreads % kVectors != 0 && row() >= kPass) return;
    const S* from = m.data + static_cast<std::int64_t>(first + row()) * m.stride + column();
    S* to = tile + row() * Shape::kStride + column();
    if (aligned)
      copy(to, from, m, m.rows - first);
    else
      copy_elements(to, from, m, m.rows - first);
  }

 private:
  using Shape = TileShape<S, kSize>;
  static constexpr int kVector = 16 / sizeof(S), kVectors = kSize / kVector, kPass = kThreads / kVectors;

  static __device__ __forceinline__ int row() { return threadIdx.x % kThreads / kVectors; }
  static __device__ __forceinline__ int column() { return threadIdx.x % kThreads % kVectors * kVector; }

  static __device__ __forceinline__ void copy(S* to, const S* from, const Matrix<const S>& m, int rows) {
#pragma unroll
    for (int i = 0; i < kRows; i += kPass)
      if (i + kPass <= kRows || i + row() < kRows)
        copy_async_16(to + i * Shape::kStride, from + static_cast<std::int64_t>(i) * m.stride,
                      i + row() < rows && column() < m.columns);
  }
  static __device__ __forceinline__ void copy_elements(S* to, const S* from, const Matrix<const S>& m, int rows) {
#pragma unroll 1
    for (int i = 0; i + row() < kRows; i += kPass)
#pragma unroll 1
      for (int k = 0; k < kVector; ++k)
        to[i * Shape::kStride + k] = i + row() < rows && column() + k < m.columns
                                         ? from[static_cast<std::int64_t>(i) * m.stride + k]
                                         : store<S>(0);
  }
};

// What the block's threads have begun to load is there for all of them.
__device__ __forceinline__ void arrival() {
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
}

// Passes the columns from `begin` to `end` by: load(first, stage) begins to fetch a tile, use(first, stage) works on it
// while the next one is on its way.  The rows that are loaded before arrive with the first tile; then start() is called.
template <class Shape, class Load, class Start, class Use>
__device__ __forceinline__ void for_columns(int begin, int end, const Load& load, const Start& start, const Use& use) {
  if (begin < end) load(begin, 0);
  arrival();
  start();
  int stage = 0;
  for (int first = begin; first < end; first += Shape::kColumns, stage = 1 - stage) {
    if (first + Shape::kColumns < end) load(first + Shape::kColumns, 1 - stage);
    use(first, stage);
    arrival();
  }
}

__device__ __forceinline__ int lane_row() { return threadIdx.x % 32 / 4; }
__device__ __forceinline__ int lane_column() { return threadIdx.x % 4 * 2; }

// 16 x 16 numbers of a warp: x[n][i] stands at row lane_row() + 8 (i / 2), column lane_column() + 8 n + i % 2.
template <class A>
using Scores = A[2][4];

// 16 rows of a tile as the left factor of products: on the tensor cores perhaps in registers.
template <class S, int kSize, bool kHeld = TileShape<S, kSize>::kHeld, bool kTensorCores = sizeof(S) == 2>
class LeftRows {
 public:
  __device__ __forceinline__ void take(const S* rows) { rows_ = rows + lane_row() * kStride; }

  // scores += rows columns^T
  __device__ __forceinline__ void times(Scores<accumulation_t<S>>& scores, const S* columns) const {
    constexpr int kVector = Words<S>::kSize;
    const S* right = columns + lane_column() * kStride;
#pragma unroll 1
    for (int begin = 0; begin < kSize; begin += 16) {  // in parts: rounding grows with the root of both lengths
      Scores<accumulation_t<S>> part = {};
#pragma unroll
      for (int k = begin; k < begin + 16; k += kVector) {
        const Words<S> x[2] = {load_words<true>(rows_ + k), load_words<true>(rows_ + 8 * kStride + k)};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const Words<S> y = load_words<true>(right + (j / 2 * 8 + j % 2) * kStride + k);
#pragma unroll
          for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int v = 0; v < kVector; ++v) {
              auto& sum = part[j / 2][2 * i + j % 2];
              sum = ::fma(x[i][v], y[v], sum);
            }
        }
      }
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[n][i] += part[n][i];
    }
  }

  // Two such products with the same columns.
  static __device__ __forceinline__ void times_both(const LeftRows& one, Scores<accumulation_t<S>>& ones,
                                                    const LeftRows& two, Scores<accumulation_t<S>>& twos,
                                                    const S* columns) {
    one.times(ones, columns);
    two.times(twos, columns);
  }

  // The same, and twos += one others^T.
  static __device__ __forceinline__ void times_crosswise(const LeftRows& one, Scores<accumulation_t<S>>& ones,
                                                         const LeftRows& two, Scores<accumulation_t<S>>& twos,
                                                         const S* columns, const S* others) {
    times_both(one, ones, two, twos, columns);
    one.times(twos, others);
  }

 private:
  static constexpr int kStride = TileShape<S, kSize>::kStride;
  const S* rows_;
};

template <class S, int kSize, bool kHeld>
class LeftRows<S, kSize, kHeld, true> {
 public:
  __device__ __forceinline__ void take(const S* rows) {
    rows_ = rows + threadIdx.x % 16 * kStride + threadIdx.x % 32 / 16 * 8;
    if constexpr (kHeld) {
#pragma unroll
      for (int k = 0; k < kSteps; ++k) ldmatrix_x4(held_[k], rows_ + 16 * k);
    }
  }

  __device__ __forceinline__ void times(Scores<float>& scores, const S* columns) const {
    const S* right = right_factor(columns);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      std::uint32_t x[4], y[4];
      step(k, x);
      ldmatrix_x4(y, right + 16 * k);
      multiply(scores, x, y);
    }
  }

  static __device__ __forceinline__ void times_both(const LeftRows& one, Scores<float>& ones, const LeftRows& two,
                                                    Scores<float>& twos, const S* columns) {
    const S* right = right_factor(columns);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      std::uint32_t x[4], y[4];
      ldmatrix_x4(y, right + 16 * k);
      one.step(k, x);
      multiply(ones, x, y);
      two.step(k, x);
      multiply(twos, x, y);
    }
  }

  static __device__ __forceinline__ void times_crosswise(const LeftRows& one, Scores<float>& ones, const LeftRows& two,
                                                         Scores<float>& twos, const S* columns, const S* others) {
    const S *right = right_factor(columns), *other = right_factor(others);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      std::uint32_t x[4], y[4], z[4];
      ldmatrix_x4(y, right + 16 * k);
      ldmatrix_x4(z, other + 16 * k);
      one.step(k, x);
      multiply(ones, x, y);
      multiply(twos, x, z);
      two.step(k, x);
      multiply(twos, x, y);
    }
  }

 private:
  static constexpr int kStride = TileShape<S, kSize>::kStride, kSteps = kSize / 16;

  // Where a lane's row lies for the matrices (columns 0 to 7, numbers 0 to 7), (the same, 8 to 15), (8 to 15, 0 to 7)...
  static __device__ __forceinline__ const S* right_factor(const S* columns) {
    return columns + (threadIdx.x % 8 + threadIdx.x % 32 / 16 * 8) * kStride + threadIdx.x % 16 / 8 * 8;
  }
  static __device__ __forceinline__ void multiply(Scores<float>& scores, const std::uint32_t (&x)[4],
                                                  const std::uint32_t (&y)[4]) {
    mma_16816<S>(scores[0], x, {y[0], y[1]});
    mma_16816<S>(scores[1], x, {y[2], y[3]});
  }
  __device__ __forceinline__ void step(int k, std::uint32_t (&x)[4]) const {
    if constexpr (kHeld) {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = held_[k][i];
    } else {
      ldmatrix_x4(x, rows_ + 16 * k);
    }
  }

  const S* rows_;
  std::uint32_t held_[kHeld ? kSteps : 1][4];
};

// 16 rows of a result: sum[n][i] stands at row lane_row() + 8 (i / 2), column lane_column() + 8 n + i % 2.
template <class S, int kSize>
struct RowSums {
  using A = accumulation_t<S>;
  A sum[kSize / 8][4] = {};

  // += weights columns, where weights is rounded to S, as the tensor cores want it.
  __device__ __forceinline__ void add(const Scores<A>& weights, const S* columns) {
    if constexpr (sizeof(S) == 2) {
      std::uint32_t x[4];
      left_factor(x, weights);
      const S* right = right_factor(columns);
#pragma unroll
      for (int n = 0; n < kSize / 8; n += 2) {
        std::uint32_t y[4];
        ldmatrix_x4_transposed(y, right + 8 * n);
        mma_16816<S>(sum[n], x, {y[0], y[1]});
        mma_16816<S>(sum[n + 1], x, {y[2], y[3]});
      }
    } else {
#pragma unroll 1
      for (int k = 0; k < 16; k += kPart) {
        A x[kPart][2];
#pragma unroll
        for (int m = 0; m < kPart; ++m)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int own = 2 * i + m % 2;  // chosen by value, lest weights go to memory
            x[m][i] = __shfl_sync(0xffffffffu, k < 8 ? weights[0][own] : weights[1][own], m / 2, 4);
          }
        const S* right = columns + k * kStride + lane_column();
#pragma unroll
        for (int n = 0; n < kSize / 8; ++n) {
          A part[4] = {};
#pragma unroll
          for (int m = 0; m < kPart; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i) part[i] = ::fma(x[m][i / 2], load(right[m * kStride + 8 * n + i % 2]), part[i]);
#pragma unroll
          for (int i = 0; i < 4; ++i) sum[n][i] += part[i];
        }
      }
    }
  }

  // Two such sums over the same columns.
  static __device__ __forceinline__ void add_both(RowSums& one, const Scores<A>& ones, RowSums& two,
                                                  const Scores<A>& twos, const S* columns) {
    if constexpr (sizeof(S) == 2) {
      std::uint32_t x[2][4];
      left_factor(x[0], ones);
      left_factor(x[1], twos);
      const S* right = right_factor(columns);
#pragma unroll
      for (int n = 0; n < kSize / 8; n += 2) {
        std::uint32_t y[4];
        ldmatrix_x4_transposed(y, right + 8 * n);
        mma_16816<S>(one.sum[n], x[0], {y[0], y[1]});
        mma_16816<S>(one.sum[n + 1], x[0], {y[2], y[3]});
        mma_16816<S>(two.sum[n], x[1], {y[0], y[1]});
        mma_16816<S>(two.sum[n + 1], x[1], {y[2], y[3]});
      }
    } else {
      one.add(ones, columns);
      two.add(twos, columns);
    }
  }

  __device__ __forceinline__ void scale_row(int i, A factor) {
#pragma unroll
    for (int n = 0; n < kSize / 8; ++n)
#pragma unroll
      for (int j = 2 * i; j < 2 * i + 2; ++j) sum[n][j] *= factor;
  }

  // factor * sum into rows `first` and on of a matrix.
  __device__ __forceinline__ void write(const Matrix<S>& m, int first, A factor, bool aligned) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = first + lane_row() + 8 * i;
      if (row >= m.rows) continue;
      S* to = m.data + static_cast<std::int64_t>(row) * m.stride + lane_column();
#pragma unroll
      for (int n = 0; n < kSize / 8; ++n) {
        const int there = m.columns - lane_column() - 8 * n;
        const A v[2] = {factor * sum[n][2 * i], factor * sum[n][2 * i + 1]};
        if constexpr (sizeof(S) == 2) {
          if (aligned) {
            if (there > 0) *reinterpret_cast<std::uint32_t*>(to + 8 * n) = pack<S>(v[0], v[1]);
            continue;
          }
        }
#pragma unroll
        for (int j = 0; j < 2; ++j)
          if (j < there) to[8 * n + j] = store<S>(v[j]);
      }
    }
  }

 private:
  static constexpr int kStride = TileShape<S, kSize>::kStride;
  static constexpr int kPart = 8;

  static __device__ __forceinline__ void left_factor(std::uint32_t (&x)[4], const Scores<A>& weights) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = pack<S>(weights[i / 2][i % 2 * 2], weights[i / 2][i % 2 * 2 + 1]);
  }
  static __device__ __forceinline__ const S* right_factor(const S* columns) {
    return columns + threadIdx.x % 16 * kStride + threadIdx.x % 32 / 16 * 8;
  }
};

// Over the four threads that share rows.
template <class A>
__device__ __forceinline__ A row_sum(A v) {
  v += __shfl_xor_sync(0xffffffffu, v, 1);
  return v + __shfl_xor_sync(0xffffffffu, v, 2);
}

template <class A>
__device__ __forceinline__ A row_max(A v) {
  v = ::max(v, __shfl_xor_sync(0xffffffffu, v, 1));
  return ::max(v, __shfl_xor_sync(0xffffffffu, v, 2));
}

// S and logsumexp of 16-bit numbers are to base 2, which saves products; the others would notice its rounding.
template <class S>
constexpr accumulation_t<S> kPerNat = sizeof(S) == 2 ? kLog2E<accumulation_t<S>> : 1;

template <class S>
__device__ __forceinline__ accumulation_t<S> power_of_base(accumulation_t<S> v) {
  return sizeof(S) == 2 ? exp2_nonpositive(v) : exp_nonpositive(v);
}

// Which rows a block stays with.
struct AttentionUnit {
  int batch, head, first;

  // The last rows first: under a causal mask they have most to do.
  __device__ __forceinline__ AttentionUnit(int heads, int rows, int tile_rows) {
    const unsigned tiles = (rows + tile_rows - 1) / tile_rows, unit = blockIdx.x;
    first = static_cast<int>(tiles - 1 - unit % tiles) * tile_rows;
    head = static_cast<int>(unit / tiles % heads);
    batch = static_cast<int>(unit / tiles / heads);
  }
};

// The longest rows of q and v that kernels of these numbers take.
template <class S>
constexpr int kLargestHead = 256 / sizeof(S);

// Calls f with the size of a kernel's rows, in which those of q and v are padded with zeros.
template <class S, class F>
cudaError_t visit_head_size(int key_size, int value_size, const F& f) {
  const int size = key_size > value_size ? key_size : value_size;
  if constexpr (sizeof(S) == 2) {
    if (size <= 32) return f(std::integral_constant<int, 32>{});
    if (size <= 64) return f(std::integral_constant<int, 64>{});
    if (size <= 96) return f(std::integral_constant<int, 96>{});
  }
  return f(std::integral_constant<int, kLargestHead<S>>{});
}

// Blocks of a kernel in which one stays with so many of a head's rows.
inline dim3 attention_grid(int heads, int rows, int tile_rows) {
  return dim3(static_cast<unsigned>(heads * ((rows + tile_rows - 1) / tile_rows)));
}

}  // namespace rk::cuda
