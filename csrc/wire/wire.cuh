// Copy engines as a wire: the flags that follow copies, see PROTOCOL.md, "Copy engines".
#pragma once

#include "common/peers.cuh"
#include "common/warp.cuh"

namespace ep::wire {

enum Flag { kHead, kFirstChunk };
static_assert(kFirstChunk + EP_COPY_CHUNKS <= EP_COPY_FLAGS);

// Where `source` raises its flags at `rank`.
__host__ __device__ inline uint32_t* flags_at(const ep_peers& peers, int64_t flag_offset,
                                              int32_t rank, int32_t source) {
  return reinterpret_cast<uint32_t*>(peers.memory[rank] + flag_offset) + source * EP_COPY_FLAGS;
}

// What flags are stamped with: outside of a graph the host's count of operations.
__device__ inline int32_t number_of(const ep_wire& wire, int32_t epoch) {
  return wire.number != 0 ? wire.number : epoch;
}

// By a warp: tells each peer of which epoch the copies are that follow, for these run whatever
// happens here. Where it is the next operation's epoch they are not to be read.
__device__ inline void set_marks(const ep_peers& peers, int64_t mark_offset, int32_t epoch) {
  const int32_t r = lane_id();
  if (r < peers.num_ranks && r != peers.rank) {
    uint32_t* const mark = in_memory_of<uint32_t>(peers, r, mark_offset) + peers.rank;
    ptx::store_relaxed_sys(mark, static_cast<uint32_t>(epoch));
  }
  ptx::fence_acq_rel_sys();
}

// Called by one thread: true when what this flag of `source` stands for can be read. With `block`
// it waits until then, and false means a fault.
__device__ inline bool has_landed(const ep_peers& peers, const ep_wire& wire, int32_t source,
                                  int32_t flag, int32_t tag, int32_t epoch, bool block) {
  const uint32_t* const word = flags_at(peers, wire.flag_offset, peers.rank, source) + flag;
  const uint32_t stamp = chunk_stamp(number_of(wire, epoch), tag);
  const auto is_of_this_operation = [stamp](uint32_t value) { return value >> 8 == stamp >> 8; };
  uint32_t seen = 0;
  if (block) {
    if (!wait_flag(peers, word, is_of_this_operation, &seen, EP_PHASE_ROWS, source, epoch)) {
      return false;
    }
  } else {
    seen = ptx::load_acquire_sys(word);
    if (!is_of_this_operation(seen)) return false;
  }
  return same_call(peers, stamp, seen, source);
}

}  // namespace ep::wire
