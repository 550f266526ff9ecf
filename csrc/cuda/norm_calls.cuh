// Tensors as arguments of the kernels of layer_norm and group_norm.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "torch.cuh"

namespace rk::cuda {

// The same numbers where kernels can read them in 16-byte vectors: a copy if t is a view that begins in between.
inline Tensor on_vectors(const Tensor& t) {
  return reinterpret_cast<std::uintptr_t>(t.data_ptr()) % 16 == 0 ? t : torch::stable::clone(t);
}

inline Tensor vectors_of(const Tensor& t) { return on_vectors(torch::stable::contiguous(t)); }
inline std::optional<Tensor> vectors_of(const std::optional<Tensor>& t) {
  return t ? std::make_optional(vectors_of(*t)) : std::nullopt;
}

// The tensors of one call, kept alive until its kernels are launched.
struct NormTensors {
  const char* op;
  Tensor x, grad, rstd;
  std::optional<Tensor> mean, weight, u, a, b;
  std::optional<Tensor> gg_grad, grad_x, grad_weight, grad_bias;  // what is needed

  ScalarType accumulation() const { return accumulation_type(x.scalar_type()); }
  Tensor sums(const std::vector<int64_t>& sizes) const { return torch::stable::new_empty(x, sizes, accumulation()); }

  template <template <class> class Call, class S>
  void put_into(Call<S>& c) const {
    using A = accumulation_t<S>;
    c.x = pointer<const S>(x);
    c.g = pointer<const S>(grad);
    c.u = pointer<const S>(u);
    c.weight = pointer<const A>(weight);
    c.a = pointer<const A>(a);
    c.b = pointer<const A>(b);
    c.mean = pointer<const A>(mean);
    c.rstd = pointer<const A>(rstd);
    c.gg_grad = pointer<S>(gg_grad);
    c.grad_x = pointer<S>(grad_x);
    c.grad_weight = pointer<A>(grad_weight);
    c.grad_bias = pointer<A>(grad_bias);
  }

  // Of the backward, and of its derivative; [0] where a gradient is not needed.
  std::tuple<Tensor, Tensor, Tensor> slopes() const { return {like_x(grad_x), sum(grad_weight), sum(grad_bias)}; }
  std::tuple<Tensor, Tensor, Tensor> bends() const { return {like_x(gg_grad), like_x(grad_x), sum(grad_weight)}; }

 private:
  Tensor like_x(const std::optional<Tensor>& t) const { return t ? *t : torch::stable::new_empty(x, {0}); }
  Tensor sum(const std::optional<Tensor>& t) const { return t ? *t : sums({0}); }
};

}  // namespace rk::cuda
