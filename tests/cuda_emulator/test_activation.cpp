// The kernel of activation_double_backward against the textbook's formulas in double: every function, random sizes and
// alignments, outputs that are not needed, huge and invalid numbers, small grids, and the end of more than 2^31
// elements.
#include "activation.cuh"

#include <algorithm>

#include "testing.h"

namespace {

using rk::Activation;
using rk::cuda::ActivationCall;
using namespace testing;

constexpr Activation functions[] = {
    Activation::kGelu, Activation::kGeluTanh,  Activation::kSilu,      Activation::kMish, Activation::kSoftplus,
    Activation::kElu,  Activation::kEluResult, Activation::kHardswish, Activation::kTanh, Activation::kSigmoid};
constexpr double beta = 1.5, threshold = 2.0, alpha = 1.25, scale = 0.75, input_scale = 0.5;

struct Truth {
  double slope, bend;
};

Truth truth(Activation function, double x) {
  const double s = 1.0 / (1.0 + std::exp(-x));
  switch (function) {
    case Activation::kGelu: {
      const double density = std::exp(-0.5 * x * x) / std::sqrt(2.0 * M_PI);
      return {0.5 * std::erfc(-x / std::sqrt(2.0)) + x * density, density * (2.0 - x * x)};
    }
    case Activation::kGeluTanh: {
      const double root = std::sqrt(2.0 / M_PI), v = root * (x + 0.044715 * x * x * x);
      const double v1 = root * (1.0 + 3.0 * 0.044715 * x * x), v2 = root * 6.0 * 0.044715 * x, t = std::tanh(v);
      const double sech2 = 1.0 / (std::cosh(v) * std::cosh(v));
      return {0.5 * (1.0 + t) + 0.5 * x * sech2 * v1, sech2 * v1 + 0.5 * x * sech2 * (v2 - 2.0 * t * v1 * v1)};
    }
    case Activation::kSilu: return {s + x * s * (1.0 - s), s * (1.0 - s) * (2.0 + x * (1.0 - 2.0 * s))};
    case Activation::kMish: {
      const double v = std::log1p(std::exp(x)), t = std::tanh(v), t1 = s / (std::cosh(v) * std::cosh(v));
      return {t + x * t1, t1 * (2.0 + x * (1.0 - s - 2.0 * t * s))};
    }
    case Activation::kSoftplus: {
      const double b = 1.0 / (1.0 + std::exp(-beta * x));
      return {beta * x > threshold ? 1.0 : b, beta * x >= threshold ? 0.0 : beta * b * (1.0 - b)};
    }
    case Activation::kElu: {
      const double e = input_scale * alpha * scale * std::exp(input_scale * x);
      return {x > 0.0 ? scale : e, x >= 0.0 ? 0.0 : input_scale * e};
    }
    case Activation::kEluResult:
      return {x > 0.0 ? scale : input_scale * (x + alpha * scale), x >= 0.0 ? 0.0 : input_scale};
    case Activation::kHardswish:
      return {x <= -3.0 ? 0.0 : x >= 3.0 ? 1.0 : x / 3.0 + 0.5, std::fabs(x) < 3.0 ? 1.0 / 3.0 : 0.0};
    case Activation::kTanh: return {1.0 - x * x, -2.0 * x};
    default: return {x * (1.0 - x), 1.0 - 2.0 * x};
  }
}

template <class S>
struct Problem {
  using A = rk::cuda::accumulation_t<S>;
  Activation function;
  std::int64_t n;
  Buffer<S> u, grad, x, gg_grad, grad_x;

  // Tensors begin up to `most_offset` elements behind a multiple of 16 bytes.
  Problem(Draw& draw, Activation kind, std::int64_t elements, int most_offset)
      : function(kind),
        n(elements),
        u(n, draw(0, most_offset)),
        grad(n, draw(0, most_offset)),
        x(n, draw(0, most_offset)),
        gg_grad(n, draw(0, most_offset)),
        grad_x(n, draw(0, most_offset)) {
    const bool of_result = kind == Activation::kTanh || kind == Activation::kSigmoid || kind == Activation::kEluResult;
    u.fill_normal(draw.random);
    grad.fill_normal(draw.random);
    x.fill_normal(draw.random, of_result ? 0.3 : draw.one_of({1.0, 4.0}));
  }

  ActivationCall<S> call(bool need_grad = true, bool need_x = true) {
    ActivationCall<S> c{};
    c.elements = n;
    c.u = u.data();
    c.grad = need_x ? grad.data() : nullptr;
    c.x = x.data();
    c.gg_grad = need_grad ? gg_grad.data() : nullptr;
    c.grad_x = need_x ? grad_x.data() : nullptr;
    c.parameters = {A(beta), A(threshold), A(alpha), A(scale), A(input_scale)};
    return c;
  }

  std::string text(const char* what, std::int64_t j) const {
    return std::string(what) + " " + std::to_string(j) + " of function " + std::to_string(static_cast<int>(function)) +
           ", " + shape_of<S>({n});
  }

  void check_element(std::int64_t j, bool need_grad, bool need_x) const {
    const double loose = 60 * epsilon<A>(), store = epsilon<S>();
    const double u_j = to_double(u[j]), g = to_double(grad[j]);
    const Truth want = truth(function, to_double(x[j]));
    if (need_grad) {
      const double value = want.slope * u_j;
      expect_close(to_double(gg_grad[j]), value, store * std::fabs(value) + loose * std::fabs(u_j) + 1e-7,
                   text("gg_grad", j));
    }
    if (need_x) {
      const double value = want.bend * u_j * g;
      expect_close(to_double(grad_x[j]), value, store * std::fabs(value) + loose * std::fabs(u_j * g) + 1e-7,
                   text("grad_x", j));
    }
  }
};

template <class S>
void test_function(const Options& options, Draw& draw, Activation function, int elements) {
  Problem<S> t(draw, function, elements, draw.one_of({0, 8}));
  const int needed = draw(0, 4);
  const bool need_grad = needed != 0, need_x = needed != 1;
  const auto call = [&] {
    return rk::cuda::launch_activation_double_backward(function, t.call(need_grad, need_x), nullptr);
  };
  run_in_all_orders(options, t.text("output", 0), call, t.gg_grad, t.grad_x);
  for (std::int64_t j = 0; j < t.n; ++j) t.check_element(j, need_grad, need_x);
}

// Several cotangents of one x, or none: the elements of each, and of grad_x their sum.
template <class S>
void test_several(const Options& options, Draw& draw, Activation function, std::int64_t count) {
  const int offset = draw.one_of({0, 8});
  Problem<S> t(draw, function, draw.one_of({draw(1, 3000), 8 * draw(1, 300)}), offset);
  Buffer<S> u(count * t.n, draw(0, offset)), g(count * t.n, draw(0, offset)), gg_grad(count * t.n, draw(0, offset));
  u.fill_normal(draw.random);
  g.fill_normal(draw.random);
  const int needed = draw(0, 4);
  const bool need_grad = needed != 0, need_x = needed != 1;
  ActivationCall<S> c = t.call(need_grad, need_x);
  c.cotangents = count;
  c.u = count ? u.data() : nullptr;
  c.grad = need_x && count ? g.data() : nullptr;
  c.gg_grad = need_grad ? gg_grad.data() : nullptr;
  const auto call = [&] { return rk::cuda::launch_activation_double_backward(function, c, nullptr); };
  run_in_all_orders(options, t.text("cotangents", count), call, gg_grad, t.grad_x);
  const double store = epsilon<S>();
  for (std::int64_t j = 0; j < t.n; ++j) {
    const Truth want = truth(function, to_double(t.x[j]));
    double sum = 0.0, room = 1e-6;
    for (std::int64_t i = 0; i < count; ++i) {
      const double u_j = to_double(u[i * t.n + j]), g_j = to_double(g[i * t.n + j]);
      if (need_grad)
        expect_close(to_double(gg_grad[i * t.n + j]), want.slope * u_j,
                     store * std::fabs(want.slope * u_j) + 1e-5 * (1 + std::fabs(u_j)),
                     t.text("gg_grad of several", j));
      sum += want.bend * u_j * g_j;
      room += 1e-5 * std::fabs(u_j * g_j);
    }
    if (need_x)
      expect_close(to_double(t.grad_x[j]), sum, store * std::fabs(sum) + room, t.text("grad_x of several", j));
  }
}

// No bit depends on where the tensors lie.
template <class S>
void test_alignment(Draw& draw, Activation function, std::int64_t elements) {
  Problem<S> t(draw, function, elements, 0), moved(draw, function, elements, 0);
  Buffer<S> x(elements, 1), gg_grad(elements, 3);
  std::copy_n(t.x.data(), elements, x.data());
  ActivationCall<S> c = t.call();
  expect_success(rk::cuda::launch_activation_double_backward(function, c, nullptr));
  c.x = x.data();
  c.gg_grad = gg_grad.data();
  c.grad_x = moved.grad_x.data();
  expect_success(rk::cuda::launch_activation_double_backward(function, c, nullptr));
  const std::size_t bytes = elements * sizeof(S);
  expect_close(std::memcmp(t.gg_grad.data(), gg_grad.data(), bytes), 0, 0, t.text("gg_grad elsewhere", 0));
  expect_close(std::memcmp(t.grad_x.data(), moved.grad_x.data(), bytes), 0, 0, t.text("grad_x elsewhere", 0));
}

// Nothing overflows at the ends of the range, and NaN stays where it is, but where PyTorch's comparisons lose it.
void test_extremes(Draw& draw) {
  for (const Activation function : {Activation::kGelu, Activation::kGeluTanh, Activation::kSilu, Activation::kMish,
                                    Activation::kSoftplus, Activation::kElu, Activation::kHardswish}) {
    Problem<float> t(draw, function, 6, draw.one_of({0, 8}));
    const float values[] = {3e38f, -3e38f, 100.0f, -100.0f, 0.0f, NAN};
    std::copy_n(values, 6, t.x.data());
    expect_success(rk::cuda::launch_activation_double_backward(function, t.call(), nullptr));
    const double right = function == Activation::kElu ? scale : 1.0;
    for (const int j : {0, 2}) expect_close(t.gg_grad[j], right * t.u[j], 1e-6, t.text("gg_grad of a huge x", j));
    for (const int j : {1, 3}) expect_close(t.gg_grad[j], 0.0, 1e-6, t.text("gg_grad of a huge negative x", j));
    for (const int j : {0, 1, 2, 3}) expect_close(t.grad_x[j], 0.0, 1e-6, t.text("grad_x of a huge x", j));
    if (function != Activation::kElu) t.check_element(4, true, true);
    if (function == Activation::kElu || function == Activation::kHardswish) {
      expect_close(t.gg_grad[5], right * t.u[5], 1e-6, t.text("gg_grad of NaN, which is above all", 5));
      expect_close(t.grad_x[5], 0.0, 0.0, t.text("grad_x of NaN, which is above all", 5));
      continue;
    }
    expect_nan(t.gg_grad[5], t.text("gg_grad of NaN", 5));
    expect_nan(t.grad_x[5], t.text("grad_x of NaN", 5));
  }
}

// Fewer threads than vectors: each does several.
void test_small_grid(Draw& draw) {
  Problem<float> t(draw, Activation::kSilu, 1003, 0);
  const auto call = t.call();
  expect_success(rk::cuda::launch(rk::cuda::activation_double_backward_kernel<Activation::kSilu, float>, dim3(2),
                                  dim3(32), 0, nullptr, call));
  for (std::int64_t j = 0; j < t.n; ++j) t.check_element(j, true, true);
  t.gg_grad.fill_with_nan();
  expect_success(rk::cuda::launch(rk::cuda::activation_double_backward_several_kernel<Activation::kSilu, false, float>,
                                  dim3(2), dim3(32), 0, nullptr, call));
  for (std::int64_t j = 0; j < t.n; ++j) t.check_element(j, true, true);
}

// The last of so many elements that their index passes 2^31; the others do not exist.
void test_huge() {
  constexpr std::int64_t rows = 1500000, cols = 2048;  // of one block each
  LastRowOnly<__half> x(rows, cols), u(rows, cols), g(rows, cols), gg_grad(rows, cols), grad_x(rows, cols);
  std::fill_n(x.last_row(), cols, from_double<__half>(0.5));
  std::fill_n(u.last_row(), cols, from_double<__half>(2.0));
  std::fill_n(g.last_row(), cols, from_double<__half>(3.0));
  ActivationCall<__half> c{};
  c.elements = rows * cols;
  c.u = u.data();
  c.grad = g.data();
  c.x = x.data();
  c.gg_grad = gg_grad.data();
  c.grad_x = grad_x.data();
  const FirstBlock first(rows - 1);
  expect_success(rk::cuda::launch_activation_double_backward(Activation::kTanh, c, nullptr));
  expect_close(to_double(gg_grad.last_row()[cols - 1]), 1.5, 1e-3, "gg_grad of the last element");
  expect_close(to_double(grad_x.last_row()[cols - 1]), -6.0, 1e-3, "grad_x of the last element");
}

}  // namespace

int main(int argc, char** argv) {
  const Options options(argc, argv);
  Draw draw{std::mt19937(options.seed)};
  for (int round = 0; round < options.rounds; ++round) {
    const Activation function = functions[round % std::size(functions)];
    test_function<float>(options, draw, function, draw(1, 1500));
    test_function<double>(options, draw, function, draw(1, 700));
    test_function<__half>(options, draw, function, draw(1, 700));
    test_function<__nv_bfloat16>(options, draw, function, draw(1, 3000));
    test_several<float>(options, draw, function, draw.one_of({0, 2, 3, 4}));
    test_several<__nv_bfloat16>(options, draw, function, draw(2, 4));
    test_alignment<float>(draw, function, draw(1, 700));
    test_alignment<__half>(draw, function, draw(1, 700));
  }
  test_extremes(draw);
  test_small_grid(draw);
  if (options.huge) test_huge();
  return finish();
}
