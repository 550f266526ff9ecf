// attention_double_backward on the CPU.  Formulas: math/attention.h.
//
// A unit of work is one head of k and v with the rows of q that attend to it, taken in blocks: matrix products for each
// block, on buffers that one thread owns, and between them loops over the scores while these lie in its cache.  No more
// than a block of rows of five matrices of scores exists per thread.
//
// The formulas have twelve products, which are small where sequences are short.  Seven remain, because operands that meet
// the same matrix lie beside each other: [S T] = q [k B]^T, [dP X] = grad [v C]^T, [Pd P] [v C], [W dS] [k B] and
// [W^T dS^T] [q A].  They are oneDNN's, through PyTorch: its kernels for small matrices take half of the time that calls
// of BLAS do, but want rows of every factor adjacent, so that k, B, v and C are held both ways and blocks of W, dS and Pd
// are turned.
//
// Where there are too few heads to occupy the machine, the blocks of a head are dealt out to several units, whose
// gradients of k and v are added afterwards in their order.  How many depends on shapes alone: every bit of the result is
// independent of the number of threads.
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "../../math/attention.h"
#include "attention_cpu.h"

namespace rk::aten {
namespace {

using namespace rk::cpu;

// ------------------------------------------------------------------ one row of scores between the matrix products

// What the forward knew of a row.  A logarithm is rounded to its own size, so that probabilities taken with it have a sum
// that differs from one by as much: they are divided by it.
template <class A>
struct Saved {
  A logsumexp, d;
};

// S, T, dP, X become Pd = P (T - t), P, W = P (G - g), dS = P (dP - D): n whole lanes.  False, and nothing done, if all
// scores are -inf: such a row attends to nothing.
template <class A>
RK_MULTIVERSION bool attention_lanes(A* __restrict__ s, A* __restrict__ t, A* __restrict__ dp, A* __restrict__ x,
                                     int64_t n, const Saved<A>* saved) {
  const A shift = saved ? saved->logsumexp : largest_score(s, n);
  if (shift == -std::numeric_limits<A>::infinity()) return false;
  for (int64_t j = 0; j < n; ++j) s[j] = exp_nonpositive(s[j] - shift);
  const double sum = row_sum<A>(n, [=](Lanes<A>& term, int64_t j) RK_INLINE_LAMBDA { load_lanes(term, s + j); });
  AttentionRow<A> row{};
  row.t = A(row_dot(s, t, n) / sum);
  row.d = saved ? saved->d : A(row_dot(s, dp, n) / sum);
  row.inverse_sum = A(1 / sum);
  for (int64_t j = 0; j < n; ++j) {
    s[j] *= row.inverse_sum;
    x[j] = attention_bend(t[j], dp[j], x[j], row);
  }
  row.g = A(row_dot(s, x, n));
  for (int64_t j = 0; j < n; ++j) {
    const A probability = s[j], slope = dp[j];
    s[j] = probability * (t[j] - row.t);
    t[j] = probability;
    dp[j] = probability * (x[j] - row.g);
    x[j] = probability * (slope - row.d);
  }
  return true;
}

template <class A>
RK_MULTIVERSION void add_rows(const A* from, A* to, int64_t n) {
  for (int64_t j = 0; j < n; ++j) to[j] += from[j];
}

template <class A>
RK_MULTIVERSION A dot(const A* x, const A* y, int64_t n) {
  return sum_over<A>(n, [=](int64_t j) RK_INLINE_LAMBDA { return x[j] * y[j]; });
}

// One row of scores s, with t, dp and x beside it: in place, s becomes Pd, t becomes P, dp becomes W, x becomes dS.
// Columns from `valid` on lie behind the causal mask or the last key; `width` counts them in whole lanes.
template <class A>
void attention_row(A* s, A* t, A* dp, A* x, int64_t valid, int64_t width, const Saved<A>* saved) {
  const int64_t n = whole_lanes<A>(valid);
  std::fill(s + valid, s + n, -std::numeric_limits<A>::infinity());
  for (A* row : {t, dp, x}) std::fill(row + valid, row + n, A(0));
  const int64_t from = attention_lanes(s, t, dp, x, n, saved) ? n : 0;
  if (from == width) return;
  for (A* row : {s, t, dp, x}) std::fill(row + from, row + width, A(0));
}

// ------------------------------------------------------------------ blocks of rows

constexpr int64_t kUnits = 16;             // at least as many as this, if there are blocks enough
constexpr int64_t kBlockScores = 1 << 14;  // entries of one matrix of scores: four of float32 take 256 KiB
constexpr int64_t kLeastRows = 32, kMostRows = 256;

struct Task {
  AttentionShape shape;
  AttentionPlan plan;
  bool causal;
  double scale;
  Rows a, b, c, grad, q, k, v, out;                // inputs
  Rows result_grad, result_q, result_k, result_v;  // outputs that the plan has
  Tensor logsumexp;                                // [B, H, L], or undefined
  Tensor mask;                                     // [B, H, L, S], accumulation type, or undefined
  int64_t block_rows, blocks;                      // rows of q in a block, blocks in a head
  int64_t splits;                                  // units that share a head
  Tensor partial_k, partial_v;                     // [B, G, splits, S, D or E] if there are several
};

// One thread's buffers, and what it does with them.
template <class A>
class Worker : RowBuffers<A> {
 public:
  explicit Worker(const Task& task) : RowBuffers<A>(task.shape.dtype), task_(task), s_(task.shape) {}

  void run(int64_t unit) {
    const int64_t split = unit % task_.splits, head = unit / task_.splits;
    const int64_t b = head / s_.key_heads, g = head % s_.key_heads;
    const auto& plan = task_.plan;
    if (plan.k) fill(sum_k_, A(0));
    if (plan.v) fill(sum_v_, A(0));
    cols_read_ = -1;  // of this head
    for (int64_t h = g * s_.group(); h < (g + 1) * s_.group(); ++h)
      for (int64_t block = split; block < task_.blocks; block += task_.splits)
        run_block(b, h, g, block * task_.block_rows);
    if (task_.splits == 1) {
      if (plan.k) write(sum_k_, task_.result_k, b, g, 0);
      if (plan.v) write(sum_v_, task_.result_v, b, g, 0);
    } else {
      if (plan.k) keep(sum_k_, task_.partial_k, unit);
      if (plan.v) keep(sum_v_, task_.partial_v, unit);
    }
  }

  // The gradients of k and v of one head from those of its units.
  void finish(int64_t head) {
    const int64_t b = head / s_.key_heads, g = head % s_.key_heads;
    if (task_.plan.k) write(total(task_.partial_k, head, sum_k_), task_.result_k, b, g, 0);
    if (task_.plan.v) write(total(task_.partial_v, head, sum_v_), task_.result_v, b, g, 0);
  }

 private:
  using RowBuffers<A>::memory;
  using RowBuffers<A>::read;
  using RowBuffers<A>::write;

  void keep(const Matrix<A>& sum, const Tensor& partial, int64_t unit) {
    const int64_t size = sum.rows * sum.cols;
    std::copy_n(sum.data, size, partial.mutable_data_ptr<A>() + unit * size);
  }
  const Matrix<A>& total(const Tensor& partial, int64_t head, const Matrix<A>& sum) {
    const int64_t size = sum.rows * sum.cols;
    const A* from = partial.const_data_ptr<A>() + head * task_.splits * size;
    std::copy_n(from, size, sum.data);
    for (int64_t i = 1; i < task_.splits; ++i) add_rows(from + i * size, sum.data, size);
    return sum;
  }

  // The first `cols` rows of k, B, v and C, zeros up to whole lanes behind them, and all of it turned.
  void read_keys(int64_t b, int64_t g, int64_t cols) {
    if (cols_read_ == cols) return;
    cols_read_ = cols;
    width_ = whole_lanes<A>(cols);
    const auto take = [&](const Rows& from, Matrix<A> to, const Matrix<A>& turned) {
      to.rows = cols;
      read(from, b, g, 0, to);
      std::fill(to.data + cols * to.cols, to.data + width_ * to.cols, A(0));
      to.rows = width_;
      transpose(to, turned);
    };
    const auto& plan = task_.plan;
    keys_ = Pair<A>::beneath(keys_memory_, width_, s_.key_size);
    values_ = Pair<A>::beneath(values_memory_, width_, s_.value_size);
    turned_keys_ = Pair<A>::beside(turned_keys_memory_, s_.key_size, width_);
    turned_values_ = Pair<A>::beside(turned_values_memory_, s_.value_size, width_);
    take(task_.k, keys_.first, turned_keys_.first);
    if (plan.b) take(task_.b, keys_.second, turned_keys_.second);
    if (plan.slope() || plan.grad) take(task_.v, values_.first, turned_values_.first);
    if (plan.c) take(task_.c, values_.second, turned_values_.second);
  }

  void run_block(int64_t batch, int64_t head, int64_t key_head, int64_t first) {
    const auto& plan = task_.plan;
    const int64_t rows = std::min(task_.block_rows, s_.queries - first);
    const int64_t cols = task_.causal ? std::min(s_.keys, first + rows) : s_.keys;
    read_keys(batch, key_head, cols);
    const auto scores = Pair<A>::beside(scores_memory_, rows, width_);          // [S T]
    const auto slopes = Pair<A>::beside(slopes_memory_, rows, width_);          // [dP X]
    const auto queries = Pair<A>::beneath(queries_memory_, rows, s_.key_size);  // scale q and scale A
    const Matrix<A> grad{grad_memory_, rows, s_.value_size, s_.value_size};
    const Matrix<A> out{out_memory_, rows, s_.value_size, s_.value_size};
    read(task_.q, batch, head, first, queries.first);
    if (plan.a) read(task_.a, batch, head, first, queries.second);
    scale_rows(queries.first.data, (plan.a ? 2 : 1) * rows * s_.key_size, A(task_.scale));
    if (plan.slope() || plan.mixed() || plan.v) read(task_.grad, batch, head, first, grad);
    if (task_.logsumexp.defined() && plan.slope()) read(task_.out, batch, head, first, out);

    multiply_across(queries.first, turned_keys_, scores, true, plan.b);
    if (plan.a) multiply_across(queries.second, turned_keys_.first, scores.second, plan.b);
    if (!plan.tangent()) fill(scores.second, A(0));
    if (plan.slope() || plan.mixed()) multiply_across(grad, turned_values_, slopes, plan.slope(), plan.mixed());
    if (!plan.slope()) fill(slopes.first, A(0));
    if (!plan.mixed()) fill(slopes.second, A(0));
    scores_loop(batch, head, first, cols, scores, slopes, grad, out);  // now they are [Pd P] and [W dS]
    if (plan.grad) {
      const Matrix<A> result{out_grad_memory_, rows, s_.value_size, s_.value_size};
      multiply_along(scores, values_, result, plan.tangent(), plan.c);
      write(result, task_.result_grad, batch, head, first);
    }
    if (plan.q) {
      const Matrix<A> result{out_q_memory_, rows, s_.key_size, s_.key_size};
      multiply_along(slopes, keys_, result, true, plan.b);
      scale_rows(result.data, rows * s_.key_size, A(task_.scale));
      write(result, task_.result_q, batch, head, first);
    }
    auto turned = Pair<A>::beside(turned_memory_, width_, rows);
    if (plan.k) {
      transpose(slopes.first, turned.first);
      if (plan.a) transpose(slopes.second, turned.second);
      add_product(turned.pick(true, plan.a), queries.pick(true, plan.a), sum_k_, cols);
    }
    if (plan.v) {
      transpose(scores.first, turned.first);
      add_product(turned.first, grad, sum_v_, cols);
    }
  }

  // The first `rows` rows of out += x y
  static void add_product(Matrix<A> x, const Matrix<A>& y, Matrix<A> out, int64_t rows) {
    x.rows = out.rows = rows;
    multiply(x, y, out, true);
  }

  void scores_loop(int64_t batch, int64_t head, int64_t first, int64_t cols, const Pair<A>& scores,
                   const Pair<A>& slopes, const Matrix<A>& grad, const Matrix<A>& out) {
    A *s = scores.both.data, *dp = slopes.both.data;
    const Tensor& mask = task_.mask;
    const A* mask_row = nullptr;
    if (mask.defined())
      mask_row = mask.const_data_ptr<A>() + batch * mask.stride(0) + head * mask.stride(1) + first * mask.stride(2);
    for (int64_t i = 0; i < scores.both.rows; ++i) {
      if (mask_row) add_to_scores(s, mask_row + i * mask.stride(2), mask.stride(3), cols);
      const int64_t valid = task_.causal ? std::min(cols, first + i + 1) : cols;
      if (task_.logsumexp.defined()) {
        const A* of_head =
            task_.logsumexp.const_data_ptr<A>() + batch * task_.logsumexp.stride(0) + head * task_.logsumexp.stride(1);
        const A d = task_.plan.slope() ? dot(grad.data + i * grad.stride, out.data + i * out.stride, grad.cols) : A(0);
        const Saved<A> saved{of_head[(first + i) * task_.logsumexp.stride(2)], d};
        attention_row(s, s + width_, dp, dp + width_, valid, width_, &saved);
      } else {
        attention_row<A>(s, s + width_, dp, dp + width_, valid, width_, nullptr);
      }
      s += scores.both.stride;
      dp += slopes.both.stride;
    }
  }

  const Task& task_;
  const AttentionShape& s_;
  const int64_t most_rows_ = task_.block_rows, most_cols_ = whole_lanes<A>(s_.keys);
  int64_t width_ = 0, cols_read_ = -1;  // keys that were read, in whole lanes and without
  // Of a head.
  A* const keys_memory_ = memory(2 * most_cols_ * s_.key_size);
  A* const values_memory_ = memory(2 * most_cols_ * s_.value_size);
  A* const turned_keys_memory_ = memory(Pair<A>::size_beside(s_.key_size, most_cols_));
  A* const turned_values_memory_ = memory(Pair<A>::size_beside(s_.value_size, most_cols_));
  const Matrix<A> sum_k_{memory(s_.keys * s_.key_size), s_.keys, s_.key_size, s_.key_size};
  const Matrix<A> sum_v_{memory(s_.keys * s_.value_size), s_.keys, s_.value_size, s_.value_size};
  Pair<A> keys_{}, values_{}, turned_keys_{}, turned_values_{};
  // Of a block.
  A* const scores_memory_ = memory(Pair<A>::size_beside(most_rows_, most_cols_));
  A* const slopes_memory_ = memory(Pair<A>::size_beside(most_rows_, most_cols_));
  A* const turned_memory_ = memory(Pair<A>::size_beside(most_cols_, most_rows_));
  A* const queries_memory_ = memory(2 * most_rows_ * s_.key_size);
  A* const grad_memory_ = memory(most_rows_ * s_.value_size);
  A* const out_memory_ = memory(most_rows_ * s_.value_size);
  A* const out_q_memory_ = memory(most_rows_ * s_.key_size);
  A* const out_grad_memory_ = memory(most_rows_ * s_.value_size);
};

template <class A>
void run_all(const Task& task) {
  const int64_t heads = task.shape.batch * task.shape.key_heads;
  on_threads<Worker<A>>(task, heads * task.splits, [](Worker<A>& worker, int64_t unit) { worker.run(unit); });
  if (task.splits > 1) on_threads<Worker<A>>(task, heads, [](Worker<A>& worker, int64_t head) { worker.finish(head); });
}

void run(const AttentionCall& call) {
  const auto& [in, s, plan, causal, scale, results] = call;
  Task task{};
  task.shape = s;
  task.plan = plan;
  task.causal = causal;
  task.scale = scale;
  task.blocks = (s.queries * s.keys + kBlockScores - 1) / kBlockScores;
  task.block_rows = std::clamp((s.queries + task.blocks - 1) / task.blocks, kLeastRows, kMostRows);
  task.block_rows = std::min(task.block_rows, s.queries);
  task.blocks = (s.queries + task.block_rows - 1) / task.block_rows;
  const int64_t heads = s.batch * s.key_heads;
  task.splits = std::min((kUnits + heads - 1) / heads, task.blocks);

  std::vector<Tensor> held;  // copies with adjacent columns
  const auto rows = [&](const Tensor& t) { return Rows(held.emplace_back(with_adjacent_columns(t))); };
  task.grad = rows(in.grad);
  task.q = rows(in.q);
  task.k = rows(in.k);
  task.v = rows(in.v);
  if (in.a) task.a = rows(*in.a);
  if (in.b) task.b = rows(*in.b);
  if (in.c) task.c = rows(*in.c);
  if (in.out) task.out = rows(*in.out);
  if (in.logsumexp) task.logsumexp = *in.logsumexp;
  if (in.mask) task.mask = additive_mask(*in.mask, s);
  if (plan.grad) task.result_grad = Rows(std::get<0>(results));
  if (plan.q) task.result_q = Rows(std::get<1>(results));
  if (plan.k) task.result_k = Rows(std::get<2>(results));
  if (plan.v) task.result_v = Rows(std::get<3>(results));
  const auto accumulation = in.q.options().dtype(accumulation_type(s.dtype));
  if (task.splits > 1 && plan.k) task.partial_k = at::empty({heads * task.splits, s.keys, s.key_size}, accumulation);
  if (task.splits > 1 && plan.v) task.partial_v = at::empty({heads * task.splits, s.keys, s.value_size}, accumulation);
  s.dtype == at::kDouble ? run_all<double>(task) : run_all<float>(task);
}

}  // namespace

TORCH_LIBRARY_IMPL(robustkern, CPU, m) {
  m.impl("attention_double_backward", TORCH_FN(attention_double_backward<run>));
}

}  // namespace rk::aten
