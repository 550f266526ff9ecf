// Whether replaced derivatives are in force: in this process, on this thread, for what is being recorded.
#pragma once

#include <c10/core/Device.h>

#include <atomic>

namespace rk::aten {

// What Python sets.  Kernels stay registered once they are: taking one out of PyTorch's tables while another thread looks
// it up would be a race, a flag is not.  A call that finds the flag down costs one more jump.
struct Switch {
  std::atomic<bool> installed{false};      // by robustkern.install()
  std::atomic<int> scopes{0};              // of fused_double_backward()
  std::atomic<bool> zeros{false};          // derivatives that are identically zero come as zeros rather than as None
  std::atomic<bool> however_small{false};  // fused derivatives also where PyTorch's are faster: for tests
  std::atomic<int> gradients{0};  // input gradients that robustkern itself takes, and nobody differentiates again
};
inline Switch the_switch;

inline bool enabled() {
  return the_switch.installed.load(std::memory_order_relaxed) || the_switch.scopes.load(std::memory_order_relaxed) > 0;
}
// Whether the input gradients of first layers are ours, although they are not differentiated again.
inline bool replaces_input_gradients() { return the_switch.gradients.load(std::memory_order_relaxed) > 0 || enabled(); }
inline bool materializes_zeros() { return the_switch.zeros.load(std::memory_order_relaxed); }
inline bool however_small() { return the_switch.however_small.load(std::memory_order_relaxed); }

// PyTorch's own kernels for every operator called on this thread while in scope.
class UseStock {
 public:
  UseStock();
  ~UseStock();
  UseStock(const UseStock&) = delete;
  UseStock& operator=(const UseStock&) = delete;

 private:
  bool before_;
};
bool uses_stock_kernels();  // inside a UseStock

bool runs_on_cuda(c10::DeviceIndex device);  // robustkern._cuda holds code for this GPU; says once if not
bool under_functorch_grad();  // a torch.func transform that differentiates is running: Function::apply would refuse

// Whether what a graph saves goes through torch.autograd.graph.saved_tensors_hooks, as checkpointing does: it computes the
// forward again while the backward asks for it, under vmap if that is where the backward runs.  There PyTorch's own nodes
// are made, which save other tensors than ours.
bool saves_through_hooks();
// A torch.utils.checkpoint is recording or repeating what it runs: both have to save the same tensors, whether or not
// second derivatives are replaced by then.
bool in_checkpoint();

}  // namespace rk::aten
