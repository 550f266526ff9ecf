// Two passes over rows that are longer than a block, in one launch: sums of a row's chunks, then, once the row's sums
// are complete, its chunks again, while the L2 cache still holds them.
//
// Blocks take chunks from a queue in this order: the sums of a group of rows, then the second pass of the same rows, and
// so on.  A second pass waits for sums that were taken before it, by blocks that run and wait for nothing, so that the
// order alone excludes a deadlock, whatever the number of blocks that run at a time.  Whose block a chunk falls to
// changes no result: a row's partial sums are added in their order, by the block that brings the last.  (In the emulator,
// whose blocks run one after another, none ever has to wait.)
#pragma once

#include <cstdint>

#include "divisor.cuh"
#include "reduce.cuh"
#include "words.cuh"

namespace rk::cuda {

struct RowQueue {
  static constexpr std::int64_t kGroupBytes = 20 << 20;  // with the next group's, within the L2 cache
  static constexpr std::int64_t kBlocks = 4096;          // more than run at a time

  std::int64_t rows, chunks, group;  // rows of a group
  unsigned long long* taken;         // [1]
  unsigned *arrived, *ready;         // [rows]

  // Words of 4 bytes for the counters of so many rows.
  static std::int64_t words(std::int64_t rows) { return 2 + 2 * rows; }

  RowQueue() = default;
  // memory: `words(rows)` words, aligned to 8 bytes; row_bytes: what a pass over one row reads.
  RowQueue(std::int64_t rows_, std::int64_t chunks_, std::int64_t row_bytes, std::uint32_t* memory)
      : rows(rows_),
        chunks(chunks_),
        group(row_bytes < kGroupBytes ? kGroupBytes / row_bytes : 1),
        taken(reinterpret_cast<unsigned long long*>(memory)),
        arrived(memory + 2),
        ready(memory + 2 + rows_) {}
};

struct QueueItem {
  std::int64_t row, chunk;
  bool sums;

  // One thread's work.
  __device__ __forceinline__ QueueItem(const RowQueue& q, std::int64_t ticket) {
    const std::int64_t whole = 2 * q.group * q.chunks, group = quotient(ticket, whole), begin = group * q.group;
    const std::int64_t sums_here = (q.rows - begin < q.group ? q.rows - begin : q.group) * q.chunks;
    std::int64_t rest = ticket - group * whole;
    sums = rest < sums_here;
    if (!sums) rest -= sums_here;
    const std::int64_t in_group = quotient(rest, q.chunks), j = rest - in_group * q.chunks;
    row = begin + in_group;
    chunk = sums ? j : q.chunks - 1 - j;  // what was read last is the likeliest to be near
  }
};

template <class Word>
__global__ void __launch_bounds__(256) clear_queue_kernel(Word* memory, std::int64_t words) {
  const std::int64_t i = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x;
  if (i < words) memory[i] = 0;
}

inline cudaError_t clear_queue(std::uint32_t* memory, std::int64_t rows, cudaStream_t stream) {
  const std::int64_t words = RowQueue::words(rows);
  return launch(clear_queue_kernel<std::uint32_t>, grid_for((words + 255) / 256), dim3(256), 0, stream, memory, words);
}

inline dim3 queue_grid(const RowQueue& q) {
  const std::int64_t items = 2 * q.rows * q.chunks;
  return grid_for(items < RowQueue::kBlocks ? items : RowQueue::kBlocks);
}

// sum(row, chunk) leaves a chunk's sums in memory; finish(row), of the block that brings a row's last sums, leaves in
// memory what the second pass needs; both write with thread 0 alone.  load(row, chunk) may read what finish does
// not write, so that it need not wait; apply(row, chunk) is the rest of the second pass.
template <class SumChunk, class Finish, class Load, class Apply>
__device__ __forceinline__ void run_queue(const RowQueue& q, const SumChunk& sum, const Finish& finish,
                                          const Load& load, const Apply& apply) {
  __shared__ std::int64_t shared_row, shared_chunk;
  __shared__ int shared_sums, shared_last;
  const bool leader = threadIdx.x == 0;
  const std::uint64_t items = 2 * static_cast<std::uint64_t>(q.rows) * q.chunks;
  std::uint64_t ticket = leader ? atomicAdd(q.taken, 1ull) : 0;
  for (;;) {
    if (leader) {
      if (ticket < items) {
        const QueueItem item(q, static_cast<std::int64_t>(ticket));
        shared_row = item.row, shared_chunk = item.chunk, shared_sums = item.sums;
        ticket = atomicAdd(q.taken, 1ull);  // wanted only after this item
      } else {
        shared_row = -1;
      }
    }
    __syncthreads();
    const std::int64_t row = shared_row, chunk = shared_chunk;
    const bool sums = shared_sums;
    if (row < 0) return;
    if (sums) {
      sum(row, chunk);
      if (leader) {
        __threadfence();
        shared_last = atomicAdd(q.arrived + row, 1u) + 1 == static_cast<unsigned>(q.chunks);
        __threadfence();
      }
      __syncthreads();
      if (shared_last) {
        finish(row);
        if (leader) {
          __threadfence();
          atomicExch(q.ready + row, 1u);
        }
      }
    } else {
      load(row, chunk);
      if (leader) {
        while (atomicAdd(q.ready + row, 0u) == 0u) {
        }
        __threadfence();
      }
      __syncthreads();
      apply(row, chunk);
    }
    __syncthreads();
  }
}

}  // namespace rk::cuda
