// Attention in forward mode: its value, and how it moves along tangents of q, k, v and the mask, in one pass.
//
//     S = scale Q K^T + mask    P = softmax(S)    T = scale (dQ K^T + Q dK^T) + dmask    t = sum_j P T
//     out = P V                 tangent = P (T - T0) V + P dV - (t - T0) out
//
// A block stays with some rows of q while k, v and their tangents pass by; scores exist in registers alone.  Six products
// a tile: three make S and T, three are added to the results, which shrink whenever the maximum of a row rises.  T0, the
// mean of T over the first columns that a row sees, is near t, so that nothing large cancels.
#pragma once

#include "attention_tiles.cuh"

namespace rk::cuda {

// q and what is like it: rows are queries, by heads; k and v: rows are keys, by key heads.
template <class S>
struct AttentionJvpCall : AttentionSizes {
  using A = accumulation_t<S>;
  Heads<const S> q, k, v, q_tangent, k_tangent, v_tangent;  // null tangents: zero
  Heads<const A> mask, mask_tangent;                        // null: none; columns of any stride
  std::int64_t mask_column, mask_tangent_column;
  Heads<S> out, tangent;
  A* logsumexp;  // [B, H, L], natural
  bool aligned;  // rows are made of 16 bytes that lie in one piece
  A scale;

  // The usual case, which has a kernel of its own: q, k and v move, and there is no mask.
  __host__ __device__ bool plain() const { return q_tangent && k_tangent && v_tangent && !masked(); }
  __host__ __device__ __forceinline__ bool masked() const { return mask || mask_tangent; }
  __device__ __forceinline__ bool scores_move() const { return q_tangent || k_tangent || mask_tangent; }

  // Adds the masks to 16 x 16 products of rows, which are scaled: S and T.
  __device__ __forceinline__ void add_masks(Scores<A>& s, Scores<A>& t, const AttentionUnit& unit, int first_query,
                                            int first_key) const {
    const Matrix<const A> added = mask.of(unit.batch, unit.head), moved = mask_tangent.of(unit.batch, unit.head);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int query = first_query + lane_row() + 8 * i;
      if (query >= queries) continue;
      const A* const s_row = added.data + static_cast<std::int64_t>(query) * added.stride;
      const A* const t_row = moved.data + static_cast<std::int64_t>(query) * moved.stride;
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int key = first_key + lane_column() + 8 * n + j;
          if (key >= keys) continue;
          if (mask) s[n][2 * i + j] += s_row[key * mask_column] * kPerNat<S>;
          if (mask_tangent) t[n][2 * i + j] += t_row[key * mask_tangent_column];
        }
    }
  }

  // Scores of -infinity where there is no key, or one that the query does not see.
  __device__ __forceinline__ void hide(Scores<A>& s, Scores<A>& t, int first_query, int first_key) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int seen = keys_seen(first_query + lane_row() + 8 * i) - first_key - lane_column();
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j)
          if (8 * n + j >= seen) {
            s[n][2 * i + j] = -INFINITY;
            t[n][2 * i + j] = 0;  // also where the key is NaN
          }
    }
  }
};

template <class S, int kSize>
struct AttentionJvpTiles {
  using Shape = TileShape<S, kSize>;
  static constexpr int kStage = 4 * Shape::kColumnTile;  // K, dK, V, dV
  static constexpr int kRowTiles = 2 * Shape::kRowTile;  // Q, dQ
  // Rows that are held in registers leave their place to the second stage.
  static constexpr bool kReused = Shape::kHeld && kStage <= kRowTiles;
  static constexpr std::size_t kShared =
      sizeof(S) * (kRowTiles + (kReused ? 1 : Shape::kStages) * static_cast<std::size_t>(kStage));
  static __device__ __forceinline__ int stage(int i) { return kReused && i == 1 ? 0 : kRowTiles + i * kStage; }
  // On an SM: masks take registers.
  static constexpr int blocks(bool plain) { return !plain && Shape::kBlocks > 2 ? 2 : Shape::kBlocks; }
};

// What is known of a thread's two rows of scores after some of their columns.
template <class S, int kSize>
struct AttentionJvpRows {
  using A = accumulation_t<S>;
  A most[2] = {-INFINITY, -INFINITY};    // of S
  A total[2] = {}, moved_total[2] = {};  // of P and P (T - T0), times the power of most; of the thread's columns
  A origin[2] = {};                      // T0
  RowSums<S, kSize> value, moved;

  // Lets `most` rise to the scores of 16 more columns, whereupon sums shrink.  Returns whether some row of the warp sees
  // its first keys; `fresh` says which of the thread's.
  __device__ __forceinline__ bool raise(const Scores<A>& s, bool (&fresh)[2]) {
    A next[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const A here = ::max(::max(s[0][2 * i], s[0][2 * i + 1]), ::max(s[1][2 * i], s[1][2 * i + 1]));
      next[i] = ::max(most[i], row_max(here));
    }
    if (!__any_sync(0xffffffffu, next[0] > most[0] || next[1] > most[1])) return false;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      fresh[i] = next[i] > most[i] && most[i] == -INFINITY;
      const A shrink = most[i] == next[i] ? A(1) : power_of_base<S>(most[i] - next[i]);
      most[i] = next[i];
      total[i] *= shrink;
      moved_total[i] *= shrink;
      value.scale_row(i, shrink);
      moved.scale_row(i, shrink);
    }
    return __any_sync(0xffffffffu, fresh[0] || fresh[1]);
  }

  // T0 of rows that see their first keys.
  __device__ __forceinline__ void begin(const Scores<A>& p, const Scores<A>& t, const bool (&fresh)[2], A scale) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      A p_sum = 0, t_sum = 0;
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int j = 2 * i; j < 2 * i + 2; ++j) {
          p_sum += p[n][j];
          t_sum += p[n][j] * t[n][j];
        }
      p_sum = row_sum(p_sum);
      t_sum = row_sum(t_sum);
      if (fresh[i]) origin[i] = scale * t_sum / p_sum;
    }
  }

  // S and T of 16 columns become P and P (T - T0).  T is yet to be multiplied by `scale`.
  __device__ __forceinline__ void weigh(Scores<A>& s, Scores<A>& t, A scale) {
    bool fresh[2] = {};
    const bool begins = raise(s, fresh);
    const A shift[2] = {most[0] == -INFINITY ? A(0) : most[0], most[1] == -INFINITY ? A(0) : most[1]};
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) total[i / 2] += s[n][i] = power_of_base<S>(s[n][i] - shift[i / 2]);
    if (begins) begin(s, t, fresh, scale);
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) moved_total[i / 2] += t[n][i] = s[n][i] * (scale * t[n][i] - origin[i / 2]);
  }

  // From sums to the results of the row.  Returns its logsumexp.
  __device__ __forceinline__ A finish(int i) {
    total[i] = row_sum(total[i]);
    const A inverse = total[i] == A(0) ? A(0) : A(1) / total[i], mean = row_sum(moved_total[i]) * inverse;
#pragma unroll
    for (int n = 0; n < kSize / 8; ++n)
#pragma unroll
      for (int j = 2 * i; j < 2 * i + 2; ++j) {
        moved.sum[n][j] = (moved.sum[n][j] - mean * value.sum[n][j]) * inverse;
        value.sum[n][j] *= inverse;
      }
    return most[i] / kPerNat<S> + ::log(total[i]);
  }
};

template <class S, int kSize, bool kPlain>
__global__ void __launch_bounds__(TileShape<S, kSize>::kThreads, AttentionJvpTiles<S, kSize>::blocks(kPlain))
    attention_jvp_kernel(const AttentionJvpCall<S> c) {
  using A = accumulation_t<S>;
  using Shape = TileShape<S, kSize>;
  using Tiles = AttentionJvpTiles<S, kSize>;
  using Left = LeftRows<S, kSize>;
  RK_DYNAMIC_SHARED(S, shared);
  const AttentionUnit unit(c.heads, c.queries, Shape::kRows);
  const int warp = threadIdx.x / 32, warp_row = warp * 16, first_query = unit.first + warp_row;
  const int key_head = unit.head / (c.heads / c.key_heads);
  const auto load_rows = [&](const Heads<const S>& from, int which) {
    TileCopy<Shape::kRows, kSize, S>::begin(shared + which * Shape::kRowTile, from.of(unit.batch, unit.head),
                                            unit.first, c.aligned);
  };
  load_rows(c.q, 0);
  if (kPlain || c.q_tangent) load_rows(c.q_tangent, 1);

  // Each warp fetches one of K, dK, V and dV: so there are fewer addresses to compute.
  static_assert(Shape::kThreads == 4 * 32);
  Matrix<const S> fetched = {};
  const auto take = [&](const Heads<const S>& from, int which) {
    if ((kPlain || from) && which == warp) fetched = from.of(unit.batch, key_head);
  };
  take(c.k, 0);
  take(c.k_tangent, 1);
  take(c.v, 2);
  take(c.v_tangent, 3);
  Left q, q_tangent;
  AttentionJvpRows<S, kSize> rows;
  for_columns<Shape>(
      0, c.keys_seen(unit.first + Shape::kRows - 1),
      [&](int first, int stage) {
        if (!kPlain && !fetched.data) return;
        TileCopy<Shape::kColumns, kSize, S, 32>::begin(shared + Tiles::stage(stage) + warp * Shape::kColumnTile,
                                                       fetched, first, c.aligned);
      },
      [&] {
        q.take(shared + warp_row * Shape::kStride);
        if (kPlain || c.q_tangent) q_tangent.take(shared + Shape::kRowTile + warp_row * Shape::kStride);
        if constexpr (Tiles::kReused) __syncthreads();
      },
      [&](int first, int stage) {
        const int seen = first_query < c.queries ? c.keys_seen(first_query + 15) - first : 0;
        const int seen_by_all = c.keys_seen(first_query) - first;
#pragma unroll 1
        for (int step = 0; step < Shape::kColumns && step < seen; step += 16) {
          const S* const k = shared + Tiles::stage(stage) + step * Shape::kStride;
          const S* const v = k + 2 * Shape::kColumnTile;
          Scores<A> s = {}, t = {};
          if (kPlain || (c.q_tangent && c.k_tangent)) {
            Left::times_crosswise(q, s, q_tangent, t, k, k + Shape::kColumnTile);
          } else if (c.q_tangent) {
            Left::times_both(q, s, q_tangent, t, k);
          } else {
            q.times(s, k);
            if (c.k_tangent) q.times(t, k + Shape::kColumnTile);
          }
#pragma unroll
          for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              s[n][i] *= c.scale * kPerNat<S>;
              if constexpr (!kPlain) t[n][i] *= c.scale;
            }
          if constexpr (!kPlain)
            if (c.masked()) c.add_masks(s, t, unit, first_query, first + step);
          if (step + 16 > seen_by_all) c.hide(s, t, first_query, first + step);
          rows.weigh(s, t, kPlain ? c.scale : A(1));
          if (c.scores_move())  // asked even where it is known: as one piece, the code takes a few registers too many
            RowSums<S, kSize>::add_both(rows.value, s, rows.moved, t, v);
          else
            rows.value.add(s, v);
          if (kPlain || c.v_tangent) rows.moved.add(s, v + Shape::kColumnTile);
        }
      });

#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const A logsumexp = rows.finish(i);
    const int query = first_query + lane_row() + 8 * i;
    if (query < c.queries && threadIdx.x % 4 == 0)
      c.logsumexp[static_cast<std::int64_t>(unit.batch * c.heads + unit.head) * c.queries + query] = logsumexp;
  }
  rows.value.write(c.out.of(unit.batch, unit.head), first_query, A(1), c.aligned);
  rows.moved.write(c.tangent.of(unit.batch, unit.head), first_query, A(1), c.aligned);
}

template <class S>
cudaError_t launch_attention_jvp(const AttentionJvpCall<S>& c, cudaStream_t stream) {
  return visit_head_size<S>(c.q.first.columns, c.v.first.columns, [&](auto size) {
    using Tiles = AttentionJvpTiles<S, size()>;
    void (*kernel)(AttentionJvpCall<S>) = attention_jvp_kernel<S, size(), false>;
    if constexpr (sizeof(S) == 2)  // others are slow enough
      if (c.plain()) kernel = attention_jvp_kernel<S, size(), true>;
    return launch(kernel, attention_grid(c.batch * c.heads, c.queries, Tiles::Shape::kRows),
                  dim3(Tiles::Shape::kThreads), Tiles::kShared, stream, c);
  });
}

}  // namespace rk::cuda
