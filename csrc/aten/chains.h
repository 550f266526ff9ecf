// How the operators of robustkern's own are differentiated: by the next one of their chain.
//
//     row_norm(x, weight, ...) -> row_norm_backward(grad, x, norm, weight, ...) -> row_norm_double_backward(u, grad, x, ...)
//
// Which arguments the next one takes is read from the schemas in robustkern/ops/_chains.py, which says so here.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace rk::aten {

// Where an argument of the next operator comes from, and which one it is there.
enum class From : int8_t { kArgument, kCotangent, kIsNeeded, kLastResult };
using Source = std::pair<From, int64_t>;

// The end of a chain: a derivative of `op` is refused with this message.
void refuse_derivatives(const std::string& op, const std::string& message);

// Args:
//   op, next: names without overloads, such as robustkern::row_norm
//   sources: of next's arguments
//   inputs: the arguments of op that next's results are the gradients of, in their order
//   flags: the arguments of op that say which of its results are there; none: all
//   only: an argument of op and the value that it must have; with another one nothing depends on the inputs
void differentiate(const std::string& op, const std::string& next, std::vector<Source> sources,
                   std::vector<int64_t> inputs, std::vector<int64_t> flags,
                   std::optional<std::pair<int64_t, int64_t>> only);

}  // namespace rk::aten
