// Low latency between nodes: counting operations, credits, and headers.
#pragma once

#include "low_latency/epochs.cuh"
#include "nodes/low_latency/memory.cuh"

namespace ep::low_latency::far {

using FarState = ep_nodes_low_latency_state;  // what is in ep_low_latency.state
static_assert(sizeof(FarState) == 4 * EP_NODES_LOW_LATENCY_STATE_INTS);
static_assert(8 * sizeof(FarState::masked) >= EP_MAX_NODE_RANKS);

__device__ inline volatile FarState& state_of(const ep_low_latency& common) {
  return *reinterpret_cast<volatile FarState*>(common.state);
}

__device__ inline bool is_alive(const ep_low_latency& common, int32_t r) {
  return (state_of(common).masked[r / 32] >> (r % 32) & 1) == 0;
}

struct FarOperation {
  int32_t kind;
  uint32_t epoch;
  int32_t half;
  uint32_t before;  // operations of the same half before this one
  bool can_begin;   // no fault came before, and this rank has received these

  __device__ Flag head_value() const { return epoch; }
  // Upper half not zero: see ep_network_queue.early_flags.
  __device__ Flag row_value() const { return static_cast<Flag>(epoch) << 32; }
};

// By all threads: the last block alone counts on, when all have been here. epochs: of the handle.
__device__ inline FarOperation begin_operation(const ep_low_latency& common, uint32_t* epochs) {
  const volatile FarState& state = state_of(common);
  const bool sends = common.phases & EP_LOW_LATENCY_SEND;
  FarOperation operation;
  operation.kind = common.peers.op == EP_OP_LOW_LATENCY_COMBINE;
  operation.epoch = sends ? epoch_after(state.sent[operation.kind]) : epochs[operation.kind];
  operation.half = operation.epoch & 1;
  operation.before = (operation.epoch - 1) >> 1;
  const uint32_t received = state.received[operation.kind][operation.half];
  // Sent before it was received, or received before it was sent, it would use what is in use.
  const bool is_in_turn = ahead(received, operation.before) == 0;
  bool has_failed = false;
  if (threadIdx.x == 0) {
    const int32_t abort = *static_cast<volatile const int32_t*>(common.peers.abort);
    has_failed = abort != 0 && abort != mismatch_of(operation.kind, operation.epoch);
  }
  has_failed = __syncthreads_or(has_failed);
  operation.can_begin = !has_failed && is_in_turn;
  if (blockIdx.x != 0 || threadIdx.x != 0 || has_failed) return operation;
  if (!is_in_turn) {
    raise_fault(common.peers, EP_FAULT_RESULTS, EP_PHASE_ROWS, common.peers.rank, 0,
                operation.epoch, 0);
  } else if (sends) {
    epochs[operation.kind] = operation.epoch;
    common.peers.record->begin_ns = static_cast<int64_t>(ptx::global_timer_ns());
  }
  return operation;
}

// By a block before it sends: all ranks have received what the operation before the last one sent.
// So their memory, and that which was sent from, may be written. False after a fault.
__device__ inline bool wait_credits(const Memory& memory, const FarOperation& operation) {
  const ep_low_latency& common = memory.common;
  bool fine = true;
  for (int32_t k = 1 + threadIdx.x; k < memory.num_ranks(); k += kThreads) {
    const int32_t r = memory.rank_after(k);
    if (!is_alive(common, r)) continue;
    const auto has_received = [&](Flag value) {
      return ahead(static_cast<uint32_t>(value), operation.before) >= 0;
    };
    Flag seen;
    fine = fine && wait_flag(common.peers, memory.credit(operation.half, r), has_received, &seen,
                             EP_PHASE_CREDIT, memory.peer_of(r), operation.epoch - 1);
  }
  return __syncthreads_and(fine);
}

// By one thread: waits for the head of a rank, whose header is to be like the own one but for the
// count. Returns that; -1 after a fault.
__device__ inline int32_t wait_head(const Memory& memory, const FarOperation& operation,
                                    const Header& own, int32_t source) {
  const ep_peers& peers = memory.common.peers;
  const Flag* const flag = memory.head_flag(operation.half, source);
  const auto is_this_epoch = [&](Flag value) { return value == operation.head_value(); };
  Flag seen;
  if (!wait_flag(peers, flag, is_this_epoch, &seen, EP_PHASE_PLAN, memory.peer_of(source),
                 operation.epoch)) {
    return -1;
  }
  network::after_wait(flag, seen);
  uint4 word;
  ptx::load_global_if(true, &word, memory.head(operation.half, source));
  if (word.y == own.call && word.z == own.of &&
      word.x <= static_cast<uint32_t>(memory.common.max_tokens)) {
    return static_cast<int32_t>(word.x);
  }
  raise_fault(peers, EP_FAULT_MISMATCH, EP_PHASE_PLAN, memory.peer_of(source), EP_FIELD_CALL,
              own.call, word.y, mismatch_of(operation.kind, operation.epoch));
  return -1;
}

// The same, timed for a caller who asks how long ranks are waited for.
__device__ inline int32_t time_head(const Memory& memory, const FarOperation& operation,
                                    const Header& own, int32_t source) {
  const uint64_t start_ns = ptx::global_timer_ns();
  const int32_t count = wait_head(memory, operation, own, source);
  int64_t* const stats = memory.common.wait_stats;
  if (stats != nullptr) stats[source] += static_cast<int64_t>(ptx::global_timer_ns() - start_ns);
  return count;
}

// By one thread: waits for a chunk of rows. False after a fault.
__device__ inline bool wait_rows(const Memory& memory, const FarOperation& operation,
                                 int32_t source, int32_t chunk) {
  const Flag* const flag = memory.row_flag(operation.half, source, chunk);
  const auto is_this_epoch = [&](Flag value) { return value == operation.row_value(); };
  Flag seen;
  const bool fine = wait_flag(memory.common.peers, flag, is_this_epoch, &seen, EP_PHASE_ROWS,
                              memory.peer_of(source), operation.epoch);
  if (fine) network::after_wait(flag, seen);
  return fine;
}

// By all blocks. The last one counts the operation and, when it has received, writes the record and
// tells all ranks that it has: by then it has seen every flag of theirs.
__device__ inline void end_operation(const Memory& memory, const FarOperation& operation,
                                     const int32_t* num_rows) {
  const ep_low_latency& common = memory.common;
  const ep_peers& peers = common.peers;
  if (!is_last_block(common.finished, gridDim.x) || aborted(peers)) return;
  volatile FarState& state = state_of(common);
  if (threadIdx.x == 0 && common.phases & EP_LOW_LATENCY_SEND) {
    state.sent[operation.kind] = operation.epoch;
  }
  if (!(common.phases & EP_LOW_LATENCY_RECEIVE)) return;
  const int32_t num_ranks = memory.num_ranks();
  auto* const record = reinterpret_cast<int64_t*>(peers.record);
  for (int32_t k = threadIdx.x; k < num_ranks; k += kThreads) {
    const int32_t r = memory.rank_after(k), peer = memory.peer_of(r);
    if (k != 0 && is_alive(common, r)) memory.send_credit(operation.half, k, operation.before + 1);
    record[EP_NODES_RECORD_WAITS + peer] = peers.longest_wait_ns[peer];
    record[EP_NODES_RECORD_WAITS + num_ranks + peer] = num_rows[r];
    peers.longest_wait_ns[peer] = 0;
  }
  if (threadIdx.x != 0) return;
  state.received[operation.kind][operation.half] = operation.before + 1;
  peers.record->epoch = operation.epoch;
  peers.record->end_ns = static_cast<int64_t>(ptx::global_timer_ns());
}

// EP_OK, or EP_ERR_ARGUMENT with a text. Host code.
inline int32_t check(const ep_low_latency& common, const ep_nodes_low_latency& nodes) {
  const int32_t status = low_latency::check(common);
  if (status != EP_OK) return status;
  const int32_t num_ranks = nodes.network.num_nodes, size = nodes.ranks_per_node;
  if (size < 1 || num_ranks < 1 || num_ranks > EP_MAX_NODE_RANKS || num_ranks % size != 0) {
    return fail(EP_ERR_ARGUMENT,
                "%d ranks, %d on each node: at most %d, and no node may have fewer", num_ranks,
                size, EP_MAX_NODE_RANKS);
  }
  return check_places(common, num_ranks);
}

}  // namespace ep::low_latency::far
