// Compares the sample kernels with plain loops in double, on random shapes, alignments and block sizes.
// --plant NAME plants one of the bugs in sample_kernels.h.
#include <algorithm>

#include "sample_kernels.h"
#include "testing.h"

namespace {

using namespace testing;

template <class T>
void test_row_normalize(Draw& draw, int cols, int offset, int threads) {
  const int rows = draw(1, 5);
  Buffer<T> x(rows * cols, offset), y(rows * cols, offset);
  Buffer<float> norm(rows);
  x.fill_normal(draw.random);
  if (rows > 2) std::fill_n(x.data() + cols, cols, from_double<T>(0.0));
  expect_success(sample::row_normalize<T>(x.data(), y.data(), norm.data(), rows, cols, 1e-6f, threads));

  const std::string shape =
      "[" + std::to_string(rows) + "," + std::to_string(cols) + "], " + std::to_string(threads) + " threads";
  for (int r = 0; r < rows; ++r) {
    double sum = 0.0;
    for (int c = 0; c < cols; ++c) sum += std::pow(to_double(x[r * cols + c]), 2);
    const double length = std::sqrt(sum);
    expect_close(norm[r], length, 1e-5 * (1.0 + length), "norm[" + std::to_string(r) + "] of " + shape);
    for (int c = 0; c < cols; ++c) {
      const double want = to_double(x[r * cols + c]) / std::max(length, 1e-6);
      expect_close(to_double(y[r * cols + c]), want, 2 * epsilon<T>() * (0.01 + std::fabs(want)) + 1e-6,
                   "y[" + std::to_string(r) + "," + std::to_string(c) + "] of " + shape);
    }
  }
}

void test_axpby_sum(Draw& draw, int threads) {
  const int n = draw(1, 3000), offset = draw(0, 4), blocks = draw(1, 4);
  Buffer<float> x(n, offset), y(n, offset), out(n, offset);
  for (int i = 0; i < n; ++i) x[i] = static_cast<float>(draw(-8, 8)), y[i] = static_cast<float>(draw(-8, 8));
  float total = 0.0f;
  expect_success(sample::axpby_sum(x.data(), y.data(), out.data(), &total, n, 2.0f, -0.5f, blocks, threads));

  double want = 0.0;
  for (int i = 0; i < n; ++i) {
    const double value = 2.0 * x[i] - 0.5 * y[i];
    want += value;
    expect_close(out[i], value, 0.0, "out[" + std::to_string(i) + "] of " + std::to_string(n));
  }
  expect_close(total, want, 1e-3, "total of " + std::to_string(n));
}

void test_project(Draw& draw, int threads) {
  const int rows = draw(1, 4), cols = draw(1, 400), projections = draw(1, 20);
  const auto seed = static_cast<std::uint32_t>(draw(0, 1 << 30));
  Buffer<float> x(rows * cols), out(rows * projections);
  x.fill_normal(draw.random);
  expect_success(sample::project(x.data(), out.data(), rows, cols, projections, seed, threads));

  for (int r = 0; r < rows; ++r) {
    for (int j = 0; j < projections; ++j) {
      double want = 0.0;
      for (int i = 0; i < cols; ++i) want += x[r * cols + i] * sample::random_sign(seed, j, i);
      expect_close(out[r * projections + j], want, 1e-3,
                   "projection " + std::to_string(j) + " of row " + std::to_string(r));
    }
  }
}

template <class T>
void test_multiply(Draw& draw) {
  const int rows = draw(1, 100), cols = 8 * draw(3, 12);
  Buffer<T> x(rows * cols), y(cols * 16);
  Buffer<float> out(rows * 16);
  x.fill_normal(draw.random), y.fill_normal(draw.random);
  expect_success(sample::multiply<T>(x.data(), y.data(), out.data(), rows, cols));

  for (int r = 0; r < rows; ++r) {
    for (int j = 0; j < 16; ++j) {
      double want = 0.0;
      for (int i = 0; i < cols; ++i) want += to_double(x[r * cols + i]) * to_double(y[i * 16 + j]);
      expect_close(out[r * 16 + j], want, 1e-3, "column " + std::to_string(j) + " of row " + std::to_string(r));
    }
  }
}

// The last row of a matrix whose flat index passes 2^31. No other row exists.
void test_huge() {
  constexpr std::int64_t rows = 70000;
  constexpr int cols = 40000;
  LastRowOnly<__half> x(rows, cols), y(rows, cols);
  std::fill_n(x.last_row(), cols, from_double<__half>(0.01));
  std::vector<float> norm(rows);
  const FirstBlock first(rows - 1);
  expect_success(sample::row_normalize<__half>(x.data(), y.data(), norm.data(), rows, cols, 1e-6f, 256));

  const double value = to_double(from_double<__half>(0.01));
  expect_close(norm[rows - 1], value * 200, 1e-3, "norm of the last row");
  expect_close(to_double(y.last_row()[cols - 1]), 1.0 / 200, 1e-5, "the last element");
}

sample::Bug bug_named(const std::string& name) {
#define SAMPLE_COMPARE(bug) \
  if (name == #bug) return sample::Bug::bug;
  SAMPLE_BUGS(SAMPLE_COMPARE)
#undef SAMPLE_COMPARE
  if (name != "none") fail_usage("no bug is named " + name);
  return sample::Bug::none;
}

}  // namespace

int main(int argc, char** argv) {
  const Options options(argc, argv);
  sample::planted = bug_named(options.plant);
  Draw draw{std::mt19937(options.seed)};
  for (int round = 0; round < options.rounds; ++round) {
    cuda_emulator::configuration().order = options.order >= 0 ? options.order : round % 4;
    const int threads = 32 * draw(2, 8);
    test_row_normalize<float>(draw, draw(1, 500), draw(0, 5), threads);
    test_row_normalize<float>(draw, 4 * draw(1, 150), draw(0, 4), threads);
    test_row_normalize<__half>(draw, draw(1, 300), draw(0, 9), threads);
    test_row_normalize<__nv_bfloat16>(draw, 8 * draw(1, 60), draw(0, 8), threads);
    test_axpby_sum(draw, threads);
    test_project(draw, threads);
    test_multiply<__half>(draw);
    test_multiply<__nv_bfloat16>(draw);
  }
  if (options.huge) test_huge();
  return finish();
}
