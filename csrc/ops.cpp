// Every operator schema of robustkern, and nothing else.
//
// foo -> foo_backward -> foo_double_backward: each is an operator of its own, with a CPU kernel (cpu/foo.cpp), a CUDA
// kernel (cuda/foo.cu), and, in robustkern/ops/foo.py, a fake kernel, an autograd formula and a vmap rule.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(robustkern, m) {
  // x: [B, N] rows; weight: [C] or none, entry (j / inner) % C belongs to column j; -> norm [B] in the accumulation
  // type.
  m.def("row_norm(Tensor x, Tensor? weight, int inner, float p, bool squared) -> Tensor");
  m.def(
      "row_norm_backward(Tensor grad, Tensor x, Tensor norm, Tensor? weight, int inner, float p, bool squared) -> "
      "Tensor");
  // -> (gg_grad [B], grad_x [B, N]; grad_x is [0] where the norm's second derivative is identically zero: p = 1, inf)
  m.def(
      "row_norm_double_backward(Tensor gg_x, Tensor grad, Tensor x, Tensor norm, Tensor? weight, int inner, float p, "
      "bool squared) -> (Tensor, Tensor)");

  // logits: [B, C]; target: [B] int64 or [B, C] probabilities; -> loss [B], statistics [B, 2] = (max, log sum exp) of
  // logits / T.
  m.def(
      "softmax_cross_entropy(Tensor logits, Tensor target, float label_smoothing, float temperature, int ignore_index) "
      "-> (Tensor, Tensor)");
  m.def(
      "softmax_cross_entropy_backward(Tensor grad, Tensor logits, Tensor statistics, Tensor target, float "
      "label_smoothing, "
      "float temperature, int ignore_index) -> Tensor");
  // -> (gg_grad [B], grad_logits [B, C])
  m.def(
      "softmax_cross_entropy_double_backward(Tensor gg_logits, Tensor grad, Tensor logits, Tensor statistics, Tensor "
      "target, "
      "float label_smoothing, float temperature, int ignore_index) -> (Tensor, Tensor)");
}
