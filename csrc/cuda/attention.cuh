// Kernels of attention's second derivative.  Formulas: math/attention.h.
//
// A block stays with some rows of q, or of k, while those of the other pass by; scores exist in registers alone, and
// nobody adds to what another block has written.  Per tile of scores S, T, dP and X take five products (of T two), what
// is made of them the rest:
//
//     moments   rows of q   D, t, g of every row;  ddO = (P (T - T0)) V + P C - (t - T0) O     2
//     queries   rows of q   dQ' = scale (W K + dS B)                                           2
//     keys      rows of k   dK' = scale (W^T Q + dS^T A),  dV' = Pd^T dO                       3
//
// The moments take one pass, since with dP and T moved by any numbers D0 and T0 of a row
//
//     D = D0 + sum P (dP - D0)      t = T0 + sum P (T - T0)
//     g = sum P ((dP - D0) (T - T0) + X) - (D - D0) (t - T0)
//
// and nothing large cancels where D0 and T0 are near D and t: they are the means over the first columns.  That is enough
// for 16-bit results; wider ones take a pass more, from D and t themselves.  Where the forward's logsumexp and O are not
// given, another kernel, of two products, computes them first.
#pragma once

#include "../math/attention.h"
#include "attention_tiles.cuh"

namespace rk::cuda {

// What the other kernels need of a row of scores; as one, it is fetched with its row of q.
template <class S, bool kWide = (sizeof(S) > 2)>
struct alignas(16) RowMoments {
  using A = accumulation_t<S>;
  A logsumexp;  // to the kernels' base; infinite where the row attends to nothing
  A d, t, g;

  static __device__ __forceinline__ RowMoments of(A logsumexp, A d, A t, A g, A) { return {logsumexp, d, t, g}; }
  __device__ __forceinline__ A normalized(A p) const { return p; }
};

// The logarithm is far larger than one, and so is its rounding.  16-bit numbers do not notice; others take the sum of what
// comes out as exp(S - logsumexp).
template <class S>
struct alignas(16) RowMoments<S, true> {
  using A = S;
  A logsumexp, d, t, g, inverse_total;

  static __device__ __forceinline__ RowMoments of(A logsumexp, A d, A t, A g, A inverse_total) {
    return {logsumexp, d, t, g, inverse_total};
  }
  __device__ __forceinline__ A normalized(A p) const { return p * inverse_total; }
};

// q, a, grad, out, gg_grad: rows are queries, by heads; k, b, v, c: rows are keys, by key heads.
template <class S>
struct AttentionCall : AttentionSizes {
  using A = accumulation_t<S>;
  Heads<const S> a, b, c;                    // null: zero
  Heads<const S> grad, q, k, v, out;         // out: null unless ddO takes T
  Heads<S> gg_grad, grad_q, grad_k, grad_v;  // null: not needed
  Heads<const A> mask;                       // null: none; columns of any stride
  std::int64_t mask_column;
  const A* logsumexp;  // [B, H, L], natural
  RowMoments<S>* moments;
  bool aligned;  // every 16 bytes from the start of a row on lie in one piece, and rows are made of such
  A scale;

  __host__ __device__ bool tangent() const { return a.first.data || b.first.data; }         // T
  __host__ __device__ bool bend() const { return grad_q.first.data || grad_k.first.data; }  // W
  __host__ __device__ bool slope() const { return tangent() && bend(); }                    // dP
  __host__ __device__ bool mixed() const { return c.first.data && bend(); }                 // X
};

__device__ __forceinline__ int up_to_16(int n) { return n < 16 ? n : 16; }

// Products of rows with columns, either of which are queries: 16 x 16 numbers of each matrix of scores.
template <class S>
struct ScoreTile {
  using A = accumulation_t<S>;
  Scores<A> s = {}, t = {}, dp = {}, x = {};

  // S with scale and mask, -infinity where there is no key, or a hidden one.  Turned: rows are keys.
  template <bool kTurned>
  __device__ __forceinline__ void finish(const AttentionCall<S>& c, int batch, int head, int first_row,
                                         int first_column) {
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[n][i] *= c.scale * kPerNat<S>;
    const int rows = up_to_16((kTurned ? c.keys : c.queries) - first_row);
    const int columns = up_to_16((kTurned ? c.queries : c.keys) - first_column);
    const int ahead = first_row - first_column;
    if (rows == 16 && columns == 16 && !c.mask && !(c.causal && (kTurned ? ahead > -15 : ahead < 15))) return;
    const Matrix<const A> mask = c.mask.of(batch, head);
    const std::int64_t of_row = kTurned ? c.mask_column : mask.stride,
                       of_column = kTurned ? mask.stride : c.mask_column;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = lane_row() + 8 * i, begin = c.causal && kTurned ? ahead + row : 0;
      int end = row < rows ? columns : 0;
      if (c.causal && !kTurned && ahead + row + 1 < end) end = ahead + row + 1;
      const A* added = mask.data;
      if (added) added += of_row * (first_row + row) + of_column * (first_column + lane_column());
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int column = lane_column() + 8 * n + j;
          A& e = s[n][2 * i + j];
          if (column < begin || column >= end)
            e = -INFINITY;
          else if (added)
            e += added[(8 * n + j) * of_column] * kPerNat<S>;
        }
    }
  }

  // Afterwards s, t, dp and x hold P, Pd, dS and W.
  __device__ __forceinline__ void weigh(int n, int i, const RowMoments<S>& row, A scale) {
    const A p = row.normalized(power_of_base<S>(s[n][i] - row.logsumexp)), moved = t[n][i] * scale - row.t,
            slope = dp[n][i] - row.d;
    s[n][i] = p;
    t[n][i] = p * moved;
    dp[n][i] = p * slope;
    x[n][i] = p * (slope * moved + x[n][i] - row.g);
  }
};

// 16 rows of k, B, v and C, or of q, A and dO, in shared memory.
template <class S>
struct Passing {
  const S* first;
  int tile;  // elements of each

  __device__ __forceinline__ const S* operator[](int which) const { return first + which * tile; }
};

// A block's rows of q, A and dO, while k, B, v and C pass by.
template <class S, int kSize>
struct QueryRows {
  using Shape = TileShape<S, kSize>;
  using A = accumulation_t<S>;
  using Left = LeftRows<S, kSize, true>;
  static constexpr int kK = 0, kB = 1, kV = 2, kC = 3;
  static constexpr std::size_t kShared =
      sizeof(S) * (3 * Shape::kRowTile + 4 * Shape::kStages * static_cast<std::size_t>(Shape::kColumnTile));

  const AttentionCall<S>& c;
  S* const shared;
  const AttentionUnit unit;
  const int first_row = threadIdx.x / 32 * 16;  // of the warp, among the block's

  __device__ __forceinline__ QueryRows(const AttentionCall<S>& call, S* memory)
      : c(call), shared(memory), unit(call.heads, call.queries, Shape::kRows) {}

  // The place of a thread's row i, of two, among the rows of all heads; -1 where there is none.
  __device__ __forceinline__ std::int64_t place(int i) const {
    const int query = unit.first + first_row + lane_row() + 8 * i;
    return query < c.queries ? static_cast<std::int64_t>(unit.batch * c.heads + unit.head) * c.queries + query : -1;
  }

  // use(scores, columns, whether they are the first) for 16 columns at a time, which are keys.  Of derivatives: T, and
  // dP and X where something is made of them; without, S alone.
  template <bool kDerivatives, class Use>
  __device__ __forceinline__ void meet_keys(bool with_v, bool with_c, const Use& use) {
    const bool with_a = kDerivatives && c.a, with_b = kDerivatives && c.b, slope = kDerivatives && c.slope(),
               mixed = kDerivatives && c.mixed();
    const int key_head = unit.head / (c.heads / c.key_heads), first_query = unit.first + first_row;
    load_rows(c.q, 0);
    if (with_a) load_rows(c.a, 1);
    if (slope || mixed) load_rows(c.grad, 2);

    S* const columns = shared + 3 * Shape::kRowTile;
    constexpr int kStage = 4 * Shape::kColumnTile;
    Left q, a, grad;
    const auto of_head = [&](const Heads<const S>& h) { return h.of(unit.batch, key_head); };
    const Matrix<const S> k = of_head(c.k), b = of_head(c.b), v = of_head(c.v), cotangent = of_head(c.c);
    for_columns<Shape>(
        0, c.keys_seen(unit.first + Shape::kRows - 1),
        [&](int first, int stage) {
          S* const tile = columns + stage * kStage;
          Copy::begin(tile + kK * Shape::kColumnTile, k, first, c.aligned);
          if (with_b) Copy::begin(tile + kB * Shape::kColumnTile, b, first, c.aligned);
          if (with_v) Copy::begin(tile + kV * Shape::kColumnTile, v, first, c.aligned);
          if (with_c) Copy::begin(tile + kC * Shape::kColumnTile, cotangent, first, c.aligned);
        },
        [&] {
          const S* rows = shared + first_row * Shape::kStride;
          q.take(rows);
          if (with_a) a.take(rows + Shape::kRowTile);
          if (slope || mixed) grad.take(rows + 2 * Shape::kRowTile);
        },
        [&](int first, int stage) {
          const int seen = first_query < c.queries ? c.keys_seen(first_query + 15) - first : 0;
#pragma unroll 1
          for (int step = 0; step < Shape::kColumns && step < seen; step += 16) {
            const Passing<S> passing{columns + stage * kStage + step * Shape::kStride, Shape::kColumnTile};
            ScoreTile<S> x;
            if (with_a && with_b) {
              Left::times_crosswise(q, x.s, a, x.t, passing[kK], passing[kB]);
            } else {
              q.times(x.s, passing[kK]);
              if (with_a) a.times(x.t, passing[kK]);
              if (with_b) q.times(x.t, passing[kB]);
            }
            if (slope) grad.times(x.dp, passing[kV]);
            if (mixed) grad.times(x.x, passing[kC]);
            x.template finish<false>(c, unit.batch, unit.head, first_query, first + step);
            use(x, passing, first + step == 0);
          }
        });
  }

 private:
  using Copy = TileCopy<Shape::kColumns, kSize, S>;

  __device__ __forceinline__ void load_rows(const Heads<const S>& from, int which) const {
    TileCopy<Shape::kRows, kSize, S>::begin(shared + which * Shape::kRowTile, from.of(unit.batch, unit.head),
                                            unit.first, c.aligned);
  }
};

// A block's rows of k, B, v and C, while q, A and dO pass by, of every head that attends to them.
template <class S, int kSize>
struct KeyRows {
  using Shape = TileShape<S, kSize>;
  using A = accumulation_t<S>;
  using Left = LeftRows<S, kSize>;
  static constexpr int kQ = 0, kA = 1, kGrad = 2;
  static constexpr int kStage = 3 * Shape::kColumnTile;
  static constexpr std::size_t kTiles =
      sizeof(S) * (4 * Shape::kRowTile + Shape::kStages * static_cast<std::size_t>(kStage));
  static constexpr std::size_t kShared = kTiles + sizeof(RowMoments<S>) * Shape::kStages * Shape::kColumns;

  const AttentionCall<S>& c;
  S* const shared;
  const AttentionUnit unit;
  const int first_row = threadIdx.x / 32 * 16;  // as above

  __device__ __forceinline__ KeyRows(const AttentionCall<S>& call, S* memory)
      : c(call), shared(memory), unit(call.key_heads, call.keys, Shape::kRows) {}

  // use(scores, columns, moments of the columns) for 16 columns at a time, which are queries.
  template <class Use>
  __device__ __forceinline__ void meet_queries(const Use& use) {
    const bool slope = c.grad_k && c.tangent(), mixed = c.grad_k && c.c;
    load_rows(c.k, 0);
    if (c.b) load_rows(c.b, 1);
    if (slope) load_rows(c.v, 2);
    if (mixed) load_rows(c.c, 3);

    S* const columns = shared + 4 * Shape::kRowTile;
    auto* const moments = reinterpret_cast<RowMoments<S>*>(columns + Shape::kStages * kStage);
    const int group = c.heads / c.key_heads, first_key = unit.first + first_row;
    const int first_query = c.causal ? unit.first / Shape::kColumns * Shape::kColumns : 0;
    Left k, b, v, cotangent;
    for (int head = unit.head * group; head < (unit.head + 1) * group; ++head) {
      const auto of_head = [&](const Heads<const S>& h) { return h.of(unit.batch, head); };
      const Matrix<const S> q = of_head(c.q), a = of_head(c.a), grad = of_head(c.grad);
      for_columns<Shape>(
          first_query, c.queries,
          [&](int first, int stage) {
            S* const tile = columns + stage * kStage;
            Copy::begin(tile + kQ * Shape::kColumnTile, q, first, c.aligned);
            if (c.a) Copy::begin(tile + kA * Shape::kColumnTile, a, first, c.aligned);
            Copy::begin(tile + kGrad * Shape::kColumnTile, grad, first, c.aligned);
            load_moments(moments + stage * Shape::kColumns,
                         static_cast<std::int64_t>(unit.batch * c.heads + head) * c.queries + first, c.queries - first);
          },
          [&] {
            const S* rows = shared + first_row * Shape::kStride;
            k.take(rows);
            if (c.b) b.take(rows + Shape::kRowTile);
            if (slope) v.take(rows + 2 * Shape::kRowTile);
            if (mixed) cotangent.take(rows + 3 * Shape::kRowTile);
          },
          [&](int first, int stage) {
#pragma unroll 1
            for (int step = 0; step < Shape::kColumns && first + step < c.queries; step += 16) {
              if (first_key >= c.keys || (c.causal && first + step + 15 < first_key)) continue;
              const Passing<S> passing{columns + stage * kStage + step * Shape::kStride, Shape::kColumnTile};
              ScoreTile<S> x;
              if (c.a && c.b) {
                Left::times_crosswise(k, x.s, b, x.t, passing[kQ], passing[kA]);
              } else {
                k.times(x.s, passing[kQ]);
                if (c.b) b.times(x.t, passing[kQ]);
                if (c.a) k.times(x.t, passing[kA]);
              }
              if (slope && mixed)
                Left::times_both(v, x.dp, cotangent, x.x, passing[kGrad]);
              else if (slope)
                v.times(x.dp, passing[kGrad]);
              else if (mixed)
                cotangent.times(x.x, passing[kGrad]);
              x.template finish<true>(c, unit.batch, head, first_key, first + step);
              use(x, passing, moments + stage * Shape::kColumns + step);
            }
          });
    }
  }

 private:
  using Copy = TileCopy<Shape::kColumns, kSize, S>;

  __device__ __forceinline__ void load_rows(const Heads<const S>& from, int which) const {
    TileCopy<Shape::kRows, kSize, S>::begin(shared + which * Shape::kRowTile, from.of(unit.batch, unit.head),
                                            unit.first, c.aligned);
  }

  // Those of `rows` queries, of all heads' from `first` on.
  __device__ __forceinline__ void load_moments(RowMoments<S>* to, std::int64_t first, int rows) const {
    constexpr int kPieces = sizeof(RowMoments<S>) / 16;
    const int i = threadIdx.x;
    if (i < Shape::kColumns * kPieces)
      copy_async_16(reinterpret_cast<uint4*>(to) + i, reinterpret_cast<const uint4*>(c.moments + first) + i,
                    i / kPieces < rows);
  }
};

// logsumexp, and O if anybody asks for it: the forward, with a maximum that rises as the keys pass by.
template <class S, int kSize>
__global__ void __launch_bounds__(TileShape<S, kSize>::kThreads, TileShape<S, kSize>::kBlocks)
    attention_forward_kernel(const AttentionCall<S> c, accumulation_t<S>* logsumexp, const Heads<S> out) {
  using A = accumulation_t<S>;
  using Rows = QueryRows<S, kSize>;
  RK_DYNAMIC_SHARED(S, shared);
  Rows rows(c, shared);
  A most[2] = {-INFINITY, -INFINITY}, total[2] = {};  // of the row; of the thread
  RowSums<S, kSize> sums;
  rows.template meet_keys<false>(bool(out), false, [&](ScoreTile<S>& x, const Passing<S>& passing, bool) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const A* s[2] = {x.s[0] + 2 * i, x.s[1] + 2 * i};
      const A before = most[i], here = ::max(::max(s[0][0], s[0][1]), ::max(s[1][0], s[1][1]));
      most[i] = ::max(before, row_max(here));
      const A shift = most[i] == -INFINITY ? A(0) : most[i], shrink = power_of_base<S>(before - shift);
      total[i] *= shrink;
      sums.scale_row(i, shrink);
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int j = 2 * i; j < 2 * i + 2; ++j) total[i] += x.s[n][j] = power_of_base<S>(x.s[n][j] - shift);
    }
    if (out) sums.add(x.s, passing[Rows::kV]);
  });
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    total[i] = row_sum(total[i]);
    const std::int64_t place = rows.place(i);
    if (place >= 0 && threadIdx.x % 4 == 0)
      logsumexp[place] = total[i] == A(0) ? A(INFINITY) : most[i] / kPerNat<S> + ::log(total[i]);
    sums.scale_row(i, total[i] == A(0) ? A(0) : A(1) / total[i]);
  }
  if (out) sums.write(out.of(rows.unit.batch, rows.unit.head), rows.unit.first + rows.first_row, A(1), c.aligned);
}

// D, t and g of every row, and ddO; again, beginning at the D and t that were found before.
template <class S, int kSize>
__global__ void __launch_bounds__(TileShape<S, kSize>::kThreads, TileShape<S, kSize>::kBlocks)
    attention_moments_kernel(const AttentionCall<S> c, const bool again) {
  using A = accumulation_t<S>;
  using Rows = QueryRows<S, kSize>;
  RK_DYNAMIC_SHARED(S, shared);
  Rows rows(c, shared);
  A logsumexp[2], total[2] = {}, d[2] = {}, t[2] = {}, g[2] = {};
  A d0[2] = {}, t0[2] = {};  // near the means of dP and T: d, t and g count from there
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const std::int64_t place = rows.place(i);
    logsumexp[i] = place < 0 ? A(INFINITY) : c.logsumexp[place] * kPerNat<S>;
    if (again && place >= 0) {
      d0[i] = c.moments[place].d;
      t0[i] = c.moments[place].t;
    }
  }
  const bool moved = c.gg_grad && c.tangent(), mixed = c.gg_grad && c.c;
  RowSums<S, kSize> sums;
  rows.template meet_keys<true>(
      c.slope() || moved, c.mixed() || mixed, [&](ScoreTile<S>& x, const Passing<S>& passing, bool first) {
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            x.s[n][i] = power_of_base<S>(x.s[n][i] - logsumexp[i / 2]);  // P
            x.t[n][i] *= c.scale;
          }
        if (first && !again) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            A p_sum = 0, d_sum = 0, t_sum = 0;
#pragma unroll
            for (int n = 0; n < 2; ++n)
#pragma unroll
              for (int j = 2 * i; j < 2 * i + 2; ++j) {
                p_sum += x.s[n][j];
                d_sum += x.s[n][j] * x.dp[n][j];
                t_sum += x.s[n][j] * x.t[n][j];
              }
            p_sum = row_sum(p_sum);
            d_sum = row_sum(d_sum);
            t_sum = row_sum(t_sum);
            if (p_sum > A(1e-30)) {
              d0[i] = d_sum * reciprocal(p_sum);
              t0[i] = t_sum * reciprocal(p_sum);
            }
          }
        }
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const A p = x.s[n][i], dp = x.dp[n][i] - d0[i / 2], pt = p * (x.t[n][i] - t0[i / 2]);
            total[i / 2] += p;
            d[i / 2] += p * dp;
            t[i / 2] += pt;
            g[i / 2] += pt * dp + p * x.x[n][i];
            x.t[n][i] = pt;
          }
        if (moved) sums.add(x.t, passing[Rows::kV]);
        if (mixed) sums.add(x.s, passing[Rows::kC]);
      });
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const A sum = row_sum(total[i]), inverse = sizeof(S) == 2 ? A(1) : sum == A(0) ? A(0) : A(1) / sum;
    d[i] = row_sum(d[i]) * inverse;
    t[i] = row_sum(t[i]) * inverse;
    g[i] = row_sum(g[i]) * inverse - d[i] * t[i];
    sums.scale_row(i, inverse);
    const std::int64_t place = rows.place(i);
    if (place >= 0 && threadIdx.x % 4 == 0)
      c.moments[place] = RowMoments<S>::of(logsumexp[i], d0[i] + d[i], t0[i] + t[i], g[i], inverse);
  }
  if (!c.gg_grad) return;
  const int first_row = rows.unit.first + rows.first_row;
  if (moved) {
    const Matrix<const S> out = c.out.of(rows.unit.batch, rows.unit.head);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = first_row + lane_row() + 8 * i;
      if (row >= out.rows) continue;
      const S* o = out.data + static_cast<std::int64_t>(row) * out.stride;
#pragma unroll
      for (int n = 0; n < kSize / 8; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int column = lane_column() + 8 * n + j;
          if (column < out.columns) sums.sum[n][2 * i + j] -= t[i] * load(o[column]);
        }
    }
  }
  sums.write(c.gg_grad.of(rows.unit.batch, rows.unit.head), first_row, A(1), c.aligned);
}

template <class S, int kSize>
__global__ void __launch_bounds__(TileShape<S, kSize>::kThreads, TileShape<S, kSize>::kBlocks)
    attention_queries_kernel(const AttentionCall<S> c) {
  using A = accumulation_t<S>;
  using Rows = QueryRows<S, kSize>;
  RK_DYNAMIC_SHARED(S, shared);
  Rows rows(c, shared);
  RowMoments<S> moments[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const std::int64_t place = rows.place(i);
    moments[i] = place < 0 ? RowMoments<S>::of(A(INFINITY), 0, 0, 0, 0) : c.moments[place];
  }
  RowSums<S, kSize> sums;
  rows.template meet_keys<true>(c.slope(), c.mixed(), [&](ScoreTile<S>& x, const Passing<S>& passing, bool) {
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) x.weigh(n, i, moments[i / 2], c.scale);
    sums.add(x.x, passing[Rows::kK]);
    if (c.b) sums.add(x.dp, passing[Rows::kB]);
  });
  sums.write(c.grad_q.of(rows.unit.batch, rows.unit.head), rows.unit.first + rows.first_row, c.scale, c.aligned);
}

template <class S, int kSize>
__global__ void __launch_bounds__(TileShape<S, kSize>::kThreads, 1) attention_keys_kernel(const AttentionCall<S> c) {
  using A = accumulation_t<S>;
  using Rows = KeyRows<S, kSize>;
  RK_DYNAMIC_SHARED(S, shared);
  Rows rows(c, shared);
  RowSums<S, kSize> k_sums, v_sums;
  rows.meet_queries([&](ScoreTile<S>& x, const Passing<S>& passing, const RowMoments<S>* moments) {
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const RowMoments<S> m = moments[lane_column() + 8 * n + j];
        x.weigh(n, j, m, c.scale);
        x.weigh(n, j + 2, m, c.scale);
      }
    if (c.grad_k) k_sums.add(x.x, passing[Rows::kQ]);
    if (c.grad_k && c.a) k_sums.add(x.dp, passing[Rows::kA]);
    if (c.grad_v) v_sums.add(x.t, passing[Rows::kGrad]);
  });
  const int first_row = rows.unit.first + rows.first_row;
  if (c.grad_k) k_sums.write(c.grad_k.of(rows.unit.batch, rows.unit.head), first_row, c.scale, c.aligned);
  if (c.grad_v) v_sums.write(c.grad_v.of(rows.unit.batch, rows.unit.head), first_row, A(1), c.aligned);
}

template <class S>
cudaError_t launch_attention_forward(const AttentionCall<S>& c, accumulation_t<S>* logsumexp, const Heads<S>& out,
                                     cudaStream_t stream) {
  return visit_head_size<S>(c.q.first.columns, c.v.first.columns, [&](auto size) {
    using Rows = QueryRows<S, size()>;
    return launch(attention_forward_kernel<S, size()>, attention_grid(c.batch * c.heads, c.queries, Rows::Shape::kRows),
                  dim3(Rows::Shape::kThreads), Rows::kShared, stream, c, logsumexp, out);
  });
}

template <class S>
cudaError_t launch_attention_double_backward(const AttentionCall<S>& c, cudaStream_t stream) {
  return visit_head_size<S>(c.q.first.columns, c.v.first.columns, [&](auto size) {
    using Queries = QueryRows<S, size()>;
    using Keys = KeyRows<S, size()>;
    const dim3 block(Queries::Shape::kThreads);
    const dim3 of_queries = attention_grid(c.batch * c.heads, c.queries, Queries::Shape::kRows);
    const dim3 of_keys = attention_grid(c.batch * c.key_heads, c.keys, Queries::Shape::kRows);
    const bool twice =
        sizeof(S) > 2 && c.tangent();  // D and t themselves are the D0 and t0 that leave nothing to cancel
    cudaError_t status = cudaSuccess;
    for (int again = 0; status == cudaSuccess && again <= twice; ++again) {
      AttentionCall<S> moments = c;
      if (again < twice) moments.gg_grad = {};
      status = launch(attention_moments_kernel<S, size()>, of_queries, block, Queries::kShared, stream, moments, again);
    }
    if (status == cudaSuccess && c.grad_q)
      status = launch(attention_queries_kernel<S, size()>, of_queries, block, Queries::kShared, stream, c);
    if (status == cudaSuccess && (c.grad_k || c.grad_v))
      status = launch(attention_keys_kernel<S, size()>, of_keys, block, Keys::kShared, stream, c);
    return status;
  });
}

}  // namespace rk::cuda
