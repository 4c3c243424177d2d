// What a routing is read from, topk_idx or a routing map, and the chunks of tokens that it is cut
// into: a chunk's experts in shared memory are the same for both.
#pragma once

#include <algorithm>
#include <climits>
#include <cstdint>

#include "common/launch.cuh"
#include "common/warp.cuh"
#include "ep_comm.h"

namespace ep::layout {

constexpr int kChunkTokens = 32;
constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarpSize;

// Tokens in chunks of kChunkTokens; each block owns a contiguous run of chunks.
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

  // A warp takes a token: 32 neighbouring experts a load. The ballot says each hit's place in the
  // row.
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

// Refuses what is none of EP_INPUT_*. Host code.
inline int32_t check_input_kind(int32_t kind) {
  if (kind >= EP_INPUT_TOPK_INT32 && kind <= EP_INPUT_ROUTING_MAP) return EP_OK;
  return fail(EP_ERR_ARGUMENT, "input_kind = %d is not one of EP_INPUT_*", kind);
}

// Returns call(input), a status, with what `kind` says that `pointer` is. Host code.
template <typename Call>
int32_t with_input(int32_t kind, const void* pointer, const Call& call) {
  switch (kind) {
    case EP_INPUT_TOPK_INT32:
      return call(TopkInput<int32_t>{static_cast<const int32_t*>(pointer)});
    case EP_INPUT_TOPK_INT64:
      return call(TopkInput<int64_t>{static_cast<const int64_t*>(pointer)});
    default:
      return call(RoutingMapInput{static_cast<const uint8_t*>(pointer)});
  }
}

}  // namespace ep::layout
