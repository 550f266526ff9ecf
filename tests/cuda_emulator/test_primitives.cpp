// Every function that the emulator offers to kernels, against what the CUDA manual says that it returns.
#include <string>
#include <vector>

#include "testing.h"

namespace {

using namespace testing;

constexpr unsigned all = 0xffffffffu;

void expect(bool condition, const std::string& what) { expect_close(condition, true, 0.0, what); }

template <class... P, class... A>
void run(void (*kernel)(P...), dim3 grid, dim3 block, A... arguments) {
  expect_success(rk::cuda::launch(kernel, grid, block, 0, nullptr, arguments...));
}

// The report of a launch that must fail.
template <class... P, class... A>
std::string report_of(void (*kernel)(P...), dim3 grid, dim3 block, std::size_t shared, A... arguments) {
  const cudaError_t status = rk::cuda::launch(kernel, grid, block, shared, nullptr, arguments...);
  expect(status == cudaErrorLaunchFailure, "the launch fails");
  return cudaGetErrorString(status);
}

void expect_contains(const std::string& text, const std::string& part) {
  ++checks;
  if (text.find(part) != std::string::npos) return;
  ++failures;
  std::printf("wrong result: no '%s' in: %s\n", part.c_str(), text.c_str());
}

__global__ void shuffles(int* out, double* wide) {
  const int lane = threadIdx.x;
  int* const row = out + lane * 8;
  row[0] = __shfl_sync(all, lane, 5);
  row[1] = __shfl_sync(all, lane, 5, 8);
  row[2] = __shfl_xor_sync(all, lane, 3);
  row[3] = __shfl_down_sync(all, lane, 4);
  row[4] = __shfl_down_sync(all, lane, 4, 16);
  row[5] = __shfl_up_sync(all, lane, 2);
  row[6] = __shfl_up_sync(all, lane, 2, 4);
  row[7] = lane % 2 ? __shfl_sync(0xaaaaaaaau, lane, 7) : __shfl_sync(0x55555555u, lane, 8);
  wide[lane] = __shfl_xor_sync(all, 1e300 * lane, 1);
}

void test_shuffles() {
  std::vector<int> out(32 * 8);
  std::vector<double> wide(32);
  run(shuffles, dim3(1), dim3(32), out.data(), wide.data());
  for (int lane = 0; lane < 32; ++lane) {
    const int want[] = {5,
                        lane / 8 * 8 + 5,
                        lane ^ 3,
                        lane + 4 < 32 ? lane + 4 : lane,
                        lane % 16 + 4 < 16 ? lane + 4 : lane,
                        lane >= 2 ? lane - 2 : lane,
                        lane % 4 >= 2 ? lane - 2 : lane,
                        lane % 2 ? 7 : 8};
    for (int i = 0; i < 8; ++i) expect_close(out[lane * 8 + i], want[i], 0, "shuffle " + std::to_string(i));
    expect_close(wide[lane], 1e300 * (lane ^ 1), 0, "64-bit shuffle");
  }
}

__global__ void votes(unsigned* out) {
  const int lane = threadIdx.x % 32;
  unsigned* const row = out + threadIdx.x * 12;
  row[0] = __ballot_sync(all, lane < 7);
  row[1] = __any_sync(all, lane == 31);
  row[2] = __all_sync(all, lane < 31);
  row[3] = __match_any_sync(all, lane % 3);
  row[4] = __reduce_add_sync(all, static_cast<unsigned>(lane));
  row[5] = static_cast<unsigned>(__reduce_min_sync(all, lane - 40));
  row[6] = __reduce_max_sync(all, static_cast<unsigned>(lane));
  row[7] = __reduce_xor_sync(all, static_cast<unsigned>(lane));
  row[8] = static_cast<unsigned>(__syncthreads_count(threadIdx.x % 5 == 0));
  row[9] = static_cast<unsigned>(__syncthreads_or(threadIdx.x == 50));
  row[10] = static_cast<unsigned>(__syncthreads_and(threadIdx.x < 63));
  row[11] = lane < 12 ? __ballot_sync(0xfffu, lane > 3) : 0;
}

void test_votes() {
  std::vector<unsigned> out(64 * 12);
  run(votes, dim3(1), dim3(64), out.data());
  for (unsigned thread = 0; thread < 64; ++thread) {
    const unsigned lane = thread % 32, thirds[] = {0x49249249u, 0x92492492u, 0x24924924u};
    const unsigned want[] = {127, 1, 0, thirds[lane % 3],      496, static_cast<unsigned>(-40), 31, 0,
                             13,  1, 0, lane < 12 ? 0xff0u : 0};
    for (int i = 0; i < 12; ++i) expect_close(out[thread * 12 + i], want[i], 0, "vote " + std::to_string(i));
  }
}

__global__ void atomics(unsigned* u, float* f, int* i, __half* h) {
  atomicAdd(u + 0, 1);
  atomicMax(u + 1, threadIdx.x);
  atomicOr(u + 2, 1u << (threadIdx.x % 32));
  atomicInc(u + 3, 9u);
  atomicCAS(u + 4, 0u, 77u);
  atomicAdd(f, 0.5f);
  atomicMin(i, -static_cast<int>(threadIdx.x));
  atomicSub(i + 1, 2);
  atomicAdd(h, __float2half(1.0f));
}

void test_atomics() {
  std::vector<unsigned> u(5);
  float f = 0;
  std::vector<int> i(2);
  __half h = __float2half(0.0f);
  run(atomics, dim3(2), dim3(64), u.data(), &f, i.data(), &h);
  expect(u == std::vector<unsigned>{128, 63, all, 8, 77}, "unsigned atomics");
  expect_close(f, 64, 0, "atomicAdd of float");
  expect(i == std::vector<int>{-63, -256}, "int atomics");
  expect_close(__half2float(h), 128, 0, "atomicAdd of half");
}

// The last block to finish adds up what the others have left, a pattern that needs __threadfence.
__global__ void last_block_sums(float* parts, unsigned* finished, float* total) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    parts[blockIdx.x] = static_cast<float>(blockIdx.x + 1);
    __threadfence();
    last = atomicAdd(finished, 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (last && threadIdx.x == 0) {
    __threadfence();
    for (unsigned i = 0; i < gridDim.x; ++i) *total += parts[i];
  }
}

void test_last_block() {
  std::vector<float> parts(10);
  unsigned finished = 0;
  float total = 0;
  run(last_block_sums, dim3(10), dim3(32), parts.data(), &finished, &total);
  expect_close(total, 55, 0, "sum by the last block");
}

__global__ void arithmetic(double* out) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(1.5f, -2.0f);
  out[0] = __half2float(__float2half(1.0f) + __float2half(0.5f));
  out[1] = __bfloat162float(__high2bfloat16(pair) * __low2bfloat16(pair));
  out[2] = __uint_as_float(__float_as_uint(-1.5f) ^ 0x80000000u);
  out[3] = rsqrtf(4.0f);
  out[4] = __umulhi(0x80000000u, 6u);
  out[5] = __clz(1) + __ffs(8) + __popc(7);
  out[6] = min(3, 4) + max(2.0f, 1.0f) + max(5ull, 6ull);
  out[7] = __ldg(out) + __expf(0.0f);
  out[8] = isnan(__int_as_float(-1)) && isinf(INFINITY);
}

void test_arithmetic() {
  std::vector<double> out(9);
  run(arithmetic, dim3(1), dim3(1), out.data());
  expect(out == std::vector<double>{1.5, -3.0, 1.5, 0.5, 3, 31 + 4 + 3, 11, 2.5, 1}, "arithmetic");
}

__global__ void write_index(std::uint64_t* out, unsigned* order, unsigned* next) {
  const dim3 grid = gridDim, block = blockDim;
  const std::uint64_t at = blockIdx.x + grid.x * (blockIdx.y + static_cast<std::uint64_t>(grid.y) * blockIdx.z);
  const unsigned thread = threadIdx.x + block.x * (threadIdx.y + block.y * threadIdx.z);
  out[at * (block.x * block.y * block.z) + thread] += 1 + at;
  if (thread == 0) order[atomicAdd(next, 1)] = static_cast<unsigned>(at);
}

// Every thread of every block runs once, in any order, and the orders differ.
void test_orders() {
  std::vector<std::vector<unsigned>> seen;
  for (const int order : {0, 1, 2, 3}) {
    cuda_emulator::configuration().order = order;
    std::vector<std::uint64_t> out(3 * 5 * 2 * 36);
    std::vector<unsigned> blocks(30);
    unsigned next = 0;
    run(write_index, dim3(3, 5, 2), dim3(4, 3, 3), out.data(), blocks.data(), &next);
    for (std::size_t i = 0; i < out.size(); ++i)
      expect_close(static_cast<double>(out[i]), 1.0 + i / 36, 0, "runs of a thread");
    for (const auto& other : seen) expect(other != blocks, "orders differ");
    seen.push_back(blocks);
  }
  cuda_emulator::configuration().order = 0;
  expect(seen[0].front() == 0 && seen[1].front() == 29, "forward and reverse");
}

__global__ void nothing() {}
__global__ void trap() {
  if (threadIdx.x == 3) __trap();
}
__global__ void foreign_mask() { __shfl_sync(1u, 1.0f, 0); }
[[maybe_unused]] __global__ void overrun() {
  RK_DYNAMIC_SHARED(char, bytes);
  *const_cast<volatile char*>(bytes + 10 * threadIdx.x) = 1;
}

void test_reports() {
  expect(rk::cuda::launch(nothing, dim3(0), dim3(32), 0, nullptr) == cudaSuccess, "an empty grid is no error");
  expect_contains(report_of(nothing, dim3(1, 65536), dim3(32), 0), "invalid grid (1,65536,1)");
  expect_contains(report_of(nothing, dim3(1), dim3(1025), 0), "invalid block (1025,1,1)");
  expect_contains(report_of(nothing, dim3(1), dim3(1, 1, 65), 0), "invalid block (1,1,65)");
  expect_contains(report_of(nothing, dim3(1), dim3(0), 0), "invalid block");
  expect_contains(report_of(nothing, dim3(1), dim3(32), 228 << 10), "dynamic shared memory: the limit is 232448");
  expect_contains(report_of(trap, dim3(2), dim3(32), 0), "__trap; block (0,0,0), thread 3\n");
  expect_contains(report_of(foreign_mask, dim3(1), dim3(2), 0), "missing from its own mask");
#if !defined(__SANITIZE_ADDRESS__)
  expect_contains(report_of(overrun, dim3(1), dim3(2), 10), "written past its ends");
#endif
  run(nothing, dim3(1), dim3(1024));  // an error leaves nothing behind
}

}  // namespace

int main() {
  for (const int order : {0, 1, 2}) {
    cuda_emulator::configuration().order = order;
    test_shuffles();
    test_votes();
    test_atomics();
    test_last_block();
  }
  cuda_emulator::configuration().order = 0;
  test_arithmetic();
  test_orders();
  test_reports();
  return finish();
}
