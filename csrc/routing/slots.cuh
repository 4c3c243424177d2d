// The routing layout: who sends what where, from topk_idx or a routing map.
//
// Two steps, no global atomics; all blocks end the first before any begins the second. Tokens are
// cut into chunks of 32; each block owns a contiguous run of chunks.
//   count_tokens   finds the experts of each token, and per chunk and rank one 32-bit word whose
//                  bit t says that token t of the chunk goes to the rank. Per block: tokens per
//                  rank, copies per expert, first error.
//   place_tokens   adds up the counts of the blocks before its own; a token's slot is that, plus
//                  the chunks before its own, plus the set bits below its own.
// ep_layout launches a kernel for each; plan/plan.cu has both in one.
// Integer sums do not depend on their order, so neither the shared-memory atomics nor the cut into
// blocks shows in the result.
#pragma once

#include <algorithm>
#include <climits>
#include <cstdint>
#include <type_traits>

#include "common/warp.cuh"
#include "ep_comm.h"

namespace ep::layout {

constexpr int kChunkTokens = 32;
constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarpSize;
// Four blocks an SM of about 132. More would lengthen place_tokens' sum over the blocks before.
constexpr int kMaxBlocks = 512;

static_assert(kMaxBlocks <= kThreads, "pick_first_error looks at one block's error a thread");

struct Shape {
  int32_t num_tokens;
  int32_t num_topk;
  int32_t num_experts;
  int32_t num_ranks;
  int32_t num_chunks;
  int32_t chunks_per_block;
  int32_t num_blocks;  // 0 where there is no token

  __device__ int32_t tokens_in_chunk(int32_t chunk) const {
    return min(kChunkTokens, num_tokens - chunk * kChunkTokens);
  }
};

// B = num_blocks, C = num_chunks.
struct Workspace {
  int4* first_error;       // [B] code, token, k or column, value
  int32_t* rank_count;     // [B, R]
  int32_t* expert_count;   // [B, E]
  uint32_t* chunk_tokens;  // [C, R] bit t: token t of the chunk goes to the rank
};

inline Shape make_shape(int64_t num_tokens, int32_t num_topk, int32_t num_experts,
                        int32_t num_ranks, int32_t max_blocks) {
  Shape shape{};
  shape.num_tokens = static_cast<int32_t>(num_tokens);
  shape.num_topk = num_topk;
  shape.num_experts = num_experts;
  shape.num_ranks = num_ranks;
  shape.num_chunks = static_cast<int32_t>(ceil_div<int64_t>(num_tokens, kChunkTokens));
  shape.chunks_per_block = std::max(1, ceil_div(shape.num_chunks, max_blocks));
  shape.num_blocks = ceil_div(shape.num_chunks, shape.chunks_per_block);
  return shape;
}

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

// ---- First offending entry of a block ----------------------------------------------------------
//
// One shared 64-bit word with token, column and detail from its top bits down: its minimum is the
// first error in token order, whichever thread sees it first.

constexpr unsigned long long kNoError = ~0ull;

__device__ inline void report(unsigned long long* first_error, int32_t token, int32_t column,
                              int32_t detail) {
  atomicMin(first_error, static_cast<unsigned long long>(token) << 32 |
                             static_cast<unsigned long long>(column) << 16 |
                             static_cast<unsigned long long>(detail));
}

__device__ inline int32_t error_token(unsigned long long error) { return error >> 32; }
__device__ inline int32_t error_column(unsigned long long error) { return (error >> 16) & 0xffff; }
__device__ inline int32_t error_detail(unsigned long long error) { return error & 0xffff; }

static_assert(EP_MAX_EXPERTS <= 0xffff, "an error's column and detail have 16 bits each");

// ---- Inputs ------------------------------------------------------------------------------------
//
// load() writes a chunk's experts [tokens, K] to shared memory, -1 where there is none, and reports
// what is out of bounds. describe() turns a reported error into what ep_layout_args.error holds.

template <typename Index>
struct TopkInput {
  const Index* topk_idx;  // [T, K]

  __device__ void load(const Shape& shape, int32_t chunk, int32_t* experts,
                       unsigned long long* first_error) const {
    const int32_t first_token = chunk * kChunkTokens;
    const int32_t count = shape.tokens_in_chunk(chunk) * shape.num_topk;
    const Index* const source = topk_idx + static_cast<int64_t>(first_token) * shape.num_topk;
    for (int32_t i = threadIdx.x; i < count; i += kThreads) {
      const Index expert = source[i];
      const bool is_expert = expert >= 0 && expert < shape.num_experts;
      experts[i] = is_expert ? static_cast<int32_t>(expert) : -1;
      if (!is_expert && expert != -1) {
        report(first_error, first_token + i / shape.num_topk, i % shape.num_topk, 0);
      }
    }
  }

  __device__ int4 describe(const Shape& shape, unsigned long long error) const {
    const int32_t token = error_token(error), k = error_column(error);
    const Index value = topk_idx[static_cast<int64_t>(token) * shape.num_topk + k];
    const bool is_expert = value >= 0 && value < shape.num_experts;
    const Index clamped = max(min(value, static_cast<Index>(INT_MAX)), static_cast<Index>(INT_MIN));
    return make_int4(is_expert ? EP_ROUTING_DUPLICATE : EP_ROUTING_OUT_OF_RANGE, token, k,
                     static_cast<int32_t>(clamped));
  }
};

struct RoutingMapInput {
  const uint8_t* routing_map;  // [T, E]

  // One warp a token: 32 neighbouring experts a load, the ballot says each hit's place in the row.
  __device__ void load(const Shape& shape, int32_t chunk, int32_t* experts,
                       unsigned long long* first_error) const {
    const int32_t lane = lane_id();
    const int32_t num_tokens = shape.tokens_in_chunk(chunk);
    for (int32_t t = threadIdx.x / kWarpSize; t < num_tokens; t += kWarps) {
      const int32_t token = chunk * kChunkTokens + t;
      const uint8_t* const row = routing_map + static_cast<int64_t>(token) * shape.num_experts;
      int32_t* const token_experts = experts + t * shape.num_topk;
      int32_t num_hits = 0;
      int32_t excess_column = -1;  // set in the lane that saw the first hit beyond K
#pragma unroll 8
      for (int32_t first = 0; first < shape.num_experts; first += kWarpSize) {
        const int32_t expert = first + lane;
        const bool hit = expert < shape.num_experts && row[expert] != 0;
        const unsigned hits = __ballot_sync(kFullWarp, hit);
        const int32_t k = num_hits + __popc(hits & ((1u << lane) - 1));
        if (hit && k < shape.num_topk) token_experts[k] = expert;
        if (hit && k == shape.num_topk) excess_column = expert;
        num_hits += __popc(hits);
      }
      if (lane >= num_hits && lane < shape.num_topk) token_experts[lane] = -1;
      if (excess_column >= 0) report(first_error, token, excess_column, num_hits);
    }
  }

  __device__ int4 describe(const Shape&, unsigned long long error) const {
    return make_int4(EP_ROUTING_TOO_MANY, error_token(error), error_column(error),
                     error_detail(error));
  }
};

static_assert(EP_MAX_TOPK <= kWarpSize, "a token's lanes fill up its row of experts");

// ---- Steps -----------------------------------------------------------------------------------

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

  // Each thread reads the rank counts that it added up itself; the rest the last barrier covers.
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
  // As many rows at a time as the threads cover, so that few ranks do not mean few loads in flight.
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

// Slots of the block's tokens, and in the last block's all tokens of each rank.
// is_token_in_rank may be NULL.
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
      send_slot[first_entry + i] = sent ? next_slot[r] + __popc(tokens & ((1u << t) - 1)) : -1;
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
