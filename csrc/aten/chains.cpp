// One boxed kernel at the alias Autograd and one Function for all operators, made of a Formula.
#include "chains.h"

#include <ATen/core/boxing/BoxedKernel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>

#include "gradients.h"

namespace rk::aten {
namespace {

using torch::jit::Stack;

struct Formula {
  c10::OperatorHandle op;
  std::optional<c10::OperatorHandle> next;  // none: the end of the chain
  std::string refusal{};
  std::vector<Source> sources{};
  std::vector<int64_t> inputs{}, flags{};
  std::optional<std::pair<int64_t, int64_t>> only{};
  size_t cotangents = 0;

  c10::TypeKind kind(int64_t argument) const { return op.schema().arguments()[argument].type()->kind(); }
  bool is_tensor(int64_t argument) const {  // or none: no other argument is optional
    return kind(argument) == c10::TypeKind::TensorType || kind(argument) == c10::TypeKind::OptionalType;
  }
};

Tensor tensor_of(const c10::IValue& value) { return value.isTensor() ? value.toTensor() : Tensor(); }

struct Link : torch::autograd::Function<Link> {
  static variable_list forward(AutogradContext* ctx, at::TensorList inputs, const Formula& formula,
                               c10::DispatchKeySet keys, const Stack& arguments) {
    ctx->set_materialize_grads(false);
    Stack stack = arguments;
    {
      const at::AutoDispatchBelowADInplaceOrView below;
      formula.op.redispatchBoxed(keys & c10::after_autograd_keyset, &stack);
    }
    variable_list results;
    for (const auto& value : stack) results.push_back(value.toTensor());

    int64_t vectors = 0;  // the inputs of one dimension: a gradient of one dimension is that of such an input, or none
    for (size_t i = 0; i < inputs.size(); ++i) vectors |= int64_t{inputs[i].dim() == 1} << i;
    Kept kept;
    kept.put(static_cast<int64_t>(reinterpret_cast<intptr_t>(&formula))).put(vectors);
    if (formula.next) {
      variable_list saved, constant;
      for (const auto& [from, index] : formula.sources) {
        if (from == From::kLastResult) {
          saved.push_back(results.back());
        } else if (from == From::kArgument) {
          const c10::IValue& value = arguments[index];
          if (formula.is_tensor(index))
            saved.push_back(tensor_of(value));
          else if (formula.kind(index) == c10::TypeKind::FloatType)
            kept.put_number(value.toDouble());
          else if (formula.kind(index) == c10::TypeKind::BoolType)
            kept.put(int64_t{value.toBool()});
          else
            kept.put(value.toInt());
        }
      }
      for (size_t i = 0; i < results.size(); ++i)
        if (i >= formula.cotangents || (i < formula.flags.size() && !arguments[formula.flags[i]].toBool()))
          constant.push_back(results[i]);
      ctx->mark_non_differentiable(constant);
      ctx->save_for_backward(std::move(saved));
    }
    kept.save(ctx);
    return results;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& cotangents) {
    Kept kept(ctx);
    const auto& formula = *reinterpret_cast<const Formula*>(static_cast<intptr_t>(kept.integer()));
    TORCH_CHECK(formula.next, formula.refusal);
    const int64_t vectors = kept.integer();
    variable_list grads(formula.inputs.size() + 3);  // forward takes three things more, which are no tensors
    const auto saved = ctx->get_saved_variables();
    if (std::any_of(cotangents.begin(), cotangents.begin() + static_cast<int64_t>(formula.cotangents),
                    [](const Tensor& t) { return t.defined(); })) {
      Stack stack = arguments_of_next(ctx, formula, cotangents, saved, kept);
      formula.next->callBoxed(&stack);
      for (size_t i = 0; i < formula.inputs.size(); ++i) {
        const Tensor& grad = stack[i].toTensor();
        if (ctx->needs_input_grad(i) && (grad.dim() != 1 || (vectors >> i & 1))) grads[i] = grad;
      }
    }
    if (in_compiled_autograd()) fill(ctx, formula, saved, grads);
    return grads;
  }

 private:
  static Stack arguments_of_next(AutogradContext* ctx, const Formula& formula, const variable_list& cotangents,
                                 const variable_list& saved, Kept& kept) {
    Stack stack;
    auto next_saved = saved.begin();
    const auto& expected = formula.next->schema().arguments();
    const auto push = [&](const Tensor& t) {  // an absent one as None where the schema has an optional
      const bool optional = expected[stack.size()].type()->kind() == c10::TypeKind::OptionalType;
      stack.push_back(optional && !t.defined() ? c10::IValue() : c10::IValue(t));
    };
    for (const auto& [from, index] : formula.sources) {
      switch (from) {
        case From::kCotangent: push(cotangents[index]); break;
        case From::kIsNeeded: stack.emplace_back(ctx->needs_input_grad(index)); break;
        case From::kLastResult: {
          // A number here: the next formula differentiates it as the function of the inputs that it is.
          const Tensor& result = *next_saved++;
          push(result.requires_grad() ? result.detach() : result);
          break;
        }
        case From::kArgument:
          if (formula.is_tensor(index)) {
            push(*next_saved++);
          } else if (formula.kind(index) == c10::TypeKind::FloatType) {
            stack.emplace_back(kept.number());
          } else if (formula.kind(index) == c10::TypeKind::BoolType) {
            stack.emplace_back(kept.flag());
          } else {
            stack.emplace_back(kept.integer());
          }
          break;
      }
    }
    return stack;
  }

  // See fill_for_compiled_autograd: zeros like the inputs, of which those are saved whose gradient can be none.
  static void fill(AutogradContext* ctx, const Formula& formula, const variable_list& saved, variable_list& grads) {
    size_t k = 0;
    for (const auto& [from, index] : formula.sources) {
      if (from == From::kLastResult) ++k;
      if (from != From::kArgument || !formula.is_tensor(index)) continue;
      const auto found = std::find(formula.inputs.begin(), formula.inputs.end(), index);
      const size_t i = found - formula.inputs.begin();
      if (found != formula.inputs.end() && ctx->needs_input_grad(i) && !grads[i].defined())
        grads[i] = at::zeros_like(saved[k]);
      ++k;
    }
  }
};

class Kernel : public c10::OperatorKernel {
 public:
  explicit Kernel(Formula formula) : formula_(std::move(formula)) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
    const size_t count = op.schema().arguments().size();
    const auto arguments = torch::jit::last(*stack, count);
    if (!differentiates(arguments)) {
      const at::AutoDispatchBelowADInplaceOrView below;
      op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
      return;
    }
    variable_list inputs;
    for (const int64_t i : formula_.inputs)
      if (const Tensor t = tensor_of(arguments[i]); t.defined()) inputs.push_back(t);
    auto results = Link::apply(at::TensorList(inputs), formula_, keys, Stack(arguments.begin(), arguments.end()));
    torch::jit::drop(*stack, count);
    for (auto& result : results) stack->emplace_back(std::move(result));
  }

 private:
  bool differentiates(c10::ArrayRef<c10::IValue> arguments) const {
    if (!at::GradMode::is_enabled()) return false;
    if (formula_.only && arguments[formula_.only->first].toInt() != formula_.only->second) return false;
    return std::any_of(formula_.inputs.begin(), formula_.inputs.end(), [&](int64_t i) {
      // Of forward mode a Function has no formula and says so: below autograd the tangent would be lost in silence.
      const Tensor t = tensor_of(arguments[i]);
      return t.defined() && (t.requires_grad() || t._fw_grad(/*level=*/0).defined());
    });
  }

  Formula formula_;  // at an address that does not change: the dispatcher keeps the kernel for good
};

c10::OperatorHandle find(const std::string& name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), "");
}

void add(Formula formula) {
  static auto* const library =  // outlives PyTorch's own statics
      new torch::Library(torch::Library::IMPL, "robustkern", c10::DispatchKey::Autograd, __FILE__, __LINE__);
  const std::string name = formula.op.schema().name();
  library->impl(name.c_str(), torch::CppFunction::makeFromBoxedFunctor(std::make_unique<Kernel>(std::move(formula))));
}

}  // namespace

void refuse_derivatives(const std::string& op, const std::string& message) {
  Formula formula{.op = find(op), .next = std::nullopt, .refusal = message};
  const auto count = static_cast<int64_t>(formula.op.schema().arguments().size());
  for (int64_t i = 0; i < count; ++i)
    if (formula.is_tensor(i)) formula.inputs.push_back(i);
  add(std::move(formula));
}

void differentiate(const std::string& op, const std::string& next, std::vector<Source> sources,
                   std::vector<int64_t> inputs, std::vector<int64_t> flags,
                   std::optional<std::pair<int64_t, int64_t>> only) {
  size_t cotangents = 0;
  for (const auto& [from, index] : sources) cotangents += from == From::kCotangent;
  add({.op = find(op),
       .next = find(next),
       .refusal = "",
       .sources = std::move(sources),
       .inputs = std::move(inputs),
       .flags = std::move(flags),
       .only = only,
       .cotangents = cotangents});
}

}  // namespace rk::aten
