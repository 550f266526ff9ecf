#include "switch.h"

#include <ATen/FuncTorchTLS.h>
#include <ATen/SavedTensorHooks.h>
#include <pybind11/pybind11.h>

#include <array>
#include <limits>

namespace py = pybind11;

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
    const py::gil_scoped_acquire gil;
    const auto library = py::module_::import("robustkern._library");
    answer = library.attr("runs_on_cuda")(static_cast<int>(device)).cast<bool>() ? kRuns : kDoesNot;
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
  const py::gil_scoped_acquire gil;
  const auto hooks = py::module_::import("torch._C._autograd").attr("_top_saved_tensors_default_hooks")(false);
  if (hooks.is_none()) return false;
  const py::object pack = hooks.cast<py::tuple>()[0];
  return py::getattr(pack, "__module__", py::str()).equal(py::str("torch.utils.checkpoint"));
}

}  // namespace rk::aten
