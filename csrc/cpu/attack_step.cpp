// attack_step on the CPU, in place.  Formulas: math/attack_step.h.  A row stays in the cache between its passes: one for
// linf, two for l2, for l1 as many as its threshold takes.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <functional>
#include <optional>

#include "../arguments/attack.h"
#include "../math/attack_step.h"
#include "attack_rows.h"

namespace rk::cpu {
namespace {

// A piece of a row.
template <class A>
struct AttackPiece {
  const A *adversary, *grad, *x;  // grad: null without a step
  const A *eps, *step;            // for each column
  A* out;
  A scale;  // of the steps
  int64_t n;
};

template <bool kGrad, class A>
RK_HOST_DEVICE void linf_loop(const AttackPiece<A>& w) {
  const A *adversary = w.adversary, *grad = w.grad, *x = w.x, *eps = w.eps, *step = w.step;
  A* out = w.out;
  for (int64_t j = 0; j < w.n; ++j) {
    const Interval<A> to = linf_interval(x[j], eps[j]);
    out[j] = linf_step(adversary[j], kGrad ? grad[j] : A(0), step[j] * w.scale, to);
  }
}

template <bool kGrad, class A>
RK_HOST_DEVICE void l2_loop(const AttackPiece<A>& w, const L2Step<A>& s) {
  const A *adversary = w.adversary, *grad = w.grad, *x = w.x;
  A* out = w.out;
  for (int64_t j = 0; j < w.n; ++j) out[j] = l2_step(adversary[j], x[j], kGrad ? grad[j] : A(0), s);
}

template <class A>
RK_MULTIVERSION void linf_piece(const AttackPiece<A>& w) {
  w.grad ? linf_loop<true>(w) : linf_loop<false>(w);
}

template <class A>
RK_MULTIVERSION void l2_piece(const AttackPiece<A>& w, const L2Step<A>& s) {
  w.grad ? l2_loop<true>(w, s) : l2_loop<false>(w, s);
}

template <class A>
RK_MULTIVERSION double sum_dd(const A* a, const A* x, int64_t n) {
  return sum_over<double>(n, [=](int64_t j) RK_INLINE_LAMBDA {
    const double d = double(a[j]) - double(x[j]);
    return d * d;
  });
}

template <class A>
RK_MULTIVERSION void sum_g(const A* g, const A* a, const A* x, double scale, int64_t n, double& gg, double& gd) {
  sums_over<double>(
      n, gg, gd,
      [=](int64_t j) RK_INLINE_LAMBDA {
        const double v = double(without_nan(g[j])) * scale;
        return v * v;
      },
      [=](int64_t j) RK_INLINE_LAMBDA { return double(without_nan(g[j])) * scale * (double(a[j]) - double(x[j])); });
}

template <class A>
RK_MULTIVERSION A largest_of(const A* g, int64_t n) {
  return max_over<A>(n, A(0), [=](int64_t j) RK_INLINE_LAMBDA { return absolute(without_nan(g[j])); });
}

template <class A>
RK_MULTIVERSION void l1_sizes(const A* a, const A* g, A* size, int64_t n) {
  for (int64_t j = 0; j < n; ++j) size[j] = l1_size(a[j], g[j]);
}

template <class A>
RK_MULTIVERSION void l1_move(const A* a, const A* g, A least, A step, A* moved, int64_t n) {
  for (int64_t j = 0; j < n; ++j) moved[j] = l1_moved(a[j], g[j], least, step);
}

template <class A>
RK_MULTIVERSION double l1_total(const A* moved, const A* x, A t, int64_t n) {
  return sum_over<double>(n, [=](int64_t j) RK_INLINE_LAMBDA { return double(l1_length(moved[j] - x[j], x[j], t)); });
}

template <class A>
RK_MULTIVERSION double l1_inside(const A* moved, const A* x, A t, int64_t n) {
  return sum_over<double>(n, [=](int64_t j) RK_INLINE_LAMBDA {
    const A v = moved[j] - x[j], size = absolute(v) - t;
    return size > A(0) && size < l1_room(v, x[j]) ? 1.0 : 0.0;
  });
}

template <class A>
RK_MULTIVERSION A l1_farthest(const A* moved, const A* x, int64_t n) {
  return max_over<A>(n, A(0), [=](int64_t j) RK_INLINE_LAMBDA { return absolute(moved[j] - x[j]); });
}

template <class A>
RK_MULTIVERSION void l1_piece(const A* moved, const A* x, A t, A* out, int64_t n) {
  for (int64_t j = 0; j < n; ++j) out[j] = l1_point(moved[j], x[j], t);
}

template <class A>
class Step {
 public:
  Step(const Tensor& adversary, const Tensor& x, const std::optional<Tensor>& grad, const Tensor& eps,
       const Tensor& step, const std::optional<Tensor>& scale, int64_t inner, Ball ball, int64_t coordinates)
      : ball_(ball),
        columns_(adversary.size(1)),
        coordinates_(std::min(coordinates, columns_)),
        adversary_(adversary),
        x_(x),
        grad_(grad ? *grad : x),
        out_(adversary),
        has_grad_(grad.has_value()),
        eps_(eps, inner, columns_),
        step_(step, inner, columns_),
        scale_(pointer<A>(scale)) {}

  // Pieces of rows for linf, else whole rows.
  int64_t units(int64_t rows) const { return ball_ == Ball::kLinf ? rows * pieces() : rows; }
  int64_t unit_size() const { return ball_ == Ball::kLinf ? std::min(kPiece, columns_) : columns_; }

  void run(int64_t first, int64_t last) {
    for (int64_t unit = first; unit < last; ++unit) {
      if (ball_ == Ball::kLinf)
        linf(unit / pieces(), unit % pieces() * kPiece);
      else
        ball_ == Ball::kL2 ? l2(unit) : l1(unit);
    }
  }

 private:
  int64_t pieces() const { return (columns_ + kPiece - 1) / kPiece; }

  AttackPiece<A> piece(int64_t row, int64_t begin, int64_t n) {
    const int64_t at = row * columns_ + begin;
    AttackPiece<A> w{};
    w.n = n;
    w.adversary = adversary_.read(at, n, b_.adversary);
    w.x = x_.read(at, n, b_.x);
    w.grad = has_grad_ ? grad_.read(at, n, b_.grad) : nullptr;
    w.eps = eps_.at(begin);
    w.step = step_.at(begin);
    w.scale = scale_ ? scale_[row] : A(1);
    w.out = out_.open(at, b_);
    return w;
  }

  void close(const AttackPiece<A>& w, int64_t at) {
    if (!out_.narrow()) return;
    if (ball_ == Ball::kLinf)
      linf_intervals(w.x, w.eps, b_.low.element, b_.high.element, w.n);
    else
      intervals(w.out, w.x, b_.low.element, b_.high.element, w.n);
    out_.close(at, w.n, b_);
  }

  void linf(int64_t row, int64_t begin) {
    const AttackPiece<A> w = piece(row, begin, std::min(kPiece, columns_ - begin));
    linf_piece(w);
    close(w, row * columns_ + begin);
  }

  double step_of(int64_t row) const { return double(*step_.at(0)) * (scale_ ? double(scale_[row]) : 1.0); }

  L2Sums sums(int64_t row, double scale, A& largest) {
    L2Sums s{};
    for_pieces(columns_, [&](int64_t begin, int64_t n) {
      const AttackPiece<A> w = piece(row, begin, n);
      s.dd += sum_dd(w.adversary, w.x, n);
      if (!has_grad_) return;
      double gg, gd;
      sum_g(w.grad, w.adversary, w.x, scale, n, gg, gd);
      s.gg += gg;
      s.gd += gd;
      if (sizeof(A) == 8) largest = std::max(largest, largest_of(w.grad, n));
    });
    return s;
  }

  void l2(int64_t row) {
    A largest = A(0);
    double scale = 1.0;
    L2Sums s = sums(row, scale, largest);
    // Squares of floats always fit into a double, squares of doubles may not.
    if (sizeof(A) == 8 && largest > A(0) && largest <= Limits<A>::largest && !(s.gg > 1e-280 && s.gg < 1e280)) {
      scale = 1.0 / double(largest);
      s = sums(row, scale, largest);
    }
    const L2Step<A> step(s, step_of(row), double(*eps_.at(0)), scale);
    for_pieces(columns_, [&](int64_t begin, int64_t n) {
      const AttackPiece<A> w = piece(row, begin, n);
      l2_piece(w, step);
      close(w, row * columns_ + begin);
    });
  }

  void l1(int64_t row) {
    moved_.resize(columns_);
    clean_.resize(columns_);
    for_pieces(columns_, [&](int64_t begin, int64_t n) {
      const AttackPiece<A> w = piece(row, begin, n);
      std::copy_n(w.adversary, n, moved_.data() + begin);
      std::copy_n(w.x, n, clean_.data() + begin);
    });
    if (has_grad_) l1_ascend(row);
    const A t = l1_threshold(*eps_.at(0));
    for_pieces(columns_, [&](int64_t begin, int64_t n) {
      const AttackPiece<A> w = piece(row, begin, n);
      l1_piece(moved_.data() + begin, clean_.data() + begin, t, w.out, n);
      close(w, row * columns_ + begin);
    });
  }

  void l1_ascend(int64_t row) {
    size_.resize(columns_);
    for_pieces(columns_, [&](int64_t begin, int64_t n) {
      const AttackPiece<A> w = piece(row, begin, n);
      l1_sizes(w.adversary, w.grad, size_.data() + begin, n);
    });
    ordered_ = size_;
    std::nth_element(ordered_.begin(), ordered_.begin() + (coordinates_ - 1), ordered_.end(), std::greater<A>());
    const A least = ordered_[coordinates_ - 1];
    const auto chosen = std::count_if(size_.begin(), size_.end(), [&](A s) { return s >= least && s > A(0); });
    const A step = A(step_of(row) / double(std::max<int64_t>(chosen, 1)));
    for_pieces(columns_, [&](int64_t begin, int64_t n) {
      const AttackPiece<A> w = piece(row, begin, n);
      l1_move(w.adversary, w.grad, least, step, moved_.data() + begin, n);
    });
  }

  // The smallest t with sum_j min(max(|v_j| - t, 0), room_j) <= eps, from above: Newton's steps on a falling, piecewise
  // linear function, halved where they leave the bracket.
  A l1_threshold(A eps) const {
    const A *const moved = moved_.data(), *const x = clean_.data();
    double excess = l1_total(moved, x, A(0), columns_) - double(eps);
    if (!(excess > 0.0)) return A(0);
    A low = A(0), high = l1_farthest(moved, x, columns_);
    for (int trial = 0; trial < 100; ++trial) {
      const double inside = l1_inside(moved, x, low, columns_);
      A t = inside > 0.0 ? A(double(low) + excess / inside) : high;
      if (!(t > low && t < high)) t = low + (high - low) / A(2);
      if (!(t > low && t < high)) break;
      const double total = l1_total(moved, x, t, columns_) - double(eps);
      if (total > 0.0)
        low = t, excess = total;
      else
        high = t;
      if (total <= 0.0 && total >= -double(Limits<A>::epsilon) * double(eps)) break;
    }
    return high;
  }

  Ball ball_;
  int64_t columns_, coordinates_;
  Input adversary_, x_, grad_;
  AttackOutput<A> out_;
  bool has_grad_;
  Columns<A> eps_, step_;
  const A* scale_;
  AttackBuffers<A> b_;
  std::vector<A> moved_, clean_, size_, ordered_;
};

void attack_step(Tensor adversary, Tensor x, std::optional<Tensor> grad, Tensor eps, Tensor step_size,
                 std::optional<Tensor> scale, int64_t inner, int64_t norm, int64_t coordinates) {
  const Ball ball =
      check_attack_step("attack_step", adversary, x, grad, eps, step_size, scale, inner, norm, coordinates);
  if (adversary.numel() == 0) return;
  const Tensor clean = torch::stable::contiguous(x);
  if (grad) grad = torch::stable::contiguous(*grad);
  if (scale) scale = torch::stable::contiguous(*scale);
  visit_accumulation(adversary.scalar_type(), [&]<class A>(A) {
    const Step<A> step(adversary, clean, grad, eps, step_size, scale, inner, ball, coordinates);
    torch::stable::parallel_for(0, step.units(adversary.size(0)), rows_per_thread(step.unit_size()),
                                [&](int64_t first, int64_t last) {
                                  Step<A> mine = step;
                                  mine.run(first, last);
                                });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(robustkern, CPU, m) { m.impl("attack_step", TORCH_BOX(&attack_step)); }

}  // namespace rk::cpu
