// softmax_double_backward on the CPU.  Formulas: math/softmax.h.  The first sweep over a row makes its sums, the second
// finds it in the cache: memory is read once.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "../math/softmax.h"
#include "../arguments/softmax.h"
#include "elements.h"

namespace rk::cpu {
namespace {

// One piece of one row, or of one class in many rows; `p` holds probabilities.
template <class A>
struct SoftmaxPiece {
  const A *p, *u, *g;
  int64_t n;
};

// One class of n rows: adds to their sums.
template <bool kLog, class A>
RK_MULTIVERSION void add_class(const SoftmaxPiece<A>& w, double* __restrict__ total_g, double* __restrict__ mean_u) {
  const A *p = w.p, *u = w.u, *g = w.g;
  for (int64_t j = 0; j < w.n; ++j) {
    total_g[j] += double(Softmax<kLog, A>::total_g_term(p[j], g[j]));
    mean_u[j] += double(p[j] * u[j]);
  }
}

// The sums are those of the one row, or of each of n rows.
template <bool kLog, class A, class Each>
RK_MULTIVERSION void finish(const SoftmaxPiece<A>& w, Each total_g, Each mean_u, A* __restrict__ gg_grad,
                            A* __restrict__ grad_output) {
  const A *p = w.p, *u = w.u, *g = w.g;
  for (int64_t j = 0; j < w.n; ++j) {
    const A total = A(entry(total_g, j)), mean = A(entry(mean_u, j));
    gg_grad[j] = Softmax<kLog, A>::gg_grad(p[j], u[j], mean);
    grad_output[j] = Softmax<kLog, A>::grad_output(p[j], u[j], g[j], total, mean);
  }
}

void add(const double* from, double* to, int64_t n) {
  vector_loop(n, [=](int64_t j) RK_INLINE_LAMBDA { to[j] += from[j]; });
}

struct SoftmaxArguments {
  Input output, u, grad;
  Output gg_grad, grad_output;
  int64_t batch, classes, inner;
};

template <class A>
struct Buffers {
  Buffer<A> o, p, u, g, gg_grad, grad_output;
};

// The inputs of a piece that begins at `begin`.
template <bool kLog, class A>
SoftmaxPiece<A> read(const SoftmaxArguments& c, int64_t begin, int64_t n, Buffers<A>& b) {
  SoftmaxPiece<A> w{c.output.read(begin, n, b.o), c.u.read(begin, n, b.u), c.grad.read(begin, n, b.g), n};
  if constexpr (kLog) {
    const A* const o = w.p;
    A* const p = b.p.element;
    vector_write(n, p, [=](int64_t j) RK_INLINE_LAMBDA { return exp_nonpositive(o[j]); });
    w.p = p;
  }
  return w;
}

template <bool kLog, class A, class Each>
void write(const SoftmaxArguments& c, int64_t begin, const SoftmaxPiece<A>& w, Each total_g, Each mean_u,
           Buffers<A>& b) {
  finish<kLog>(w, total_g, mean_u, c.gg_grad.open(begin, b.gg_grad), c.grad_output.open(begin, b.grad_output));
  c.gg_grad.close(begin, w.n, b.gg_grad);
  c.grad_output.close(begin, w.n, b.grad_output);
}

// A row whose classes are adjacent.
template <bool kLog, class A>
void run_row(const SoftmaxArguments& c, int64_t row, Buffers<A>& b) {
  const int64_t first = row * c.classes;
  SoftmaxPiece<A> w{};
  double total_g = 0, mean_u = 0;
  for (int64_t j = 0; j < c.classes; j += kPiece) {
    w = read<kLog>(c, first + j, std::min(kPiece, c.classes - j), b);
    A part_g, part_u;
    const auto term = [=](int64_t k) RK_INLINE_LAMBDA { return Softmax<kLog, A>::total_g_term(w.p[k], w.g[k]); };
    vector_sums<A>(w.n, part_g, part_u, term, [=](int64_t k) RK_INLINE_LAMBDA { return w.p[k] * w.u[k]; });
    total_g += part_g;
    mean_u += part_u;
  }
  for (int64_t j = 0; j < c.classes; j += kPiece) {
    if (c.classes > kPiece) w = read<kLog>(c, first + j, std::min(kPiece, c.classes - j), b);  // else it is still there
    write<kLog>(c, first + j, w, A(total_g), A(mean_u), b);
  }
}

// Rows [begin, begin + n) of an image, side by side in memory, class after class.
template <bool kLog, class A>
void run_columns(const SoftmaxArguments& c, int64_t image, int64_t begin, int64_t n, Buffers<A>& b) {
  constexpr int64_t together = 32;  // classes summed before their sum is: rounding grows with 32 + classes / 32
  double total_g[kPiece], mean_u[kPiece], part_g[kPiece], part_u[kPiece];
  const int64_t first = image * c.classes * c.inner + begin;
  std::fill_n(total_g, n, 0.0);
  std::fill_n(mean_u, n, 0.0);
  for (int64_t k = 0; k < c.classes;) {
    std::fill_n(part_g, n, 0.0);
    std::fill_n(part_u, n, 0.0);
    for (const int64_t end = std::min(c.classes, k + together); k < end; ++k)
      add_class<kLog>(read<kLog>(c, first + k * c.inner, n, b), part_g, part_u);
    add(part_g, total_g, n);
    add(part_u, mean_u, n);
  }
  for (int64_t k = 0; k < c.classes; ++k) {
    const int64_t at = first + k * c.inner;
    write<kLog, A, const double*>(c, at, read<kLog>(c, at, n, b), total_g, mean_u, b);
  }
}

template <bool kLog, class A>
void run(const SoftmaxArguments& c) {
  if (c.inner == 1) {
    torch::stable::parallel_for(0, c.batch, rows_per_thread(c.classes), [&](int64_t begin, int64_t end) {
      Buffers<A> buffers;
      for (int64_t row = begin; row < end; ++row) run_row<kLog>(c, row, buffers);
      finish_streams();
    });
    return;
  }
  // As many rows as let their classes stay in the L2 cache between the sweeps, at least a few vectors of them.
  constexpr int64_t cached = 256 * 1024 / (3 * sizeof(A));
  const int64_t together = std::clamp<int64_t>(cached / std::max<int64_t>(1, c.classes) / 32 * 32, 32, kPiece);
  const int64_t blocks = (c.inner + together - 1) / together;
  torch::stable::parallel_for(
      0, c.batch * blocks, rows_per_thread(together * c.classes), [&](int64_t begin, int64_t end) {
        Buffers<A> buffers;
        for (int64_t unit = begin; unit < end; ++unit) {
          const int64_t from = unit % blocks * together;
          run_columns<kLog>(c, unit / blocks, from, std::min(together, c.inner - from), buffers);
        }
        finish_streams();
      });
}

std::tuple<Tensor, Tensor> softmax_double_backward(Tensor u, Tensor grad, Tensor output, bool log, bool need_grad,
                                                   bool need_output) {
  const SoftmaxTensors t("softmax_double_backward", u, grad, output, need_grad, need_output);
  const SoftmaxArguments call{
      Input(t.output), Input(t.u),     Input(t.grad), Output(t.gg_grad, need_grad), Output(t.grad_output, need_output),
      output.size(0),  output.size(1), output.size(2)};
  visit_accumulation(output.scalar_type(), [&]<class A>(A) { log ? run<true, A>(call) : run<false, A>(call); });
  return {t.gg_grad, t.grad_output};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(robustkern, CPU, m) {
  m.impl("softmax_double_backward", TORCH_BOX(&softmax_double_backward));
}

}  // namespace rk::cpu
