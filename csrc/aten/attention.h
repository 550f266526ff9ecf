// Attention in operators that PyTorch differentiates any number of times, with the scores of all heads in memory: for orders,
// transforms and gradients that no kernel serves.
#pragma once

#include <cmath>

#include "gradients.h"

namespace rk::aten::attention {

struct Settings {
  bool causal;
  double scale, dropout;
};

inline double scale_of(const std::optional<double>& scale, const Tensor& q) {
  return scale ? *scale : 1.0 / std::sqrt(static_cast<double>(q.sym_size(-1).guard_int(__FILE__, __LINE__)));
}

// q, k, v and the bias, which may be undefined; or how they move: then each of them may.
struct Inputs {
  Tensor q, k, v, bias;
};

// The output, how it moves when the inputs move, and the logsumexp of the scores, which has no derivative.
std::tuple<Tensor, Tensor, Tensor> forward_mode(const Inputs& in, const Inputs& tangents, const Settings& s);

// grad_q, grad_k, grad_v, and grad_bias where there is a bias.  `in` is the cotangent of the output, then q, k, v and the
// bias, which may be undefined.
variable_list first_backward(const variable_list& in, const Settings& s);

// grad_g, grad_q, grad_k, grad_v, and grad_bias where there is a bias: see math/attention.h.  The cotangents
// gg of grad_q, grad_k, grad_v and grad_bias may be undefined.
variable_list second_backward(const Tensor* gg, const variable_list& in, const Settings& s);

// CPU flash, by a node that takes several cotangents at once; nothing where PyTorch's own is to be used.
std::optional<std::tuple<Tensor, Tensor>> forward_that_folds(const Tensor& q, const Tensor& k, const Tensor& v,
                                                             double dropout, bool causal,
                                                             const std::optional<Tensor>& mask,
                                                             std::optional<double> scale);
void add_attention_folding();

}  // namespace rk::aten::attention
