// The routing layout: who sends what where.
//
// It takes two steps and no global atomics. All blocks end the first before any begins the second.
//   count_tokens   finds the experts of each token, and per chunk and rank one 32-bit word whose
//                  bit t says that token t of the chunk goes to the rank. Per block: tokens per
//                  rank, copies per expert, first error.
//   place_tokens   adds up the counts of the blocks before its own; a token's slot is that, plus
//                  the chunks before its own, plus the set bits below its own.
// ep_layout launches a kernel for each; a plan has both in one (plan/send.cuh).
// Integer sums do not depend on their order, so neither the shared-memory atomics nor the cut into
// blocks shows in the result.
#pragma once

#include <cstdint>
#include <type_traits>

#include "routing/input.cuh"

namespace ep::layout {

// Four blocks an SM of about 132. More would lengthen place_tokens' sum over the blocks before.
constexpr int kMaxBlocks = 512;

static_assert(kMaxBlocks <= kThreads, "pick_first_error looks at one block's error a thread");

// B = num_blocks, C = num_chunks.
struct Workspace {
  int4* first_error;       // [B] code, token, k or column, value
  int32_t* rank_count;     // [B, R]
  int32_t* expert_count;   // [B, E]
  uint32_t* chunk_tokens;  // [C, R] bit t: token t of the chunk goes to the rank
};

// Cuts the workspace at address `base` up and returns the bytes that it takes. Only where experts
// are counted is there room for their counts.
inline int64_t cut_workspace(const Shape& shape, bool counts_experts, uintptr_t base,
                             Workspace* workspace) {
  uintptr_t next = base;
  const auto take = [&next](auto*& pointer, int64_t count) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(next);
    next += count * sizeof(*pointer);
  };
  take(workspace->first_error, shape.num_blocks);
  take(workspace->rank_count, static_cast<int64_t>(shape.num_blocks) * shape.num_ranks);
  take(workspace->expert_count,
       counts_experts ? static_cast<int64_t>(shape.num_blocks) * shape.num_experts : 0);
  take(workspace->chunk_tokens, static_cast<int64_t>(shape.num_chunks) * shape.num_ranks);
  return static_cast<int64_t>(next - base);
}

// Shared memory of count_tokens.
inline int32_t count_shared_bytes(const Shape& shape, bool counts_experts) {
  return static_cast<int32_t>(sizeof(int32_t)) *
         (kChunkTokens * shape.num_topk + 2 * shape.num_ranks +
          (counts_experts ? shape.num_experts : 0));
}

static_assert(sizeof(int32_t) * (kChunkTokens * EP_MAX_TOPK + 2 * EP_MAX_RANKS + EP_MAX_EXPERTS) <=
                  40 * 1024,
              "shared memory must fit at the limits without an opt-in");

__device__ inline bool repeats_earlier(const int32_t* token_experts, int32_t k) {
  for (int32_t earlier = 0; earlier < k; ++earlier) {
    if (token_experts[earlier] == token_experts[k]) return true;
  }
  return false;
}

template <bool kCountsExperts, typename Input>
__device__ inline void count_tokens(const Input& input, const Shape& shape,
                                    const Workspace& workspace, int32_t* topk_idx_out,
                                    int32_t* shared) {
  int32_t* const experts = shared;                                      // [kChunkTokens, K]
  int32_t* const rank_count = experts + kChunkTokens * shape.num_topk;  // [R]
  auto* const chunk_tokens = reinterpret_cast<uint32_t*>(rank_count + shape.num_ranks);  // [R]
  int32_t* const expert_count = rank_count + 2 * shape.num_ranks;  // [E], if they are counted
  __shared__ unsigned long long first_error;

  const int32_t block = blockIdx.x;
  const int32_t experts_per_rank = shape.num_experts / shape.num_ranks;

  for (int32_t r = threadIdx.x; r < shape.num_ranks; r += kThreads) {
    chunk_tokens[r] = 0;
    rank_count[r] = 0;
  }
  if constexpr (kCountsExperts) {
    for (int32_t e = threadIdx.x; e < shape.num_experts; e += kThreads) expert_count[e] = 0;
  }
  if (threadIdx.x == 0) first_error = kNoError;
  __syncthreads();

  const int32_t begin = block * shape.chunks_per_block;
  const int32_t end = min(begin + shape.chunks_per_block, shape.num_chunks);
  for (int32_t chunk = begin; chunk < end; ++chunk) {
    input.load(shape, chunk, experts, &first_error);
    __syncthreads();

    const int32_t first_token = chunk * kChunkTokens;
    const int32_t count = shape.tokens_in_chunk(chunk) * shape.num_topk;
    for (int32_t i = threadIdx.x; i < count; i += kThreads) {
      const int32_t t = i / shape.num_topk;
      const int32_t k = i % shape.num_topk;
      int32_t expert = experts[i];
      if (expert >= 0 && repeats_earlier(experts + t * shape.num_topk, k)) {
        report(&first_error, first_token + t, k, 0);
        expert = -1;
      }
      if (expert >= 0) {
        atomicOr(&chunk_tokens[expert / experts_per_rank], 1u << t);
        if constexpr (kCountsExperts) atomicAdd(&expert_count[expert], 1);
      }
      topk_idx_out[static_cast<int64_t>(first_token) * shape.num_topk + i] = expert;
    }
    __syncthreads();

    // The next chunk's load() touches neither array, and its barrier covers the zeroing.
    for (int32_t r = threadIdx.x; r < shape.num_ranks; r += kThreads) {
      const uint32_t tokens = chunk_tokens[r];
      workspace.chunk_tokens[static_cast<int64_t>(chunk) * shape.num_ranks + r] = tokens;
      rank_count[r] += __popc(tokens);
      chunk_tokens[r] = 0;
    }
  }

  // Each thread reads the rank counts that it added up itself. The last barrier covers everything
  // else.
  for (int32_t r = threadIdx.x; r < shape.num_ranks; r += kThreads) {
    workspace.rank_count[block * shape.num_ranks + r] = rank_count[r];
  }
  if constexpr (kCountsExperts) {
    for (int32_t e = threadIdx.x; e < shape.num_experts; e += kThreads) {
      workspace.expert_count[block * shape.num_experts + e] = expert_count[e];
    }
  }
  if (threadIdx.x == 0) {
    workspace.first_error[block] = first_error == kNoError ? make_int4(EP_ROUTING_OK, 0, 0, 0)
                                                           : input.describe(shape, first_error);
  }
}

// Adds rows [0, num_rows) of rank_count [B, R] to `sum` [R] in shared memory.
__device__ inline void add_rank_counts(const Shape& shape, const int32_t* rank_count,
                                       int32_t num_rows, int32_t* sum) {
  // The threads cover as many rows at a time as they can: few ranks need not mean few loads in
  // flight.
  const int32_t num_columns = min(shape.num_ranks, kThreads);
  const int32_t rows_at_a_time = kThreads / num_columns;
  const int32_t first_row = threadIdx.x / num_columns;
  if (first_row >= rows_at_a_time) return;
  for (int32_t r = threadIdx.x % num_columns; r < shape.num_ranks; r += num_columns) {
    int32_t tokens = 0;
    for (int32_t row = first_row; row < num_rows; row += rows_at_a_time) {
      tokens += rank_count[row * shape.num_ranks + r];
    }
    if (tokens != 0) atomicAdd(&sum[r], tokens);
  }
}

// Sums the columns of expert_count [B, E]: 32 columns a block at a time, the rows spread over its
// warps.
__device__ inline void sum_expert_counts(const Shape& shape, const int32_t* expert_count,
                                         int32_t* num_tokens_per_expert) {
  __shared__ int32_t partial[kWarps][kWarpSize];
  const int32_t lane = lane_id(), warp = threadIdx.x / kWarpSize;
  for (int32_t first = blockIdx.x * kWarpSize; first < shape.num_experts;
       first += gridDim.x * kWarpSize) {
    const int32_t expert = first + lane;
    int32_t copies = 0;
    if (expert < shape.num_experts) {
#pragma unroll 8
      for (int32_t row = warp; row < shape.num_blocks; row += kWarps) {
        copies += expert_count[row * shape.num_experts + expert];
      }
    }
    partial[warp][lane] = copies;
    __syncthreads();
    if (warp == 0 && expert < shape.num_experts) {
      for (int32_t w = 1; w < kWarps; ++w) copies += partial[w][lane];
      num_tokens_per_expert[expert] = copies;
    }
    __syncthreads();
  }
}

// Blocks own ascending runs of tokens, so the first block with an error has the first error.
__device__ inline void pick_first_error(const Shape& shape, const int4* first_error,
                                        int32_t* error) {
  __shared__ int32_t first_block;
  if (threadIdx.x == 0) first_block = shape.num_blocks;
  __syncthreads();
  const int32_t block = threadIdx.x;
  if (block < shape.num_blocks && first_error[block].x != EP_ROUTING_OK) {
    atomicMin(&first_block, block);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    const bool fine = first_block == shape.num_blocks;
    const int4 found = fine ? make_int4(EP_ROUTING_OK, 0, 0, 0) : first_error[first_block];
    error[0] = found.x;
    error[1] = found.y;
    error[2] = found.z;
    error[3] = found.w;
  }
}

// Writes the slots of the block's tokens: for each rank the index among the tokens that go there,
// or -1. The last block also writes the number of tokens of each rank. is_token_in_rank and
// send_slot may be NULL.
__device__ inline void place_tokens(const Shape& shape, const Workspace& workspace,
                                    int32_t* num_tokens_per_rank, uint8_t* is_token_in_rank,
                                    int32_t* send_slot) {
  __shared__ int32_t next_slot[EP_MAX_RANKS];
  const int32_t num_ranks = shape.num_ranks;
  for (int32_t r = threadIdx.x; r < num_ranks; r += kThreads) next_slot[r] = 0;
  __syncthreads();
  // Without tokens there is one block all the same, and no count before it.
  add_rank_counts(shape, workspace.rank_count, blockIdx.x, next_slot);
  __syncthreads();

  const int32_t begin = blockIdx.x * shape.chunks_per_block;
  const int32_t end = min(begin + shape.chunks_per_block, shape.num_chunks);
  for (int32_t chunk = begin; chunk < end; ++chunk) {
    const uint32_t* const chunk_tokens =
        workspace.chunk_tokens + static_cast<int64_t>(chunk) * num_ranks;
    const int64_t first_entry = static_cast<int64_t>(chunk) * kChunkTokens * num_ranks;
    const int32_t count = shape.tokens_in_chunk(chunk) * num_ranks;
    for (int32_t i = threadIdx.x; i < count; i += kThreads) {
      const int32_t t = i / num_ranks;
      const int32_t r = i % num_ranks;
      const uint32_t tokens = chunk_tokens[r];
      const bool sent = (tokens >> t & 1) != 0;
      if (is_token_in_rank != nullptr) is_token_in_rank[first_entry + i] = sent;
      if (send_slot != nullptr) {
        send_slot[first_entry + i] = sent ? next_slot[r] + __popc(tokens & ((1u << t) - 1)) : -1;
      }
    }
    __syncthreads();
    for (int32_t r = threadIdx.x; r < num_ranks; r += kThreads) {
      next_slot[r] += __popc(chunk_tokens[r]);
    }
    __syncthreads();
  }

  if (blockIdx.x == gridDim.x - 1) {
    for (int32_t r = threadIdx.x; r < num_ranks; r += kThreads) {
      num_tokens_per_rank[r] = next_slot[r];
    }
  }
}

}  // namespace ep::layout
