// attention_double_backward on the CPU.  Formulas: math/attention.h.
//
// A unit of work is one head of k and v with the rows of q that attend to it, taken in blocks: matrix products through
// PyTorch's BLAS for each block, on buffers that one thread owns, and between them loops over the scores while these lie
// in its cache.  No more than a block of rows of four matrices of scores exists per thread.
//
// The formulas have twelve products, which are small where sequences are short.  Seven remain, because operands that meet
// the same matrix lie beside each other: [S T] = q [k B]^T, [dP X] = grad [v C]^T, [Pd P] [v C], [W dS] [k B], and the
// rows of W and dS alternate as those of q and A do: (W, dS)^T (q, A).
//
// Where there are too few heads to occupy the machine, the blocks of a head are dealt out to several units, whose
// gradients of k and v are added afterwards in their order.  How many depends on shapes alone: every bit of the result is
// independent of the number of threads.
#include <torch/csrc/stable/ops.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "../cpu/attention_loops.h"
#include "attention_arguments.h"

// MKL's, where PyTorch is linked with it.
extern "C" int MKL_Set_Num_Threads_Local(int threads) __attribute__((weak));

namespace rk::aten {
namespace {

// MKL chooses its kernels, and with them the order of additions, by the number of threads it may use, even where it
// uses one: so that the bits are the same for every number, it is told one.
class SequentialBlas {
 public:
  SequentialBlas() : before_(set(1)) {}
  ~SequentialBlas() { set(before_); }
  SequentialBlas(const SequentialBlas&) = delete;
  SequentialBlas& operator=(const SequentialBlas&) = delete;

 private:
  static int set(int threads) { return MKL_Set_Num_Threads_Local ? MKL_Set_Num_Threads_Local(threads) : 0; }
  const int before_;
};

using rk::cpu::read_piece;
using rk::cpu::write_piece;

constexpr int64_t kUnits = 16;             // at least as many as this, if there are blocks enough
constexpr int64_t kBlockScores = 1 << 14;  // entries of one matrix of scores: four of float32 take 256 KiB
constexpr int64_t kLeastRows = 32, kMostRows = 256;

// A tensor [B, H, N, D] in any layout with adjacent columns.
struct Rows {
  char* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;  // bytes

  Rows() = default;
  explicit Rows(const Tensor& t)
      : data(static_cast<char*>(t.data_ptr())),
        batch(t.stride(0) * t.element_size()),
        head(t.stride(1) * t.element_size()),
        row(t.stride(2) * t.element_size()) {}
  char* at(int64_t b, int64_t h, int64_t i) const { return data + b * batch + h * head + i * row; }
};

Tensor with_adjacent_columns(const Tensor& t) { return t.size(3) <= 1 || t.stride(3) == 1 ? t : t.contiguous(); }

struct Task {
  AttentionShape shape;
  AttentionPlan plan;
  Rows gg_q, gg_k, gg_v, grad, q, k, v;            // inputs
  Rows result_grad, result_q, result_k, result_v;  // outputs that the plan has
  Tensor mask;                                     // [B, H, L, S], accumulation type, or undefined
  bool causal;
  double scale;
  int64_t block_rows, blocks;   // rows of q in a block, blocks in a head
  int64_t splits;               // units that share a head
  Tensor partial_k, partial_v;  // [B, G, splits, S, D or E] if there are several
};

// Two matrices that lie beside or beneath each other.
struct Pair {
  Tensor both, first, second;
  const Tensor& pick(bool with_first, bool with_second) const {
    return with_first && with_second ? both : with_first ? first : second;
  }
};

// One thread's buffers, and what it does with them.
template <class A>
class Worker {
 public:
  explicit Worker(const Task& task) : task_(task), s_(task.shape) {
    const auto options = at::TensorOptions().dtype(c10::CppTypeToScalarType<A>::value);
    const auto buffer = [&](int64_t rows, int64_t cols) { return at::empty({rows, cols}, options); };
    const int64_t width = rk::cpu::whole_lanes<A>(s_.keys);
    keys_ = buffer(2 * width, s_.key_size);
    values_ = buffer(2 * width, s_.value_size);
    sum_k_ = buffer(s_.keys, s_.key_size);
    sum_v_ = buffer(s_.keys, s_.value_size);
    for (Tensor& m : scores_) m = buffer(1, task.block_rows * 2 * width);
    queries_ = buffer(task.block_rows, 2 * s_.key_size);
    out_q_ = buffer(task.block_rows, s_.key_size);
    grad_ = buffer(task.block_rows, s_.value_size);
    out_grad_ = buffer(task.block_rows, s_.value_size);
  }

  void run(int64_t unit) {
    const int64_t split = unit % task_.splits, head = unit / task_.splits;
    const int64_t b = head / s_.key_heads, g = head % s_.key_heads;
    const auto& plan = task_.plan;
    if (plan.k) sum_k_.zero_();
    if (plan.v) sum_v_.zero_();
    cols_read_ = -1;  // of this head
    for (int64_t h = g * s_.group(); h < (g + 1) * s_.group(); ++h)
      for (int64_t block = split; block < task_.blocks; block += task_.splits)
        run_block(b, h, g, block * task_.block_rows);
    if (task_.splits == 1) {
      if (plan.k) write(sum_k_, task_.result_k, b, g, 0, s_.keys);
      if (plan.v) write(sum_v_, task_.result_v, b, g, 0, s_.keys);
    } else {
      if (plan.k) keep(sum_k_, task_.partial_k, unit);
      if (plan.v) keep(sum_v_, task_.partial_v, unit);
    }
  }

  // The gradients of k and v of one head from those of its units.
  void finish(int64_t head) {
    const int64_t b = head / s_.key_heads, g = head % s_.key_heads;
    if (task_.plan.k) write(total(task_.partial_k, head, sum_k_), task_.result_k, b, g, 0, s_.keys);
    if (task_.plan.v) write(total(task_.partial_v, head, sum_v_), task_.result_v, b, g, 0, s_.keys);
  }

 private:
  static A* pointer(const Tensor& t) { return t.mutable_data_ptr<A>(); }

  // Rows of a tensor into a matrix whose rows may lie further apart than they are long.
  void read(const Rows& from, int64_t b, int64_t h, int64_t first, const Tensor& to, int64_t rows) {
    const int64_t cols = to.size(1), stride = to.stride(0);
    A* const out = pointer(to);
    for (int64_t i = 0; i < rows; ++i) read_piece(s_.dtype, from.at(b, h, first + i), out + i * stride, cols);
  }
  void write(const Tensor& from, const Rows& to, int64_t b, int64_t h, int64_t first, int64_t rows) {
    const int64_t cols = from.size(1);
    const A* const in = pointer(from);
    for (int64_t i = 0; i < rows; ++i) write_piece(s_.dtype, in + i * cols, to.at(b, h, first + i), cols);
  }

  void keep(const Tensor& sum, const Tensor& partial, int64_t unit) {
    std::copy_n(pointer(sum), sum.numel(), pointer(partial) + unit * sum.numel());
  }
  const Tensor& total(const Tensor& partial, int64_t head, const Tensor& sum) {
    const A* from = pointer(partial) + head * task_.splits * sum.numel();
    std::copy_n(from, sum.numel(), pointer(sum));
    for (int64_t i = 1; i < task_.splits; ++i) rk::cpu::add_rows(from + i * sum.numel(), pointer(sum), sum.numel());
    return sum;
  }

  static Pair beside(const Tensor& buffer, int64_t rows, int64_t cols) {
    const Tensor both = buffer.view({-1}).narrow(0, 0, rows * 2 * cols).view({rows, 2 * cols});
    return {both, both.narrow(1, 0, cols), both.narrow(1, cols, cols)};
  }
  static Pair beneath(const Tensor& buffer, int64_t rows) {
    return {buffer.narrow(0, 0, 2 * rows), buffer.narrow(0, 0, rows), buffer.narrow(0, rows, rows)};
  }

  // The buffers as matrices of a block's size; blocks of one size in a row find them made.
  void shape_views(int64_t rows, int64_t cols) {
    if (rows == rows_ && cols == cols_) return;
    rows_ = rows;
    cols_ = cols;
    width_ = rk::cpu::whole_lanes<A>(cols);
    moved_scores = beside(scores_[0], rows, width_);
    slopes = beside(scores_[1], rows, width_);
    alternating = slopes.both.view({2 * rows, width_}).narrow(1, 0, cols).t();
    bend = slopes.first.narrow(1, 0, cols).t();
    moved = moved_scores.first.narrow(1, 0, cols).t();
    keys = beneath(keys_, width_);
    values = beneath(values_, width_);
    queries = beside(queries_, rows, s_.key_size);
    alternating_queries = queries.both.view({2 * rows, s_.key_size});
    out_q = out_q_.narrow(0, 0, rows);
    grad = grad_.narrow(0, 0, rows);
    out_grad = out_grad_.narrow(0, 0, rows);
    sum_k = sum_k_.narrow(0, 0, cols);
    sum_v = sum_v_.narrow(0, 0, cols);
  }

  // The first cols_ rows of k, B, v and C, zeros behind them.
  void read_keys(int64_t b, int64_t g) {
    if (cols_read_ == cols_) return;
    cols_read_ = cols_;
    const auto fill = [&](const Rows& from, const Tensor& to) {
      read(from, b, g, 0, to, cols_);
      std::fill(pointer(to) + cols_ * to.size(1), pointer(to) + width_ * to.size(1), A(0));
    };
    const auto& plan = task_.plan;
    fill(task_.k, keys.first);
    if (plan.b) fill(task_.gg_k, keys.second);
    if (plan.slope() || plan.grad) fill(task_.v, values.first);
    if (plan.c) fill(task_.gg_v, values.second);
  }

  // out = scale x y, or out += scale x y
  static void multiply(const Tensor& x, const Tensor& y, const Tensor& out, bool add, double scale = 1) {
    Tensor(out).addmm_(x, y, add ? 1 : 0, scale);
  }

  void run_block(int64_t batch, int64_t head, int64_t key_head, int64_t first) {
    const auto& plan = task_.plan;
    const int64_t rows = std::min(task_.block_rows, s_.queries - first);
    shape_views(rows, task_.causal ? std::min(s_.keys, first + rows) : s_.keys);
    read_keys(batch, key_head);
    const Tensor &q = queries.first, &a = queries.second;
    read(task_.q, batch, head, first, q, rows);
    if (plan.a) read(task_.gg_q, batch, head, first, a, rows);
    if (plan.slope() || plan.mixed() || plan.v) read(task_.grad, batch, head, first, grad, rows);

    multiply(q, keys.pick(true, plan.b).t(), moved_scores.pick(true, plan.b), false, task_.scale);
    if (plan.a) multiply(a, keys.first.t(), moved_scores.second, plan.b, task_.scale);
    if (!plan.tangent()) Tensor(moved_scores.second).zero_();
    if (plan.slope() || plan.mixed())
      multiply(grad, values.pick(plan.slope(), plan.mixed()).t(), slopes.pick(plan.slope(), plan.mixed()), false);
    if (!plan.slope()) Tensor(slopes.first).zero_();
    if (!plan.mixed()) Tensor(slopes.second).zero_();
    scores_loop(batch, head, first);  // now they are [Pd P] and [W dS]
    if (plan.grad) {
      multiply(moved_scores.pick(plan.tangent(), plan.c), values.pick(plan.tangent(), plan.c), out_grad, false);
      write(out_grad, task_.result_grad, batch, head, first, rows);
    }
    if (plan.q) {
      multiply(slopes.pick(true, plan.b), keys.pick(true, plan.b), out_q, false, task_.scale);
      write(out_q, task_.result_q, batch, head, first, rows);
    }
    if (plan.k && plan.a) multiply(alternating, alternating_queries, sum_k, true, task_.scale);
    if (plan.k && !plan.a) multiply(bend, q, sum_k, true, task_.scale);
    if (plan.v) multiply(moved, grad, sum_v, true);
  }

  void scores_loop(int64_t batch, int64_t head, int64_t first) {
    A *s = pointer(moved_scores.both), *dp = pointer(slopes.both);
    const Tensor& mask = task_.mask;
    const A* mask_row = nullptr;
    if (mask.defined())
      mask_row = mask.const_data_ptr<A>() + batch * mask.stride(0) + head * mask.stride(1) + first * mask.stride(2);
    for (int64_t i = 0; i < rows_; ++i) {
      if (mask_row) rk::cpu::add_to_scores(s, mask_row + i * mask.stride(2), mask.stride(3), cols_);
      const int64_t valid = task_.causal ? std::min(cols_, first + i + 1) : cols_;
      rk::cpu::attention_row(s, s + width_, dp, dp + width_, valid, width_);
      s += 2 * width_;
      dp += 2 * width_;
    }
  }

  const Task& task_;
  const AttentionShape& s_;
  Tensor keys_, values_, sum_k_, sum_v_;                  // [2 S or S, D or E]
  Tensor scores_[2], queries_, out_q_, grad_, out_grad_;  // a block's
  int64_t rows_ = -1, cols_ = -1, width_ = -1;            // of the views below; cols_ in whole lanes
  int64_t cols_read_ = -1;                                // rows of this head in keys and values
  Pair keys, values, queries;                             // [k B], [v C], [q A]
  Pair moved_scores, slopes;                              // [S T] and [dP X]
  Tensor moved, bend, alternating, alternating_queries, out_q, grad, out_grad, sum_k, sum_v;
};

template <class A>
void run_all(const Task& task) {
  const int64_t heads = task.shape.batch * task.shape.key_heads;
  const auto on_threads = [&](int64_t n, auto step) {
    // The library's own: at::parallel_for is a template, which without -fopenmp is a loop on one thread.
    torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
      const at::AutoDispatchBelowADInplaceOrView below;
      const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
      const SequentialBlas sequential;
      Worker<A> worker(task);
      for (int64_t i = begin; i < end; ++i) step(worker, i);
    });
  };
  on_threads(heads * task.splits, [](Worker<A>& worker, int64_t unit) { worker.run(unit); });
  if (task.splits > 1) on_threads(heads, [](Worker<A>& worker, int64_t head) { worker.finish(head); });
}

AttentionResults attention_double_backward(const std::optional<Tensor>& gg_q, const std::optional<Tensor>& gg_k,
                                           const std::optional<Tensor>& gg_v, const Tensor& grad, const Tensor& q,
                                           const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask,
                                           bool causal, double scale, bool need_grad, bool need_q, bool need_k,
                                           bool need_v) {
  const AttentionArguments arguments{gg_q, gg_k, gg_v, grad, q, k, v, mask};
  Task task;
  task.shape = check_attention(arguments);
  const AttentionShape& s = task.shape;
  task.plan = s.empty() ? AttentionPlan{} : attention_plan(arguments, need_grad, need_q, need_k, need_v);
  const AttentionPlan& plan = task.plan;
  AttentionResults results{attention_result(grad, need_grad, plan.grad), attention_result(q, need_q, plan.q),
                           attention_result(k, need_k, plan.k), attention_result(v, need_v, plan.v)};
  if (plan.nothing()) return results;
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
  task.grad = rows(grad);
  task.q = rows(q);
  task.k = rows(k);
  task.v = rows(v);
  if (gg_q) task.gg_q = rows(*gg_q);
  if (gg_k) task.gg_k = rows(*gg_k);
  if (gg_v) task.gg_v = rows(*gg_v);
  if (mask) task.mask = additive_mask(*mask, s);
  if (plan.grad) task.result_grad = Rows(std::get<0>(results));
  if (plan.q) task.result_q = Rows(std::get<1>(results));
  if (plan.k) task.result_k = Rows(std::get<2>(results));
  if (plan.v) task.result_v = Rows(std::get<3>(results));
  const auto accumulation = q.options().dtype(s.dtype == at::kDouble ? at::kDouble : at::kFloat);
  if (task.splits > 1 && plan.k) task.partial_k = at::empty({heads * task.splits, s.keys, s.key_size}, accumulation);
  if (task.splits > 1 && plan.v) task.partial_v = at::empty({heads * task.splits, s.keys, s.value_size}, accumulation);
  s.dtype == at::kDouble ? run_all<double>(task) : run_all<float>(task);
  return results;
}

}  // namespace

TORCH_LIBRARY_IMPL(robustkern, CPU, m) { m.impl("attention_double_backward", TORCH_FN(attention_double_backward)); }

}  // namespace rk::aten
