// What attack_step and attack_start share: rows in pieces, tables of numbers for the columns, 16-bit results.
#pragma once

#include <algorithm>
#include <vector>

#include "../math/attack_step.h"
#include "elements.h"

namespace rk::cpu {

template <class A>
RK_MULTIVERSION static void intervals(const A* a, const A* b, A* low, A* high, std::int64_t n) {
  for (std::int64_t j = 0; j < n; ++j) {
    const Interval<A> to = between(a[j], b[j]);
    low[j] = to.low, high[j] = to.high;
  }
}

template <class A>
RK_MULTIVERSION static void linf_intervals(const A* x, const A* eps, A* low, A* high, std::int64_t n) {
  for (std::int64_t j = 0; j < n; ++j) {
    const Interval<A> to = linf_interval(x[j], eps[j]);
    low[j] = to.low, high[j] = to.high;
  }
}

// The nearest 16-bit number within [low, high], 0 <= low: the bits of numbers that are not negative count steps.
template <class S>
RK_MULTIVERSION static void write_between(const float* from, const float* low, const float* high, S* to,
                                          std::int64_t n) {
  for (std::int64_t j = 0; j < n; ++j) {
    S s = store<S>(from[j]);
    const float back = load(s);
    s.bits = std::uint16_t(s.bits + (back < low[j] ? 1 : 0) - (back > high[j] ? 1 : 0));
    to[j] = s;
  }
}

// A table of [1], [C] or [N] numbers, written out so that a piece that begins anywhere reads adjacent numbers.
template <class A>
class Columns {
 public:
  Columns(const Tensor& table, int64_t inner, int64_t columns) {
    const Tensor dense = torch::stable::contiguous(table);
    const A* const from = pointer<A>(dense);
    const int64_t count = table.size(0);
    if (count == columns) inner = 1;
    period_ = count == 1 ? 1 : count * inner;
    number_.resize(period_ + kPiece);
    for (int64_t j = 0; j < static_cast<int64_t>(number_.size()); ++j)
      number_[j] = from[count == 1 ? 0 : j / inner % count];
  }
  const A* at(int64_t column) const { return number_.data() + column % period_; }

 private:
  std::vector<A> number_;
  int64_t period_;
};

template <class A>
struct AttackBuffers {
  Buffer<A> adversary, grad, x, out, low, high;
};

// Where a piece's results go: into the tensor itself, or into a buffer to be rounded.
template <class A>
class AttackOutput {
 public:
  explicit AttackOutput(const Tensor& t)
      : base_(pointer<char>(t)), dtype_(t.scalar_type()), item_(item_size(t.scalar_type())) {}
  bool narrow() const { return item_ == 2; }
  A* open(int64_t begin, AttackBuffers<A>& b) const {
    return narrow() ? b.out.element : reinterpret_cast<A*>(base_ + begin * item_);
  }
  // After `out`, and for 16 bits `low` and `high`, are there.
  void close(int64_t begin, int64_t n, const AttackBuffers<A>& b) const {
    if constexpr (sizeof(A) == 4) {
      if (dtype_ == ScalarType::Half)
        write_between(b.out.element, b.low.element, b.high.element, reinterpret_cast<Half*>(base_) + begin, n);
      else if (dtype_ == ScalarType::BFloat16)
        write_between(b.out.element, b.low.element, b.high.element, reinterpret_cast<BFloat16*>(base_) + begin, n);
    }
  }

 private:
  char* base_;
  ScalarType dtype_;
  int64_t item_;
};

}  // namespace rk::cpu
