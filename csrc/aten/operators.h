// Every file of replacements, and nothing else.
#pragma once

#include "replacement.h"

namespace rk::aten {

void register_activation(Registrar&);
void register_attention(Registrar&);
void register_batch_norm(Registrar&);
void register_convolution(Registrar&);
void register_group_norm(Registrar&);
void register_layer_norm(Registrar&);
void register_matmul(Registrar&);
void register_nll_loss(Registrar&);
void register_piecewise_linear(Registrar&);
void register_pooling(Registrar&);
void register_softmax(Registrar&);

inline void register_all(Registrar& r) {
  register_activation(r);
  register_attention(r);
  register_batch_norm(r);
  register_convolution(r);
  register_group_norm(r);
  register_layer_norm(r);
  register_matmul(r);
  register_nll_loss(r);
  register_piecewise_linear(r);
  register_pooling(r);
  register_softmax(r);
}

}  // namespace rk::aten
