// What the CPU kernels of attention share: rows of scores in whole lanes, tensors of any layout as rows, matrices in buffers
// of one thread and their products, and the threads.
#pragma once

#include <ATen/native/CPUBlas.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "../../cpu/pieces.h"
#include "../../cpu/transpose.h"
#include "attention_arguments.h"

// MKL's, where PyTorch is linked with it.
extern "C" int MKL_Set_Num_Threads_Local(int threads) __attribute__((weak));

namespace rk::aten {

using namespace rk::cpu;

// ------------------------------------------------------------------ rows of scores

// n, up to the next multiple of a register's lanes: rows are that long, and no loop has a remainder.
template <class A>
constexpr int64_t whole_lanes(int64_t n) {
  return (n + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

// The largest of n whole lanes, NaN if there is one.
template <class A>
RK_HOST_DEVICE A largest_score(const A* s, int64_t n) {
  constexpr int L = kLanes<A>;
  Lanes<A> best, v;
  load_lanes(best, s);
  for (int64_t j = L; j < n; j += L) {
    load_lanes(v, s + j);
    best = (v > best) | (v != v) ? v : best;
  }
  A largest = best[0];
  for (int k = 1; k < L; ++k) largest = best[k] > largest || is_nan(best[k]) ? best[k] : largest;
  return largest;
}

// A sum of n whole lanes, in their type within a piece and in double across pieces; f(j) gives those from j.
template <class A, class F>
RK_HOST_DEVICE double row_sum(int64_t n, const F& f) {
  constexpr int L = kLanes<A>;
  double total = 0;
  for (int64_t i = 0; i < n; i += kPiece) {
    const int64_t end = n - i < kPiece ? n : i + kPiece;
    Lanes<A> sum_0 = {}, sum_1 = {}, sum_2 = {}, sum_3 = {}, term;  // four hide the latency of an addition
    int64_t j = i;
    for (; j + 4 * L <= end; j += 4 * L) {
      f(term, j);
      sum_0 += term;
      f(term, j + L);
      sum_1 += term;
      f(term, j + 2 * L);
      sum_2 += term;
      f(term, j + 3 * L);
      sum_3 += term;
    }
    for (; j < end; j += L) {
      f(term, j);
      sum_0 += term;
      std::swap(sum_0, sum_1);
    }
    total += double(horizontal_sum<A>((sum_0 + sum_2) + (sum_1 + sum_3)));
  }
  return total;
}

// sum x y
template <class A>
RK_HOST_DEVICE double row_dot(const A* x, const A* y, int64_t n) {
  return row_sum<A>(n, [=](Lanes<A>& term, int64_t j) RK_INLINE_LAMBDA {
    Lanes<A> y_j;
    load_lanes(term, x + j);
    load_lanes(y_j, y + j);
    term *= y_j;
  });
}

template <class A>
RK_MULTIVERSION static void add_to_scores(A* s, const A* mask, int64_t stride, int64_t n) {
  if (stride == 1)
    for (int64_t j = 0; j < n; ++j) s[j] += mask[j];
  else
    for (int64_t j = 0; j < n; ++j) s[j] += mask[j * stride];
}

template <class A>
RK_MULTIVERSION static void scale_rows(A* rows, int64_t n, A scale) {
  for (int64_t j = 0; j < n; ++j) rows[j] *= scale;
}

// ------------------------------------------------------------------ tensors and matrices

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

inline Tensor with_adjacent_columns(const Tensor& t) { return t.size(3) <= 1 || t.stride(3) == 1 ? t : t.contiguous(); }

template <class A>
struct Matrix {
  A* data;
  int64_t rows, cols, stride;
};

template <class A>
void fill(const Matrix<A>& m, A value) {
  for (int64_t i = 0; i < m.rows; ++i) std::fill_n(m.data + i * m.stride, m.cols, value);
}

// out = x y, or out += x y
template <class A>
void multiply(const Matrix<A>& x, const Matrix<A>& y, const Matrix<A>& out, bool add) {
  if (x.cols == 0) {
    if (!add) fill(out, A(0));
    return;
  }
#ifdef CPUBLAS_BRGEMM_F32F32F32
  if constexpr (std::is_same_v<A, float>)
    return at::native::cpublas::brgemm(x.rows, y.cols, x.cols, x.stride, y.stride, out.stride, add, x.data, y.data,
                                       out.data);
#endif
  const auto tensor = [](const Matrix<A>& m) {
    return at::from_blob(m.data, {m.rows, m.cols}, {m.stride, 1}, at::dtype<A>());
  };
  tensor(out).addmm_(tensor(x), tensor(y), add ? 1 : 0);
}

// Two matrices of one size that lie beside each other, or one beneath the other.
template <class A>
struct Pair {
  Matrix<A> first, second, both;

  // Rows a cache line further apart than they are long: at a distance of a power of two they would share a few of the
  // cache's sets.
  static constexpr int64_t kGap = 64 / sizeof(A);
  static constexpr int64_t size_beside(int64_t rows, int64_t cols) { return rows * (2 * cols + kGap); }
  static Pair beside(A* data, int64_t rows, int64_t cols) {
    const int64_t stride = 2 * cols + kGap;
    return {{data, rows, cols, stride}, {data + cols, rows, cols, stride}, {data, rows, 2 * cols, stride}};
  }
  static Pair beneath(A* data, int64_t rows, int64_t cols) {
    return {{data, rows, cols, cols}, {data + rows * cols, rows, cols, cols}, {data, 2 * rows, cols, cols}};
  }
  const Matrix<A>& pick(bool with_first, bool with_second) const {
    return with_first && with_second ? both : with_first ? first : second;
  }
};

// Keys that a product takes at a time: their part of a factor stays in the second-level cache while it meets all rows of the
// other one.
constexpr int64_t kPart = 512;

template <class F>
void for_parts(int64_t keys, const F& f) {
  for (int64_t j = 0; j < keys; j += kPart) f(j, std::min(kPart, keys - j));
}

template <class A>
Matrix<A> columns(const Matrix<A>& m, int64_t first, int64_t count) {
  return {m.data + first, m.rows, count, m.stride};
}
template <class A>
Matrix<A> rows(const Matrix<A>& m, int64_t first, int64_t count) {
  return {m.data + first * m.stride, count, m.cols, m.stride};
}

// out = x y, or out += x y, where out has a column for each key.
template <class A>
void multiply_across(const Matrix<A>& x, const Matrix<A>& y, const Matrix<A>& out, bool add) {
  for_parts(y.cols, [&](int64_t j, int64_t n) { multiply(x, columns(y, j, n), columns(out, j, n), add); });
}
template <class A>
void multiply_across(const Matrix<A>& x, const Pair<A>& y, const Pair<A>& out, bool with_first, bool with_second) {
  if (y.first.cols <= kPart)
    return multiply(x, y.pick(with_first, with_second), out.pick(with_first, with_second), false);
  if (with_first) multiply_across(x, y.first, out.first, false);
  if (with_second) multiply_across(x, y.second, out.second, false);
}

// out = x y, where x has a column and y a row for each key; of a pair the sum of both products.
template <class A>
void multiply_along(const Matrix<A>& x, const Matrix<A>& y, const Matrix<A>& out, bool add) {
  for_parts(x.cols, [&](int64_t j, int64_t n) { multiply(columns(x, j, n), rows(y, j, n), out, add || j > 0); });
}
template <class A>
void multiply_along(const Pair<A>& x, const Pair<A>& y, const Matrix<A>& out, bool with_first, bool with_second) {
  if (x.first.cols <= kPart)
    return multiply(x.pick(with_first, with_second), y.pick(with_first, with_second), out, false);
  if (with_first) multiply_along(x.first, y.first, out, false);
  if (with_second) multiply_along(x.second, y.second, out, with_first);
}

template <class A>
void transpose(const Matrix<A>& from, const Matrix<A>& to) {
  cpu::transpose(from.data, from.stride, to.data, to.stride, from.rows, from.cols);
}

// ------------------------------------------------------------------ threads

// What a thread's worker has: memory of its own, and rows of tensors on their way to it and back.
template <class A>
class RowBuffers {
 protected:
  explicit RowBuffers(at::ScalarType dtype) : dtype_(dtype) {}

  A* memory(int64_t size) {
    held_.push_back(at::empty({size}, at::dtype<A>()));
    return held_.back().template mutable_data_ptr<A>();
  }

  // Rows from `first` on.
  void read(const Rows& from, int64_t b, int64_t h, int64_t first, const Matrix<A>& to) const {
    for (int64_t i = 0; i < to.rows; ++i)
      cpu::read_piece(dtype_, from.at(b, h, first + i), to.data + i * to.stride, to.cols);
  }
  void write(const Matrix<A>& from, const Rows& to, int64_t b, int64_t h, int64_t first) const {
    for (int64_t i = 0; i < from.rows; ++i)
      cpu::write_piece(dtype_, from.data + i * from.stride, to.at(b, h, first + i), from.cols);
  }

 private:
  const at::ScalarType dtype_;
  std::vector<Tensor> held_;
};

// What oneDNN does not do, MKL does.  It chooses its kernels, and with them the order of additions, by the number of
// threads it may use, even where it uses one: so that the bits are the same for every number, it is told one.
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

// step(worker, i) for i in [0, n), with a worker for each thread.
template <class Worker, class Task, class Step>
void on_threads(const Task& task, int64_t n, const Step& step) {
  // The library's own: at::parallel_for is a template, which without -fopenmp is a loop on one thread.
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const SequentialBlas sequential;
    Worker worker(task);
    for (int64_t i = begin; i < end; ++i) step(worker, i);
  });
}

}  // namespace rk::aten
