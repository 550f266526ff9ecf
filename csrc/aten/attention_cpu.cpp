// attention_double_backward on the CPU.  Formulas: math/attention.h.
//
// A unit of work is one head of k and v with the rows of q that attend to it, taken in blocks: twelve matrix products
// through PyTorch's BLAS for each block, on buffers that one thread owns, and between them loops over the scores while
// these lie in its cache.  No more than a block of rows of four matrices of scores exists per thread.
//
// Where there are too few heads to occupy the machine, the blocks of a head are dealt out to several units, whose
// gradients of k and v are added afterwards in their order.  How many depends on shapes alone: every bit of the result is
// independent of the number of threads.
#include <ATen/Parallel.h>
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

// One thread's buffers, and what it does with them.
template <class A>
class Worker {
 public:
  explicit Worker(const Task& task) : task_(task), s_(task.shape) {
    const auto options = at::TensorOptions().dtype(c10::CppTypeToScalarType<A>::value);
    const auto buffer = [&](int64_t rows, int64_t cols) { return at::empty({rows, cols}, options); };
    k_ = buffer(s_.keys, s_.key_size);
    b_ = buffer(s_.keys, s_.key_size);
    v_ = buffer(s_.keys, s_.value_size);
    c_ = buffer(s_.keys, s_.value_size);
    sum_k_ = buffer(s_.keys, s_.key_size);
    sum_v_ = buffer(s_.keys, s_.value_size);
    for (Tensor& m : scores_) m = buffer(1, task.block_rows * s_.keys);
    for (Tensor& m : q_like_) m = buffer(task.block_rows, s_.key_size);
    for (Tensor& m : grad_like_) m = buffer(task.block_rows, s_.value_size);
  }

  void run(int64_t unit) {
    const int64_t split = unit % task_.splits, head = unit / task_.splits;
    const int64_t b = head / s_.key_heads, g = head % s_.key_heads;
    const auto& plan = task_.plan;
    read(task_.k, b, g, 0, k_, s_.keys);
    if (plan.b) read(task_.gg_k, b, g, 0, b_, s_.keys);
    if (plan.slope() || plan.grad) read(task_.v, b, g, 0, v_, s_.keys);
    if (plan.c) read(task_.gg_v, b, g, 0, c_, s_.keys);
    if (plan.k) sum_k_.zero_();
    if (plan.v) sum_v_.zero_();
    for (int64_t h = g * s_.group(); h < (g + 1) * s_.group(); ++h)
      for (int64_t block = split; block < task_.blocks; block += task_.splits)
        run_block(b, h, block * task_.block_rows);
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

  void read(const Rows& from, int64_t b, int64_t h, int64_t first, const Tensor& to, int64_t rows) {
    const int64_t cols = to.size(1);
    A* const out = pointer(to);
    for (int64_t i = 0; i < rows; ++i) read_piece(s_.dtype, from.at(b, h, first + i), out + i * cols, cols);
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

  // The buffers as matrices of a block's size; blocks of one size in a row find them made.
  void shape_views(int64_t rows, int64_t cols) {
    if (rows == rows_ && cols == cols_) return;
    rows_ = rows;
    cols_ = cols;
    for (int i = 0; i < 4; ++i) scores[i] = scores_[i].narrow(1, 0, rows * cols).view({rows, cols});
    for (int i = 0; i < 3; ++i) q_like[i] = q_like_[i].narrow(0, 0, rows);
    for (int i = 0; i < 2; ++i) grad_like[i] = grad_like_[i].narrow(0, 0, rows);
    k = k_.narrow(0, 0, cols);
    b = b_.narrow(0, 0, cols);
    v = v_.narrow(0, 0, cols);
    c = c_.narrow(0, 0, cols);
    sum_k = sum_k_.narrow(0, 0, cols);
    sum_v = sum_v_.narrow(0, 0, cols);
  }

  // out = scale x y, or out += scale x y
  static void multiply(const Tensor& x, const Tensor& y, const Tensor& out, bool add, double scale = 1) {
    Tensor(out).addmm_(x, y, add ? 1 : 0, scale);
  }

  void run_block(int64_t batch, int64_t head, int64_t first) {
    const auto& plan = task_.plan;
    const int64_t rows = std::min(task_.block_rows, s_.queries - first);
    const int64_t cols = task_.causal ? std::min(s_.keys, first + rows) : s_.keys;
    shape_views(rows, cols);
    const Tensor &s = scores[0], &t = scores[1], &dp = scores[2], &x = scores[3];
    const Tensor &q = q_like[0], &a = q_like[1], &out_q = q_like[2], &grad = grad_like[0], &out_grad = grad_like[1];
    read(task_.q, batch, head, first, q, rows);
    if (plan.a) read(task_.gg_q, batch, head, first, a, rows);
    if (plan.slope() || plan.mixed() || plan.v) read(task_.grad, batch, head, first, grad, rows);

    multiply(q, k.t(), s, false, task_.scale);
    if (plan.a) multiply(a, k.t(), t, false, task_.scale);
    if (plan.b) multiply(q, b.t(), t, plan.a, task_.scale);
    if (!plan.tangent()) Tensor(t).zero_();
    if (plan.slope())
      multiply(grad, v.t(), dp, false);
    else
      Tensor(dp).zero_();
    if (plan.mixed())
      multiply(grad, c.t(), x, false);
    else
      Tensor(x).zero_();
    scores_loop(batch, head, first);
    const Tensor &moved = s, &probability = t, &slope = dp, &bend = x;  // Pd, P, dS, W
    if (plan.grad) {
      if (plan.tangent()) multiply(moved, v, out_grad, false);
      if (plan.c) multiply(probability, c, out_grad, plan.tangent());
      write(out_grad, task_.result_grad, batch, head, first, rows);
    }
    if (plan.q) {
      multiply(bend, k, out_q, false, task_.scale);
      if (plan.b) multiply(slope, b, out_q, true, task_.scale);
      write(out_q, task_.result_q, batch, head, first, rows);
    }
    if (plan.k) {
      multiply(bend.t(), q, sum_k, true, task_.scale);
      if (plan.a) multiply(slope.t(), a, sum_k, true, task_.scale);
    }
    if (plan.v) multiply(moved.t(), grad, sum_v, true);
  }

  void scores_loop(int64_t batch, int64_t head, int64_t first) {
    A *s = pointer(scores[0]), *t = pointer(scores[1]), *dp = pointer(scores[2]), *x = pointer(scores[3]);
    const Tensor& mask = task_.mask;
    const A* mask_row = nullptr;
    if (mask.defined())
      mask_row = mask.const_data_ptr<A>() + batch * mask.stride(0) + head * mask.stride(1) + first * mask.stride(2);
    for (int64_t i = 0; i < rows_; ++i) {
      if (mask_row) rk::cpu::add_to_scores(s, mask_row + i * mask.stride(2), mask.stride(3), cols_);
      const int64_t valid = task_.causal ? std::min(cols_, first + i + 1) : cols_;
      rk::cpu::attention_row(s, t, dp, x, valid, cols_);
      for (A** row : {&s, &t, &dp, &x}) *row += cols_;
    }
  }

  const Task& task_;
  const AttentionShape& s_;
  Tensor k_, b_, v_, c_, sum_k_, sum_v_;         // [S, D or E]
  Tensor scores_[4], q_like_[3], grad_like_[2];  // a block's
  int64_t rows_ = -1, cols_ = -1;                // of the views below
  Tensor k, b, v, c, sum_k, sum_v, scores[4], q_like[3], grad_like[2];
};

template <class A>
void run_all(const Task& task) {
  const int64_t heads = task.shape.batch * task.shape.key_heads;
  const auto on_threads = [&](int64_t n, auto step) {
    at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
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
