// activation_double_backward on the CPU.  Formulas: math/activation.h.  One sweep over memory in pieces that stay in
// the L1 cache on their way between storage and accumulation type; an output that is not needed goes no further.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "../arguments/activation.h"
#include "../math/activation.h"
#include "elements.h"
#include "pieces.h"

namespace rk::cpu {
namespace {

// Of at most kPiece elements.
template <class A>
struct ActivationPiece {
  const A *u, *grad, *x;
  A *gg_grad, *grad_x;
  int64_t n;
};

template <Activation kFunction, class A>
RK_MULTIVERSION void activation_piece(const ActivationPiece<A>& w, const ActivationParameters<A>& parameters) {
  const A *u = w.u, *grad = w.grad, *x = w.x;
  A* __restrict__ gg_grad = w.gg_grad, * __restrict__ grad_x = w.grad_x;
  const ActivationParameters<A> p = parameters;
  using Function = ActivationSlopes<kFunction, A>;
  alignas(64) A e[kPiece], tail[kPiece];
  if constexpr (Function::kExponential)
    for (int64_t j = 0; j < w.n; ++j) e[j] = exp_nonpositive(Function::exponent(x[j], p));
  if constexpr (Function::kTail)
    for (int64_t j = 0; j < w.n; ++j) tail[j] = normal_tail(absolute(x[j]));
  for (int64_t j = 0; j < w.n; ++j) {
    ActivationTerms<A> terms{};
    if constexpr (Function::kExponential) terms.e = e[j];
    if constexpr (Function::kTail) terms.tail = tail[j];
    const Slopes<A> s = Function::at(x[j], terms, p);
    const A u_j = u[j];
    gg_grad[j] = times_slope<kFunction>(s, u_j);
    grad_x[j] = times_bend<kFunction>(s, u_j, grad[j]);
  }
}

template <class A>
void run_piece(Activation function, const ActivationPiece<A>& w, const ActivationParameters<A>& p) {
  switch (function) {
    case Activation::kGelu: return activation_piece<Activation::kGelu>(w, p);
    case Activation::kGeluTanh: return activation_piece<Activation::kGeluTanh>(w, p);
    case Activation::kSilu: return activation_piece<Activation::kSilu>(w, p);
    case Activation::kMish: return activation_piece<Activation::kMish>(w, p);
    case Activation::kSoftplus: return activation_piece<Activation::kSoftplus>(w, p);
    case Activation::kElu: return activation_piece<Activation::kElu>(w, p);
    case Activation::kEluResult: return activation_piece<Activation::kEluResult>(w, p);
    case Activation::kHardswish: return activation_piece<Activation::kHardswish>(w, p);
    case Activation::kTanh: return activation_piece<Activation::kTanh>(w, p);
    case Activation::kSigmoid: return activation_piece<Activation::kSigmoid>(w, p);
  }
}

// A piece of one of several cotangents: slope and bend are given, grad_x is added to.
template <class A>
struct CotangentPiece {
  const A *slope, *bend, *u, *grad;
  A *gg_grad, *grad_x;  // or null
  int64_t n;
  int64_t u_ahead, grad_ahead;  // elements to where the next pieces lie, too far for the processor to guess
};

template <bool kGrad, bool kX, class A>
RK_MULTIVERSION void cotangent_piece(const CotangentPiece<A>& w) {
  const A *slope = w.slope, *bend = w.bend, *u = w.u, *grad = w.grad;
  A* __restrict__ gg_grad = w.gg_grad, * __restrict__ grad_x = w.grad_x;
  const auto run = [=](int64_t begin, int64_t end) RK_INLINE_LAMBDA {
    for (int64_t j = begin; j < end; ++j) {
      const A u_j = u[j];
      if constexpr (kGrad) gg_grad[j] = slope[j] * u_j;
      if constexpr (kX) grad_x[j] += bend[j] * u_j * grad[j];
    }
  };
  constexpr int64_t line = 64 / sizeof(A);
  int64_t j = 0;
  for (; j + line <= w.n; j += line) {
    __builtin_prefetch(u + j + w.u_ahead);
    if constexpr (kX) __builtin_prefetch(grad + j + w.grad_ahead);
    run(j, j + line);
  }
  run(j, w.n);
}

template <class A>
void run_piece(const CotangentPiece<A>& w) {
  if (w.gg_grad && w.grad_x)
    cotangent_piece<true, true>(w);
  else if (w.gg_grad)
    cotangent_piece<true, false>(w);
  else if (w.grad_x)
    cotangent_piece<false, true>(w);
}

// Elements at a time.  Few where they are converted, and where they are written past the caches, since they then wait in
// the store queue while the next are computed.  Several cotangents are so many streams that each should last for a while.
int64_t elements_of_piece(const ActivationTensors& t) {
  const int64_t item = item_size(t.x.scalar_type());
  const bool few = item < 4 || t.x.numel() * item >= kStreamedBytes;
  return few && t.cotangents == 1 ? 256 : kPiece;
}

// The inputs and outputs of a call, and what a thread holds of them.
template <class A>
class Sweep {
 public:
  Sweep(const ActivationChoice& choice, const ActivationTensors& t, bool need_grad, bool need_x)
      : function_(choice.function),
        parameters_(choice.as<A>()),
        elements_(t.x.numel()),
        cotangents_(t.cotangents),
        x_(t.x),
        u_(t.u),
        grad_(t.grad),
        gg_grad_(t.gg_grad, need_grad),
        grad_x_(t.grad_x, need_x) {
    std::fill(ones_.element, ones_.element + kPiece, A(1));
  }

  void run(int64_t begin, int64_t n) { cotangents_ == 1 ? run_one(begin, n) : run_several(begin, n); }

 private:
  void run_one(int64_t begin, int64_t n) {
    const A *x = x_.read(begin, n, in_x_), *u = u_.read(begin, n, in_u_);
    const A* const grad = grad_x_ ? grad_.read(begin, n, in_g_) : u;
    run_piece(function_, ActivationPiece<A>{u, grad, x, gg_grad_.open(begin, out_g_), grad_x_.open(begin, out_x_), n},
              parameters_);
    gg_grad_.close(begin, n, out_g_);
    grad_x_.close(begin, n, out_x_);
  }

  // The slopes of a piece of x are computed once for all cotangents.
  void run_several(int64_t begin, int64_t n) {
    const A* x = x_.read(begin, n, in_x_);
    run_piece(function_, ActivationPiece<A>{ones_.element, ones_.element, x, slope_.element, bend_.element, n},
              parameters_);
    A* const sum = grad_x_ ? grad_x_.open(begin, out_x_) : nullptr;
    if (sum) std::fill(sum, sum + n, A(0));
    for (int64_t k = 0; k < cotangents_; ++k) {
      const int64_t at = k * elements_ + begin, next = k + 1 < cotangents_ ? elements_ : n - k * elements_;
      CotangentPiece<A> piece{};
      piece.slope = slope_.element;
      piece.bend = bend_.element;
      piece.n = n;
      piece.u = u_.read(at, n, in_u_);
      piece.u_ahead = piece.u == in_u_.element ? 0 : next;
      if (grad_x_) piece.grad = grad_.read(at, n, in_g_);
      piece.grad_ahead = piece.grad == in_g_.element ? 0 : next;
      if (gg_grad_) piece.gg_grad = gg_grad_.open(at, out_g_);
      piece.grad_x = sum;
      run_piece(piece);
      gg_grad_.close(at, n, out_g_);
    }
    grad_x_.close(begin, n, out_x_);
  }

  const Activation function_;
  const ActivationParameters<A> parameters_;
  const int64_t elements_, cotangents_;
  const Input x_, u_, grad_;
  const Output gg_grad_, grad_x_;
  Buffer<A> ones_, slope_, bend_, in_x_, in_u_, in_g_, out_g_, out_x_;
};

template <class A>
void run(const ActivationChoice& choice, const ActivationTensors& t, bool need_grad, bool need_x) {
  const int64_t elements = t.x.numel(), piece = elements_of_piece(t), pieces = (elements + piece - 1) / piece;
  torch::stable::parallel_for(0, pieces, rows_per_thread(piece * t.cotangents), [&](int64_t first, int64_t last) {
    Sweep<A> sweep(choice, t, need_grad, need_x);
    for (int64_t begin = first * piece; begin < std::min(elements, last * piece); begin += piece)
      sweep.run(begin, std::min(piece, elements - begin));
    finish_streams();
  });
}

std::tuple<Tensor, Tensor> activation_double_backward(Tensor u, Tensor grad, Tensor x, std::string function,
                                                      std::vector<double> parameters, bool need_grad, bool need_x) {
  const char* op = "activation_double_backward";
  const ActivationChoice choice = activation_choice(op, function, parameters);
  const ActivationTensors t(op, u, grad, x, need_grad, need_x);
  visit_accumulation(t.x.scalar_type(), [&]<class A>(A) { run<A>(choice, t, need_grad, need_x); });
  return {t.gg_grad, t.grad_x};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(robustkern, CPU, m) {
  m.impl("activation_double_backward", TORCH_BOX(&activation_double_backward));
}

}  // namespace rk::cpu
