// Every file of replacements, and nothing else.
#pragma once

#include "replacement.h"

namespace rk::aten {

void register_batch_norm(Registrar&);
void register_convolution(Registrar&);
void register_group_norm(Registrar&);
void register_layer_norm(Registrar&);

inline void register_all(Registrar& r) {
  register_batch_norm(r);
  register_convolution(r);
  register_group_norm(r);
  register_layer_norm(r);
}

}  // namespace rk::aten
