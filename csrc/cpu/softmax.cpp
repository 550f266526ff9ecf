// softmax_double_backward on the CPU.  Formulas: math/softmax.h.  The first sweep over a row makes its sums, the second
// finds it in the cache: memory is read once.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "../arguments/softmax.h"
#include "elements.h"
#include "softmax_loops.h"

namespace rk::cpu {
namespace {

struct Call {
  Input output, gg_x, grad;
  Output gg_grad, grad_output;
  bool log;
  int64_t batch, classes, inner;
};

template <class A>
struct Buffers {
  Buffer<A> o, p, u, g, gg_grad, grad_output;
};

// The inputs of a piece that begins at `begin`.
template <class A>
SoftmaxPiece<A> read(const Call& c, int64_t begin, int64_t n, Buffers<A>& b) {
  SoftmaxPiece<A> w{};
  w.n = n;
  w.u = c.gg_x.read(begin, n, b.u);
  w.g = c.grad.read(begin, n, b.g);
  w.p = c.output.read(begin, n, b.o);
  if (c.log) {
    exponentials(w.p, b.p.element, n);
    w.p = b.p.element;
  }
  return w;
}

template <class A, class Finish>
void write(const Call& c, int64_t begin, SoftmaxPiece<A>& w, Buffers<A>& b, const Finish& finish) {
  w.gg_grad = c.gg_grad.open(begin, b.gg_grad);
  w.grad_output = c.grad_output.open(begin, b.grad_output);
  finish(w);
  c.gg_grad.close(begin, w.n, b.gg_grad);
  c.grad_output.close(begin, w.n, b.grad_output);
}

// A row whose classes are adjacent.
template <class A>
void run_row(const Call& c, int64_t row, Buffers<A>& b) {
  const int64_t first = row * c.classes;
  SoftmaxPiece<A> w{};
  double total_g = 0, mean_u = 0;
  for (int64_t j = 0; j < c.classes; j += kPiece) {
    w = read(c, first + j, std::min(kPiece, c.classes - j), b);
    const SoftmaxSums<A> part = row_sums(c.log, w);
    total_g += part.total_g;
    mean_u += part.mean_u;
  }
  const SoftmaxSums<A> sums{A(total_g), A(mean_u)};
  for (int64_t j = 0; j < c.classes; j += kPiece) {
    if (c.classes > kPiece) w = read(c, first + j, std::min(kPiece, c.classes - j), b);  // else it is still there
    write(c, first + j, w, b, [&](const SoftmaxPiece<A>& piece) { finish_row(c.log, piece, sums); });
  }
}

// Rows [begin, begin + n) of an image, side by side in memory, class after class.
template <class A>
void run_columns(const Call& c, int64_t image, int64_t begin, int64_t n, Buffers<A>& b) {
  constexpr int64_t together = 32;  // classes summed before their sum is: rounding grows with 32 + classes / 32
  double total_g[kPiece], mean_u[kPiece], part_g[kPiece], part_u[kPiece];
  const int64_t first = image * c.classes * c.inner + begin;
  std::fill_n(total_g, n, 0.0);
  std::fill_n(mean_u, n, 0.0);
  for (int64_t k = 0; k < c.classes;) {
    std::fill_n(part_g, n, 0.0);
    std::fill_n(part_u, n, 0.0);
    for (const int64_t end = std::min(c.classes, k + together); k < end; ++k)
      add_class(c.log, read(c, first + k * c.inner, n, b), part_g, part_u);
    add(part_g, total_g, n);
    add(part_u, mean_u, n);
  }
  for (int64_t k = 0; k < c.classes; ++k) {
    SoftmaxPiece<A> w = read(c, first + k * c.inner, n, b);
    write(c, first + k * c.inner, w, b,
          [&](const SoftmaxPiece<A>& piece) { finish_class(c.log, piece, total_g, mean_u); });
  }
}

template <class A>
void run(const Call& c) {
  if (c.inner == 1) {
    torch::stable::parallel_for(0, c.batch, rows_per_thread(c.classes), [&](int64_t begin, int64_t end) {
      Buffers<A> buffers;
      for (int64_t row = begin; row < end; ++row) run_row<A>(c, row, buffers);
      finish_streams();
    });
    return;
  }
  // As many rows as let their classes stay in the L2 cache between the sweeps, at least a few vectors of them.
  constexpr int64_t cached = 256 * 1024 / (3 * sizeof(A));
  const int64_t together = std::clamp<int64_t>(cached / std::max<int64_t>(1, c.classes) / 32 * 32, 32, kPiece);
  const int64_t blocks = (c.inner + together - 1) / together;
  torch::stable::parallel_for(0, c.batch * blocks, rows_per_thread(together * c.classes),
                              [&](int64_t begin, int64_t end) {
                                Buffers<A> buffers;
                                for (int64_t unit = begin; unit < end; ++unit) {
                                  const int64_t from = unit % blocks * together;
                                  run_columns<A>(c, unit / blocks, from, std::min(together, c.inner - from), buffers);
                                }
                                finish_streams();
                              });
}

std::tuple<Tensor, Tensor> softmax_double_backward(Tensor gg_x, Tensor grad, Tensor output, bool log, bool need_grad,
                                                   bool need_output) {
  const SoftmaxTensors t("softmax_double_backward", gg_x, grad, output, need_grad, need_output);
  const Call call{Input(t.output),
                  Input(t.gg_x),
                  Input(t.grad),
                  Output(t.gg_grad, need_grad),
                  Output(t.grad_output, need_output),
                  log,
                  output.size(0),
                  output.size(1),
                  output.size(2)};
  t.output.scalar_type() == ScalarType::Double ? run<double>(call) : run<float>(call);
  return {t.gg_grad, t.grad_output};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(robustkern, CPU, m) {
  m.impl("softmax_double_backward", TORCH_BOX(&softmax_double_backward));
}

}  // namespace rk::cpu
