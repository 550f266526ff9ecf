#include "linear_backward.h"

#include <torch/csrc/autograd/graph_task.h>

namespace rk::aten {
namespace {

// What torch.autograd.grad gives for an input that nothing defined has reached.
class ZerosIfUndefined : public torch::autograd::GraphTask::ExecInfo::Capture::GradCaptureHook {
 public:
  explicit ZerosIfUndefined(const torch::autograd::InputMetadata& input) : input_(input) {}
  Tensor operator()(const Tensor& grad) override { return grad.defined() ? grad : input_.zeros_like(); }

 private:
  const torch::autograd::InputMetadata& input_;  // of a node that outlives the pass
};

// A zero that is left out is missed only by whoever asked for a gradient by name and would be told that it was not used.
// Once for each pass; on the device at hand alone, whose thread is this one.
void zeros_for_whom_it_concerns(const at::Device& device) {
  thread_local int last_pass = -1;
  const int pass = torch::autograd::get_current_graph_task_id();
  const auto* const nodes = torch::autograd::get_current_graph_task_exec_info();
  if (!nodes || pass == last_pass) return;
  last_pass = pass;
  for (const auto& [node, info] : *nodes) {
    if (!info.captures_) continue;
    for (auto& capture : *info.captures_) {
      const auto& input = node->input_metadata(capture.input_idx_);
      if (input.device() == device)
        capture.DO_NOT_USE_DEPRECATED_register_capture_hook(std::make_unique<ZerosIfUndefined>(input));
    }
  }
}

struct LinearBackward : torch::autograd::Function<LinearBackward> {
  static Tensor forward(AutogradContext* ctx, const Tensor&, const Tensor&, const LinearMap& map) {
    ctx->save_for_backward(map.arguments.tensors);
    ctx->set_materialize_grads(false);
    auto& data = ctx->saved_data;
    // In a list: a number by itself is a variable to compiled autograd.
    data["transposed"] = std::vector<int64_t>{reinterpret_cast<int64_t>(map.transposed)};
    data["integers"] = c10::IValue(SymIntArrayRef(map.arguments.integers));
    data["numbers"] = map.arguments.numbers;
    data["zeros"] = materializes_zeros();  // a graph keeps the derivatives it was built with
    const at::AutoDispatchBelowADInplaceOrView below;
    return map.first();
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& cotangents) {
    const Tensor& u = cotangents[0];
    if (!u.defined()) return {Tensor(), Tensor(), Tensor()};
    auto& data = ctx->saved_data;
    Tensor grad_g, grad_x;
    if (ctx->needs_input_grad(0)) {
      const auto transposed = reinterpret_cast<Transposed>(data["transposed"].toIntVector()[0]);
      grad_g = transposed(
          u, {ctx->get_saved_variables(), data["integers"].toSymIntVector(), data["numbers"].toDoubleVector()});
    }
    if (ctx->needs_input_grad(1)) {
      if (data["zeros"].toBool() || in_compiled_autograd())
        grad_x = at::zeros_like(u);  // which is of x's shape
      else
        zeros_for_whom_it_concerns(u.device());
    }
    return {grad_g, grad_x, Tensor()};
  }
};

}  // namespace

Tensor linear_backward(const Tensor& g, const Tensor& x, const LinearMap& map) {
  if (!g.is_nested() && !x.is_nested()) return LinearBackward::apply(g, x, map);
  const UseStock guard;  // a nested tensor has no shape to make zeros of
  return map.first();
}

}  // namespace rk::aten
