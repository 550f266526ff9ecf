// Four small kernels in the style of csrc/cuda, and the bugs that such kernels have, one of which is active at a time.
// tests/test_cuda_emulator.py holds the emulator to finding each of them, and nothing in the correct code.
#include "sample_kernels.h"

#include "mma.cuh"

namespace sample {

constexpr unsigned all_lanes = 0xffffffffu;

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ void store(float* p, float v) { *p = v; }
__device__ __forceinline__ void store(__half* p, float v) { *p = __float2half_rn(v); }
__device__ __forceinline__ void store(__nv_bfloat16* p, float v) { *p = __float2bfloat16_rn(v); }

template <class T>
struct alignas(16) Vector {
  static constexpr int size = 16 / sizeof(T);
  T value[size];
};

__device__ __forceinline__ bool is_aligned(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; }

// The sum over the warp, in every lane.
__device__ __forceinline__ float warp_sum(float v) {
  for (int distance = 16; distance > 0; distance /= 2) {
    const int partner = has(Bug::wrong_lane) && distance == 8 ? 16 : distance;
    v += __shfl_xor_sync(all_lanes, v, partner);
  }
  return v;
}

// The sum over the block, in every thread. blockDim.x is a multiple of 32.
__device__ __forceinline__ float block_sum(float v) {
  __shared__ float parts[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  if (!has(Bug::missing_barrier_on_reuse)) __syncthreads();  // an earlier call may still read parts
  v = warp_sum(v);
  if (lane == 0) parts[warp + (has(Bug::shared_overrun) ? 32 : 0)] = v;
  if (!has(Bug::missing_barrier)) __syncthreads();
  if (has(Bug::unwritten_shared)) return warp_sum(parts[lane]);
  if (has(Bug::divergent_shuffle)) {
    if (threadIdx.x < blockDim.x / 32) parts[0] = warp_sum(parts[lane]);
    __syncthreads();
    return parts[0];
  }
  return warp_sum(lane < warps ? parts[lane] : 0.0f);
}

// y[r, :] = x[r, :] / max(norm[r], eps) with norm[r] the Euclidean norm of x[r, :]. A block does a row.
template <class T>
__global__ void __launch_bounds__(1024)
    row_normalize_kernel(const T* __restrict__ x, T* __restrict__ y, float* __restrict__ norm, int cols, float eps) {
  const std::int64_t row = has(Bug::rows_on_grid_y) ? blockIdx.y : blockIdx.x;
  const std::int64_t offset = has(Bug::int32_offset) ? static_cast<int>(row) * cols : row * cols;
  const T* const from = x + offset;
  T* const to = y + offset;
  const int thread = threadIdx.x;
  if (has(Bug::early_return) && thread >= cols) return;

  constexpr int size = Vector<T>::size;
  float sum = 0.0f;
  if (cols % size == 0 && (is_aligned(from) || has(Bug::misaligned_vector))) {
    for (int i = thread; i < cols / size; i += blockDim.x) {
      const Vector<T> vector = reinterpret_cast<const Vector<T>*>(from)[i];
      for (const T value : vector.value) sum += to_float(value) * to_float(value);
    }
  } else {
    for (int i = thread; i < cols + has(Bug::tail_overread); i += blockDim.x)
      sum += to_float(from[i]) * to_float(from[i]);
  }

  if (has(Bug::divergent_barriers)) {
    if (thread < 32) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  }
  if (has(Bug::inlined_barriers)) {
    sum = thread < 32 ? block_sum(sum) : block_sum(sum);
  } else {
    sum = block_sum(sum);
  }
  const float length = sqrtf(sum);
  float scale = 1.0f / fmaxf(length, eps);

  if (has(Bug::broadcast_without_barrier)) {
    __shared__ float broadcast;
    if (thread == 0) broadcast = scale;
    scale = broadcast;
  }
  if (has(Bug::missing_syncwarp)) {
    __shared__ float exchange[1024];
    exchange[thread] = scale;
    scale = exchange[thread ^ 1];
  }
  if (has(Bug::absent_lane)) {
    if (thread % 32 == 31) return;
    scale = __shfl_sync(all_lanes, scale, 31);
  }
  if (thread == 0) norm[row] = length;
  for (int i = thread; i < cols - has(Bug::unwritten_output); i += blockDim.x) store(to + i, to_float(from[i]) * scale);

  // The same shared memory once more; the result decides nothing in correct code.
  const float active = block_sum(thread < cols ? 1.0f : 0.0f);
  if (thread == 0 && !(active > 0.0f)) norm[row] = -1.0f;
}

// out = a x + b y, and *total += the sum of out. Any number of blocks; four elements at a time where addresses allow.
__global__ void axpby_sum_kernel(const float* __restrict__ x, const float* __restrict__ y, float* __restrict__ out,
                                 float* total, std::int64_t n, float a, float b) {
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  const std::int64_t vectors = is_aligned(x) && is_aligned(y) && is_aligned(out) ? n / 4 : 0;
  float sum = 0.0f;
  for (std::int64_t i = first; i < vectors; i += step) {
    const float4 p = reinterpret_cast<const float4*>(x)[i], q = reinterpret_cast<const float4*>(y)[i];
    const float4 r = make_float4(a * p.x + b * q.x, a * p.y + b * q.y, a * p.z + b * q.z, a * p.w + b * q.w);
    reinterpret_cast<float4*>(out)[i] = r;
    sum += r.x + r.y + r.z + r.w;
  }
  for (std::int64_t i = 4 * vectors + first; i < n; i += step) {
    out[i] = a * x[i] + b * y[i];
    sum += out[i];
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) {
    if (has(Bug::lost_update)) {
      *total += sum;
    } else {
      atomicAdd(total, sum);
    }
  }
}

// out[r, j] = sum over i of x[r, i] random_sign(seed, j, i). A block does a row; shared: `projections` floats a warp.
__global__ void project_kernel(const float* __restrict__ x, float* __restrict__ out, int cols, int projections,
                               std::uint32_t seed) {
  RK_DYNAMIC_SHARED(float, parts);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const float* const row = x + static_cast<std::int64_t>(blockIdx.x) * cols;
  for (int j = 0; j < projections; ++j) {
    float sum = 0.0f;
    for (int i = threadIdx.x; i < cols; i += blockDim.x) sum += row[i] * random_sign(seed, j, i);
    sum = warp_sum(sum);
    if (lane == 0) parts[warp * projections + j + has(Bug::dynamic_shared_overrun)] = sum;
  }
  __syncthreads();
  for (int j = threadIdx.x; j < projections; j += blockDim.x) {
    float sum = 0.0f;
    for (int w = 0; w < warps; ++w) sum += parts[w * projections + j];
    out[static_cast<std::int64_t>(blockIdx.x) * projections + j] = sum;
  }
}

// out = x y, for x [rows, cols] and y [cols, 16]; cols is a multiple of 8. A block does 64 rows, a warp 16 of them, 16
// columns of x at a time; the next ones are copied meanwhile.
template <class T>
__global__ void __launch_bounds__(128)
    multiply_kernel(const T* __restrict__ x, const T* __restrict__ y, float* __restrict__ out, int rows, int cols) {
  __shared__ __align__(16) T x_tile[2][64 * 16];
  __shared__ __align__(16) T y_tile[2][16 * 16];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, first_row = blockIdx.x * 64;
  const int tiles = (cols + 15) / 16;
  const auto copy_tile = [&](int tile) {
    const int row = first_row + thread / 2, col = tile * 16 + thread % 2 * 8, k = tile * 16 + thread / 2;
    const bool there = row < rows && col < cols;
    rk::cuda::copy_async_16(x_tile[tile % 2] + thread * 8, there ? x + row * cols + col : x, there);
    if (thread < 32)
      rk::cuda::copy_async_16(y_tile[tile % 2] + thread * 8, k < cols ? y + k * 16 + thread % 2 * 8 : y, k < cols);
    rk::cuda::copy_async_commit();
  };

  float sums[2][4] = {};
  copy_tile(0);
  for (int tile = 0; tile < tiles; ++tile) {
    if (tile + 1 < tiles)
      copy_tile(tile + 1);
    else
      rk::cuda::copy_async_commit();
    if (!has(Bug::missing_async_wait)) rk::cuda::copy_async_wait<1>();
    if (!has(Bug::missing_barrier_after_wait)) __syncthreads();
    std::uint32_t a[4], b[4];
    const int at = lane % 16 * 16 + lane / 16 * 8;
    rk::cuda::ldmatrix_x4(a, x_tile[tile % 2] + warp * 16 * 16 + at);
    if (has(Bug::transposed_fragment))
      rk::cuda::ldmatrix_x4(b, y_tile[tile % 2] + at);
    else
      rk::cuda::ldmatrix_x4_transposed(b, y_tile[tile % 2] + at);
    for (int half = 0; half < 2; ++half) rk::cuda::mma_16816<T>(sums[half], a, {b[2 * half], b[2 * half + 1]});
    __syncthreads();
  }
  rk::cuda::copy_async_wait<0>();
  for (int i = 0; i < 8; ++i) {
    const int row = first_row + warp * 16 + lane / 4 + i % 4 / 2 * 8, col = i / 4 * 8 + lane % 4 * 2 + i % 2;
    if (row < rows) out[row * 16 + col] = sums[i / 4][i % 4];
  }
}

template <class T>
cudaError_t row_normalize(const T* x, T* y, float* norm, std::int64_t rows, int cols, float eps, int threads) {
  const auto blocks = static_cast<unsigned>(rows);
  const dim3 grid = has(Bug::rows_on_grid_y) ? dim3(rows > 0, blocks) : dim3(blocks);
  return rk::cuda::launch(row_normalize_kernel<T>, grid, dim3(threads), 0, nullptr, x, y, norm, cols, eps);
}
template cudaError_t row_normalize(const float*, float*, float*, std::int64_t, int, float, int);
template cudaError_t row_normalize(const __half*, __half*, float*, std::int64_t, int, float, int);
template cudaError_t row_normalize(const __nv_bfloat16*, __nv_bfloat16*, float*, std::int64_t, int, float, int);

cudaError_t axpby_sum(const float* x, const float* y, float* out, float* total, std::int64_t n, float a, float b,
                      int blocks, int threads) {
  return rk::cuda::launch(axpby_sum_kernel, dim3(n > 0 ? blocks : 0), dim3(threads), 0, nullptr, x, y, out, total, n, a,
                          b);
}

cudaError_t project(const float* x, float* out, int rows, int cols, int projections, std::uint32_t seed, int threads) {
  const std::size_t shared =
      sizeof(float) * static_cast<std::size_t>(projections) * static_cast<std::size_t>(threads / 32);
  return rk::cuda::launch(project_kernel, dim3(rows), dim3(threads), shared, nullptr, x, out, cols, projections, seed);
}

template <class T>
cudaError_t multiply(const T* x, const T* y, float* out, int rows, int cols) {
  return rk::cuda::launch(multiply_kernel<T>, dim3((rows + 63) / 64), dim3(128), 0, nullptr, x, y, out, rows, cols);
}
template cudaError_t multiply(const __half*, const __half*, float*, int, int);
template cudaError_t multiply(const __nv_bfloat16*, const __nv_bfloat16*, float*, int, int);

}  // namespace sample
