// Blocks that stay in the second-level cache, each multiplied by oneDNN's kernel for small matrices.
//
// That kernel wants the rows of both factors adjacent.  Where many rows are multiplied by a weight, they are as they come,
// and the weight is turned once if need be.  A weight's gradient is a sum over rows, so that its left factor comes turned
// the wrong way: the narrower factor is turned block by block, a few per cent of the time.
#include "matmul_cpu.h"

#include <ATen/Context.h>
#include <ATen/native/CPUBlas.h>
#include <torch/csrc/stable/ops.h>  // a parallel_for of the library's own: at::'s is one thread without -fopenmp

#include <algorithm>
#include <vector>

#include "../../cpu/transpose.h"

namespace rk::aten {
namespace {

using at::Tensor;

constexpr int64_t kRows = 64;    // of the output in a block
constexpr int64_t kCols = 384;   // of the output in a block
constexpr int64_t kDepth = 256;  // of the sum in a block
constexpr int64_t kUnits = 16;   // at least as many parts of a sum as this, if there is enough to add up
constexpr int64_t kMany = 512, kLeastProducts = 1 << 21;

bool any_stride_is_one(const Tensor& t) { return t.stride(0) == 1 || t.stride(1) == 1; }

void multiply(int64_t rows, int64_t cols, int64_t depth, const float* a, int64_t stride_a, const float* b,
              int64_t stride_b, float* out, int64_t stride_out, bool add) {
#ifdef CPUBLAS_BRGEMM_F32F32F32
  at::native::cpublas::brgemm(rows, cols, depth, stride_a, stride_b, stride_out, add, a, b, out);
#else
  TORCH_INTERNAL_ASSERT(false);
#endif
}

// Adjacent rows of a, which are many.
Tensor many_rows(const Tensor& a, const Tensor& b) {
  const int64_t m = a.size(0), depth = a.size(1), n = b.size(1);
  const Tensor weight = b.stride(1) == 1 && b.stride(0) >= n ? b : b.contiguous();  // rows that do not overlap
  Tensor result = at::empty({m, n}, a.options());
  const float *from = a.const_data_ptr<float>(), *by = weight.const_data_ptr<float>();
  float* const to = result.mutable_data_ptr<float>();
  const int64_t stride_a = a.stride(0), stride_b = weight.stride(0);
  torch::stable::parallel_for(0, (m + kRows - 1) / kRows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * kRows; i < std::min(m, end * kRows); i += kRows)
      for (int64_t j = 0; j < n; j += kCols)
        for (int64_t k = 0; k < depth; k += kDepth)
          multiply(std::min(kRows, m - i), std::min(kCols, n - j), std::min(kDepth, depth - k), from + i * stride_a + k,
                   stride_a, by + k * stride_b + j, stride_b, to + i * n + j, n, k > 0);
  });
  return result;
}

// a^T b for a [R, M] and b [R, N] with adjacent rows, M <= N.
Tensor sum_over_rows(const Tensor& a, const Tensor& b) {
  const int64_t depth = a.size(0), m = a.size(1), n = b.size(1);
  const int64_t stride_a = a.stride(0), stride_b = b.stride(0);
  const float *left = a.const_data_ptr<float>(), *right = b.const_data_ptr<float>();
  constexpr int64_t tile_rows = 2 * kRows;
  const int64_t across = (n + kCols - 1) / kCols, tiles = (m + tile_rows - 1) / tile_rows * across;
  const int64_t blocks = (depth + kDepth - 1) / kDepth;
  const int64_t parts = std::min(blocks, (kUnits + tiles - 1) / tiles);
  const Tensor sums = at::empty({parts, m, n}, a.options());
  float* const to = sums.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, parts * tiles, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> turned(tile_rows * kDepth);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t part = unit / tiles, i = unit % tiles / across * tile_rows, j = unit % across * kCols;
      const int64_t rows = std::min(tile_rows, m - i), cols = std::min(kCols, n - j);
      const int64_t first = blocks * part / parts, last = blocks * (part + 1) / parts;
      for (int64_t block = first; block < last; ++block) {
        const int64_t k = block * kDepth, size = std::min(kDepth, depth - k);
        rk::cpu::transpose(left + k * stride_a + i, stride_a, turned.data(), kDepth, size, rows);
        multiply(rows, cols, size, turned.data(), kDepth, right + k * stride_b + j, stride_b,
                 to + (part * m + i) * n + j, n, block > first);
      }
    }
  });
  return parts == 1 ? sums[0] : sums.sum(0);
}

}  // namespace

bool has_faster_matmul() {
#if defined(CPUBLAS_BRGEMM_F32F32F32) && (defined(__x86_64__) || defined(_M_X64)) && defined(__GNUC__)
  static const bool faster = at::hasMKL() && !__builtin_cpu_is("intel") && __builtin_cpu_supports("avx512f");
  return faster && at::globalContext().userEnabledMkldnn();
#else
  return false;
#endif
}

Tensor matrix_product(const Tensor& a, const Tensor& b) {
  const auto served = [](const Tensor& t) {
    return t.is_cpu() && t.dim() == 2 && t.scalar_type() == at::kFloat && t.numel() > 0 && any_stride_is_one(t) &&
           !t.is_neg() && !t._is_zerotensor();
  };
  if (!has_faster_matmul() || !served(a) || !served(b) || a.size(1) != b.size(0)) return at::mm(a, b);
  const int64_t m = a.size(0), depth = a.size(1), n = b.size(1);
  if (std::min({m, depth, n}) < 16 || m * n * depth < kLeastProducts) return at::mm(a, b);
  if (a.stride(1) == 1 && a.stride(0) >= depth && m >= kMany && m >= std::max(n, depth) / 4) return many_rows(a, b);
  const bool of_rows = a.stride(0) == 1 && a.stride(1) >= m && b.stride(1) == 1 && b.stride(0) >= n;
  if (of_rows && depth >= kMany && depth >= std::max(n, m) / 4)
    return m <= n ? sum_over_rows(a.t(), b) : sum_over_rows(b, a.t()).t().contiguous();
  return at::mm(a, b);
}

}  // namespace rk::aten
