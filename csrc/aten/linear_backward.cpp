#include "linear_backward.h"

#include <torch/csrc/autograd/graph_task.h>

#include "cotangents.h"
#include "recomputed.h"

namespace rk::aten {
namespace {

using torch::autograd::Node;

// What torch.autograd.grad gives for an input that nothing defined has reached.
class ZerosIfUndefined : public torch::autograd::GraphTask::ExecInfo::Capture::GradCaptureHook {
 public:
  explicit ZerosIfUndefined(const torch::autograd::InputMetadata& input) : input_(input) {}
  Tensor operator()(const Tensor& grad) override { return grad.defined() ? grad : input_.zeros_like(); }

 private:
  const torch::autograd::InputMetadata& input_;  // of a node that outlives the pass
};

// The hooks of an accumulating node, such as DistributedDataParallel's, take what there is.
bool would_miss_zeros(Node& node) {
  const bool accumulates = node.num_outputs() == 0;
  return accumulates ? !node.tensor_pre_hooks().empty() : has_hooks(node);
}

// Whether somebody would miss a zero that is left out of the pass at hand: a hook would be given None.  Whoever asked
// torch.autograd.grad for a gradient by name gets zeros in any case: on this thread's device, since other devices have
// threads of their own.  Looked for once in each pass.
bool somebody_looks_on(const at::Device& device) {
  thread_local int last_pass = -1;
  thread_local bool hooked = false;
  const int pass = torch::autograd::get_current_graph_task_id();
  if (pass == last_pass) return hooked;
  last_pass = pass;
  const auto* const graph = torch::autograd::get_current_graph_task_nodes_in_graph();
  hooked = graph && std::any_of(graph->begin(), graph->end(), [](Node* node) { return would_miss_zeros(*node); });
  const auto* const nodes = torch::autograd::get_current_graph_task_exec_info();
  if (!nodes || hooked) return hooked;
  for (const auto& [node, info] : *nodes) {
    if (!info.captures_) continue;
    for (auto& capture : *info.captures_) {
      const auto& input = node->input_metadata(capture.input_idx_);
      if (input.device() == device)
        capture.DO_NOT_USE_DEPRECATED_register_capture_hook(std::make_unique<ZerosIfUndefined>(input));
    }
  }
  return false;
}

struct LinearBackward : torch::autograd::Function<LinearBackward> {
  static Tensor forward(AutogradContext* ctx, const Tensor&, const Tensor&, const LinearMap& map) {
    ctx->save_for_backward(map.tensors);
    ctx->set_materialize_grads(false);
    Kept kept;
    // a graph keeps the derivatives it was built with
    kept.put(materializes_zeros()).put(static_cast<int64_t>(reinterpret_cast<intptr_t>(map.transposed)));
    kept.put_all_of(map.kept).save(ctx);
    const at::AutoDispatchBelowADInplaceOrView below;
    return map.first();
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& cotangents) {
    const Tensor& u = cotangents[0];
    if (!u.defined()) return {Tensor(), Tensor(), Tensor()};
    Kept kept(ctx);
    const bool zeros = kept.flag();
    Tensor grad_g, grad_x;
    if (ctx->needs_input_grad(0)) {
      const auto transposed = reinterpret_cast<Transposed>(static_cast<intptr_t>(kept.integer()));
      const BelowAutogradIf below(is_final(u));
      grad_g = transposed(u, ctx->get_saved_variables(), kept);
    }
    if (ctx->needs_input_grad(1) && (zeros || in_compiled_autograd() || somebody_looks_on(u.device())))
      grad_x = at::zeros_like(u);  // which is of x's shape
    return {grad_g, grad_x, Tensor()};
  }
};

}  // namespace

std::optional<Tensor> linear_backward(const Tensor& g, const Tensor& x, const LinearMap& map) {
  if (map.differentiable && is_small(x, 1 << 14)) return std::nullopt;
  const KeepLess less(x);
  return LinearBackward::apply(g, x, map);
}

}  // namespace rk::aten
