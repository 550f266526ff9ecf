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
      "row_norm_double_backward(Tensor u, Tensor grad, Tensor x, Tensor norm, Tensor? weight, int inner, float p, "
      "bool squared) -> (Tensor, Tensor)");

  // logits: [B, C]; target: [B] int64 or [B, C] probabilities; -> loss [B], statistics [B, 2] = (max, log sum exp) of
  // logits / T.
  m.def(
      "softmax_cross_entropy(Tensor logits, Tensor target, float label_smoothing, float temperature, int ignore_index) "
      "-> (Tensor, Tensor)");
  m.def(
      "softmax_cross_entropy_backward(Tensor grad, Tensor logits, Tensor statistics, Tensor target, float "
      "label_smoothing, float temperature, int ignore_index) -> Tensor");
  // -> (gg_grad [B], grad_logits [B, C])
  m.def(
      "softmax_cross_entropy_double_backward(Tensor u, Tensor grad, Tensor logits, Tensor statistics, Tensor "
      "target, float label_smoothing, float temperature, int ignore_index) -> (Tensor, Tensor)");

  // p_logits, q_logits: [B, C] -> kl [B], statistics [B, 5], see KlRow in math/kl_divergence.h
  m.def("kl_divergence(Tensor p_logits, Tensor q_logits, float temperature) -> (Tensor, Tensor)");
  // -> (grad_p, grad_q) [B, C]; one that is not needed is [0]
  m.def(
      "kl_divergence_backward(Tensor grad, Tensor p_logits, Tensor q_logits, Tensor statistics, float temperature, "
      "bool need_p, bool need_q) -> (Tensor, Tensor)");
  // An absent cotangent is zero.  -> (gg_grad [B], grad_p, grad_q [B, C], or [0] where not needed)
  m.def(
      "kl_divergence_double_backward(Tensor? u, Tensor? v, Tensor grad, Tensor p_logits, Tensor q_logits, Tensor "
      "statistics, float temperature, bool need_p, bool need_q) -> (Tensor, Tensor, Tensor)");

  // outputs: [B, C, S]; seed: [1] int64; law, kind: see math/random_cotangents.h -> w [K, B, C, S]
  m.def("random_cotangents(Tensor outputs, Tensor seed, int projections, int law, int kind) -> Tensor");
  // Of kind fisher; grad: [K, B, C, S] -> grad_outputs [B, C, S]
  m.def("random_cotangents_backward(Tensor grad, Tensor outputs, Tensor seed, int law) -> Tensor");

  // logits: [B, C]; target, towards: [B] int64; kind: see math/margin_loss.h -> loss [B], slopes [B, C] = d loss / d logits
  m.def("margin_loss(Tensor logits, Tensor target, Tensor? towards, int kind) -> (Tensor, Tensor)");
  m.def("margin_loss_backward(Tensor grad, Tensor slopes) -> Tensor");

  // One step of an attack and one random start, in place; see math/attack_step.h.  adversary, x, grad: [B, N] rows; eps,
  // step_size: [1], [C] or [N] in the accumulation type, entry (j / inner) % C belongs to column j; scale: [B].
  m.def(
      "attack_step(Tensor(a!) adversary, Tensor x, Tensor? grad, Tensor eps, Tensor step_size, Tensor? scale, int "
      "inner, int norm, int coordinates) -> ()");
  // seed: [1] int64; samples: [B] int64
  m.def(
      "attack_start(Tensor(a!) adversary, Tensor x, Tensor eps, Tensor seed, Tensor? samples, int inner, int norm, int "
      "restart) -> ()");

  // Second derivatives of PyTorch's own operators.  The inputs of a first backward (grad, x, ...) and the cotangents of
  // its outputs (u of grad_x, a of grad_weight, b of grad_bias) give the gradients of those inputs.
  // An absent cotangent is zero, and costs nothing; a gradient that is not needed comes back as an empty tensor [0].
  // Numbers per channel or row (weight, mean, ...) come and go in the accumulation type.

  // x: [N, C, S]; grad, u like x; weight, a, b, mean, invstd: [C]
  // -> (gg_grad like x, grad_x like x, grad_weight [C])
  m.def(
      "batch_norm_double_backward(Tensor? u, Tensor? a, Tensor? b, Tensor grad, Tensor x, Tensor? "
      "weight, Tensor mean, Tensor invstd, bool training, bool need_grad, bool need_x, bool need_weight) -> (Tensor, "
      "Tensor, Tensor)");
  // x: [B, D] rows; weight: [D]; mean (none: RMSNorm), rstd: [B] -> (grad_x [B, D], grad_weight [D], grad_bias [D])
  m.def(
      "layer_norm_backward(Tensor grad, Tensor x, Tensor? weight, Tensor? mean, Tensor rstd, bool need_x, bool "
      "need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)");
  // a, b: [D]
  // -> (gg_grad [B, D], grad_x [B, D], grad_weight [D])
  m.def(
      "layer_norm_double_backward(Tensor? u, Tensor? a, Tensor? b, Tensor grad, Tensor x, Tensor? "
      "weight, Tensor? mean, Tensor rstd, bool need_grad, bool need_x, bool need_weight) -> (Tensor, Tensor, Tensor)");
  // x: [N, C, S], contiguous or with the channels innermost; weight: [C]; mean, rstd: [N, groups]
  // -> (grad_x like x, grad_weight [C], grad_bias [C])
  m.def(
      "group_norm_backward(Tensor grad, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, int groups, bool need_x, "
      "bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)");
  // a, b: [C]
  // -> (gg_grad like x, grad_x like x, grad_weight [C])
  m.def(
      "group_norm_double_backward(Tensor? u, Tensor? a, Tensor? b, Tensor grad, Tensor x, Tensor? "
      "weight, Tensor mean, Tensor rstd, int groups, bool need_grad, bool need_x, bool need_weight) -> (Tensor, "
      "Tensor, Tensor)");
  // x: any shape, the input (for tanh and sigmoid: the output); parameters: see math/activation.h
  // -> (gg_grad like x, grad_x like x)
  m.def(
      "activation_double_backward(Tensor u, Tensor grad, Tensor x, str function, float[] parameters, bool "
      "need_grad, bool need_x) -> (Tensor, Tensor)");
  // output: [B, C, S], of softmax or log_softmax over C -> (gg_grad, grad_output), both like output
  m.def(
      "softmax_double_backward(Tensor u, Tensor grad, Tensor output, bool log, bool need_grad, bool need_output) -> "
      "(Tensor, Tensor)");
  // q, a: [B, H, L, D]; k, b: [B, G, S, D]; v, c: [B, G, S, E], G a divisor of H; grad: [B, H, L, E];
  // out: like grad, and logsumexp: [B, H, L], the natural logarithm of sum exp(S): the forward's, both or neither, where
  // every row sees a key; mask: additive, broadcastable to [B, H, L, S]; causal: row i of q sees keys 0 to i
  // -> (gg_grad like grad, grad_q like q, grad_k like k, grad_v like v)
  m.def(
      "attention_double_backward(Tensor? a, Tensor? b, Tensor? c, Tensor grad, Tensor q, Tensor k, Tensor v, "
      "Tensor? out, Tensor? logsumexp, Tensor? mask, bool causal, float scale, bool need_grad, bool need_q, bool "
      "need_k, bool need_v) -> (Tensor, Tensor, Tensor, Tensor)");
  // Forward mode: the value, and how it moves when q, k, v and the mask move along their tangents, which are like them.
  // -> (out, tangent [B, H, L, E] like q, logsumexp [B, H, L] of the scores in the accumulation type)
  m.def(
      "attention_jvp(Tensor q, Tensor k, Tensor v, Tensor? q_tangent, Tensor? k_tangent, Tensor? v_tangent, Tensor? "
      "mask, Tensor? mask_tangent, bool causal, float scale) -> (Tensor, Tensor, Tensor)");
}
