// attention_jvp on the CPU.  Formulas: math/attention.h.
//
// A unit of work is blocks of rows of q, of all heads that share one of k and v.  A row of the result depends on one row of
// q, so nothing is added across units, and every bit is independent of the number of threads.  Products whose operands meet
// the same matrix are one: [S T] = q [k dk]^T, tangent = [Pd P] [v dv].
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "attention_cpu.h"

namespace rk::aten {
namespace {

// S, T become Pd = P (T - t), P: n whole lanes.  False, and nothing done, if all scores are -inf: such a row attends to
// nothing.  Else log sum exp S = max + log(sum).
template <class A>
RK_MULTIVERSION bool jvp_lanes(A* __restrict__ s, A* __restrict__ t, int64_t n, A* max, double* sum) {
  const A largest = largest_score(s, n);
  *max = largest;
  if (largest == -std::numeric_limits<A>::infinity()) return false;
  for (int64_t j = 0; j < n; ++j) s[j] = exp_nonpositive(s[j] - largest);
  const double total = row_sum<A>(n, [=](Lanes<A>& term, int64_t j) RK_INLINE_LAMBDA { load_lanes(term, s + j); });
  const A mean = A(row_dot(s, t, n) / total), inverse = A(1 / total);
  for (int64_t j = 0; j < n; ++j) {
    const A probability = s[j] * inverse;
    s[j] = probability * (t[j] - mean);
    t[j] = probability;
  }
  *sum = total;
  return true;
}

// One row of scores s, with t beside it: in place, s becomes Pd, t becomes P.  Columns from `valid` on lie behind the causal
// mask or the last key; `width` counts them in whole lanes.  Returns log sum exp S.
template <class A>
A jvp_row(A* s, A* t, int64_t valid, int64_t width) {
  constexpr A never = -std::numeric_limits<A>::infinity();
  const int64_t n = whole_lanes<A>(valid);
  std::fill(s + valid, s + n, never);
  std::fill(t + valid, t + n, A(0));
  A max = never;
  double sum = 0;
  const bool attends = jvp_lanes(s, t, n, &max, &sum);
  for (A* const row : {s, t}) std::fill(row + (attends ? n : 0), row + width, A(0));
  return attends ? A(double(max) + std::log(sum)) : never;
}

constexpr int64_t kUnits = 16;             // at least as many as this, if there are blocks enough
constexpr int64_t kBlockScores = 1 << 15;  // entries of one matrix of scores: two of float32 take 256 KiB
constexpr int64_t kLeastRows = 32, kMostRows = 256;

struct Task {
  AttentionShape shape;
  bool causal;
  double scale;
  bool q_moves, k_moves, v_moves;
  Rows q{}, k{}, v{}, q_tangent{}, k_tangent{}, v_tangent{}, out{}, tangent{};
  Tensor mask{}, mask_tangent{};       // [B, H, L, S], accumulation type, or undefined
  Tensor logsumexp{};                  // [B, H, L]
  int64_t block_rows = 0, blocks = 0;  // rows of q in a block, blocks in a head
  int64_t splits = 0;                  // units that share a head

  bool scores_move() const { return q_moves || k_moves || mask_tangent.defined(); }
};

// One thread's buffers, and what it does with them.
template <class A>
class Worker : RowBuffers<A> {
 public:
  explicit Worker(const Task& task) : RowBuffers<A>(task.shape.dtype), task_(task), s_(task.shape) {}

  void run(int64_t unit) {
    const int64_t split = unit % task_.splits, head = unit / task_.splits;
    const int64_t b = head / s_.key_heads, g = head % s_.key_heads;
    cols_read_ = -1;  // of this head
    for (int64_t block = split; block < task_.blocks; block += task_.splits)
      for (int64_t h = g * s_.group(); h < (g + 1) * s_.group(); ++h) run_block(b, h, g, block * task_.block_rows);
  }

 private:
  using RowBuffers<A>::memory;
  using RowBuffers<A>::read;
  using RowBuffers<A>::write;

  // The first `cols` rows of k and dk, turned, and of v and dv, with zeros up to whole lanes behind them.
  void read_keys(int64_t b, int64_t g, int64_t cols) {
    if (cols_read_ == cols) return;
    cols_read_ = cols;
    width_ = whole_lanes<A>(cols);
    const auto take = [&](const Rows& from, Matrix<A> to) {
      to.rows = cols;
      read(from, b, g, 0, to);
      std::fill(to.data + cols * to.cols, to.data + width_ * to.cols, A(0));
    };
    const Matrix<A> straight{keys_memory_, width_, s_.key_size, s_.key_size};
    turned_keys_ = Pair<A>::beside(turned_keys_memory_, s_.key_size, width_);
    take(task_.k, straight);
    transpose(straight, turned_keys_.first);
    if (task_.k_moves) {
      take(task_.k_tangent, straight);
      transpose(straight, turned_keys_.second);
    }
    values_ = Pair<A>::beneath(values_memory_, width_, s_.value_size);
    take(task_.v, values_.first);
    if (task_.v_moves) take(task_.v_tangent, values_.second);
  }

  void run_block(int64_t batch, int64_t head, int64_t key_head, int64_t first) {
    const int64_t rows = std::min(task_.block_rows, s_.queries - first);
    read_keys(batch, key_head, task_.causal ? std::min(s_.keys, first + rows) : s_.keys);
    const auto scores = Pair<A>::beside(scores_memory_, rows, width_);  // [S T]
    const Matrix<A> queries{queries_memory_, rows, s_.key_size, s_.key_size};
    const auto read_queries = [&](const Rows& from) {
      read(from, batch, head, first, queries);
      scale_rows(queries.data, rows * s_.key_size, A(task_.scale));
    };
    read_queries(task_.q);
    multiply_across(queries, turned_keys_, scores, true, task_.k_moves);
    if (task_.q_moves) {
      read_queries(task_.q_tangent);
      multiply_across(queries, turned_keys_.first, scores.second, task_.k_moves);
    } else if (!task_.k_moves) {
      fill(scores.second, A(0));
    }
    scores_loop(batch, head, first, scores);  // now they are [Pd P]

    const Matrix<A> result{result_memory_, rows, s_.value_size, s_.value_size};
    multiply_along(scores.second, values_.first, result, false);
    write(result, task_.out, batch, head, first);
    const bool scores_move = task_.scores_move();
    if (scores_move || task_.v_moves)
      multiply_along(scores, values_, result, scores_move, task_.v_moves);
    else
      fill(result, A(0));
    write(result, task_.tangent, batch, head, first);
  }

  // The rows of a mask from `first` on, or nothing.
  static const A* rows_of(const Tensor& mask, int64_t batch, int64_t head, int64_t first) {
    if (!mask.defined()) return nullptr;
    return mask.const_data_ptr<A>() + batch * mask.stride(0) + head * mask.stride(1) + first * mask.stride(2);
  }

  void scores_loop(int64_t batch, int64_t head, int64_t first, const Pair<A>& scores) {
    const Tensor &mask = task_.mask, &moved = task_.mask_tangent;
    const A *const mask_rows = rows_of(mask, batch, head, first), *const moved_rows =
                                                                      rows_of(moved, batch, head, first);
    A* const logsumexp =
        task_.logsumexp.mutable_data_ptr<A>() + (batch * s_.heads + head) * s_.queries + first;  // contiguous
    for (int64_t i = 0; i < scores.both.rows; ++i) {
      A* const s = scores.both.data + i * scores.both.stride;
      if (mask_rows) add_to_scores(s, mask_rows + i * mask.stride(2), mask.stride(3), cols_read_);
      if (moved_rows) add_to_scores(s + width_, moved_rows + i * moved.stride(2), moved.stride(3), cols_read_);
      const int64_t valid = task_.causal ? std::min(cols_read_, first + i + 1) : cols_read_;
      logsumexp[i] = jvp_row(s, s + width_, valid, width_);
    }
  }

  const Task& task_;
  const AttentionShape& s_;
  const int64_t most_rows_ = task_.block_rows, most_cols_ = whole_lanes<A>(s_.keys);
  int64_t width_ = 0, cols_read_ = -1;  // keys that were read, in whole lanes and without
  // Of a head.
  A* const keys_memory_ = memory(most_cols_ * s_.key_size);
  A* const turned_keys_memory_ = memory(Pair<A>::size_beside(s_.key_size, most_cols_));
  A* const values_memory_ = memory(2 * most_cols_ * s_.value_size);
  Pair<A> turned_keys_{}, values_{};
  // Of a block.
  A* const scores_memory_ = memory(Pair<A>::size_beside(most_rows_, most_cols_));
  A* const queries_memory_ = memory(most_rows_ * s_.key_size);
  A* const result_memory_ = memory(most_rows_ * s_.value_size);
};

template <class A>
void run_all(const Task& task) {
  const int64_t units = task.shape.batch * task.shape.key_heads * task.splits;
  on_threads<Worker<A>>(task, units, [](Worker<A>& worker, int64_t unit) { worker.run(unit); });
}

void run(const AttentionJvpCall& call) {
  const auto& [in, s, causal, scale, results] = call;
  Task task{s, causal, scale, in.q_tangent.has_value(), in.k_tangent.has_value(), in.v_tangent.has_value()};
  task.block_rows = std::clamp(kBlockScores / s.keys, kLeastRows, kMostRows);
  task.block_rows = std::min(task.block_rows, s.queries);
  task.blocks = (s.queries + task.block_rows - 1) / task.block_rows;
  const int64_t heads = s.batch * s.key_heads;
  task.splits = std::min((kUnits + heads - 1) / heads, task.blocks);

  std::vector<Tensor> held;  // copies with adjacent columns
  const auto rows = [&](const Tensor& t) { return Rows(held.emplace_back(with_adjacent_columns(t))); };
  task.q = rows(in.q);
  task.k = rows(in.k);
  task.v = rows(in.v);
  if (in.q_tangent) task.q_tangent = rows(*in.q_tangent);
  if (in.k_tangent) task.k_tangent = rows(*in.k_tangent);
  if (in.v_tangent) task.v_tangent = rows(*in.v_tangent);
  if (in.mask) task.mask = additive_mask(*in.mask, s);
  if (in.mask_tangent) task.mask_tangent = additive_mask(*in.mask_tangent, s);
  task.out = Rows(std::get<0>(results));
  task.tangent = Rows(std::get<1>(results));
  task.logsumexp = std::get<2>(results);
  s.dtype == at::kDouble ? run_all<double>(task) : run_all<float>(task);
}

}  // namespace

TORCH_LIBRARY_IMPL(robustkern, CPU, m) { m.impl("attention_jvp", TORCH_FN(attention_jvp<run>)); }

}  // namespace rk::aten
