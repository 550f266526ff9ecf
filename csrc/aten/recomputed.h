// install(save_memory=True): of what a graph keeps, that which is cheap to compute again is not kept.
//
// A convolution or a product keeps its arguments.  Where such an argument is what a normalisation, an activation or one of their
// first backwards has made, the graph keeps the node of that instead, which remembers its own arguments and makes it again when it
// is asked for: by the same operator, so with the same bits.  A backward pass runs a node after those that kept its results, so
// that what it remembers is still there.  ReLU, which keeps its result for the signs, keeps the signs.
//
// A KeepLess stands around the call that keeps.  It puts hooks for saved tensors in place, unless somebody else has some.
#pragma once

#include <torch/csrc/autograd/custom_function.h>

#include <typeindex>

#include "gradients.h"

namespace rk::aten {

bool saves_memory();  // where derivatives are replaced

enum class Keep {
  kValues,
  kArgument,  // of a product with a weight, of whose node only the weight's gradient reads it
  kSigns      // of what is compared with zero and not read otherwise
};

class KeepLess {
 public:
  explicit KeepLess(const Tensor& kept, Keep what = Keep::kValues);
  ~KeepLess();
  KeepLess(const KeepLess&) = delete;
  KeepLess& operator=(const KeepLess&) = delete;

 private:
  bool active_;
  Keep before_;
  const c10::TensorImpl* argument_before_;
};

// A node whose results can be made again, below autograd.  Whether is a flag that its forward has set: to look at what it
// saved could itself compute something.
struct Again {
  uint32_t results;  // the first ones, that run() gives
  bool (*can)(torch::autograd::Node&);
  variable_list (*run)(torch::autograd::Node&);
};
void add_again(std::type_index node, Again again);

// For Functions with a function again(ctx).
template <class Function>
void add_again(uint32_t results = 1) {
  using Node = torch::autograd::CppNode<Function>;
  add_again(
      typeid(Node),
      {results, [](torch::autograd::Node& node) { return static_cast<Node&>(node).ctx_.saved_data.count("again") > 0; },
       [](torch::autograd::Node& node) { return Function::again(&static_cast<Node&>(node).ctx_); }});
}
inline void can_do_again(AutogradContext* ctx, bool can = true) {
  if (can && saves_memory()) ctx->saved_data["again"] = true;
}

}  // namespace rk::aten
