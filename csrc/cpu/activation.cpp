// activation_double_backward on the CPU.  Formulas: math/activation.h.  One sweep over memory in pieces that stay in
// the L1 cache on their way between storage and accumulation type; an output that is not needed goes no further.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "../activation_arguments.h"
#include "activation_loops.h"
#include "elements.h"

namespace rk::cpu {
namespace {

// Several cotangents: the slopes of a piece of x are computed once for all of them.
template <class A>
void run_several(const ActivationChoice& choice, const ActivationTensors& t, bool need_grad, bool need_x) {
  const ActivationParameters<A> parameters = choice.as<A>();
  const Input x(t.x), gg_x(t.gg_x), grad(t.grad);
  const Output gg_grad(t.gg_grad, need_grad), grad_x(t.grad_x, need_x);
  const int64_t elements = t.x.numel(), pieces = (elements + kPiece - 1) / kPiece;
  torch::stable::parallel_for(0, pieces, rows_per_thread(kPiece * t.cotangents), [&](int64_t first, int64_t last) {
    Buffer<A> ones, slope, bend, in_x, in_u, in_g, out_g, out_x;
    std::fill(ones.element, ones.element + kPiece, A(1));
    for (int64_t begin = first * kPiece; begin < std::min(elements, last * kPiece); begin += kPiece) {
      const int64_t n = std::min(kPiece, elements - begin);
      run_piece(choice.function,
                ActivationPiece<A>{ones.element, ones.element, x.read(begin, n, in_x), slope.element, bend.element, n},
                parameters);
      A* const sum = grad_x.open(begin, out_x);
      std::fill(sum, sum + n, A(0));
      for (int64_t k = 0; k < t.cotangents; ++k) {
        const int64_t at = k * elements + begin;
        const A* u = gg_x.read(at, n, in_u);
        if (need_grad) {
          multiply(slope.element, u, gg_grad.open(at, out_g), n);
          gg_grad.close(at, n, out_g);
        }
        if (need_x) add_product(bend.element, u, grad.read(at, n, in_g), sum, n);
      }
      grad_x.close(begin, n, out_x);
    }
    finish_streams();
  });
}

template <class A>
void run(const ActivationChoice& choice, const ActivationTensors& t, bool need_grad, bool need_x) {
  const ActivationParameters<A> parameters = choice.as<A>();
  const Input x(t.x), gg_x(t.gg_x), grad(t.grad);
  const Output gg_grad(t.gg_grad, need_grad), grad_x(t.grad_x, need_x);
  const int64_t elements = t.x.numel(), pieces = (elements + kPiece - 1) / kPiece;
  if (t.cotangents != 1) return run_several<A>(choice, t, need_grad, need_x);
  torch::stable::parallel_for(0, pieces, rows_per_thread(kPiece), [&](int64_t first, int64_t last) {
    Buffer<A> in_x, in_u, in_g, out_g, out_x;
    for (int64_t begin = first * kPiece; begin < std::min(elements, last * kPiece); begin += kPiece) {
      const int64_t n = std::min(kPiece, elements - begin);
      ActivationPiece<A> piece{};
      piece.n = n;
      piece.x = x.read(begin, n, in_x);
      piece.gg_x = gg_x.read(begin, n, in_u);
      piece.grad = need_x ? grad.read(begin, n, in_g) : piece.gg_x;
      piece.gg_grad = gg_grad.open(begin, out_g);
      piece.grad_x = grad_x.open(begin, out_x);
      run_piece(choice.function, piece, parameters);
      gg_grad.close(begin, n, out_g);
      grad_x.close(begin, n, out_x);
    }
    finish_streams();
  });
}

std::tuple<Tensor, Tensor> activation_double_backward(Tensor gg_x, Tensor grad, Tensor x, std::string function,
                                                      std::vector<double> parameters, bool need_grad, bool need_x) {
  const char* op = "activation_double_backward";
  const ActivationChoice choice = activation_choice(op, function, parameters);
  const ActivationTensors t(op, gg_x, grad, x, need_grad, need_x);
  t.x.scalar_type() == ScalarType::Double ? run<double>(choice, t, need_grad, need_x)
                                          : run<float>(choice, t, need_grad, need_x);
  return {t.gg_grad, t.grad_x};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(robustkern, CPU, m) {
  m.impl("activation_double_backward", TORCH_BOX(&activation_double_backward));
}

}  // namespace rk::cpu
