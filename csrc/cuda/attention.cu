// attention_double_backward for CUDA tensors, as an operator of its own, which writes into results that it is given:
// aten/kernels/attention_blocks.cpp has checked the arguments, allocates, and does what this one does not serve.
#include "attention.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "torch.cuh"

namespace rk::cuda {
namespace {

constexpr const char* kOp = "attention_double_backward";

using OptionalTensor = std::optional<Tensor>;

// Since 8.0 there are the instructions of mma.cuh, and a block may have 99 KiB of shared memory.
bool has_tensor_cores([[maybe_unused]] const Tensor& t) {
#if defined(__CUDACC__)
  int major = 0;
  return cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, t.get_device_index()) == cudaSuccess &&
         major >= 8;
#else
  return true;
#endif
}

// The tensors as the kernels take them; copies live as long as this.
class Views {
 public:
  template <class T>
  Heads<T> operator()(const OptionalTensor& tensor, bool any_columns = false) {
    if (!tensor) return {};
    const Tensor& t =
        held_.emplace_back(any_columns || has_adjacent_columns(*tensor) ? *tensor : torch::stable::contiguous(*tensor));
    T* const data = pointer<T>(t);
    if (any_columns)
      return {{data, static_cast<int>(t.stride(2)), static_cast<int>(t.size(2)), 0}, t.stride(0), t.stride(1)};
    aligned_ = aligned_ && aligned<std::remove_const_t<T>>(t.size(3), data);
    for (int64_t d = 0; d < 3; ++d) aligned_ = aligned_ && (t.size(d) == 1 || t.stride(d) % (16 / sizeof(T)) == 0);
    return {{data, static_cast<int>(t.stride(2)), static_cast<int>(t.size(2)), static_cast<int>(t.size(3))},
            t.stride(0),
            t.stride(1)};
  }

  // Whether rows of all of them can be copied by 16 bytes.
  bool all_aligned() const { return aligned_; }

 private:
  static bool has_adjacent_columns(const Tensor& t) { return t.size(3) <= 1 || t.stride(3) == 1; }
  std::vector<Tensor> held_;
  bool aligned_ = true;
};

// Whether the kernels serve these sizes: rows that they can hold, and few enough rows for 32 bits.
template <class S>
bool fits(const Tensor& q, const Tensor& k, const Tensor& v) {
  const int64_t most = int64_t{1} << 30, tile = 32;  // the fewest rows that a block has
  const auto few = [&](const Tensor& t) {
    return t.size(2) <= most && t.size(0) * t.size(1) <= most / (t.size(2) / tile + 1);
  };
  return q.size(3) <= kLargestHead<S> && v.size(3) <= kLargestHead<S> && few(q) && few(k);
}

// mask: [B, H, L, S] in the accumulation type.  Results that nobody needs are absent.
bool attention_double_backward(OptionalTensor a, OptionalTensor b, OptionalTensor c, Tensor grad, Tensor q, Tensor k,
                               Tensor v, OptionalTensor out, OptionalTensor logsumexp, OptionalTensor mask, bool causal,
                               double scale, OptionalTensor gg_grad, OptionalTensor grad_q, OptionalTensor grad_k,
                               OptionalTensor grad_v) {
  if (!has_tensor_cores(q)) return false;
  const DeviceScope scope(q);
  bool served = false;
  visit_storage(q.scalar_type(), [&](auto element) {
    using S = decltype(element);
    using A = accumulation_t<S>;
    served = fits<S>(q, k, v);
    if (!served) return;
    const auto type = accumulation_type(q.scalar_type());
    const auto scratch = [&](std::int64_t numbers) {
      const std::vector<std::int64_t> sizes(1, numbers * q.size(0) * q.size(1) * q.size(2));
      return torch::stable::new_empty(q, sizes, type);
    };
    Views view;
    AttentionCall<S> x{};
    x.batch = static_cast<int>(q.size(0));
    x.heads = static_cast<int>(q.size(1));
    x.key_heads = static_cast<int>(k.size(1));
    x.queries = static_cast<int>(q.size(2));
    x.keys = static_cast<int>(k.size(2));
    x.a = view.operator()<const S>(a);
    x.b = view.operator()<const S>(b);
    x.c = view.operator()<const S>(c);
    x.grad = view.operator()<const S>(grad);
    x.q = view.operator()<const S>(q);
    x.k = view.operator()<const S>(k);
    x.v = view.operator()<const S>(v);
    x.gg_grad = view.operator()<S>(gg_grad);
    x.grad_q = view.operator()<S>(grad_q);
    x.grad_k = view.operator()<S>(grad_k);
    x.grad_v = view.operator()<S>(grad_v);
    x.mask = view.operator()<const A>(mask, true);
    x.mask_column = mask ? mask->stride(3) : 0;
    x.causal = causal;
    x.scale = static_cast<A>(scale);
    const Tensor moments = scratch(sizeof(RowMoments<S>) / sizeof(A));
    x.moments = reinterpret_cast<RowMoments<S>*>(pointer<A>(moments));
    if (logsumexp) {
      logsumexp = torch::stable::contiguous(*logsumexp);
      x.logsumexp = pointer<const A>(logsumexp);
      x.out = view.operator()<const S>(out);
    } else {
      logsumexp = scratch(1);
      x.logsumexp = pointer<const A>(logsumexp);
      if (gg_grad && x.tangent()) out = torch::stable::empty_like(*gg_grad);
      const auto results = view.operator()<S>(out);
      x.out = view.operator()<const S>(out);
      x.aligned = view.all_aligned();
      check_launch(launch_attention_forward(x, pointer<A>(logsumexp), results, scope.stream()), kOp);
    }
    x.aligned = view.all_aligned();
    check_launch(launch_attention_double_backward(x, scope.stream()), kOp);
  });
  return served;
}

}  // namespace

// Known where it has kernels; returns whether it serves the call.
STABLE_TORCH_LIBRARY(robustkern_cuda, m) {
  m.def(
      "attention_double_backward(Tensor? a, Tensor? b, Tensor? c, Tensor grad, Tensor q, Tensor k, Tensor v, "
      "Tensor? out, Tensor? logsumexp, Tensor? mask, bool causal, float scale, Tensor(a!)? gg_grad, "
      "Tensor(b!)? grad_q, Tensor(c!)? grad_k, Tensor(d!)? grad_v) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(robustkern_cuda, RK_CUDA_KEY, m) {
  m.impl("attention_double_backward", TORCH_BOX(&attention_double_backward));
}

}  // namespace rk::cuda
