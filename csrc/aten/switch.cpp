#include "switch.h"

#include <ATen/FuncTorchTLS.h>
#include <ATen/SavedTensorHooks.h>

#include <array>
#include <limits>

#include "python.h"

namespace rk::aten {
namespace {

thread_local bool stock = false;

}  // namespace

UseStock::UseStock() : before_(stock) { stock = true; }
UseStock::~UseStock() { stock = before_; }
bool uses_stock_kernels() { return stock; }

bool runs_on_cuda(c10::DeviceIndex device) {
  enum : signed char { kUnknown, kRuns, kDoesNot };
  static std::array<std::atomic<signed char>, std::numeric_limits<c10::DeviceIndex>::max() + 1> known{};
  auto& answer = known.at(device);
  if (answer == kUnknown) {
    const python::WithGil gil;
    const auto asked = python::import("robustkern._library").attribute("runs_on_cuda");
    answer = asked(python::Object(PyLong_FromLong(device)).get()).is_true() ? kRuns : kDoesNot;
  }
  return answer == kRuns;
}

bool under_functorch_grad() {
  const auto& transforms = at::functorch::functorchTLSAccessor();
  if (!transforms) return false;
  try {
    transforms->checkSupportsCppAutogradFunction();
  } catch (const c10::Error&) {
    return true;
  }
  return false;
}

bool saves_through_hooks() { return at::SavedTensorDefaultHooks::get_hooks().has_value(); }

bool in_checkpoint() {
  if (!saves_through_hooks()) return false;
  const python::WithGil gil;
  const auto hooks = python::import("torch._C._autograd").attribute("_top_saved_tensors_default_hooks")(Py_False);
  if (hooks.is_none()) return false;
  const auto pack = hooks.item(0);
  return pack.has("__module__") && pack.attribute("__module__").text() == "torch.utils.checkpoint";
}

}  // namespace rk::aten
