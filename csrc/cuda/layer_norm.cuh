// Kernels of layer_norm_backward and its derivative, RMSNorm included.  Formulas: math/layer_norm.h.
//
// A team of threads takes a row and keeps it in registers between the sums and the results: device memory is read once.
// A team keeps its columns' parameters too, and the sums down its columns, over the rows of a block's chunk.  At the
// chunk's end the block's teams are added, and another kernel adds the chunks in order: no atomics, the same bits on
// every run.  Several cotangents of one x pass by one after the other, while x and the sum of their grad_x stay.  Rows
// too long for registers: layer_norm_long.cuh.
#pragma once

#include <cstdint>

#include "column_totals.cuh"
#include "layer_norm_long.cuh"
#include "layer_norm_rows.cuh"

namespace rk::cuda {

// What a second backward is given: u alone, a and b too, or several u.
enum class Given { kOne, kAffine, kSeveral };

// A thread's share of its team's rows: kShares vectors, team vectors apart.
template <class W, int kShares>
struct Share {
  using A = typename W::A;
  static constexpr int V = W::kSize;
  int team, index, column, cols;  // index: of the team

  __device__ __forceinline__ Share(int team_size, std::int64_t columns)
      : team(team_size),
        index(threadIdx.x / team_size),
        column(threadIdx.x % team_size * V),
        cols(static_cast<int>(columns)) {}

  __device__ __forceinline__ int teams() const { return kRowThreads / team; }
  __device__ __forceinline__ int at(int i) const { return column + i * team * V; }
  __device__ __forceinline__ bool has(int i) const { return (V > 1 && i < kShares - 1) || at(i) < cols; }

  // Of the row at `from`; zeros in the place of what is not there.
  template <class S>
  __device__ __forceinline__ void read(W (&to)[kShares], const S* from) const {
    from += column;
#pragma unroll
    for (int i = 0; i < kShares; ++i, from += team * V)
      if (has(i))
        to[i] = read_vector<W>(from);
      else
        to[i] = W{};
  }
  __device__ __forceinline__ void read_all_parameters(A (&to)[kShares][V], const A* from, A absent) const {
#pragma unroll
    for (int i = 0; i < kShares; ++i) read_parameters<W>(to[i], from && has(i) ? from + at(i) : nullptr, absent);
  }

  // to[j] = the sum of all teams' sums of column j, by way of `memory`: [teams, cols], shared.
  __device__ __forceinline__ void write_sums(const A (&sums)[kShares][V], A* memory, A* to) const {
    __syncthreads();  // memory may still be read
#pragma unroll
    for (int i = 0; i < kShares; ++i)
      if (has(i))
#pragma unroll
        for (int k = 0; k < V; ++k) memory[index * cols + at(i) + k] = sums[i][k];
    __syncthreads();
    for (int j = threadIdx.x; j < cols; j += kRowThreads) {
      A sum = memory[j];
      for (int i = 1; i < teams(); ++i) sum += memory[i * cols + j];
      to[j] = sum;
    }
  }
};

// f(row, whether it counts) for the rows of a chunk that a team takes; as often in every team, with the chunk's last row
// in the place of those that are not there.
template <class S, class F>
__device__ __forceinline__ void for_chunk_rows(const LayerNormCall<S>& c, std::int64_t chunk, int index, int teams,
                                               const F& f) {
  const std::int64_t first = chunk * c.chunk_rows, rest = c.rows - first;
  const int rows = static_cast<int>(rest < c.chunk_rows ? rest : c.chunk_rows);
  for (int i = index; i - index < rows; i += teams) f(first + (i < rows ? i : rows - 1), i < rows);
}

template <class S, class W, int kShares>
__global__ void __launch_bounds__(kRowThreads, 2) layer_norm_backward_kernel(const LayerNormCall<S> c) {
  using A = accumulation_t<S>;
  constexpr int V = W::kSize;
  RK_DYNAMIC_SHARED(A, memory);
  const Share<W, kShares> share(c.team, c.cols);
  TeamSums<A, SlopeSums<A>::kCount> team(c.team);
  A w[kShares][V];
  share.read_all_parameters(w, c.weight, A(1));
  for (std::int64_t unit = blockIdx.x; unit < c.chunks * c.cotangents; unit += gridDim.x) {
    const std::int64_t chunk = unit / c.cotangents, before = unit % c.cotangents * c.rows;
    A weights[kShares][V] = {}, biases[kShares][V] = {};
    for_chunk_rows(c, chunk, share.index, share.teams(), [&](std::int64_t row, bool counts) {
      const A mean = c.mean ? c.mean[row] : A(0), r = c.rstd[row];
      W x[kShares], g[kShares];
      share.read(x, c.x + row * c.cols);
      share.read(g, c.g + (before + row) * c.cols);
      SlopeSums<A> s;
#pragma unroll
      for (int i = 0; i < kShares; ++i)
#pragma unroll
        for (int k = 0; k < V; ++k) s.add(x[i][k] - mean, g[i][k], w[i][k]);
      team.add_up(s.sums);
      if (!counts) return;
      const NormSlopes<A> d = s.slopes(c.mean, r, c.average);
      S* const to = c.grad_x + (before + row) * c.cols + share.column;
#pragma unroll
      for (int i = 0; i < kShares; ++i) {
        if (!share.has(i)) continue;
        forget(x[i]);
        forget(g[i]);
        A grad_x[V];
#pragma unroll
        for (int k = 0; k < V; ++k) {
          const A xh = (x[i][k] - mean) * r;
          grad_x[k] = d.x_g * (w[i][k] * g[i][k]) + (d.x_x * xh + d.x_one);
          weights[i][k] += g[i][k] * xh;
          biases[i][k] += g[i][k];
        }
        if (c.grad_x) write_vector<W>(to + i * share.team * V, grad_x);
      }
    });
    if (c.partial_weight) share.write_sums(weights, memory, c.partial_weight + chunk * c.cols);
    if (c.partial_bias) share.write_sums(biases, memory, c.partial_bias + chunk * c.cols);
  }
}

template <class S, class W, int kShares, Given kGiven>
__global__ void __launch_bounds__(kRowThreads,
                                  kGiven == Given::kOne || (kGiven == Given::kAffine && sizeof(S) < 8) ? 2 : 1)
    layer_norm_double_backward_kernel(const LayerNormCall<S> c) {
  using A = accumulation_t<S>;
  constexpr int V = W::kSize;
  constexpr bool kAffine = kGiven == Given::kAffine, kSeveral = kGiven == Given::kSeveral;
  RK_DYNAMIC_SHARED(A, memory);
  const Share<W, kShares> share(c.team, c.cols);
  TeamSums<A, BendSums<A, kAffine>::kCount> team(c.team);
  // The weights are kept where registers are left; a and b come from the cache.
  [[maybe_unused]] A kept[kShares][V];
  if constexpr (kGiven == Given::kOne) share.read_all_parameters(kept, c.weight, A(1));
  const auto read_weights = [&](int i, A(&w)[V]) {
    if constexpr (kGiven == Given::kOne)
#pragma unroll
      for (int k = 0; k < V; ++k) w[k] = kept[i][k];
    else
      read_parameters<W>(w, c.weight ? c.weight + share.at(i) : nullptr, A(1));
  };
  for (std::int64_t chunk = blockIdx.x; chunk < c.chunks; chunk += gridDim.x) {
    A weights[kShares][V] = {};
    for_chunk_rows(c, chunk, share.index, share.teams(), [&](std::int64_t row, bool counts) {
      const A mean = c.mean ? c.mean[row] : A(0), r = c.rstd[row];
      W x[kShares], g[kShares], u[kShares];
      [[maybe_unused]] A sum[kShares][V] = {};  // of the cotangents' grad_x
      share.read(x, c.x + row * c.cols);
      for (std::int64_t cotangent = 0; cotangent < (kSeveral ? c.cotangents : 1); ++cotangent) {
        const std::int64_t from = (cotangent * c.rows + row) * c.cols;
        share.read(g, c.g + from);
        if (c.u)
          share.read(u, c.u + from);
        else
#pragma unroll
          for (int i = 0; i < kShares; ++i) u[i] = W{};
        BendSums<A, kAffine> s;
#pragma unroll
        for (int i = 0; i < kShares; ++i) {
          if (!share.has(i)) continue;
          A w[V], a[V];
          read_weights(i, w);
          read_parameters<W>(a, kAffine && c.a ? c.a + share.at(i) : nullptr, A(0));
#pragma unroll
          for (int k = 0; k < V; ++k) s.add(x[i][k] - mean, g[i][k], u[i][k], w[k], a[k]);
        }
        team.add_up(s.sums);
        if (!counts) continue;
        const NormBends<A> d = s.bends(c.mean, r, c.average);
        S *const to_grad = c.gg_grad + from + share.column, *const to_x = c.grad_x + from + share.column;
#pragma unroll
        for (int i = 0; i < kShares; ++i) {
          if (!share.has(i)) continue;
          forget(x[i]);
          forget(g[i]);
          forget(u[i]);
          A gg_grad[V], grad_x[V], w[V], a[V], b[V];
          read_weights(i, w);
          read_parameters<W>(a, kAffine && c.a ? c.a + share.at(i) : nullptr, A(0));
          read_parameters<W>(b, kAffine && c.b ? c.b + share.at(i) : nullptr, A(0));
#pragma unroll
          for (int k = 0; k < V; ++k) {
            const BendResult<A> result = bend<kAffine>(d, (x[i][k] - mean) * r, r, g[i][k], u[i][k], w[k], a[k], b[k]);
            gg_grad[k] = result.gg_grad;
            grad_x[k] = result.grad_x;
            weights[i][k] += result.weight;
            if constexpr (kSeveral) sum[i][k] += result.grad_x;
          }
          if (c.gg_grad) write_vector<W>(to_grad + i * share.team * V, gg_grad);
          if (!kSeveral && c.grad_x) write_vector<W>(to_x + i * share.team * V, grad_x);
        }
      }
      if constexpr (kSeveral)
#pragma unroll
        for (int i = 0; i < kShares; ++i)
          if (c.grad_x && counts && share.has(i)) write_vector<W>(c.grad_x + row * c.cols + share.at(i), sum[i]);
    });
    if (c.partial_weight) share.write_sums(weights, memory, c.partial_weight + chunk * c.cols);
  }
}

template <class S, class W, int kShares>
cudaError_t launch_short_rows(bool second, const LayerNormCall<S>& c, dim3 grid, cudaStream_t stream) {
  const auto kernel = !second             ? layer_norm_backward_kernel<S, W, kShares>
                      : c.cotangents != 1 ? layer_norm_double_backward_kernel<S, W, kShares, Given::kSeveral>
                      : c.a || c.b        ? layer_norm_double_backward_kernel<S, W, kShares, Given::kAffine>
                                          : layer_norm_double_backward_kernel<S, W, kShares, Given::kOne>;
  const bool sums = c.partial_weight || c.partial_bias;
  const std::size_t shared = sums ? kRowThreads / c.team * c.cols * sizeof(accumulation_t<S>) : 0;
  return launch(kernel, grid, dim3(kRowThreads), shared, stream, c);
}

// After set_shares; c.partial_* must hold chunks * cols numbers where c.grad_* is wanted and be null where not, c.bends be
// there where c.team is 0.  Where rows are whole vectors, every pointer is a multiple of 16 bytes.
template <class S>
cudaError_t launch_layer_norm(bool second, const LayerNormCall<S>& c, cudaStream_t stream) {
  using A = accumulation_t<S>;
  const bool words = in_words<S>(c.cols);
  if (words && !(aligned<S>(c.cols, c.x, c.g, c.u, c.gg_grad, c.grad_x) && aligned<A>(0, c.weight, c.a, c.b)))
    return cudaErrorMisalignedAddress;
  const dim3 grid = grid_for(second ? c.chunks : c.chunks * c.cotangents);
  cudaError_t status = c.team == 0     ? words ? launch_long_rows<S, Words<S>>(second, c, stream)
                                               : launch_long_rows<S, Element<S>>(second, c, stream)
                       : !words        ? launch_short_rows<S, Element<S>, 4>(second, c, grid, stream)
                       : c.shares == 2 ? launch_short_rows<S, Words<S>, 2>(second, c, grid, stream)
                                       : launch_short_rows<S, Words<S>, 3>(second, c, grid, stream);
  if (status == cudaSuccess)
    status =
        launch_column_totals<A>(c.partial_weight, c.grad_weight, c.partial_bias, c.grad_bias, c.chunks, c.cols, stream);
  return status;
}

}  // namespace rk::cuda
