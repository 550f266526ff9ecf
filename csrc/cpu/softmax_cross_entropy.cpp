// softmax_cross_entropy on the CPU.  Formulas: math/softmax_cross_entropy.h.  One thread works a row in pieces that
// stay in its L1 cache, so a row is read from memory once, whatever the number of sweeps over it.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <tuple>
#include <vector>

#include "../math/softmax_cross_entropy.h"
#include "../arguments/softmax_cross_entropy.h"
#include "logits.h"

namespace rk::cpu {
namespace {

// One row's numbers.  inverse_t: 1 / temperature.
template <class A>
struct RowState {
  A max, log_sum, total_q, grad, inverse_t, mean_u;
};

// f(q), where q(j) is the target's share of class j; a null target is one of zeros.
template <class A, class F>
auto with_target(const A* t, Smoothing<A> s, const F& f) {
  return t ? f([=](int64_t j) RK_INLINE_LAMBDA { return s.q(t[j]); })
           : f([=](int64_t) RK_INLINE_LAMBDA { return s.floor; });
}

template <class A>
void probabilities(const A* z, A* p, int64_t n, RowState<A> r) {
  vector_write(n, p,
               [=](int64_t j) RK_INLINE_LAMBDA { return softmax_probability(z[j] * r.inverse_t, r.max, r.log_sum); });
}

// Few classes: a tile of rows, transposed, so that a lane is a row.
template <class A>
struct Tile {
  alignas(64) TileMatrix<A> z, t, u, out;  // logits, probabilities, cotangent of grad_logits, result
  TileColumn<A> y;                         // the class, where there are no probabilities
  TileColumn<A> max, log_sum, grad, per_row, total_q;
  int64_t classes;
};

template <bool kSoft, class A>
RK_HOST_DEVICE A tile_q(const Tile<A>& w, Smoothing<A> s, int64_t c, int k) {
  if constexpr (kSoft) return s.q(w.t[c * kTileRows + k]);
  return w.y[k] == A(c) ? s.q(A(1)) : s.floor;
}

// per_row = loss
template <bool kSoft, class A>
RK_MULTIVERSION void tile_value(Tile<A>& w, Smoothing<A> s, A inverse_t) {
  A max[kTileRows], sum[kTileRows] = {}, total_q[kTileRows] = {}, gap[kTileRows] = {};
  tile_max(w.z, w.classes, inverse_t, max);
  for (int64_t c = 0; c < w.classes; ++c)
    for (int k = 0; k < kTileRows; ++k) {
      const A scaled = w.z[c * kTileRows + k] * inverse_t, q = tile_q<kSoft>(w, s, c, k);
      sum[k] += exp_nonpositive(scaled - max[k]);
      gap[k] += cross_entropy_term(q, max[k] - scaled);
      total_q[k] += q;
    }
  for (int k = 0; k < kTileRows; ++k) {
    const A log_sum = log_from_one(sum[k]);
    w.max[k] = max[k];
    w.log_sum[k] = log_sum;
    w.per_row[k] = cross_entropy_value(log_sum, total_q[k], gap[k]);
  }
}

template <bool kSoft, class A>
RK_HOST_DEVICE void tile_total_q(Tile<A>& w, Smoothing<A> s) {
  for (int k = 0; k < kTileRows; ++k) w.total_q[k] = kSoft ? A(0) : s.keep + s.floor * A(w.classes);
  if constexpr (kSoft)
    for (int64_t c = 0; c < w.classes; ++c)
      for (int k = 0; k < kTileRows; ++k) w.total_q[k] += s.q(w.t[c * kTileRows + k]);
}

// out = grad_logits
template <bool kSoft, class A>
RK_MULTIVERSION void tile_backward(Tile<A>& w, Smoothing<A> s, A inverse_t) {
  tile_total_q<kSoft>(w, s);
  for (int64_t c = 0; c < w.classes; ++c)
    for (int k = 0; k < kTileRows; ++k) {
      const A p = softmax_probability(w.z[c * kTileRows + k] * inverse_t, w.max[k], w.log_sum[k]);
      const A q = tile_q<kSoft>(w, s, c, k);
      w.out[c * kTileRows + k] = w.grad[k] * cross_entropy_slope(p, q, w.total_q[k], inverse_t);
    }
}

// per_row = gg_grad, out = grad_logits.  Sums in double: gg_grad is the difference of two of them.
template <bool kSoft, class A>
RK_MULTIVERSION void tile_double_backward(Tile<A>& w, Smoothing<A> s, A inverse_t) {
  double mean_u[kTileRows] = {}, dot_qu[kTileRows] = {};
  tile_total_q<kSoft>(w, s);
  for (int64_t c = 0; c < w.classes; ++c)
    for (int k = 0; k < kTileRows; ++k) {
      const A p = softmax_probability(w.z[c * kTileRows + k] * inverse_t, w.max[k], w.log_sum[k]);
      const A u = w.u[c * kTileRows + k];
      w.out[c * kTileRows + k] = p;
      mean_u[k] += double(p) * double(u);
      dot_qu[k] += double(tile_q<kSoft>(w, s, c, k)) * double(u);
    }
  A mean[kTileRows];
  for (int k = 0; k < kTileRows; ++k) {
    w.per_row[k] = A((double(w.total_q[k]) * mean_u[k] - dot_qu[k]) * double(inverse_t));
    mean[k] = A(mean_u[k]);
  }
  for (int64_t c = 0; c < w.classes; ++c)
    for (int k = 0; k < kTileRows; ++k) {
      const A p = w.out[c * kTileRows + k], u = w.u[c * kTileRows + k];
      w.out[c * kTileRows + k] = w.grad[k] * cross_entropy_bend(p, u, mean[k], w.total_q[k], inverse_t);
    }
}

// The tensors of a call; numbers per row are in the accumulation type.
template <class A>
class CrossEntropyArguments {
 public:
  int64_t rows, classes, ignore_index;
  InputRows logits, u;             // u: cotangent of grad_logits
  const int64_t* index = nullptr;  // [rows], or the target is
  InputRows probabilities;         // [rows, classes]
  Smoothing<A> smoothing;
  A inverse_t;                                        // 1 / temperature
  const A *grad = nullptr, *statistics_in = nullptr;  // [rows], [rows, 2]
  A *per_row = nullptr, *statistics = nullptr;        // [rows], [rows, 2]
  Output out;                                         // [rows, classes]

  CrossEntropyArguments(const Tensor& z, const Tensor& target, double label_smoothing, double temperature,
                        int64_t ignored)
      : rows(z.size(0)),
        classes(z.size(1)),
        ignore_index(ignored),
        smoothing(A(label_smoothing), A(classes)),
        inverse_t(A(1 / temperature)) {
    logits = InputRows(keep(with_dense_rows(z)));
    if (target.scalar_type() == ScalarType::Long)
      index = pointer<int64_t>(keep(torch::stable::contiguous(target)));
    else
      probabilities = InputRows(keep(with_dense_rows(target)));
  }

  const Tensor& keep(const Tensor& t) { return kept_.emplace_back(t); }

  void set_grad(const Tensor& grad_of_loss, const Tensor& s) {
    grad = pointer<A>(keep(torch::stable::contiguous(grad_of_loss)));
    statistics_in = pointer<A>(keep(torch::stable::contiguous(s)));
  }

  // Whether there is nothing to learn from a row.
  bool ignored(int64_t row) const {
    if (!index) return false;
    if (index[row] == ignore_index) return true;
    if (index[row] >= 0 && index[row] < classes) return false;
    bad_row_.store(row, std::memory_order_relaxed);
    return true;
  }

  void raise_if_bad(const char* op) const {
    const int64_t row = bad_row_.load();
    if (row < 0) return;
    fail(op, ": target[", row, "] is class ", index[row], ", but there are ", classes, " classes and ignore_index is ",
         ignore_index);
  }

 private:
  std::vector<Tensor> kept_;
  mutable std::atomic<int64_t> bad_row_{-1};  // whose class index does not exist
};

// Pieces of one row in the accumulation type.
template <class A>
struct Row {
  // Side by side: where one began a little behind another in its page, loads would wait for stores.
  Buffer<A> p, z_buffer, t_buffer, u_buffer, out_buffer;
  const CrossEntropyArguments<A>& a;
  int64_t row;

  Row(const CrossEntropyArguments<A>& arguments, int64_t number) : a(arguments), row(number) {}

  const A* z(int64_t begin, int64_t n) { return a.logits.read(row, begin, n, z_buffer); }
  const A* u(int64_t begin, int64_t n) { return a.u.read(row, begin, n, u_buffer); }
  // Null for a class index.
  const A* t(int64_t begin, int64_t n) { return a.index ? nullptr : a.probabilities.read(row, begin, n, t_buffer); }
  // Where in the piece the row's class is, or -1.
  int64_t y(int64_t begin, int64_t n) const {
    return a.index && a.index[row] >= begin && a.index[row] < begin + n ? a.index[row] - begin : -1;
  }
  template <class F>
  void write(int64_t begin, int64_t n, const F& f) {
    a.out.write(row * a.classes + begin, n, out_buffer, f);
  }

  RowState<A> state() {
    const A* const s = a.statistics_in + 2 * row;
    return {s[0], s[1], total_q(), a.grad[row], a.inverse_t, A(0)};
  }

 private:
  A total_q() {
    if (a.index) return a.smoothing.keep + a.smoothing.floor * A(a.classes);
    double total = 0;
    for_pieces(a.classes, [&](int64_t begin, int64_t n) {
      const A* const target = t(begin, n);
      total += vector_sum<A>(n, [=, s = a.smoothing](int64_t j) RK_INLINE_LAMBDA { return s.q(target[j]); });
    });
    return A(total);
  }
};

template <class A>
void zero_row(const CrossEntropyArguments<A>& a, int64_t row) {
  Buffer<A> buffer;
  if (a.out)
    for_pieces(a.classes, [&](int64_t begin, int64_t n) {
      a.out.write(row * a.classes + begin, n, buffer, [&](A* out) { std::fill_n(out, n, A(0)); });
    });
  if (a.per_row) a.per_row[row] = A(0);
}

template <class A>
void value_row(const CrossEntropyArguments<A>& a, int64_t row) {
  A* const statistics = a.statistics + 2 * row;
  if (a.ignored(row)) {
    statistics[0] = statistics[1] = A(0);
    return zero_row(a, row);
  }
  Row<A> w(a, row);
  const A max = row_max(a.classes, a.inverse_t, [&](int64_t begin, int64_t n) { return w.z(begin, n); });
  const bool spread = !a.index || a.smoothing.floor != A(0);  // q has more than one class
  double sum = 0, total_q = 0, gap = 0;
  for_pieces(a.classes, [&](int64_t begin, int64_t n) {
    const A* z = w.z(begin, n);
    sum += sum_exp(z, n, a.inverse_t, max);
    if (spread) {
      A q_sum, gap_sum;  // of q_c, and of q_c (max - z_c / T)
      with_target(w.t(begin, n), a.smoothing, [&](const auto& q) {
        const auto term = [=, inverse_t = a.inverse_t](int64_t j)
                              RK_INLINE_LAMBDA { return cross_entropy_term(q(j), max - z[j] * inverse_t); };
        vector_sums<A>(n, q_sum, gap_sum, q, term);
      });
      total_q += q_sum;
      gap += gap_sum;
    }
    if (const int64_t y = w.y(begin, n); y >= 0) {
      total_q += a.smoothing.keep;
      gap += cross_entropy_term(a.smoothing.keep, max - z[y] * a.inverse_t);
    }
  });
  statistics[0] = max;
  statistics[1] = A(std::log(sum));
  a.per_row[row] = A(cross_entropy_value(std::log(sum), total_q, gap));
}

template <class A>
void backward_row(const CrossEntropyArguments<A>& a, int64_t row) {
  if (a.ignored(row)) return zero_row(a, row);
  Row<A> w(a, row);
  const RowState<A> r = w.state();
  A* const p = w.p.element;
  for_pieces(a.classes, [&](int64_t begin, int64_t n) {
    probabilities(w.z(begin, n), p, n, r);
    w.write(begin, n, [&](A* out) {
      with_target(w.t(begin, n), a.smoothing, [&](const auto& q) {
        vector_write(n, out, [=](int64_t j) RK_INLINE_LAMBDA {
          return r.grad * cross_entropy_slope(p[j], q(j), r.total_q, r.inverse_t);
        });
      });
      if (const int64_t y = w.y(begin, n); y >= 0)
        out[y] = r.grad * cross_entropy_slope(p[y], a.smoothing.q(A(1)), r.total_q, r.inverse_t);
    });
  });
}

template <class A>
void double_backward_row(const CrossEntropyArguments<A>& a, int64_t row) {
  if (a.ignored(row)) return zero_row(a, row);
  Row<A> w(a, row);
  RowState<A> r = w.state();
  A* const p = w.p.element;
  double mean_u = 0, dot_qu = 0;
  for_pieces(a.classes, [&](int64_t begin, int64_t n) {
    const A* u = w.u(begin, n);
    probabilities(w.z(begin, n), p, n, r);
    mean_u += dot(p, u, n);
    dot_qu += with_target(w.t(begin, n), a.smoothing, [&](const auto& q) {
      return vector_sum<A>(n, [=](int64_t j) RK_INLINE_LAMBDA { return q(j) * u[j]; });
    });
    if (const int64_t y = w.y(begin, n); y >= 0) dot_qu += a.smoothing.keep * u[y];
  });
  a.per_row[row] = A((double(r.total_q) * mean_u - dot_qu) * double(r.inverse_t));
  r.mean_u = A(mean_u);
  for_pieces(a.classes, [&](int64_t begin, int64_t n) {
    const A* u = w.u(begin, n);
    if (a.classes > kPiece) probabilities(w.z(begin, n), p, n, r);
    w.write(begin, n, [&](A* out) {
      vector_write(n, out, [=](int64_t j) RK_INLINE_LAMBDA {
        return r.grad * cross_entropy_bend(p[j], u[j], r.mean_u, r.total_q, r.inverse_t);
      });
    });
  });
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
void run_tile(const CrossEntropyArguments<A>& a, Order order, int64_t first, int64_t rows) {
  Tile<A> tile;
  bool ignored[kTileRows] = {};
  tile.classes = a.classes;
  const auto fill = [&](const InputRows& from, A* to) {
    fill_tile(from.elements, from.stride, a.classes, first, rows, to);
  };
  fill(a.logits, tile.z);
  if (!a.index) fill(a.probabilities, tile.t);
  for (int64_t k = 0; k < kTileRows; ++k) {
    const bool row_exists = k < rows;
    const int64_t row = first + k;
    if (row_exists && a.index) {
      ignored[k] = a.ignored(row);
      tile.y[k] = A(a.index[row]);
    }
    if (order == Order::kValue) continue;
    tile.max[k] = row_exists ? a.statistics_in[2 * row] : A(0);
    tile.log_sum[k] = row_exists ? a.statistics_in[2 * row + 1] : A(0);
    tile.grad[k] = row_exists ? a.grad[row] : A(0);
  }
  if (order == Order::kDoubleBackward) fill(a.u, tile.u);
  a.index ? compute_tile<false>(order, tile, a.smoothing, a.inverse_t)
          : compute_tile<true>(order, tile, a.smoothing, a.inverse_t);
  if (order != Order::kValue) write_tile(a.out, a.classes, first, rows, tile.out);
  for (int64_t k = 0; k < rows; ++k) {
    if (order == Order::kValue) {
      A* const statistics = a.statistics + 2 * (first + k);
      statistics[0] = ignored[k] ? A(0) : tile.max[k];
      statistics[1] = ignored[k] ? A(0) : tile.log_sum[k];
    }
    if (ignored[k])
      zero_row(a, first + k);
    else if (order != Order::kBackward)
      a.per_row[first + k] = tile.per_row[k];
  }
}

template <class A>
void run(const char* op, const CrossEntropyArguments<A>& a, Order order) {
  // Transposing an output back costs more than the sums across lanes that it saves, but for short rows.
  const int64_t most = order == Order::kValue ? kTileClasses : kTileClasses / 4;
  const int64_t at_once = a.classes <= most ? kTileRows : 1, units = (a.rows + at_once - 1) / at_once;
  torch::stable::parallel_for(0, units, rows_per_thread(at_once * a.classes), [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit)
      if (at_once > 1) {
        run_tile(a, order, unit * at_once, std::min(at_once, a.rows - unit * at_once));
      } else {
        switch (order) {
          case Order::kValue: value_row(a, unit); break;
          case Order::kBackward: backward_row(a, unit); break;
          case Order::kDoubleBackward: double_backward_row(a, unit); break;
        }
      }
  });
  a.raise_if_bad(op);
}

std::tuple<Tensor, Tensor> softmax_cross_entropy(Tensor logits, Tensor target, double label_smoothing,
                                                 double temperature, int64_t ignore_index) {
  const char* op = "softmax_cross_entropy";
  check_cross_entropy(op, logits, target, label_smoothing, temperature);
  const ScalarType accumulation = accumulation_type(logits.scalar_type());
  Tensor loss = torch::stable::new_empty(logits, {logits.size(0)}, accumulation);
  Tensor statistics = torch::stable::new_empty(logits, {logits.size(0), 2}, accumulation);
  visit_accumulation(logits.scalar_type(), [&]<class A>(A) {
    CrossEntropyArguments<A> a(logits, target, label_smoothing, temperature, ignore_index);
    a.per_row = pointer<A>(loss);
    a.statistics = pointer<A>(statistics);
    run(op, a, Order::kValue);
  });
  return {loss, statistics};
}

Tensor softmax_cross_entropy_backward(Tensor grad, Tensor logits, Tensor statistics, Tensor target,
                                      double label_smoothing, double temperature, int64_t ignore_index) {
  const char* op = "softmax_cross_entropy_backward";
  check_cross_entropy(op, logits, target, label_smoothing, temperature);
  check_statistics(op, grad, statistics, logits);
  Tensor grad_logits = torch::stable::new_empty(logits, {logits.size(0), logits.size(1)});
  visit_accumulation(logits.scalar_type(), [&]<class A>(A) {
    CrossEntropyArguments<A> a(logits, target, label_smoothing, temperature, ignore_index);
    a.set_grad(grad, statistics);
    a.out = Output(grad_logits, true, false);
    run(op, a, Order::kBackward);
  });
  return grad_logits;
}

std::tuple<Tensor, Tensor> softmax_cross_entropy_double_backward(Tensor u, Tensor grad, Tensor logits,
                                                                 Tensor statistics, Tensor target,
                                                                 double label_smoothing, double temperature,
                                                                 int64_t ignore_index) {
  const char* op = "softmax_cross_entropy_double_backward";
  check_cross_entropy(op, logits, target, label_smoothing, temperature);
  check_statistics(op, grad, statistics, logits);
  check_tensor(op, "u", u, sizes_of(logits), logits.scalar_type(), logits);
  Tensor gg_grad = torch::stable::new_empty(logits, {logits.size(0)}, accumulation_type(logits.scalar_type()));
  Tensor grad_logits = torch::stable::new_empty(logits, {logits.size(0), logits.size(1)});
  visit_accumulation(logits.scalar_type(), [&]<class A>(A) {
    CrossEntropyArguments<A> a(logits, target, label_smoothing, temperature, ignore_index);
    a.set_grad(grad, statistics);
    a.u = InputRows(a.keep(with_dense_rows(u)));
    a.per_row = pointer<A>(gg_grad);
    a.out = Output(grad_logits, true, false);
    run(op, a, Order::kDoubleBackward);
  });
  return {gg_grad, grad_logits};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(robustkern, CPU, m) {
  m.impl("softmax_cross_entropy", TORCH_BOX(&softmax_cross_entropy));
  m.impl("softmax_cross_entropy_backward", TORCH_BOX(&softmax_cross_entropy_backward));
  m.impl("softmax_cross_entropy_double_backward", TORCH_BOX(&softmax_cross_entropy_double_backward));
}

}  // namespace rk::cpu
