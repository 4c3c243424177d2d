// Low latency between nodes, sending: the rows to all ranks, a contiguous share of them for each
// block. Whoever packs the last row of a chunk sends it.
#pragma once

#include "nodes/low_latency/epochs.cuh"

namespace ep::low_latency::far {

// Exclusive prefix sums, by a warp: first[i] becomes the sum of count(j) over j < i, for i up to n.
template <typename Count>
__device__ inline void prefix_sums(int32_t* first, int32_t n, const Count& count) {
  int32_t sum = 0;
#pragma unroll 1
  for (int32_t base = 0; base < n; base += kWarpSize) {
    const int32_t i = base + lane_id();
    int32_t total;
    const int32_t before = sum_before(i < n ? count(i) : 0, &total);
    if (i < n) first[i] = sum + before;
    sum += total;
  }
  if (lane_id() == 0) first[n] = sum;
}

// By one warp, when its block has packed num_rows rows of a chunk and has met: counts them, and
// sends the chunk if it is full.
__device__ inline void count_rows(const Memory& memory, const FarOperation& operation, int32_t k,
                                  int32_t chunk, int32_t num_rows, int32_t rows_of_chunk,
                                  int32_t row_bytes) {
  int32_t* const counter =
      memory.nodes.counters + memory.rank_after(k) * EP_LOW_LATENCY_CHUNKS + chunk;
  bool is_last = false;
  if (lane_id() == 0) {
    ptx::fence_acq_rel_sys();
    is_last = atomicAdd(counter, num_rows) + num_rows == rows_of_chunk;
    if (is_last) *counter = 0;
    ptx::fence_acq_rel_sys();
  }
  if (!__any_sync(kFullWarp, is_last)) return;
  __syncwarp();
  const int64_t first = static_cast<int64_t>(chunk) * memory.chunk_rows() * row_bytes;
  memory.send_rows(operation.half, k, chunk, first, static_cast<int64_t>(rows_of_chunk) * row_bytes,
                   operation.row_value(), network::WarpGroup());
}

// By all threads of a block: packs and sends the block's share of all rows. first: prefix sums of
// the rows to the ranks k after, [R + 1] in shared memory. pack(k, begin, end, to) has all threads
// write rows [begin, end) to the rank k after, to `to` on; false, in all threads, after a fault.
template <typename Pack>
__device__ inline bool send_rows(const Memory& memory, const FarOperation& operation,
                                 const int32_t* first, int32_t words_of_row, const Pack& pack) {
  const int32_t num_ranks = memory.num_ranks(), total = first[num_ranks];
  const int32_t share = ceil_div<int32_t>(total, gridDim.x), chunk_rows = memory.chunk_rows();
  const int32_t last = min(static_cast<int32_t>(blockIdx.x + 1) * share, total);
  int32_t item = blockIdx.x * share;
#pragma unroll 1
  while (item < last) {
    const int32_t k = group_of(item, first, num_ranks), begin = item - first[k];
    const int32_t count = first[k + 1] - first[k], chunk = begin / chunk_rows;
    const int32_t rows_of_chunk = min(chunk_rows, count - chunk * chunk_rows);
    const int32_t end = min(begin + last - item, chunk * chunk_rows + rows_of_chunk);
    uint4* const rows = memory.rows_to_write(operation.half, k);
    if (!pack(k, begin, end, rows + static_cast<int64_t>(begin) * words_of_row)) return false;
    __syncthreads();
    if (threadIdx.x < kWarpSize) {
      count_rows(memory, operation, k, chunk, end - begin, rows_of_chunk, 16 * words_of_row);
    }
    item += end - begin;
  }
  return true;
}

}  // namespace ep::low_latency::far
