#include "cotangents.h"

#include <torch/csrc/autograd/function.h>

#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <limits>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace rk::aten {
namespace {

using torch::autograd::Node;

std::unordered_map<std::type_index, Folding>& ours() {
  static std::unordered_map<std::type_index, Folding> types;
  return types;
}

// PyTorch's own nodes whose batching rules neither loop nor copy x for each cotangent.  Other nodes have not been measured.
bool is_known(const Node& node) {
  static const std::unordered_set<std::string> names{"AddBackward0",
                                                     "AddmmBackward0",
                                                     "AliasBackward0",
                                                     "CloneBackward0",
                                                     "ConvolutionBackward0",
                                                     "ExpandBackward0",
                                                     "GeluBackward0",
                                                     "MeanBackward1",
                                                     "MmBackward0",
                                                     "MulBackward0",
                                                     "PermuteBackward0",
                                                     "ReshapeAliasBackward0",
                                                     "SiluBackward0",
                                                     "SqueezeBackward1",
                                                     "SubBackward0",
                                                     "SumBackward1",
                                                     "TBackward0",
                                                     "TransposeBackward0",
                                                     "UnbindBackward0",
                                                     "UnsafeViewBackward0",
                                                     "UnsqueezeBackward0",
                                                     "ViewBackward0",
                                                     "torch::autograd::AccumulateGrad"};
  return names.count(node.name()) > 0;
}

// Bytes of the largest gradient that a node is given.
int64_t largest_gradient(const Node& node) {
  int64_t bytes = 0;
  for (uint32_t i = 0; i < node.num_inputs(); ++i) {
    const auto& metadata = node.input_metadata(i);
    if (metadata.is_nested_tensor() || metadata.is_cpp_nested_tensor()) return std::numeric_limits<int64_t>::max();
    const auto elements = c10::multiply_integers(metadata.shape_as_dim_vector());
    const auto count = elements.maybe_as_int();
    if (!count) return std::numeric_limits<int64_t>::max();
    bytes = std::max<int64_t>(bytes, *count * static_cast<int64_t>(metadata.options().dtype().itemsize()));
  }
  return bytes;
}

// Fewer and larger operators gain up to a half where they are small.  Where one cotangent alone fills a good part of the
// cache, ReLU and BatchNorm find less of their input there: the measured limit grows with the number of cotangents.
bool works_on_several(Node& node, int64_t cotangents, bool on_cpu) {
  const auto own = ours().find(typeid(node));
  const bool is_relu = own == ours().end() && node.name() == "ReluBackward0";
  if (own == ours().end() && !is_relu) return is_known(node);
  if (!is_relu && !own->second.folds(node)) return false;
  return !on_cpu || (!is_relu && own->second.when_large) || largest_gradient(node) <= cotangents << 20;
}

// The nodes that a backward pass from `root` to `leaf` runs.
std::vector<Node*> nodes_between(Node* root, const Node* leaf) {
  std::vector<Node*> nodes{root};
  std::unordered_set<const Node*> seen{root};
  for (size_t i = 0; i < nodes.size(); ++i)
    for (const auto& edge : nodes[i]->next_edges())
      if (edge.function && seen.insert(edge.function.get()).second) nodes.push_back(edge.function.get());
  // A node's number is larger than those of the nodes it leads to.
  std::sort(nodes.begin(), nodes.end(),
            [](const Node* a, const Node* b) { return a->topological_nr() < b->topological_nr(); });
  std::unordered_set<const Node*> reach{leaf};
  nodes.erase(std::remove_if(nodes.begin(), nodes.end(),
                             [&](Node* node) {
                               const auto& edges = node->next_edges();
                               const bool leads = std::any_of(edges.begin(), edges.end(), [&](const auto& edge) {
                                 return reach.count(edge.function.get()) > 0;
                               });
                               if (leads) reach.insert(node);
                               return !leads && node != leaf;
                             }),
              nodes.end());
  return nodes;
}

}  // namespace

bool has_hooks(torch::autograd::Node& node) {
  return !node.pre_hooks().empty() || !node.post_hooks().empty() || !node.tensor_pre_hooks().empty() ||
         !node.retains_grad_hooks().empty();
}

void add_folding(std::type_index node, Folding folding) { ours()[node] = folding; }

bool folds(const Tensor& outputs, const Tensor& x, int64_t cotangents) {
  if (!enabled() || cotangents < 2 || !is_plain(outputs) || !outputs.grad_fn() || !x.requires_grad()) return false;
  const auto nodes = nodes_between(outputs.grad_fn().get(), torch::autograd::impl::gradient_edge(x).function.get());
  return !nodes.empty() && std::all_of(nodes.begin(), nodes.end(), [&](Node* node) {
    return !has_hooks(*node) && works_on_several(*node, cotangents, outputs.is_cpu());
  });
}

}  // namespace rk::aten
