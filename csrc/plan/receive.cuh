// The second kernel of a plan. It waits for the flags and copies the routing out of the staging
// memory, which the next plan overwrites. It counts the rows of each expert, tells the host, and
// says where every row stands in the output (plan/rows.cuh). The headers say how many rows came, so
// no other rows are looked at.
//
// What differs where the plan is one of several nodes is asked of the arguments (plan/plan.cuh,
// nodes/plan.cuh): how many sources there are, where their counts go.
#pragma once

#include "common/warp.cuh"
#include "plan/plan.cuh"
#include "plan/rows.cuh"

namespace ep::plan {

// Waits for the routing of rank `source` and reads its header. A rank with more tokens than there
// is room for sends none, and all hear how many it asked for. After a fault there are 0 rows.
template <typename Args>
__device__ inline void wait_for_header(const Args& args, int32_t source, int32_t epoch,
                                       int32_t* num_rows, int32_t* asked_tokens) {
  const ep_peers& peers = args.peers;
  const uint32_t* const flag = in_memory_of<uint32_t>(peers, peers.rank, args.flag_offset) + source;
  int32_t rows = 0, asked = 0;
  if (wait_epoch(peers, flag, epoch, EP_PHASE_PLAN, peer_of(args, source))) {
    const volatile int32_t* const header =
        in_memory_of<int32_t>(peers, peers.rank, args.header_offset) + source * kHeaderInts;
    rows = min(max(header[0], 0), args.max_tokens);
    asked = max(header[1], 0);
    for (int i = 0; i < EP_NUM_FIELDS; ++i) {
      const int32_t ours = field_of(args, i), theirs = header[2 + i];
      if (theirs == ours) continue;
      raise_fault(peers, EP_FAULT_MISMATCH, EP_PHASE_PLAN, peer_of(args, source), i, ours, theirs);
      rows = 0;
      break;
    }
  }
  num_rows[source] = rows;
  asked_tokens[source] = asked;
  if (blockIdx.x == 0) {
    args.routing.num_recv[source] = rows;
    args.routing.source_tokens[source] = tokens_of(args, source, asked);
  }
}

// first[g] becomes the sum of the sizes before g, each rounded up to `alignment`, or all taken for
// `rows` where that is not 0; returns the sum of all, in every thread. first may be `size`.
__device__ inline int32_t prefix_of_groups(const int32_t* size, int32_t num_groups,
                                           int32_t alignment, int32_t rows, int32_t* first) {
  __shared__ int32_t total;
  __syncthreads();
  if (threadIdx.x < kWarpSize) {
    int32_t carry = 0;
    for (int32_t begin = 0; begin < num_groups; begin += kWarpSize) {
      const int32_t g = begin + lane_id();
      const int32_t all = rows == 0 && g < num_groups ? round_up(size[g], alignment) : rows;
      const int32_t own = g < num_groups ? all : 0;
      int32_t of_these;
      const int32_t before = sum_before(own, &of_these);
      if (g < num_groups) first[g] = carry + before;
      carry += of_these;
    }
    if (lane_id() == 0) total = carry;
  }
  __syncthreads();
  return total;
}

// One block says where each expert's group stands in an output of `capacity` rows. Returns, in
// every thread, how many rows do not fit into groups of a fixed size.
template <typename Args>
__device__ inline int32_t publish_groups(const Args& args, const int32_t* expert_tokens,
                                         const int32_t* first_row, int32_t end) {
  __shared__ int32_t dropped;
  if (threadIdx.x == 0) dropped = 0;
  __syncthreads();
  const int32_t num_local_experts = args.num_experts / num_sources(args);
  const int32_t capacity = args.capacity;
  for (int32_t e = threadIdx.x; e < num_local_experts; e += kThreads) {
    const int32_t tokens = expert_tokens[e];
    if (args.ticket != 0) expert_counts(args)[e] = tokens;
    if (args.routing.expert_major) {
      const int32_t first = min(first_row[e], capacity);
      args.routing.expert_first_row[e] = first;
      const int32_t room = args.expert_capacity != 0 ? args.expert_capacity : capacity - first;
      args.routing.expert_tokens[e] = min(tokens, room);
      if (args.overflow != nullptr) {
        // Plans of a buffer follow one another: nobody else writes.
        args.overflow[e] += max(tokens - room, 0);
        args.overflow[num_local_experts + e] = max(args.overflow[num_local_experts + e], tokens);
      }
      if (args.expert_capacity != 0 && tokens > room) atomicAdd(&dropped, tokens - room);
    } else {
      args.routing.expert_tokens[e] = tokens;
    }
  }
  if (threadIdx.x == 0) args.routing.expert_first_row[num_local_experts] = min(end, capacity);
  __syncthreads();
  return dropped;
}

// One thread leaves a notice for a host that does not wait, if something is wrong. The first notice
// stays until the host has taken it.
__device__ inline void leave_notice(const ep_plan_args& args, const int32_t* sent_error,
                                    const int32_t* asked_tokens, int32_t end) {
  volatile ep_notice* const notice = args.notice;
  if (notice->code != EP_NOTICE_NONE) return;
  bool too_many = false;
  for (int32_t r = 0; r < args.peers.num_ranks; ++r) {
    notice->asked_tokens[r] = asked_tokens[r];
    too_many |= asked_tokens[r] > args.max_tokens;
  }
  if (!too_many && sent_error[0] == EP_ROUTING_OK && end <= args.capacity) return;
  for (int i = 0; i < 4; ++i) notice->routing_error[i] = sent_error[i];
  notice->num_rows = end;
  notice->capacity = too_many ? args.max_tokens : args.capacity;
  __threadfence_system();
  notice->code = too_many                         ? EP_NOTICE_TOO_MANY
                 : sent_error[0] != EP_ROUTING_OK ? EP_NOTICE_ROUTING
                                                  : EP_NOTICE_OVERFLOW;
}

// One block writes the counts that the host waits for, the ticket last.
__device__ inline void fill_mailbox(const ep_plan_args& args, const int32_t* sent_error,
                                    const int32_t* num_rows, const int32_t* asked_tokens) {
  if (threadIdx.x < EP_MAX_PEERS) {
    const int32_t r = threadIdx.x, num_ranks = args.peers.num_ranks;
    args.mailbox->asked_tokens[r] = r < num_ranks ? asked_tokens[r] : 0;
    args.mailbox->num_sent_tokens[r] = r < num_ranks ? args.routing.num_sent[r] : 0;
    args.mailbox->num_recv_tokens[r] = r < num_ranks ? num_rows[r] : 0;
  }
  if (threadIdx.x < 4) args.mailbox->routing_error[threadIdx.x] = sent_error[threadIdx.x];
  __threadfence_system();
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::store_release_sys(reinterpret_cast<uint32_t*>(&args.mailbox->ticket), args.ticket);
  }
}

// Copies which tokens come here out of the staging memory, this block its part.
template <typename Args>
__device__ inline void take_token_bits(const Args& args, int32_t num_ranks) {
  const uint32_t* const staged = staged_token_bits(args);
  const int32_t num_words = 2 * num_ranks * ceil_div(args.max_tokens, kChunkTokens);
  const int32_t step = gridDim.x * kThreads;
  for (int32_t i = blockIdx.x * kThreads + threadIdx.x; i < num_words; i += step) {
    args.routing.token_bits[i] = staged[i];
  }
}

// The whole kernel, for at most kMaxSources ranks.
template <int kMaxSources, typename Args>
__device__ inline void receive_all(const Args& args, const Scratch& scratch, int32_t* shared) {
  const ep_peers& peers = args.peers;
  const Receive& receive = scratch.receive;
  const int32_t num_ranks = num_sources(args);
  const int32_t num_experts = args.num_experts / num_ranks;  // of this rank
  const int32_t group_words = receive.chunks_per_group * num_experts;
  auto* const mask = reinterpret_cast<uint32_t*>(shared);
  int32_t* const chunk_first_row = shared + group_words;
  int32_t* const next_row = chunk_first_row + group_words;
  int32_t* const tokens = next_row + num_experts;
  int32_t* const first_row = tokens + num_experts;  // [E] of each expert's group
  __shared__ int32_t num_rows[kMaxSources], first_of_source[kMaxSources];
  __shared__ int32_t asked_tokens[kMaxSources];
  static_assert(
      4 * (2 * kMaxGroupWords<kMaxSources> + 3 * EP_MAX_LOCAL_EXPERTS + 3 * kMaxSources) + 64 <=
          48 * 1024,
      "what a block may have without asking");
  const int32_t epoch = epoch_of(peers);
  uint32_t* const counters = reinterpret_cast<uint32_t*>(args.counters);

  // A thread's next source. Where each has a thread nothing loops, and no register keeps r.
  const auto after = [&](int32_t r) { return kMaxSources <= kThreads ? num_ranks : r + kThreads; };
  for (int32_t r = threadIdx.x; r < num_ranks; r = after(r)) {
    wait_for_header(args, r, epoch, num_rows, asked_tokens);
  }
  for (int32_t e = threadIdx.x; e < num_experts; e += kThreads) next_row[e] = tokens[e] = 0;
  const int32_t num_received = prefix_of_groups(num_rows, num_ranks, 1, 0, first_of_source);
  for (int32_t r = threadIdx.x; blockIdx.x == 0 && r < num_ranks; r = after(r)) {
    args.routing.first_of_source[r] = first_of_source[r];
  }

  if (args.routing.token_bits != nullptr) take_token_bits(args, num_ranks);

  const int32_t num_all_chunks = ceil_div(num_received, kChunkTokens);
  // Rounded up; as ceil_div writes it the compiler needs eight registers more.
  const int32_t num_blocks = gridDim.x;
  const int32_t chunks_per_block = num_all_chunks / num_blocks + (num_all_chunks % num_blocks != 0);
  const int32_t begin = blockIdx.x * chunks_per_block;
  const int32_t end = min(begin + chunks_per_block, num_all_chunks);
  const auto* const staged = in_memory_of<const int32_t>(peers, peers.rank, args.idx_offset);
  for (int32_t chunk = begin; chunk < end; chunk += receive.chunks_per_group) {
    const Chunks group{chunk, min(receive.chunks_per_group, end - chunk)};
    take_in(args, group, num_experts, first_of_source, num_received, staged, mask);
    count_rows(receive, group, num_experts, mask, tokens);
  }
  leave_counts(receive, num_experts, tokens);
  if (!grid_barrier(peers, &counters[kReceiveBarrier], gridDim.x)) return;

  add_up_blocks(receive, num_experts, next_row, tokens);
  const int32_t end_of_groups =
      prefix_of_groups(tokens, num_experts, args.expert_alignment, args.expert_capacity, first_row);
  for (int32_t e = threadIdx.x; e < num_experts; e += kThreads) next_row[e] += first_row[e];
  if (blockIdx.x == 0) {
    const int32_t end_of_rows = args.routing.expert_major ? end_of_groups : num_received;
    const int32_t dropped = publish_groups(args, tokens, first_row, end_of_rows);
    if (args.ticket != 0) {
      fill_mailbox(args, scratch.sent_error, num_rows, asked_tokens);
    } else if (threadIdx.x == 0) {
      const int32_t wanted = args.overflow != nullptr ? 0 : end_of_rows + dropped;
      leave_notice(args, scratch.sent_error, asked_tokens, wanted);
    }
  }
  __syncthreads();

  for (int32_t chunk = begin; chunk < end; chunk += receive.chunks_per_group) {
    const Chunks group{chunk, min(receive.chunks_per_group, end - chunk)};
    place_rows(receive, group, num_experts, next_row, mask, chunk_first_row);
    if (args.expert_capacity != 0) {
      drop_experts(args, group, num_experts, num_received, mask, chunk_first_row);
    }
    write_rows(args, group, num_experts, num_received, mask, chunk_first_row);
  }
  if (is_last_block(&args.counters[kReceiveEnd], gridDim.x) && threadIdx.x == 0) {
    counters[kReceiveBarrier] = 0;
  }
}

}  // namespace ep::plan
