// Every file of replacements, and nothing else.
#pragma once

#include "replacement.h"

namespace rk::aten {

using Register = void(Registrar&);

Register register_activation, register_attention, register_attention_jvp, register_batch_norm, register_convolution,
    register_group_norm, register_layer_norm, register_matmul, register_nll_loss, register_piecewise_linear,
    register_pooling, register_softmax;

inline void register_all(Registrar& r) {
  for (Register* const add : {register_activation, register_attention, register_attention_jvp, register_batch_norm,
                              register_convolution, register_group_norm, register_layer_norm, register_matmul,
                              register_nll_loss, register_piecewise_linear, register_pooling, register_softmax})
    add(r);
}

}  // namespace rk::aten
