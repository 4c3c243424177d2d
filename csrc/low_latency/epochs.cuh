// Counting low-latency operations, and the credits that keep ranks from writing over what a peer
// has not read. See PROTOCOL.md, "Low latency".
#pragma once

#include <cstddef>

#include "common/calls.cuh"
#include "common/launch.cuh"
#include "low_latency/memory.cuh"

namespace ep::low_latency {

using State = ep_low_latency_state;  // what is in ep_low_latency.state
constexpr int kStateInts = sizeof(State) / sizeof(uint32_t);
static_assert(kStateInts == 16 && kStateInts <= EP_LOW_LATENCY_STATE_INTS);

// How far `count` is ahead of `of`, times four: what counts is the sign. Only 30 bits are compared,
// because epochs wrap from 2^32 - 1 to 2^31: zero stands in words that nothing has come into.
__device__ inline int32_t ahead(uint32_t count, uint32_t of) {
  return static_cast<int32_t>((count - of) << 2);
}
__device__ inline uint32_t epoch_after(uint32_t epoch) {
  return epoch + 1 != 0 ? epoch + 1 : 1u << 31;
}

// What `abort` holds after a mismatch of an operation. Its other blocks, which may begin later,
// still send what they have to: else the peer would wait for the header that tells it so.
__device__ inline int32_t mismatch_of(int32_t kind, uint32_t epoch) {
  return static_cast<int32_t>(epoch << 1 | kind | 1u << 31);  // not kAborted
}

struct Operation {
  int32_t kind;
  uint32_t epoch;
  int32_t half;
  uint32_t before;   // operations of the same half before this one
  uint32_t alive;    // bit r: rank r is not masked
  bool has_credits;  // a kernel before has learnt that all ranks have received these
  bool can_begin;    // no fault came before, and this rank itself has received these
};

// What a kernel knows of its operation. Every warp reads it for itself, a word a lane: so nobody
// waits for another warp, and those of an SM find it in L1.
class Begin {
 public:
  // Begins to load it. epochs: of the handle's dispatch and combine.
  __device__ Begin(const ep_low_latency& common, const uint32_t* epochs) : common_(common) {
    const int32_t lane = lane_id();
    word_ = ptx::load_global_now(
        lane < kStateInts    ? reinterpret_cast<const uint32_t*>(common.state) + lane
        : lane == kAbortLane ? reinterpret_cast<const uint32_t*>(common.peers.abort)
                             : epochs + kind());
  }

  __device__ Operation operation() const {
    const bool sends = common_.phases & EP_LOW_LATENCY_SEND;
    Operation operation;
    operation.kind = kind();
    operation.epoch = sends ? epoch_after(of(offsetof(State, sent) / 4 + kind())) : of(kEpochLane);
    operation.half = operation.epoch & 1;
    operation.before = (operation.epoch - 1) >> 1;
    operation.alive = ~of(offsetof(State, masked) / 4);
    const uint32_t known =
        of(offsetof(State, known) / 4 + (launches() % 2 * 2 + kind()) * 2 + operation.half);
    operation.has_credits = ahead(known, operation.before) >= 0;
    // Sent before it was received, or received before it was sent, it would use what is in use.
    const bool is_in_turn = ahead(received(kind(), operation.half), operation.before) == 0;
    const int32_t abort = static_cast<int32_t>(of(kAbortLane));
    const bool has_failed = abort != 0 && abort != mismatch_of(operation.kind, operation.epoch);
    operation.can_begin = !has_failed && is_in_turn;
    if (!has_failed && !is_in_turn && blockIdx.x == 0 && threadIdx.x == 0) {
      raise_fault(common_.peers, EP_FAULT_RESULTS, EP_PHASE_ROWS, common_.peers.rank, 0,
                  operation.epoch, 0);
    }
    return operation;
  }

  __device__ uint32_t launches() const { return of(offsetof(State, launches) / 4); }
  __device__ uint32_t received(int32_t kind, int32_t half) const {
    return of(offsetof(State, received) / 4 + kind * 2 + half);
  }

 private:
  static constexpr int kAbortLane = kStateInts, kEpochLane = kStateInts + 1;
  const ep_low_latency& common_;
  uint32_t word_;

  __device__ int32_t kind() const { return common_.peers.op == EP_OP_LOW_LATENCY_COMBINE; }
  __device__ uint32_t of(int32_t lane) const { return __shfl_sync(kFullWarp, word_, lane); }
};

// By one warp: tells every rank what this one has received and put back, and learns the same of
// them for the next kernel. Kernels before this one have put it back: the release orders that
// before the credit. Nobody in this kernel waits for it.
template <typename Memory>
__device__ inline void exchange_credits(const Memory& memory, const Begin& begin,
                                        const Operation& operation) {
  static_assert(4 * EP_MAX_PEERS <= kWarpSize);  // a lane for each rank, kind and half
  const int32_t num_ranks = memory.num_ranks(), lane = lane_id();
  const int32_t which = min(lane / num_ranks, 3), r = lane % num_ranks;
  const int32_t kind = which / 2, half = which % 2;
  const uint32_t mine = begin.received(kind, half), launches = begin.launches();
  // A rank that is masked has, for all that matters, received what this one has.
  uint32_t theirs = mine;
  if (lane < 4 * num_ranks && operation.alive >> r & 1) {
    memory.delay();
    ptx::store_release_sys(memory.credit(r, kind, half, memory.rank()), mine);
    theirs = ptx::load_acquire_sys(memory.credit(memory.rank(), kind, half, r));
  }
  uint32_t fewest = theirs;
#pragma unroll 1
  for (int32_t other = 0; other < num_ranks; ++other) {
    const uint32_t value = __shfl_sync(kFullWarp, theirs, which * num_ranks + other);
    if (ahead(value, fewest) < 0) fewest = value;
  }
  if (lane < 4 * num_ranks && r == 0) {
    auto* const next = reinterpret_cast<State*>(memory.common.state);
    next->known[(launches + 1) % 2][kind][half] = fewest;
  }
}

// Number of the barrier at which all warps of a block have read the state.
constexpr int kStateBarrier = 1;

// By all warps but one, when they have read the state.
__device__ inline void has_read_state(int32_t num_threads) {
  ptx::named_arrive(kStateBarrier, num_threads);
}

// By the other warp: counts the operation for later kernels, when all blocks have read the state.
// This kernel goes on with what it has read.
__device__ inline void count_operation(const ep_low_latency& common, const Begin& begin,
                                       const Operation& operation, int32_t num_threads) {
  const uint32_t launches = begin.launches();
  ptx::named_barrier(kStateBarrier, num_threads);
  if (lane_id() != 0) return;
  ptx::fence_acq_rel_gpu();
  if (atomicAdd(common.finished, 1) != static_cast<int32_t>(gridDim.x) - 1) return;
  ptx::fence_acq_rel_gpu();
  *common.finished = 0;
  if (!operation.can_begin) return;
  auto* const next = reinterpret_cast<State*>(common.state);
  next->launches = launches + 1;
  if (common.phases & EP_LOW_LATENCY_SEND) next->sent[operation.kind] = operation.epoch;
  if (common.phases & EP_LOW_LATENCY_RECEIVE) {
    next->received[operation.kind][operation.half] = operation.before + 1;
  }
}

// By one thread of all.
__device__ inline void begin_record(const ep_low_latency& common, const Operation& operation,
                                    uint32_t* epochs) {
  if (!(common.phases & EP_LOW_LATENCY_SEND)) return;
  epochs[operation.kind] = operation.epoch;
  common.peers.record->epoch = operation.epoch;
  common.peers.record->begin_ns = static_cast<int64_t>(ptx::global_timer_ns());
}

// By a thread of each block, when the block is done: the record keeps the latest time. Times only
// grow, so it needs no zeroing.
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
  const auto is_behind = [&](uint32_t count) { return ahead(count, operation.before) < 0; };
  const int32_t r = lane_id();
  bool fine = true;
  // Of this rank itself can_begin has said it.
  if (r < memory.num_ranks() && r != memory.rank() && operation.alive >> r & 1) {
    const uint32_t* const theirs = memory.credit(memory.rank(), operation.kind, operation.half, r);
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
  uint32_t of;          // dispatch: max_tokens; combine: the epoch of its dispatch
};

// By a warp: to all ranks that are alive.
template <typename Memory>
__device__ inline void send_header(const Memory& memory, const Operation& operation,
                                   const Header& header) {
  const int32_t r = lane_id();
  if (r >= memory.num_ranks() || !(operation.alive >> r & 1)) return;
  memory.delay();
  ptx::store_word(memory.header(r, operation.kind, operation.half, memory.rank()),
                  make_uint4(header.num_tokens, header.call, header.of, operation.epoch));
}

// By one thread: waits for the header of `source`, which is to be like the own one but for the
// number of tokens. Returns that number; -1 after a fault. One of all threads keeps the time.
template <typename Memory>
__device__ inline int32_t receive_header(const Memory& memory, const Operation& operation,
                                         const Header& own, int32_t source, bool keeps_time) {
  const ep_low_latency& common = memory.common;
  const ep_peers& peers = common.peers;
  const uint4* const from = memory.header(memory.rank(), operation.kind, operation.half, source);
  memory.delay();
  const uint64_t start_ns = keeps_time ? ptx::global_timer_ns() : 0;
  uint4 word = ptx::load_word(from);
  if (!wait_for_stamp(peers, from, &word, source, operation.epoch)) return -1;
  if (keeps_time) {
    const int64_t waited_ns = static_cast<int64_t>(ptx::global_timer_ns() - start_ns);
    peers.record->longest_wait_ns[source] = waited_ns;
    if (common.wait_stats != nullptr) common.wait_stats[source] += waited_ns;
  }
  if (word.y == own.call && word.z == own.of &&
      word.x <= static_cast<uint32_t>(common.max_tokens)) {
    return static_cast<int32_t>(word.x);
  }
  raise_fault(peers, EP_FAULT_MISMATCH, EP_PHASE_PLAN, source, EP_FIELD_CALL, own.call, word.y,
              mismatch_of(operation.kind, operation.epoch));
  return -1;
}

// Notes a call of an operation; a second phase is no other call. A combine's rows are BF16 ones. Of
// a dispatch nobody asks how long they are.
inline void note_call(const ep_low_latency& common) {
  if (common.phases & EP_LOW_LATENCY_SEND) ep::note_call(common.peers, 2 * common.hidden);
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

// The same of the places for received rows, whose numbers have kRowBits in a handle.
inline int32_t check_places(const ep_low_latency& common, int32_t num_ranks) {
  const int64_t places =
      static_cast<int64_t>(common.num_local_experts) * num_ranks * common.max_tokens;
  if (places <= EP_LOW_LATENCY_MAX_PLACES) return EP_OK;
  return fail(EP_ERR_ARGUMENT, "%d local experts x %d ranks x %d tokens: the product is at most %d",
              common.num_local_experts, num_ranks, common.max_tokens, EP_LOW_LATENCY_MAX_PLACES);
}

}  // namespace ep::low_latency
