// Counting low-latency operations, and the credits that keep ranks from writing over what a peer
// has not read. See PROTOCOL.md, "Low latency".
#pragma once

#include "common/launch.cuh"
#include "low_latency/words.cuh"

namespace ep::low_latency {

// In ep_low_latency.state. Index 0 of `kind` is dispatch, 1 combine; `half` is that of the memory
// which an epoch uses: they take turns.
struct State {
  uint32_t launches;        // kernels so far
  uint32_t sent[2];         // [kind] operations
  uint32_t received[2][2];  // [kind][half]
  uint32_t known[2][2][2];  // [launches % 2][kind][half]: what all ranks have received, as a kernel
                            // before this one has learnt
  uint32_t unused;
};
constexpr int kStateWords = 4;
static_assert(sizeof(State) == kStateWords * sizeof(uint4));
static_assert(sizeof(State) <= EP_LOW_LATENCY_STATE_INTS * sizeof(int32_t));

// Does what nobody waits for, with the warp behind it: neither is among the first to have work.
constexpr int kBookkeepingWarp = kWarps / 2;

struct Operation {
  int32_t kind;
  uint32_t epoch;
  int32_t half;
  uint32_t before;   // operations of the same half before this one
  bool has_credits;  // a kernel before has learnt that all ranks have received these
  bool can_begin;    // no fault came before, and this rank itself has received these
};

__device__ inline Operation operation_of(const ep_low_latency& common, const State& state) {
  Operation operation;
  operation.kind = common.peers.op == EP_OP_LOW_LATENCY_COMBINE;
  const uint32_t sent = state.sent[operation.kind];
  operation.epoch = common.phases & EP_LOW_LATENCY_SEND ? sent + 1 : sent - common.lag;
  operation.half = operation.epoch & 1;
  operation.before = (operation.epoch - 1) >> 1;
  const uint32_t known = state.known[state.launches % 2][operation.kind][operation.half];
  operation.has_credits = static_cast<int32_t>(known - operation.before) >= 0;
  // Sent before it was received, or received before it was sent, it would use what is in use.
  operation.can_begin = state.received[operation.kind][operation.half] == operation.before;
  return operation;
}

__device__ inline uint32_t* credit(const ep_low_latency& common, int32_t owner, int32_t kind,
                                   int32_t half, int32_t of) {
  const ep_peers& peers = common.peers;
  return in_memory_of<uint32_t>(peers, owner, common.credit_offset) +
         ((kind * 2 + half) * peers.num_ranks + of);
}

// By one warp: tells every rank what this one has received and put back, and learns the same of
// them for the next kernel. Kernels before this one have put it back: the fence orders that before
// the credit. Nobody in this kernel waits for it.
__device__ inline void exchange_credits(const ep_low_latency& common, const State& state) {
  const int32_t num_ranks = common.peers.num_ranks, lane = lane_id();
  const int32_t which = min(lane / num_ranks, 3), r = lane % num_ranks;
  const int32_t kind = which / 2, half = which % 2;
  uint32_t theirs = 0;
  if (lane < 4 * num_ranks) {
    signal(common.peers, credit(common, r, kind, half, common.peers.rank),
           state.received[kind][half]);
    theirs = ptx::load_acquire_sys(credit(common, common.peers.rank, kind, half, r));
  }
  uint32_t fewest = theirs;
  for (int32_t other = 0; other < num_ranks; ++other) {
    const uint32_t value = __shfl_sync(kFullWarp, theirs, which * num_ranks + other);
    if (static_cast<int32_t>(value - fewest) < 0) fewest = value;
  }
  if (lane < 4 * num_ranks && r == 0) {
    auto* const next = reinterpret_cast<State*>(common.state);
    next->known[(state.launches + 1) % 2][kind][half] = fewest;
  }
}

// Counts the operation, for later kernels: this one goes on with what it has read.
__device__ inline void count_operation(const ep_low_latency& common, const State& state,
                                       const Operation& operation) {
  ptx::fence_acq_rel_gpu();
  if (atomicAdd(common.finished, 1) != static_cast<int32_t>(gridDim.x) - 1) return;
  ptx::fence_acq_rel_gpu();  // all blocks have read the state
  *common.finished = 0;
  auto* const next = reinterpret_cast<State*>(common.state);
  next->launches = state.launches + 1;
  if (common.phases & EP_LOW_LATENCY_SEND) next->sent[operation.kind] = operation.epoch;
  if (common.phases & EP_LOW_LATENCY_RECEIVE) {
    next->received[operation.kind][operation.half] = operation.before + 1;
  }
}

// By all threads: which operation the kernel is part of. Counts it, and exchanges credits. The
// state is read once a block: thousands of threads that load the same line take microseconds.
__device__ inline Operation begin_operation(const ep_low_latency& common) {
  __shared__ alignas(16) State state;
  __shared__ bool has_failed;
  if (threadIdx.x == kStateWords) has_failed = aborted(common.peers);
  if (threadIdx.x < kStateWords) {
    ptx::load_global_if(true, reinterpret_cast<uint4*>(&state) + threadIdx.x,
                        reinterpret_cast<const uint4*>(common.state) + threadIdx.x);
  }
  __syncthreads();
  Operation operation = operation_of(common, state);
  if (has_failed || !operation.can_begin) {
    operation.can_begin = false;
    if (!has_failed && blockIdx.x == 0 && threadIdx.x == 0) {
      raise_fault(common.peers, EP_FAULT_RESULTS, EP_PHASE_ROWS, common.peers.rank, 0,
                  operation.epoch, 0);
    }
    return operation;
  }
  const int32_t warp = threadIdx.x / kWarpSize;
  if (warp == kBookkeepingWarp && lane_id() == 0) {
    if (blockIdx.x == 0 && common.phases & EP_LOW_LATENCY_SEND) {
      common.peers.record->epoch = operation.epoch;
      common.peers.record->begin_ns = static_cast<int64_t>(ptx::global_timer_ns());
    }
    count_operation(common, state, operation);
  }
  if (warp == kBookkeepingWarp + 1 && blockIdx.x == 0) exchange_credits(common, state);
  return operation;
}

// By a thread of each block, when that is done: the record keeps the latest. Times only grow, so
// the memory needs no zeroing.
__device__ inline void end_operation(const ep_low_latency& common) {
  if (threadIdx.x != 0 || !(common.phases & EP_LOW_LATENCY_RECEIVE)) return;
  atomicMax(reinterpret_cast<long long*>(&common.peers.record->end_ns),
            static_cast<long long>(ptx::global_timer_ns()));
}

// By each warp before it writes into memory of other ranks: they have read what the operation
// before the last one sent. False after a fault.
__device__ inline bool wait_credits(const ep_low_latency& common, const Operation& operation,
                                    Waiter& waiter) {
  // The end of the kernel before orders what it learnt before all that this one does.
  if (operation.has_credits) return true;
  const auto is_behind = [&](uint32_t count) {
    return static_cast<int32_t>(count - operation.before) < 0;
  };
  const int32_t r = lane_id();
  bool fine = true;
  if (r < common.peers.num_ranks && r != common.peers.rank) {  // can_begin says it of the own one
    const uint32_t* const theirs =
        credit(common, common.peers.rank, operation.kind, operation.half, r);
    while (fine && is_behind(ptx::load_acquire_sys(theirs))) {
      fine = waiter.goes_on(EP_PHASE_CREDIT, r, operation.epoch - 1);
    }
    if (fine) waiter.has_come(r);
  }
  fine = __all_sync(kFullWarp, fine);
  __syncwarp();  // a vote orders no memory: what one lane has acquired holds for all from here on
  return fine;
}

// EP_OK, or EP_ERR_ARGUMENT with a text: what the host can see of an operation's arguments.
inline int32_t check(const ep_low_latency& common) {
  const struct {
    const char* name;
    int32_t value, least, most;
  } limits[] = {
      {"num_ranks", common.peers.num_ranks, 1, EP_MAX_PEERS},
      {"num_topk", common.num_topk, 1, EP_MAX_TOPK},
      {"num_local_experts", common.num_local_experts, 1, EP_MAX_LOCAL_EXPERTS},
      {"room", common.room, 1, EP_LOW_LATENCY_MAX_TOKENS},
      {"max_tokens", common.max_tokens, 1, common.room},
      {"num_tokens", common.num_tokens, 0, common.max_tokens},
      {"num_blocks", common.num_blocks, 1, INT32_MAX},
      {"phases", common.phases, EP_LOW_LATENCY_SEND, EP_LOW_LATENCY_SEND | EP_LOW_LATENCY_RECEIVE},
  };
  for (const auto& limit : limits) {
    if (limit.value >= limit.least && limit.value <= limit.most) continue;
    return fail(EP_ERR_ARGUMENT, "%s = %d is not in [%d, %d]", limit.name, limit.value, limit.least,
                limit.most);
  }
  if (common.hidden < 8 || common.hidden % 8 != 0) {
    return fail(EP_ERR_ARGUMENT, "hidden = %d is not a multiple of 8", common.hidden);
  }
  return EP_OK;
}

}  // namespace ep::low_latency
