// What both kernels of a plan know: the scratch that they share, and the fields that must agree.
#pragma once

#include "common/peers.cuh"
#include "routing/slots.cuh"

namespace ep::plan {

using layout::kChunkTokens;
using layout::kThreads;

// Blocks of a kernel wait for one another (grid_barrier), so all must be on the GPU together.
constexpr int kMaxPlanBlocks = 64;
constexpr int kHeaderInts = 16;  // rows sent, tokens, fields that must agree

// (chunk, expert) pairs in a block's shared memory, beside what it keeps of each source.
template <int kMaxSources>
constexpr int kMaxGroupWords = kMaxSources > EP_MAX_PEERS ? 2048 : 4096;

// Places in ep_plan_args.counters, all zero between plans.
enum Counter { kSendBarrier, kSendEnd, kReceiveBarrier, kReceiveEnd };

// Received rows are cut into chunks of 32. Each block owns a contiguous run of the chunks that
// came.
struct Receive {
  int32_t* expert_count;  // [blocks, E_local]
  uint32_t* chunk_rows;   // [max_chunks, E_local] bit t: row t of the chunk goes to the expert
  int32_t max_chunks;
  int32_t chunks_per_group;  // at most so many in shared memory at a time

  __host__ __device__ int32_t shared_bytes(int32_t num_local_experts) const {
    return 4 * (2 * chunks_per_group * num_local_experts + 3 * num_local_experts);
  }
};

struct Scratch {
  int32_t* sent_error;  // [4] as ep_layout_args.error
  layout::Workspace layout;
  Receive receive;
};

// What the plan of one node knows of its sources. That of several nodes has functions of these
// names too (nodes/plan.cuh).
__device__ inline int32_t num_sources(const ep_plan_args& args) { return args.peers.num_ranks; }
// Number of a source among the peers that are waited for.
__device__ inline int32_t peer_of(const ep_plan_args&, int32_t source) { return source; }
// Tokens whose rows a source pushes here in chunks.
__device__ inline int32_t tokens_of(const ep_plan_args& args, int32_t, int32_t asked_tokens) {
  return asked_tokens <= args.max_tokens ? asked_tokens : 0;
}
// Where the host finds the rows of each local expert.
__device__ inline int32_t* expert_counts(const ep_plan_args& args) {
  return args.mailbox->num_tokens_per_expert;
}

// Where sources have left which of their tokens come here, in the form of ep_routing.token_bits.
__device__ inline const uint32_t* staged_token_bits(const ep_plan_args& args) {
  return in_memory_of<const uint32_t>(args.peers, args.peers.rank, args.token_bits_offset);
}

template <typename Args>
__device__ inline int32_t field_of(const Args& args, int32_t field) {
  switch (field) {
    case EP_FIELD_NUM_TOPK:
      return args.routing.num_topk;
    case EP_FIELD_HIDDEN:
      return args.hidden;
    case EP_FIELD_NUM_EXPERTS:
      return args.num_experts;
    case EP_FIELD_EXPERT_MAJOR:
      return args.routing.expert_major;
    default:
      return args.expert_alignment;
  }
}

}  // namespace ep::plan
