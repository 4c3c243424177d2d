// Counting low-latency operations, and the credits that keep ranks from writing over what a peer
// has not read. See PROTOCOL.md, "Low latency".
#pragma once

#include "common/launch.cuh"
#include "low_latency/memory.cuh"

namespace ep::low_latency {

// In ep_low_latency.state. Index 0 of `kind` is dispatch, 1 combine; `half` is that of the memory
// which an epoch uses: they take turns.
struct State {
  uint32_t launches;        // kernels so far
  uint32_t sent[2];         // [kind] operations
  uint32_t received[2][2];  // [kind][half]
  uint32_t known[2][2][2];  // [launches % 2][kind][half]: what all ranks have received, as a kernel
                            // before this one has learnt
  uint32_t masked;          // bit r: rank r is dead, or taken for dead. The host writes it
};
constexpr int kStateWords = 4;
static_assert(sizeof(State) == kStateWords * sizeof(uint4));
static_assert(sizeof(State) <= EP_LOW_LATENCY_STATE_INTS * sizeof(int32_t));

// Does what nobody waits for: of all warps of a block the last two have the least to send, and the
// last one sends what is waited for first.
constexpr int kBookkeepingWarp = kWarps - 2;

struct Operation {
  int32_t kind;
  uint32_t epoch;
  int32_t half;
  uint32_t before;   // operations of the same half before this one
  uint32_t alive;    // bit r: rank r is not masked
  bool has_credits;  // a kernel before has learnt that all ranks have received these
  bool can_begin;    // no fault came before, and this rank itself has received these
};

// sent_epoch: of a receive alone, what its send left.
__device__ inline Operation operation_of(const ep_low_latency& common, const State& state,
                                         uint32_t sent_epoch) {
  Operation operation;
  operation.kind = common.peers.op == EP_OP_LOW_LATENCY_COMBINE;
  operation.epoch =
      common.phases & EP_LOW_LATENCY_SEND ? state.sent[operation.kind] + 1 : sent_epoch;
  operation.half = operation.epoch & 1;
  operation.before = (operation.epoch - 1) >> 1;
  operation.alive = ~state.masked;
  const uint32_t known = state.known[state.launches % 2][operation.kind][operation.half];
  operation.has_credits = static_cast<int32_t>(known - operation.before) >= 0;
  // Sent before it was received, or received before it was sent, it would use what is in use.
  operation.can_begin = state.received[operation.kind][operation.half] == operation.before;
  return operation;
}

// By one warp: tells every rank what this one has received and put back, and learns the same of
// them for the next kernel. Kernels before this one have put it back: the fence orders that before
// the credit. Nobody in this kernel waits for it.
template <typename Memory>
__device__ inline void exchange_credits(const Memory& memory, const State& state) {
  const ep_peers& peers = memory.common.peers;
  const int32_t num_ranks = memory.num_ranks(), lane = lane_id();
  const int32_t which = min(lane / num_ranks, 3), r = lane % num_ranks;
  const int32_t kind = which / 2, half = which % 2;
  const bool is_alive = lane < 4 * num_ranks && !(state.masked >> r & 1);
  // A rank that is masked has, for all that matters, received what this one has.
  uint32_t theirs = state.received[kind][half];
  if (is_alive) {
    signal(peers, memory.credit(r, kind, half, memory.rank()), theirs);
    theirs = ptx::load_acquire_sys(memory.credit(memory.rank(), kind, half, r));
  }
  uint32_t fewest = theirs;
  for (int32_t other = 0; other < num_ranks; ++other) {
    const uint32_t value = __shfl_sync(kFullWarp, theirs, which * num_ranks + other);
    if (static_cast<int32_t>(value - fewest) < 0) fewest = value;
  }
  if (lane < 4 * num_ranks && r == 0) {
    auto* const next = reinterpret_cast<State*>(memory.common.state);
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
// epochs: of the handle's dispatch and combine.
template <typename Memory>
__device__ inline Operation begin_operation(const Memory& memory, uint32_t* epochs) {
  __shared__ alignas(16) State state;
  __shared__ uint32_t sent_epoch;
  __shared__ bool has_failed;
  const ep_low_latency& common = memory.common;
  uint32_t* const epoch = epochs + (common.peers.op == EP_OP_LOW_LATENCY_COMBINE);
  if (threadIdx.x == kStateWords) has_failed = aborted(common.peers);
  if (threadIdx.x == kWarpSize && !(common.phases & EP_LOW_LATENCY_SEND)) sent_epoch = *epoch;
  if (threadIdx.x < kStateWords) {
    ptx::load_global_if(true, reinterpret_cast<uint4*>(&state) + threadIdx.x,
                        reinterpret_cast<const uint4*>(common.state) + threadIdx.x);
  }
  __syncthreads();
  Operation operation = operation_of(common, state, sent_epoch);
  if (has_failed || !operation.can_begin) {
    operation.can_begin = false;
    if (!has_failed && blockIdx.x == 0 && threadIdx.x == 0) {
      raise_fault(common.peers, EP_FAULT_RESULTS, EP_PHASE_ROWS, common.peers.rank, 0,
                  operation.epoch, 0);
    }
    return operation;
  }
  if (threadIdx.x / kWarpSize == kBookkeepingWarp) {
    if (lane_id() == 0) {
      if (blockIdx.x == 0 && common.phases & EP_LOW_LATENCY_SEND) {
        *epoch = operation.epoch;
        common.peers.record->epoch = operation.epoch;
        common.peers.record->begin_ns = static_cast<int64_t>(ptx::global_timer_ns());
      }
      count_operation(common, state, operation);
    }
    __syncwarp();
    if (blockIdx.x == 0) exchange_credits(memory, state);
  }
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
template <typename Memory>
__device__ inline bool wait_credits(const Memory& memory, const Operation& operation) {
  // The end of the kernel before orders what it learnt before all that this one does.
  if (operation.has_credits) return true;
  const ep_peers& peers = memory.common.peers;
  const auto is_behind = [&](uint32_t count) {
    return static_cast<int32_t>(count - operation.before) < 0;
  };
  const int32_t r = lane_id();
  bool fine = true;
  // can_begin says it of the own rank
  if (r < memory.num_ranks() && r != memory.rank() && operation.alive >> r & 1) {
    const uint32_t* const theirs =
        memory.credit(memory.rank(), operation.kind, operation.half, r);
    Wait wait;
    while (fine && is_behind(ptx::load_acquire_sys(theirs))) {
      fine = wait.goes_on(peers, EP_PHASE_CREDIT, r, operation.epoch - 1);
    }
    if (fine) wait.has_come(peers, r);
  }
  fine = __all_sync(kFullWarp, fine);
  __syncwarp();  // a vote orders no memory: what one lane has acquired holds for all from here on
  return fine;
}

// ---- Headers -----------------------------------------------------------------------------------

// What a rank says of an operation before its rows: words with the epoch.
struct Header {
  uint32_t num_tokens;  // of the rank
  uint32_t call;        // what ranks must do alike
  uint32_t of;          // dispatch: max_tokens; combine: epoch of its dispatch
};

// By a warp: to all ranks that are alive.
template <typename Memory>
__device__ inline void send_header(const Memory& memory, const Operation& operation,
                                   const Header& header) {
  const int32_t r = lane_id();
  if (r >= memory.num_ranks() || !(operation.alive >> r & 1)) return;
  delay(memory.common.peers);
  ptx::store_word(memory.header(r, operation.kind, operation.half, memory.rank()),
                  make_uint4(header.num_tokens, header.call, header.of, operation.epoch));
}

// By one thread: waits for the header of `source`, which is to be like the own one but for the
// number of tokens. Returns that number; -1 after a fault. The first block keeps the time.
template <typename Memory>
__device__ inline int32_t receive_header(const Memory& memory, const Operation& operation,
                                         const Header& own, int32_t source) {
  const ep_low_latency& common = memory.common;
  const ep_peers& peers = common.peers;
  const uint4* const from =
      memory.header(memory.rank(), operation.kind, operation.half, source);
  delay(peers);
  const uint64_t start_ns = ptx::global_timer_ns();
  uint4 word = ptx::load_word(from);
  if (!wait_for_stamp(peers, from, &word, source, operation.epoch)) return -1;
  if (blockIdx.x == 0) {
    const int64_t waited_ns = static_cast<int64_t>(ptx::global_timer_ns() - start_ns);
    peers.record->longest_wait_ns[source] = waited_ns;
    if (common.wait_stats != nullptr) common.wait_stats[source] += waited_ns;
  }
  if (word.y == own.call && word.z == own.of &&
      word.x <= static_cast<uint32_t>(common.max_tokens)) {
    return static_cast<int32_t>(word.x);
  }
  raise_fault(peers, EP_FAULT_MISMATCH, EP_PHASE_PLAN, source, EP_FIELD_CALL, own.call, word.y);
  return -1;
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
