// The instructions of csrc/cuda/mma.cuh against plain products and copies. Fragments are filled and read here by the
// formulas of the PTX manual, "Matrix Fragments for mma.m16n8k16": from a lane and an index i to a row and a column.
#include <string>
#include <vector>

#include "mma.cuh"
#include "testing.h"

namespace {

using namespace testing;
using namespace rk::cuda;

struct Place {
  int row, column;
};
__host__ __device__ Place place_in_a(int lane, int i) {
  const int group = lane >> 2, within = lane % 4;
  return {(i < 2) || (i >= 4 && i < 6) ? group : group + 8, within * 2 + (i & 1) + (i < 4 ? 0 : 8)};
}
__host__ __device__ Place place_in_b(int lane, int i) {
  const int group = lane >> 2, within = lane % 4;
  return {within * 2 + (i & 1) + (i < 2 ? 0 : 8), group};
}
__host__ __device__ Place place_in_d(int lane, int i) {
  const int group = lane >> 2, within = lane % 4;
  return {i < 2 ? group : group + 8, within * 2 + (i & 1)};
}

template <class S>
float number(S value) {
  return static_cast<float>(to_double(value));
}

template <class... P, class... A>
void run(void (*kernel)(P...), unsigned threads, A... arguments) {
  expect_success(launch(kernel, dim3(1), dim3(threads), 0, nullptr, arguments...));
}

template <class... P, class... A>
void expect_report(const std::string& want, void (*kernel)(P...), unsigned threads, A... arguments) {
  const cudaError_t status = launch(kernel, dim3(1), dim3(threads), 0, nullptr, arguments...);
  ++checks;
  const std::string report = cudaGetErrorString(status);
  if (status != cudaSuccess && report.find(want) != std::string::npos) return;
  ++failures;
  std::printf("wrong result: no '%s' in: %s\n", want.c_str(), status == cudaSuccess ? "" : report.c_str());
}

// d += a b, for matrices in memory, row after row.
template <class S>
__global__ void multiply(const S* a, const S* b, float* d) {
  const int lane = threadIdx.x;
  std::uint32_t a_bits[4], b_bits[2];
  float sums[4];
  for (int i = 0; i < 8; i += 2) {
    const Place low = place_in_a(lane, i), high = place_in_a(lane, i + 1);
    a_bits[i / 2] = pack<S>(number(a[low.row * 16 + low.column]), number(a[high.row * 16 + high.column]));
  }
  for (int i = 0; i < 4; i += 2) {
    const Place low = place_in_b(lane, i), high = place_in_b(lane, i + 1);
    b_bits[i / 2] = pack<S>(number(b[low.row * 8 + low.column]), number(b[high.row * 8 + high.column]));
  }
  for (int i = 0; i < 4; ++i) sums[i] = d[place_in_d(lane, i).row * 8 + place_in_d(lane, i).column];
  mma_16816<S>(sums, a_bits, b_bits);
  for (int i = 0; i < 4; ++i) d[place_in_d(lane, i).row * 8 + place_in_d(lane, i).column] = sums[i];
}

// Of whole numbers every sum is exact; of others, each of the two sums of 9 terms loses 9 units and a last place.
template <class S>
void test_multiply(Draw& draw, bool whole) {
  Buffer<S> a(16 * 16), b(16 * 8);
  Buffer<float> d(16 * 8);
  a.fill_normal(draw.random), b.fill_normal(draw.random), d.fill_normal(draw.random);
  if (whole) {
    for (auto* matrix : {&a, &b})
      for (std::size_t i = 0; i < matrix->size(); ++i) (*matrix)[i] = from_double<S>(draw(-100, 100));
    for (std::size_t i = 0; i < d.size(); ++i) d[i] = static_cast<float>(draw(-1000, 1000));
  }
  std::vector<double> want(16 * 8), size(16 * 8);
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      const int i = row * 8 + column;
      want[i] = d[i], size[i] = std::fabs(d[i]);
      for (int k = 0; k < 16; ++k) {
        const double product = to_double(a[row * 16 + k]) * to_double(b[k * 8 + column]);
        want[i] += product, size[i] += std::fabs(product);
      }
    }
  }
  run(multiply<S>, 32, a.data(), b.data(), d.data());
  for (int i = 0; i < 16 * 8; ++i)
    expect_close(d[i], want[i], whole ? 0 : 2 * (9 * 0x1p-24 + 0x1p-23) * size[i], "product " + std::to_string(i));
}

// A number that is not finite stays in its own row and column.
template <class S>
void test_infinity() {
  Buffer<S> a(16 * 16), b(16 * 8);
  Buffer<float> d(16 * 8);
  for (auto* matrix : {&a, &b})
    for (std::size_t i = 0; i < matrix->size(); ++i) (*matrix)[i] = from_double<S>(1.0);
  for (std::size_t i = 0; i < d.size(); ++i) d[i] = 0;
  a[3 * 16 + 9] = from_double<S>(INFINITY);
  b[12 * 8 + 5] = from_double<S>(NAN);
  run(multiply<S>, 32, a.data(), b.data(), d.data());
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      const float got = d[row * 8 + column];
      if (column == 5)
        expect_nan(got, "product with NaN");
      else
        expect_close(got, row == 3 ? INFINITY : 16, 0, "product beside NaN");
    }
  }
}

// 1 + 16 products of 2^-26: a tensor core cuts each of them off.
template <class S>
void test_cut_off() {
  Buffer<S> a(16 * 16), b(16 * 8);
  Buffer<float> d(16 * 8);
  for (auto* matrix : {&a, &b})
    for (std::size_t i = 0; i < matrix->size(); ++i) (*matrix)[i] = from_double<S>(0x1p-13);
  for (std::size_t i = 0; i < d.size(); ++i) d[i] = 1;
  run(multiply<S>, 32, a.data(), b.data(), d.data());
  for (std::size_t i = 0; i < d.size(); ++i) expect_close(d[i], 1, 0, "a sum whose terms are cut off");
}

// The element (row, column) of matrix m is its own number 64 m + 8 row + column.
template <bool kTransposed>
__global__ void load_matrices(std::uint32_t* out) {
  alignas(16) __shared__ std::uint16_t numbers[4 * 64];
  const int lane = threadIdx.x;
  for (int i = lane; i < 4 * 64; i += 32) numbers[i] = static_cast<std::uint16_t>(i);
  __syncthreads();
  std::uint32_t r[4];
  if constexpr (kTransposed)
    ldmatrix_x4_transposed(r, numbers + lane * 8);
  else
    ldmatrix_x4(r, numbers + lane * 8);
  for (int i = 0; i < 4; ++i) out[lane * 4 + i] = r[i];
}

template <bool kTransposed>
void test_ldmatrix() {
  std::vector<std::uint32_t> out(32 * 4);
  run(load_matrices<kTransposed>, 32, out.data());
  for (int lane = 0; lane < 32; ++lane) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      const int g = lane >> 2, t = lane % 4;
      const int low = kTransposed ? 2 * t * 8 + g : g * 8 + 2 * t;
      const int high = kTransposed ? (2 * t + 1) * 8 + g : g * 8 + 2 * t + 1;
      const std::uint32_t want = 64 * matrix + low + ((64u * matrix + high) << 16);
      expect_close(out[lane * 4 + matrix], want, 0, "ldmatrix of lane " + std::to_string(lane));
    }
  }
}

// a is [16, 16], b [16, 16]: d = a b by ldmatrix, b as its rows lie with the transposition, or as columns without.
template <class S, bool kRows>
__global__ void multiply_from_shared(const S* a, const S* b, float* d) {
  alignas(16) __shared__ S in_a[16 * 16], in_b[16 * 16];
  const int lane = threadIdx.x;
  copy_async_16(in_a + lane * 8, a + lane * 8, true);
  copy_async_16(in_b + lane * 8, b + lane * 8, true);
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  std::uint32_t a_bits[4], b_bits[4];
  ldmatrix_x4(a_bits, in_a + lane % 16 * 16 + lane / 16 * 8);
  if constexpr (kRows)
    ldmatrix_x4_transposed(b_bits, in_b + lane % 16 * 16 + lane / 16 * 8);
  else
    ldmatrix_x4(b_bits, in_b + (lane % 8 + lane / 16 * 8) * 16 + lane / 8 % 2 * 8);
  for (int half = 0; half < 2; ++half) {
    float sums[4] = {};
    mma_16816<S>(sums, a_bits, {b_bits[2 * half], b_bits[2 * half + 1]});
    for (int i = 0; i < 4; ++i) d[place_in_d(lane, i).row * 16 + half * 8 + place_in_d(lane, i).column] = sums[i];
  }
}

template <class S, bool kRows>
void test_multiply_from_shared(Draw& draw) {
  Buffer<S> a(16 * 16), b(16 * 16);
  Buffer<float> d(16 * 16);
  for (auto* matrix : {&a, &b})
    for (std::size_t i = 0; i < matrix->size(); ++i) (*matrix)[i] = from_double<S>(draw(-20, 20));
  run(multiply_from_shared<S, kRows>, 32, a.data(), b.data(), d.data());
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 16; ++column) {
      double want = 0;
      for (int k = 0; k < 16; ++k)
        want += to_double(a[row * 16 + k]) * to_double(b[kRows ? k * 16 + column : column * 16 + k]);
      expect_close(d[row * 16 + column], want, 0, "product from shared memory");
    }
  }
}

// What each stage of three groups of copies leaves: NaN until the wait that covers it.
__global__ void copy_in_groups(const float4* from, float* out) {
  __shared__ float4 to[4];
  const int thread = threadIdx.x;
  if (thread != 0) return;
  to[3] = make_float4(7, 7, 7, 7);
  for (int group = 0; group < 3; ++group) {
    copy_async_16(to + group, from + group, group != 1);
    copy_async_commit();
  }
  copy_async_16(to + 3, from + 3, true);  // of no group yet
  auto write = [&](int stage) {
    for (int i = 0; i < 4; ++i) out[stage * 4 + i] = to[i].y;
  };
  write(0);
  copy_async_wait<2>();
  write(1);
  copy_async_wait<0>();
  write(2);
  copy_async_commit();
  copy_async_wait<0>();
  write(3);
}

void test_copy_in_groups() {
  Buffer<float4> from(4);
  for (int i = 0; i < 4; ++i) from[i] = make_float4(i + 1.0f, i + 10.0f, 0, 0);
  std::vector<float> out(16);
  run(copy_in_groups, 1, from.data(), out.data());
  const float nan = NAN, want[] = {nan, nan, nan, nan, 10, nan, nan, nan, 10, 0, 12, nan, 10, 0, 12, 13};
  for (int i = 0; i < 16; ++i) {
    const std::string what = "stage " + std::to_string(i / 4) + " of copy " + std::to_string(i % 4);
    std::isnan(want[i]) ? expect_nan(out[i], what) : expect_close(out[i], want[i], 0, what);
  }
}

__global__ void copy_to(int offset_of_target, const char* from) {
  alignas(16) __shared__ char to[64];
  copy_async_16(to + offset_of_target, from, true);
  copy_async_commit();
  copy_async_wait<0>();
}
__global__ void copy_and_return(const char* from, bool commit) {
  alignas(16) __shared__ char to[16];
  copy_async_16(to, from, true);
  if (commit) copy_async_commit();
}
__global__ void copy_and_write(const int4* from, int4* source) {
  __shared__ int4 to;
  copy_async_16(&to, from, true);
  copy_async_commit();
  (source ? source : &to)->x = 5;
  copy_async_wait<0>();
}
__global__ void load_from(int offset) {
  alignas(16) __shared__ char rows[33 * 16];
  std::uint32_t r[4];
  ldmatrix_x4(r, rows + threadIdx.x * 16 + (threadIdx.x == 9 ? offset : 0));
}
__global__ void multiply_in_branches() {
  float d[4] = {};
  const std::uint32_t zeros[4] = {};
  if (threadIdx.x < 16)
    mma_16816<__half>(d, zeros, {0, 0});
  else
    mma_16816<__half>(d, zeros, {0, 0});
}

void test_reports() {
  Buffer<int4> from(4);
  for (int i = 0; i < 4; ++i) from[i] = make_int4(i, i, i, i);
  const char* const bytes = reinterpret_cast<const char*>(from.data());
  run(copy_to, 1, 16, bytes);
  expect_report("no multiple of 16; block (0,0,0), thread 0\n  thread 0: stopped at test_mma.cpp:", copy_to, 1, 8,
                bytes);
  expect_report("no multiple of 16", copy_to, 1, 0, bytes + 4);
  for (const bool commit : {false, true}) expect_report("before its asynchronous", copy_and_return, 1, bytes, commit);
  expect_report("the target of an asynchronous copy was written", copy_and_write, 1, from.data(), nullptr);
  expect_report("the source of an asynchronous copy has changed", copy_and_write, 1, from.data(), from.data());
  run(load_from, 32, 16);
  expect_report("ldmatrix from an address that is no multiple of 16; block (0,0,0), thread 9", load_from, 32, 8);
  expect_report("without all 32 lanes", load_from, 31, 0);
  expect_report("deadlock; block (0,0,0)\n  threads 0..15: mma at test_mma.cpp:", multiply_in_branches, 32);
}

template <class S>
void test_all(Draw& draw) {
  for (const bool whole : {true, false}) test_multiply<S>(draw, whole);
  test_infinity<S>();
  test_cut_off<S>();
  test_multiply_from_shared<S, true>(draw);
  test_multiply_from_shared<S, false>(draw);
}

}  // namespace

int main() {
  Draw draw{std::mt19937(1)};
  for (const int order : {0, 1, 2}) {
    cuda_emulator::configuration().order = order;
    test_all<__half>(draw);
    test_all<__nv_bfloat16>(draw);
    test_ldmatrix<false>();
    test_ldmatrix<true>();
    test_copy_in_groups();
  }
  cuda_emulator::configuration().order = 0;
  test_reports();
  return finish();
}
