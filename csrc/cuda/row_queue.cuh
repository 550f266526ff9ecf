// Two passes over rows that are longer than a block, in one launch: sums of a row's chunks, then, once the row's sums
// are complete, its chunks again, while the L2 cache still holds them.
//
// Blocks take items from a queue in this order: the sums of a group of rows, chunk by chunk, then each of these rows'
// total, then their second pass, chunk by chunk, and so on.  An item waits for such as were taken before it, by blocks
// that run, so that the order alone excludes a deadlock, whatever the number of blocks that run at a time.  Whose block an
// item falls to changes no result: a row's partial sums are added in their order, by one block.  (In the emulator, whose
// blocks run one after another, none ever has to wait.)
#pragma once

#include <cstdint>

#include "divisor.cuh"
#include "reduce.cuh"
#include "words.cuh"

namespace rk::cuda {

struct RowQueue {
  static constexpr std::int64_t kGroupBytes = 20 << 20;  // with the next group's, within the L2 cache
  static constexpr std::int64_t kBlocks = 4096;          // more than run at a time

  std::uint32_t rows, chunks, group;  // rows of a group
  Divisor by_group, by_chunks;        // of items
  std::uint32_t* taken;               // [1]
  std::uint32_t *arrived, *ready;     // [rows]

  // Words of 4 bytes for the counters of so many rows.
  static std::int64_t words(std::int64_t rows) { return 1 + 2 * rows; }
  // Rows of a group, if a pass over one row reads so many bytes.
  static std::int64_t group_of(std::int64_t row_bytes) { return row_bytes < kGroupBytes ? kGroupBytes / row_bytes : 1; }

  RowQueue() = default;
  // memory: `words(rows)` words.  No memory holds rows of 2^31 items: a chunk is kilobytes.
  RowQueue(std::int64_t rows_, std::int64_t chunks_, std::int64_t group_, std::uint32_t* memory)
      : rows(static_cast<std::uint32_t>(rows_)),
        chunks(static_cast<std::uint32_t>(chunks_)),
        group(static_cast<std::uint32_t>(group_ < rows_ || rows_ == 0 ? group_ : rows_)),
        by_group(std::int64_t{group} * (2 * chunks_ + 1)),
        by_chunks(chunks_),
        taken(memory),
        arrived(memory + 1),
        ready(memory + 1 + rows_) {}
  RK_HOST_DEVICE std::uint32_t items() const { return rows * (2 * chunks + 1); }
};

enum class QueueWork { kSums, kTotal, kSecondPass };

struct QueueItem {
  std::uint32_t row, chunk = 0;  // of a total no chunk
  QueueWork work;

  RK_HOST_DEVICE QueueItem(const RowQueue& q, std::uint32_t ticket) {
    const std::uint32_t before = q.by_group.quotient(ticket), begin = before * q.group;
    const std::uint32_t rows_here = q.rows - begin < q.group ? q.rows - begin : q.group;
    const std::uint32_t in_group = ticket - before * q.by_group.d, sums = rows_here * q.chunks;
    if (in_group - sums < rows_here) {
      work = QueueWork::kTotal;
      row = begin + (in_group - sums);
      return;
    }
    work = in_group < sums ? QueueWork::kSums : QueueWork::kSecondPass;
    const std::uint32_t place = in_group < sums ? in_group : in_group - sums - rows_here;
    const std::uint32_t of_row = q.by_chunks.quotient(place), j = place - of_row * q.chunks;
    row = begin + of_row;
    chunk = in_group < sums ? j : q.chunks - 1 - j;  // what was read last is the likeliest to be near
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
  return grid_for(q.items() < RowQueue::kBlocks ? q.items() : RowQueue::kBlocks);
}

// Waits until a counter of other blocks has come to `value`, and sees what they wrote before.  All threads take part.
__device__ __forceinline__ void wait_for(std::uint32_t* counter, std::uint32_t value) {
  if (threadIdx.x == 0) {
    while (atomicAdd(counter, 0u) != value) {
    }
    __threadfence();
  }
  __syncthreads();
}
// Adds one to it once all threads have written.
__device__ __forceinline__ void announce(std::uint32_t* counter) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(counter, 1u);
  }
}

// sum(row, chunk) leaves a chunk's sums in memory; total(row) leaves there what the second pass needs; load(row, chunk)
// may read what total does not write, so that it need not wait; apply(row, chunk) is the rest of the second pass.
template <class SumChunk, class Total, class Load, class Apply>
__device__ __forceinline__ void run_queue(const RowQueue& q, const SumChunk& sum, const Total& total, const Load& load,
                                          const Apply& apply) {
  __shared__ std::uint32_t shared_ticket;
  const bool leader = threadIdx.x == 0;
  const std::uint32_t items = q.items();
  std::uint32_t ticket = leader ? atomicAdd(q.taken, 1u) : 0;
  for (;;) {
    if (leader) {
      shared_ticket = ticket;
      if (ticket < items) ticket = atomicAdd(q.taken, 1u);  // wanted only after this item
    }
    __syncthreads();
    if (shared_ticket >= items) return;
    const QueueItem item(q, shared_ticket);
    const std::uint32_t row = item.row, chunk = item.chunk;
    if (item.work == QueueWork::kSums) {
      sum(row, chunk);
      announce(q.arrived + row);
    } else if (item.work == QueueWork::kTotal) {
      wait_for(q.arrived + row, q.chunks);
      total(row);
      announce(q.ready + row);
    } else {
      load(row, chunk);
      wait_for(q.ready + row, 1);
      apply(row, chunk);
    }
    __syncthreads();
  }
}

}  // namespace rk::cuda
