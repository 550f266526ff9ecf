// softmax_cross_entropy on the CPU.  Formulas: math/softmax_cross_entropy.h.  One thread works a row in pieces that
// stay in its L1 cache, so a row is read from memory once, whatever the number of sweeps over it.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <tuple>

#include "../math/softmax_cross_entropy.h"
#include "../softmax_cross_entropy_arguments.h"
#include "pieces.h"
#include "softmax_cross_entropy_tiles.h"

namespace rk::cpu {
namespace {

// One row's numbers.  inverse_t: 1 / temperature.
template <class A>
struct RowState {
  A max, log_sum, total_q, grad, inverse_t, mean_u;
};

template <class A>
RK_MULTIVERSION A largest(const A* z, int64_t n) {
  return max_over<A>(n, -std::numeric_limits<A>::infinity(), [=](int64_t j) RK_INLINE_LAMBDA { return z[j]; });
}

template <class A>
RK_MULTIVERSION A sum_exp(const A* z, int64_t n, A inverse_t, A max) {
  return sum_over<A>(n, [=](int64_t j) RK_INLINE_LAMBDA { return exp_nonpositive(z[j] * inverse_t - max); });
}

// sum of q_c and of q_c (max - z_c / T); a null target is one of zeros
template <class A>
RK_MULTIVERSION void gaps(const A* z, const A* t, int64_t n, A inverse_t, A max, Smoothing<A> s, A& q_sum, A& gap_sum) {
  if (t)
    sums_over<A>(
        n, q_sum, gap_sum, [=](int64_t j) RK_INLINE_LAMBDA { return s.q(t[j]); },
        [=](int64_t j) RK_INLINE_LAMBDA { return cross_entropy_term(s.q(t[j]), max - z[j] * inverse_t); });
  else
    sums_over<A>(
        n, q_sum, gap_sum, [=](int64_t) RK_INLINE_LAMBDA { return s.floor; },
        [=](int64_t j) RK_INLINE_LAMBDA { return cross_entropy_term(s.floor, max - z[j] * inverse_t); });
}

template <class A>
RK_MULTIVERSION void probabilities(const A* z, A* p, int64_t n, RowState<A> r) {
  for (int64_t j = 0; j < n; ++j) p[j] = softmax_probability(z[j] * r.inverse_t, r.max, r.log_sum);
}

template <class A>
RK_MULTIVERSION A dot(const A* a, const A* b, int64_t n) {
  return sum_over<A>(n, [=](int64_t j) RK_INLINE_LAMBDA { return a[j] * b[j]; });
}

template <class A>
RK_MULTIVERSION A dot_q(const A* t, const A* u, int64_t n, Smoothing<A> s) {
  return t ? sum_over<A>(n, [=](int64_t j) RK_INLINE_LAMBDA { return s.q(t[j]) * u[j]; })
           : sum_over<A>(n, [=](int64_t j) RK_INLINE_LAMBDA { return s.floor * u[j]; });
}

template <class A>
RK_MULTIVERSION A sum_q(const A* t, int64_t n, Smoothing<A> s) {
  return sum_over<A>(n, [=](int64_t j) RK_INLINE_LAMBDA { return s.q(t[j]); });
}

template <class A>
RK_MULTIVERSION void slopes(const A* p, const A* t, A* __restrict__ out, int64_t n, Smoothing<A> s, RowState<A> r) {
  if (t)
    for (int64_t j = 0; j < n; ++j) out[j] = r.grad * cross_entropy_slope(p[j], s.q(t[j]), r.total_q, r.inverse_t);
  else
    for (int64_t j = 0; j < n; ++j) out[j] = r.grad * cross_entropy_slope(p[j], s.floor, r.total_q, r.inverse_t);
}

template <class A>
RK_MULTIVERSION void bends(const A* p, const A* u, A* __restrict__ out, int64_t n, RowState<A> r) {
  for (int64_t j = 0; j < n; ++j) out[j] = r.grad * cross_entropy_bend(p[j], u[j], r.mean_u, r.total_q, r.inverse_t);
}

struct CrossEntropyArguments {
  ScalarType dtype, target_dtype;
  int64_t rows, classes;
  const void *logits, *target, *gg;                 // gg: cotangent of grad_logits
  int64_t logits_stride, target_stride, gg_stride;  // elements between rows
  double label_smoothing, temperature;
  int64_t ignore_index;
  const void *grad, *statistics_in;  // [rows], [rows, 2]
  void *per_row, *statistics, *out;  // [rows], [rows, 2], [rows, classes]
  std::atomic<int64_t>* bad_row;     // a row whose class index does not exist
};

// One row of a matrix, read piece by piece in the accumulation type; without a copy where it is stored so.
template <class A>
struct Row {
  const char* base;
  ScalarType dtype;

  Row(const void* matrix, int64_t stride, int64_t row, ScalarType type)
      : base(matrix ? static_cast<const char*>(matrix) + row * stride * item_size(type) : nullptr), dtype(type) {}

  const A* piece(int64_t begin, int64_t end, A* buffer) const {
    if (!base) return nullptr;
    const char* from = base + begin * item_size(dtype);
    if (item_size(dtype) == sizeof(A)) return reinterpret_cast<const A*>(from);
    read_piece(dtype, from, buffer, end - begin);
    return buffer;
  }
};

template <class A, class F>
void write_row_piece(const CrossEntropyArguments& a, int64_t row, int64_t begin, int64_t end, const F& f) {
  char* to = static_cast<char*>(a.out) + (row * a.classes + begin) * item_size(a.dtype);
  alignas(64) A buffer[kPiece];
  A* piece = item_size(a.dtype) == sizeof(A) ? reinterpret_cast<A*>(to) : buffer;
  f(piece);
  if (piece == buffer) write_piece(a.dtype, buffer, to, end - begin);
}

template <class F>
void for_pieces(int64_t n, const F& f) {
  for (int64_t begin = 0; begin < n; begin += kPiece) f(begin, std::min(n, begin + kPiece));
}

// The target of one row: a class, a row of probabilities, or nothing to learn from.
template <class A>
struct Target {
  Row<A> probabilities;  // null for a class index
  int64_t index = -1;
  bool ignored = false;
  Smoothing<A> smoothing;

  Target(const CrossEntropyArguments& a, int64_t row)
      : probabilities(a.target_dtype == ScalarType::Long ? nullptr : a.target, a.target_stride, row, a.target_dtype),
        smoothing(A(a.label_smoothing), A(a.classes)) {
    if (a.target_dtype != ScalarType::Long) return;
    index = static_cast<const int64_t*>(a.target)[row];
    ignored = index == a.ignore_index;
    if (!ignored && (index < 0 || index >= a.classes)) {
      a.bad_row->store(row, std::memory_order_relaxed);
      ignored = true;
    }
  }

  A total_q(int64_t classes) const {
    if (!probabilities.base) return smoothing.keep + smoothing.floor * A(classes);
    alignas(64) A buffer[kPiece];
    double total = 0;
    for_pieces(classes, [&](int64_t begin, int64_t end) {
      total += sum_q(probabilities.piece(begin, end, buffer), end - begin, smoothing);
    });
    return A(total);
  }
};

template <class A>
void zero_row(const CrossEntropyArguments& a, int64_t row) {
  if (a.out)
    std::memset(static_cast<char*>(a.out) + row * a.classes * item_size(a.dtype), 0, a.classes * item_size(a.dtype));
  if (a.per_row) static_cast<A*>(a.per_row)[row] = A(0);
}

template <class A>
void value_row(const CrossEntropyArguments& a, int64_t row) {
  const Target<A> target(a, row);
  A* statistics = static_cast<A*>(a.statistics) + 2 * row;
  if (target.ignored) {
    statistics[0] = statistics[1] = A(0);
    return zero_row<A>(a, row);
  }
  const Row<A> z(a.logits, a.logits_stride, row, a.dtype);
  const A inverse_t = A(1 / a.temperature);
  alignas(64) A z_buffer[kPiece], t_buffer[kPiece];
  A max = -std::numeric_limits<A>::infinity();
  for_pieces(a.classes, [&](int64_t begin, int64_t end) {
    const A m = largest(z.piece(begin, end, z_buffer), end - begin);
    max = m > max || is_nan(m) ? m : max;
  });
  max *= inverse_t;
  const bool spread = target.probabilities.base || target.smoothing.floor != A(0);  // q has more than one class
  double sum = 0, total_q = 0, gap = 0;
  for_pieces(a.classes, [&](int64_t begin, int64_t end) {
    const A* piece = z.piece(begin, end, z_buffer);
    sum += sum_exp(piece, end - begin, inverse_t, max);
    if (spread) {
      A q = 0, g = 0;
      gaps(piece, target.probabilities.piece(begin, end, t_buffer), end - begin, inverse_t, max, target.smoothing, q,
           g);
      total_q += q, gap += g;
    }
    if (target.index >= begin && target.index < end) {
      total_q += target.smoothing.keep;
      gap += cross_entropy_term(target.smoothing.keep, max - piece[target.index - begin] * inverse_t);
    }
  });
  statistics[0] = max;
  statistics[1] = A(std::log(sum));
  static_cast<A*>(a.per_row)[row] = A(cross_entropy_value(std::log(sum), total_q, gap));
}

template <class A>
RowState<A> state_of(const CrossEntropyArguments& a, const Target<A>& target, int64_t row) {
  const A* statistics = static_cast<const A*>(a.statistics_in) + 2 * row;
  return {statistics[0],        statistics[1], target.total_q(a.classes), static_cast<const A*>(a.grad)[row],
          A(1 / a.temperature), A(0)};
}

template <class A>
void backward_row(const CrossEntropyArguments& a, int64_t row) {
  const Target<A> target(a, row);
  if (target.ignored) return zero_row<A>(a, row);
  const RowState<A> r = state_of(a, target, row);
  const Row<A> z(a.logits, a.logits_stride, row, a.dtype);
  alignas(64) A z_buffer[kPiece], t_buffer[kPiece], p[kPiece];
  for_pieces(a.classes, [&](int64_t begin, int64_t end) {
    probabilities(z.piece(begin, end, z_buffer), p, end - begin, r);
    write_row_piece<A>(a, row, begin, end, [&](A* out) {
      slopes(p, target.probabilities.piece(begin, end, t_buffer), out, end - begin, target.smoothing, r);
      const int64_t y = target.index - begin;
      if (y >= 0 && y < end - begin)
        out[y] = r.grad * cross_entropy_slope(p[y], target.smoothing.q(A(1)), r.total_q, r.inverse_t);
    });
  });
}

template <class A>
void double_backward_row(const CrossEntropyArguments& a, int64_t row) {
  const Target<A> target(a, row);
  if (target.ignored) return zero_row<A>(a, row);
  RowState<A> r = state_of(a, target, row);
  const Row<A> z(a.logits, a.logits_stride, row, a.dtype), u(a.gg, a.gg_stride, row, a.dtype);
  alignas(64) A z_buffer[kPiece], t_buffer[kPiece], u_buffer[kPiece], p[kPiece];
  double mean_u = 0, dot_qu = 0;
  for_pieces(a.classes, [&](int64_t begin, int64_t end) {
    const A* us = u.piece(begin, end, u_buffer);
    probabilities(z.piece(begin, end, z_buffer), p, end - begin, r);
    mean_u += dot(p, us, end - begin);
    dot_qu += dot_q(target.probabilities.piece(begin, end, t_buffer), us, end - begin, target.smoothing);
    const int64_t y = target.index - begin;
    if (y >= 0 && y < end - begin) dot_qu += target.smoothing.keep * us[y];
  });
  static_cast<A*>(a.per_row)[row] = A((double(r.total_q) * mean_u - dot_qu) * double(r.inverse_t));
  r.mean_u = A(mean_u);
  for_pieces(a.classes, [&](int64_t begin, int64_t end) {
    const A* us = u.piece(begin, end, u_buffer);
    if (a.classes > kPiece) probabilities(z.piece(begin, end, z_buffer), p, end - begin, r);
    write_row_piece<A>(a, row, begin, end, [&](A* out) { bends(p, us, out, end - begin, r); });
  });
}

// Rows [first, first + tile.rows) of a matrix, stored as `dtype`, into `to`.
template <class A>
void fill_tile(const void* matrix, int64_t stride, ScalarType dtype, int64_t first, const Tile<A>& tile, A* to) {
  A buffer[kTileClasses * kTileRows];
  const char* from = static_cast<const char*>(matrix) + first * stride * item_size(dtype);
  if (item_size(dtype) == sizeof(A)) return into_tile(reinterpret_cast<const A*>(from), stride, tile, to);
  if (stride == tile.classes)
    read_piece(dtype, from, buffer, tile.rows * tile.classes);
  else
    for (int64_t k = 0; k < tile.rows; ++k)
      read_piece(dtype, from + k * stride * item_size(dtype), buffer + k * tile.classes, tile.classes);
  into_tile(buffer, tile.classes, tile, to);
}

template <class A>
void write_tile(const CrossEntropyArguments& a, int64_t first, const Tile<A>& tile) {
  A buffer[kTileClasses * kTileRows];
  char* to = static_cast<char*>(a.out) + first * a.classes * item_size(a.dtype);
  if (item_size(a.dtype) == sizeof(A)) return out_of_tile(tile, reinterpret_cast<A*>(to));
  out_of_tile(tile, buffer);
  write_piece(a.dtype, buffer, to, tile.rows * tile.classes);
}

enum class Order { kValue, kBackward, kDoubleBackward };

template <bool kSoft, class A>
void compute_tile(Order order, Tile<A>& tile, Smoothing<A> smoothing, A inverse_t) {
  switch (order) {
    case Order::kValue: return tile_value<kSoft>(tile, smoothing, inverse_t);
    case Order::kBackward: return tile_backward<kSoft>(tile, smoothing, inverse_t);
    case Order::kDoubleBackward: return tile_double_backward<kSoft>(tile, smoothing, inverse_t);
  }
}

template <class A>
void run_tile(const CrossEntropyArguments& a, Order order, int64_t first, int64_t rows) {
  Tile<A> tile;
  const Smoothing<A> smoothing(A(a.label_smoothing), A(a.classes));
  const A inverse_t = A(1 / a.temperature);
  bool ignored[kTileRows] = {};
  tile.rows = rows;
  tile.classes = a.classes;
  tile.soft = a.target_dtype != ScalarType::Long;
  fill_tile(a.logits, a.logits_stride, a.dtype, first, tile, tile.z);
  if (tile.soft) fill_tile(a.target, a.target_stride, a.target_dtype, first, tile, tile.t);
  for (int64_t k = 0; k < kTileRows; ++k) {
    const bool row_exists = k < rows;
    if (row_exists && !tile.soft) {
      const Target<A> target(a, first + k);
      ignored[k] = target.ignored;
      tile.y[k] = A(target.index);
    }
    if (order == Order::kValue) continue;
    tile.max[k] = row_exists ? static_cast<const A*>(a.statistics_in)[2 * (first + k)] : A(0);
    tile.log_sum[k] = row_exists ? static_cast<const A*>(a.statistics_in)[2 * (first + k) + 1] : A(0);
    tile.grad[k] = row_exists ? static_cast<const A*>(a.grad)[first + k] : A(0);
  }
  if (order == Order::kDoubleBackward) fill_tile(a.gg, a.gg_stride, a.dtype, first, tile, tile.u);
  tile.soft ? compute_tile<true>(order, tile, smoothing, inverse_t)
            : compute_tile<false>(order, tile, smoothing, inverse_t);
  if (order != Order::kValue) write_tile(a, first, tile);
  for (int64_t k = 0; k < rows; ++k) {
    if (order == Order::kValue) {
      A* statistics = static_cast<A*>(a.statistics) + 2 * (first + k);
      statistics[0] = ignored[k] ? A(0) : tile.max[k];
      statistics[1] = ignored[k] ? A(0) : tile.log_sum[k];
    }
    if (ignored[k])
      zero_row<A>(a, first + k);
    else if (order != Order::kBackward)
      static_cast<A*>(a.per_row)[first + k] = tile.per_row[k];
  }
}

template <class A>
void run_row(const CrossEntropyArguments& a, Order order, int64_t row) {
  switch (order) {
    case Order::kValue: return value_row<A>(a, row);
    case Order::kBackward: return backward_row<A>(a, row);
    case Order::kDoubleBackward: return double_backward_row<A>(a, row);
  }
}

template <class A>
void run_rows(const CrossEntropyArguments& a, Order order) {
  // Transposing an output back costs more than the sums across lanes that it saves, but for short rows.
  const int64_t most = order == Order::kValue ? kTileClasses : kTileClasses / 4;
  const int64_t at_once = a.classes <= most ? kTileRows : 1, units = (a.rows + at_once - 1) / at_once;
  torch::stable::parallel_for(0, units, rows_per_thread(at_once * a.classes), [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit)
      if (at_once == 1)
        run_row<A>(a, order, unit);
      else
        run_tile<A>(a, order, unit * at_once, std::min(at_once, a.rows - unit * at_once));
  });
}

void run(const CrossEntropyArguments& a, Order order) {
  visit_accumulation(a.dtype, [&]<class A>(A) { run_rows<A>(a, order); });
}

// The tensors of one call, in the form that the rows read.
class CrossEntropyTensors {
 public:
  CrossEntropyArguments a{};

  CrossEntropyTensors(const char* op, const Tensor& logits, const Tensor& target, double label_smoothing,
                      double temperature, int64_t ignore_index)
      : op_(op), logits_(with_dense_rows(logits)), target_(dense_target(target)) {
    check_cross_entropy(op, logits, target, label_smoothing, temperature);
    a.dtype = logits.scalar_type();
    a.target_dtype = target.scalar_type();
    a.rows = logits.size(0);
    a.classes = logits.size(1);
    a.logits = logits_.data_ptr();
    a.logits_stride = logits_.stride(0);
    a.target = target_.data_ptr();
    a.target_stride = target_.dim() ? target_.stride(0) : 0;
    a.label_smoothing = label_smoothing;
    a.temperature = temperature;
    a.ignore_index = ignore_index;
    a.bad_row = &bad_row_;
  }
  CrossEntropyTensors(const CrossEntropyTensors&) = delete;

  void set_grad(const Tensor& grad, const Tensor& statistics) {
    check_statistics(op_, grad, statistics, logits_);
    grad_ = torch::stable::contiguous(grad);
    statistics_ = torch::stable::contiguous(statistics);
    a.grad = grad_->data_ptr();
    a.statistics_in = statistics_->data_ptr();
  }

  void set_gg(const Tensor& gg) {
    check_tensor(op_, "gg_logits", gg, sizes_of(logits_), a.dtype, logits_);
    gg_ = with_dense_rows(gg);
    a.gg = gg_->data_ptr();
    a.gg_stride = gg_->stride(0);
  }

  void raise_if_bad() const {
    const int64_t row = bad_row_.load();
    if (row < 0) return;
    const int64_t index = static_cast<const int64_t*>(a.target)[row];
    fail(op_, ": target[", row, "] is class ", index, ", but there are ", a.classes, " classes and ignore_index is ",
         a.ignore_index);
  }

 private:
  static Tensor dense_target(const Tensor& t) {
    return t.dim() == 2 ? with_dense_rows(t) : torch::stable::contiguous(t);
  }

  const char* op_;
  Tensor logits_, target_;
  std::optional<Tensor> grad_, statistics_, gg_;
  std::atomic<int64_t> bad_row_{-1};
};

std::tuple<Tensor, Tensor> softmax_cross_entropy(Tensor logits, Tensor target, double label_smoothing,
                                                 double temperature, int64_t ignore_index) {
  CrossEntropyTensors t("softmax_cross_entropy", logits, target, label_smoothing, temperature, ignore_index);
  const ScalarType accumulation = accumulation_type(logits.scalar_type());
  Tensor loss = torch::stable::new_empty(logits, {logits.size(0)}, accumulation);
  Tensor statistics = torch::stable::new_empty(logits, {logits.size(0), 2}, accumulation);
  t.a.per_row = loss.data_ptr();
  t.a.statistics = statistics.data_ptr();
  run(t.a, Order::kValue);
  t.raise_if_bad();
  return {loss, statistics};
}

Tensor softmax_cross_entropy_backward(Tensor grad, Tensor logits, Tensor statistics, Tensor target,
                                      double label_smoothing, double temperature, int64_t ignore_index) {
  CrossEntropyTensors t("softmax_cross_entropy_backward", logits, target, label_smoothing, temperature, ignore_index);
  t.set_grad(grad, statistics);
  Tensor grad_logits = torch::stable::new_empty(logits, {logits.size(0), logits.size(1)});
  t.a.out = grad_logits.data_ptr();
  run(t.a, Order::kBackward);
  t.raise_if_bad();
  return grad_logits;
}

std::tuple<Tensor, Tensor> softmax_cross_entropy_double_backward(Tensor gg_logits, Tensor grad, Tensor logits,
                                                                 Tensor statistics, Tensor target,
                                                                 double label_smoothing, double temperature,
                                                                 int64_t ignore_index) {
  CrossEntropyTensors t("softmax_cross_entropy_double_backward", logits, target, label_smoothing, temperature,
                        ignore_index);
  t.set_grad(grad, statistics);
  t.set_gg(gg_logits);
  Tensor gg_grad = torch::stable::new_empty(logits, {logits.size(0)}, accumulation_type(logits.scalar_type()));
  Tensor grad_logits = torch::stable::new_empty(logits, {logits.size(0), logits.size(1)});
  t.a.per_row = gg_grad.data_ptr();
  t.a.out = grad_logits.data_ptr();
  run(t.a, Order::kDoubleBackward);
  t.raise_if_bad();
  return {gg_grad, grad_logits};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(robustkern, CPU, m) {
  m.impl("softmax_cross_entropy", TORCH_BOX(&softmax_cross_entropy));
  m.impl("softmax_cross_entropy_backward", TORCH_BOX(&softmax_cross_entropy_backward));
  m.impl("softmax_cross_entropy_double_backward", TORCH_BOX(&softmax_cross_entropy_double_backward));
}

}  // namespace rk::cpu
