// The plan's arguments as plan/receive.cuh asks for them, where there are several nodes.
#pragma once

#include "nodes/nodes.cuh"

namespace ep::nodes {

// A type of this namespace, so that the functions below are found.
struct Plan : ep_nodes_plan_args {};

__device__ inline int32_t num_sources(const Plan& args) {
  return args.peers.num_ranks * args.network.num_nodes;
}
__device__ inline int32_t peer_of(const Plan& args, int32_t source) {
  const int32_t num_local = args.peers.num_ranks;
  return peer_number(args.peers, distance_before(args.network, source / num_local),
                     source % num_local);
}
__device__ inline int32_t tokens_of(const Plan& args, int32_t source, int32_t asked_tokens) {
  if (asked_tokens < 1 || asked_tokens > args.max_tokens) return 0;
  const volatile int32_t* const header =
      in_memory_of<int32_t>(args.peers, args.peers.rank, args.header_offset) +
      source * plan::kHeaderInts;
  return min(max(header[kRowsPushed], 0), args.max_tokens);
}
__device__ inline int32_t* expert_counts(const Plan& args) {
  return args.mailbox + EP_NODES_MAILBOX_COUNTS + 3 * num_sources(args) + args.network.num_nodes;
}
// No copy engine moves rows between nodes.
__device__ inline const uint32_t* staged_token_bits(const Plan&) { return nullptr; }

// As those of one node (plan/receive.cuh).
__device__ inline void leave_notice(const Plan& args, const int32_t* sent_error,
                                    const int32_t* asked_tokens, int32_t end) {
  volatile int32_t* const notice = args.notice;
  if (notice[0] != EP_NOTICE_NONE) return;
  bool too_many = false;
  for (int32_t r = 0; r < num_sources(args); ++r) {
    notice[EP_NODES_NOTICE_ASKED + r] = asked_tokens[r];
    too_many |= asked_tokens[r] > args.max_tokens;
  }
  if (!too_many && sent_error[0] == EP_ROUTING_OK && end <= args.capacity) return;
  for (int i = 0; i < 4; ++i) notice[EP_NODES_NOTICE_ERROR + i] = sent_error[i];
  notice[EP_NODES_NOTICE_ROWS] = end;
  notice[EP_NODES_NOTICE_CAPACITY] = too_many ? args.max_tokens : args.capacity;
  __threadfence_system();
  notice[0] = too_many                         ? EP_NOTICE_TOO_MANY
              : sent_error[0] != EP_ROUTING_OK ? EP_NOTICE_ROUTING
                                               : EP_NOTICE_OVERFLOW;
}

__device__ inline void fill_mailbox(const Plan& args, const int32_t* sent_error,
                                    const int32_t* num_rows, const int32_t* asked_tokens) {
  const int32_t num_ranks = num_sources(args), num_nodes = args.network.num_nodes;
  int32_t* const counts = args.mailbox + EP_NODES_MAILBOX_COUNTS;
  for (int32_t r = threadIdx.x; r < num_ranks; r += blockDim.x) {
    counts[r] = asked_tokens[r];
    counts[num_ranks + r] = args.routing.num_sent[r];
    counts[2 * num_ranks + r] = num_rows[r];
  }
  for (int32_t k = threadIdx.x; k < num_nodes; k += blockDim.x) {
    counts[3 * num_ranks + k] = args.nodes.num_relayed[k];
  }
  if (threadIdx.x < 4) args.mailbox[EP_NODES_MAILBOX_ERROR + threadIdx.x] = sent_error[threadIdx.x];
  __threadfence_system();
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::store_release_sys(reinterpret_cast<uint32_t*>(args.mailbox), args.ticket);
  }
}

}  // namespace ep::nodes
