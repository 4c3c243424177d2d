// Where every received row stands in the output: the steps of a plan's second kernel
// (plan/receive.cuh). It is the layout again (routing/slots.cuh), with each local expert taken for
// a rank: the slot of a received row is its place in the expert's group.
#pragma once

#include "common/warp.cuh"
#include "plan/plan.cuh"
#include "routing/entries.cuh"

namespace ep::plan {

// Chunks of received rows; a block goes through its own, a group of them at a time.
struct Chunks {
  int32_t first;
  int32_t count;
};

// Copies the local experts of a group's rows into the entries, and says in `mask` which rows go to
// which expert.
template <typename Args>
__device__ inline void take_in(const Args& args, const Chunks& group, int32_t num_experts,
                               const int32_t* first_of_source, int32_t num_received,
                               const int32_t* staged, uint32_t* mask) {
  const int32_t num_topk = args.routing.num_topk;
  for (int32_t i = threadIdx.x; i < group.count * num_experts; i += kThreads) mask[i] = 0;
  __syncthreads();
  for (int32_t i = threadIdx.x; i < group.count * kChunkTokens * num_topk; i += kThreads) {
    const int32_t row = i / num_topk;
    const int32_t n = group.first * kChunkTokens + row;
    if (n >= num_received) break;
    const int32_t source = group_of(n, first_of_source, num_sources(args)), k = i % num_topk;
    const int32_t slot = n - first_of_source[source];
    const int32_t expert =
        staged[(static_cast<int64_t>(source) * args.max_tokens + slot) * num_topk + k];
    const bool is_expert = expert >= 0 && expert < num_experts;
    if (n <= args.routing.last_entry) {
      args.routing.entries[place_in_entries(args.routing, n, kLocalExperts) + k] =
          is_expert ? expert : -1;
    }
    if (is_expert) {
      atomicOr(&mask[row / kChunkTokens * num_experts + expert], 1u << row % kChunkTokens);
    }
  }
  __syncthreads();
}

// Adds the group's rows of each expert to `tokens`, and keeps their bits for place_rows().
__device__ inline void count_rows(const Receive& receive, const Chunks& group, int32_t num_experts,
                                  const uint32_t* mask, int32_t* tokens) {
  for (int32_t e = threadIdx.x; e < num_experts; e += kThreads) {
    for (int32_t c = 0; c < group.count; ++c) {
      const uint32_t rows = mask[c * num_experts + e];
      receive.chunk_rows[static_cast<int64_t>(group.first + c) * num_experts + e] = rows;
      tokens[e] += __popc(rows);
    }
  }
  __syncthreads();
}

// Leaves this block's counts where all blocks find them, and clears `tokens` for those of all.
__device__ inline void leave_counts(const Receive& receive, int32_t num_experts, int32_t* tokens) {
  for (int32_t e = threadIdx.x; e < num_experts; e += kThreads) {
    receive.expert_count[blockIdx.x * num_experts + e] = tokens[e];
    tokens[e] = 0;
  }
}

// Called after the barrier. Adds each expert's rows in the blocks before this one to `next_row`,
// and its rows in all blocks to `tokens`.
__device__ inline void add_up_blocks(const Receive& receive, int32_t num_experts, int32_t* next_row,
                                     int32_t* tokens) {
  const int32_t num_columns = min(num_experts, kThreads);
  const int32_t rows_at_a_time = kThreads / num_columns;
  if (static_cast<int32_t>(threadIdx.x) >= rows_at_a_time * num_columns) return;
  for (int32_t e = threadIdx.x % num_columns; e < num_experts; e += num_columns) {
    int32_t before = 0, all = 0;
    for (int32_t block = threadIdx.x / num_columns; block < static_cast<int32_t>(gridDim.x);
         block += rows_at_a_time) {
      const int32_t count = receive.expert_count[block * num_experts + e];
      all += count;
      if (block < static_cast<int32_t>(blockIdx.x)) before += count;
    }
    if (before) atomicAdd(&next_row[e], before);
    if (all) atomicAdd(&tokens[e], all);
  }
}

// Finds the output rows of a group: `chunk_first_row` gets the first one of each chunk and expert,
// `mask` which of the chunk's rows take the places from there on.
__device__ inline void place_rows(const Receive& receive, const Chunks& group, int32_t num_experts,
                                  int32_t* next_row, uint32_t* mask, int32_t* chunk_first_row) {
  for (int32_t e = threadIdx.x; e < num_experts; e += kThreads) {
    int32_t row = next_row[e];
    for (int32_t c = 0; c < group.count; ++c) {
      const uint32_t rows =
          receive.chunk_rows[static_cast<int64_t>(group.first + c) * num_experts + e];
      mask[c * num_experts + e] = rows;
      chunk_first_row[c * num_experts + e] = row;
      row += __popc(rows);
    }
    next_row[e] = row;
  }
  __syncthreads();
}

// Where entry k of a row's experts [K] stands in ascending order; missing ones come last.
__device__ inline int32_t place_in_order(const int32_t* experts, int32_t num_topk, int32_t k) {
  const int32_t expert = k < num_topk ? experts[k] : -1;
  int32_t smaller = 0, present = 0, absent_before = max(0, k - num_topk);
  for (int32_t other = 0; other < num_topk; ++other) {
    const int32_t value = experts[other];
    present += value >= 0;
    smaller += value >= 0 && value < expert;
    absent_before += value < 0 && other < k;
  }
  return expert >= 0 ? smaller : present + absent_before;
}

// Returns the output row of a group's row for one of its experts.
__device__ inline int32_t row_of_expert(int32_t in_group, int32_t expert, int32_t num_experts,
                                        const uint32_t* mask, const int32_t* chunk_first_row) {
  const int32_t word = in_group / kChunkTokens * num_experts + expert;
  return chunk_first_row[word] + __popc(mask[word] & ((1u << in_group % kChunkTokens) - 1));
}

// Takes experts whose groups have no room for the row out of the entries of a group's rows.
template <typename Args>
__device__ inline void drop_experts(const Args& args, const Chunks& group, int32_t num_experts,
                                    int32_t num_received, const uint32_t* mask,
                                    const int32_t* chunk_first_row) {
  const int32_t num_topk = args.routing.num_topk;
  for (int32_t i = threadIdx.x; i < group.count * kChunkTokens * num_topk; i += kThreads) {
    const int32_t in_group = i / num_topk;
    const int32_t n = group.first * kChunkTokens + in_group;
    if (n >= num_received || n > args.routing.last_entry) break;
    int32_t* const expert =
        args.routing.entries + place_in_entries(args.routing, n, kLocalExperts) + i % num_topk;
    if (*expert < 0) continue;
    const int32_t row = row_of_expert(in_group, *expert, num_experts, mask, chunk_first_row);
    if (row >= (*expert + 1) * args.expert_capacity) *expert = -1;
  }
  __syncthreads();
}

// Writes the output rows of a group's rows into the entries, in the order of k and ascending.
template <typename Args>
__device__ inline void write_rows(const Args& args, const Chunks& group, int32_t num_experts,
                                  int32_t num_received, const uint32_t* mask,
                                  const int32_t* chunk_first_row) {
  const int32_t num_topk = args.routing.num_topk, num_topk4 = args.routing.num_topk4;
  int32_t* const entries = args.routing.entries;
  for (int32_t i = threadIdx.x; i < group.count * kChunkTokens * num_topk4; i += kThreads) {
    const int32_t in_group = i / num_topk4, k = i % num_topk4;
    const int32_t n = group.first * kChunkTokens + in_group;
    if (n >= num_received || n > args.routing.last_entry) break;
    int32_t row = -1, place = k;  // place among the row's ascending rows
    if (args.routing.expert_major) {
      const int32_t* const experts = entries + place_in_entries(args.routing, n, kLocalExperts);
      const int32_t expert = k < num_topk ? experts[k] : -1;
      place = place_in_order(experts, num_topk, k);  // groups stand in the order of experts
      if (expert >= 0) {
        row = row_of_expert(in_group, expert, num_experts, mask, chunk_first_row);
      }
    } else if (k == 0) {
      row = n;
    }
    if (row >= args.capacity) row = -1;
    entries[place_in_entries(args.routing, n, kRowOfK) + k] = row;
    entries[place_in_entries(args.routing, n, kRowsAscending) + place] = row;
  }
  __syncthreads();
}

}  // namespace ep::plan
