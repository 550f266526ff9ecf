// The bookkeeping of a Function that is a first backward: which gradients it gives, which of its own are asked for, and what
// it keeps for them.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <array>
#include <bit>
#include <optional>
#include <tuple>
#include <vector>

#include "tensors.h"

namespace rk::aten {

using c10::SymInt;
using c10::SymIntArrayRef;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// ------------------------------------------------------------------ several tensors, of which some are there

template <size_t N>
using MaskOf = std::array<bool, N>;
using Mask = MaskOf<3>;
using Triple = std::tuple<Tensor, Tensor, Tensor>;

// For Kept: to_bits({true, false}), to_bits(mask).
template <class Flags = std::initializer_list<bool>>
int64_t to_bits(const Flags& flags) {
  int64_t bits = 0, bit = 1;
  for (const bool flag : flags) {
    if (flag) bits |= bit;
    bit <<= 1;
  }
  return bits;
}

template <class... T>
MaskOf<sizeof...(T)> are_defined(const std::tuple<T...>& all) {
  return std::apply([](const auto&... t) { return MaskOf<sizeof...(T)>{t.defined()...}; }, all);
}

// A Function gives and takes the tensors that are there, and no others.
template <class... T>
variable_list pick(const std::tuple<T...>& all, const MaskOf<sizeof...(T)>& mask) {
  variable_list picked;
  size_t i = 0;
  const auto take = [&](const Tensor& t) {
    if (mask[i++]) picked.push_back(t);
  };
  std::apply([&](const auto&... t) { (take(t), ...); }, all);
  return picked;
}

template <size_t N>
auto spread(const variable_list& picked, const MaskOf<N>& mask) {
  std::array<Tensor, N> all;
  for (size_t i = 0, k = 0; i < N; ++i)
    if (mask[i]) all[i] = picked[k++];
  return std::apply([](const auto&... t) { return std::tuple(t...); }, all);
}

// Those that are asked for, as a Function's first gradients.  An operator may give more: PyTorch's do in forward mode.
template <class... T>
void assign(variable_list& grads, const std::tuple<T...>& all, const MaskOf<sizeof...(T)>& asked) {
  size_t i = 0;
  const auto take = [&](const Tensor& t) {
    if (asked[i]) grads[i] = t;
    ++i;
  };
  std::apply([&](const auto&... t) { (take(t), ...); }, all);
}

// ------------------------------------------------------------------ in a Function's backward

// Whether the gradient of each of its first N inputs is asked for.  `given`: the bits of those that were not absent.
template <size_t N>
MaskOf<N> asked(AutogradContext* ctx, int64_t given = -1) {
  MaskOf<N> result{};
  for (size_t i = 0, edge = 0; i < N; ++i)  // as Function::apply counts, which skips what is absent
    if (given & int64_t{1} << i) result[i] = ctx->needs_input_grad(edge++);
  return result;
}

// Whether a second backward with these cotangents is differentiated itself, backwards, for a third order, or forwards; or
// is for operators that the cotangents know.
inline bool composes(const variable_list& cotangents) {
  return at::GradMode::is_enabled() || std::any_of(cotangents.begin(), cotangents.end(), [](const Tensor& t) {
           return t.defined() && (is_differentiated(t) || !is_known(t));
         });
}

// Whether a backward is run not by its node but by what compiled autograd has made of one: that adds up the results
// without asking whether they are defined, so that zeros must be tensors there.
inline bool in_compiled_autograd() { return !torch::autograd::get_current_node(); }

// Where undefined does not stand for zero: zeros, like `like`, for the gradients that are asked for and that a backward
// left undefined.
template <size_t N>
void fill_for_compiled_autograd(const MaskOf<N>& asked, variable_list& grads, const variable_list& like) {
  if (!in_compiled_autograd()) return;
  for (size_t i = 0; i < N; ++i)
    if (asked[i] && !grads[i].defined()) grads[i] = at::zeros_like(like[i]);
}

// Without autograd's keys where nothing is to be differentiated: PyTorch's own kernels at once.
class BelowAutogradIf {
 public:
  explicit BelowAutogradIf(bool condition) {
    if (condition) guard_.emplace();
  }

 private:
  std::optional<at::AutoDispatchBelowADInplaceOrView> guard_;
};
inline bool is_final(const Tensor& g) {
  return !at::GradMode::is_enabled() && !is_differentiated(g) && !g.key_set().has(c10::DispatchKey::FuncTorchBatched);
}

// ------------------------------------------------------------------ what a Function keeps

// Besides tensors, written and read in the same order.  All in one entry: many of them take longer
// than the kernels of a small layer.
class Kept {
 public:
  Kept() = default;
  explicit Kept(AutogradContext* ctx) : values_(ctx->saved_data["kept"].toSymIntVector()) {}
  void save(AutogradContext* ctx) const { ctx->saved_data["kept"] = c10::IValue(SymIntArrayRef(values_)); }

  Kept& put(const SymInt& value) {
    values_.push_back(value);
    return *this;
  }
  Kept& put_all_of(const Kept& other) {
    values_.insert(values_.end(), other.values_.begin(), other.values_.end());
    return *this;
  }
  Kept& put_number(double value) {
    const auto bits = std::bit_cast<uint64_t>(value);  // in halves, which every SymInt holds
    return put(static_cast<int64_t>(bits >> 32)).put(static_cast<int64_t>(bits & 0xffffffff));
  }
  Kept& put_numbers(const std::vector<double>& list) {
    put(static_cast<int64_t>(list.size()));
    for (const double value : list) put_number(value);
    return *this;
  }
  Kept& put_list(SymIntArrayRef list) {
    put(static_cast<int64_t>(list.size()));
    values_.insert(values_.end(), list.begin(), list.end());
    return *this;
  }

  SymInt symbol() { return values_[next_++]; }
  int64_t integer() { return symbol().expect_int(); }
  bool flag() { return integer() != 0; }
  template <size_t N>
  MaskOf<N> mask() {
    const int64_t bits = integer();
    MaskOf<N> result;
    for (size_t i = 0; i < N; ++i) result[i] = (bits >> i & 1) != 0;
    return result;
  }
  double number() {
    const auto high = static_cast<uint64_t>(integer());
    return std::bit_cast<double>(high << 32 | static_cast<uint64_t>(integer()));
  }
  std::vector<double> numbers() {
    std::vector<double> result(static_cast<size_t>(integer()));
    for (double& value : result) value = number();
    return result;
  }
  std::vector<int64_t> integers() {
    std::vector<int64_t> result;
    for (const SymInt& value : list()) result.push_back(value.expect_int());
    return result;
  }
  std::vector<SymInt> list() {
    const auto begin = values_.begin() + static_cast<int64_t>(next_ + 1), end = begin + integer();
    next_ = static_cast<size_t>(end - values_.begin());
    return {begin, end};
  }

 private:
  std::vector<SymInt> values_;
  size_t next_ = 0;
};

}  // namespace rk::aten
