// The arguments of random_cotangents and its derivative, checked once for both devices.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "check.h"
#include "../math/random_cotangents.h"

namespace rk {

// One call on outputs [B, C, ...]: D = classes * positions numbers a sample.
struct CotangentShape {
  Law law;
  Kind kind;
  int64_t projections, batch, classes, positions;

  std::vector<int64_t> of_outputs;

  int64_t size() const { return classes * positions; }

  std::vector<int64_t> of_cotangents() const {
    std::vector<int64_t> sizes{projections};
    sizes.insert(sizes.end(), of_outputs.begin(), of_outputs.end());
    return sizes;
  }

  CotangentShape(const char* op, const Tensor& outputs, const Tensor& seed, int64_t k, int64_t law_index,
                 int64_t kind_index) {
    RK_CHECK(outputs.dim() >= 2, op, ": outputs must have at least 2 dimensions, got ", describe(outputs));
    check_floating(op, "outputs", outputs);
    check_tensor(op, "seed", seed, {1}, ScalarType::Long, outputs);
    check_number(op, "law", law_index >= 0 && law_index <= 3, "0, 1, 2 or 3", static_cast<double>(law_index));
    check_number(op, "kind", kind_index >= 0 && kind_index <= 2, "0, 1 or 2", static_cast<double>(kind_index));
    law = static_cast<Law>(law_index);
    kind = static_cast<Kind>(kind_index);
    projections = k;
    of_outputs = sizes_of(outputs);
    batch = of_outputs[0];
    classes = of_outputs[1];
    positions = 1;
    for (size_t i = 2; i < of_outputs.size(); ++i) positions *= of_outputs[i];
    check_number(op, "projections", k >= 1, "at least 1", static_cast<double>(k));
    RK_CHECK(law != Law::kOrthonormal || k <= size(), op, ": projections must be at most ", size(),
             ", the dimensions of a sample, for orthonormal vectors, got ", k);
    RK_CHECK(batch <= (int64_t{1} << 32), op, ": outputs must have at most 2^32 samples, got ", describe(outputs));
  }
};

inline int64_t projections_of(const char* op, const Tensor& grad) {
  RK_CHECK(grad.dim() >= 3, op, ": grad must have at least 3 dimensions, got ", describe(grad));
  return grad.size(0);
}

inline void check_grad(const char* op, const Tensor& grad, const CotangentShape& s, const Tensor& outputs) {
  check_tensor(op, "grad", grad, s.of_cotangents(), outputs.scalar_type(), outputs);
}

}  // namespace rk
