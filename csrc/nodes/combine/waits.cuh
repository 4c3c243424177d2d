// Combine between nodes: what a lister waits for. All lanes wait together: false, in all of them,
// after a fault. Before a wait the lister tells what its team has done, for others may be waiting
// for that.
#pragma once

#include <type_traits>

#include "nodes/combine/lister.cuh"

namespace ep::nodes {
namespace {  // see lister.cuh

// Waits until the ranks of this node have read the wave that used this half before.
__device__ inline bool Lister::wait_for_credits() {
  flush();
  bool fine = true;
  if (lane_id() < peers_.num_ranks - 1) {
    const int32_t l = (peers_.rank + 1 + lane_id()) % peers_.num_ranks;
    fine = wait_for_wave(peers_, local_.credit_offset, wave_.number - 2, epoch_, l);
  }
  __syncwarp();  // all lanes may write to where one waited
  return __all_sync(kFullWarp, fine);
}

// Waits until the owner has read what the combine before sent it.
__device__ inline bool Lister::wait_to_send() {
  if (may_send_) return true;
  flush();
  const bool fine =
      lane_id() != 0 ||
      wait_for_rail(peers_, args_.network, args_.network_credit_offset, epoch_ - 1, wave_.j + 1);
  __syncwarp();
  may_send_ = __all_sync(kFullWarp, fine);
  return may_send_;
}

// Waits for this lane's chunks [first, last], whose flags carry the stamp in their upper bits;
// `peer` raises them. The team finishes before anybody waits.
template <typename Flag>
__device__ inline bool Lister::wait_for_chunks(const Flag* flags, int32_t first, int32_t last,
                                               uint32_t stamp, int32_t peer) {
  const auto stamp_of = [](Flag flag) {
    return static_cast<uint32_t>(flag >> (8 * (sizeof(Flag) - sizeof(uint32_t))));
  };
  const auto is_of_this_epoch = [&](Flag flag) { return stamp_of(flag) >> 8 == stamp >> 8; };
  bool arrived = true;
  for (int32_t chunk = first; chunk <= last && arrived; ++chunk) {
    arrived = is_of_this_epoch(ptx::load_acquire_sys(&flags[chunk]));
  }
  if (__any_sync(kFullWarp, !arrived)) flush();
  bool fine = true;
  for (int32_t chunk = first; chunk <= last && fine; ++chunk) {
    Flag seen;
    fine = wait_flag(peers_, &flags[chunk], is_of_this_epoch, &seen, EP_PHASE_ROWS, peer, epoch_) &&
           same_call(peers_, stamp, stamp_of(seen), peer);
    if constexpr (std::is_same_v<Flag, network::Flag>) {
      if (fine) network::after_wait(&flags[chunk], seen);
    }
  }
  __syncwarp();  // all lanes may read what one waited for
  return __all_sync(kFullWarp, fine);
}

// Waits for the chunks with the partial rows of a group. Lane l waits for those of local rank l.
__device__ __noinline__ inline bool Lister::wait_for_partials(const Token& token) {
  const ChunkRange chunks = chunks_of_partials(
      token, [&](int32_t l) { return l != peers_.rank; },
      [&](int32_t slot) { return slot / local_.chunk_rows; });
  const uint32_t* const flags = partial_flags(peers_.rank, wave_.half(), lane_id());
  const uint32_t stamp = chunk_stamp(wave_.number, local_.tag);
  return wait_for_chunks(flags, chunks.first, chunks.last, stamp, lane_id());
}

// Waits for the sums of other nodes of tokens [begin, end). A lane takes a node. The first group
// waits for everybody's first chunk, for that comes even where it is empty.
__device__ __noinline__ inline bool Lister::wait_for_sums(int32_t begin, int32_t end) {
  const uint32_t stamp = chunk_stamp(epoch_, local_.tag);
  for (int32_t from = 1; from < num_nodes_; from += kWarpSize) {
    const int32_t k = from + lane_id();
    int32_t lowest = INT32_MAX, highest = -1;
    if (k < num_nodes_) {
      const int32_t node = node_after(args_.network, num_nodes_ - k);
      if (begin == 0) lowest = highest = 0;
      for (int32_t t = begin; t < end; ++t) {
        const int32_t slot = args_.nodes.node_slot[static_cast<int64_t>(t) * num_nodes_ + node];
        if (slot < 0) continue;
        lowest = min(lowest, slot);
        highest = max(highest, slot);
      }
    }
    const int32_t rows = args_.network_chunk_rows;
    const int32_t first = highest < 0 ? 0 : lowest / rows;
    const int32_t last = highest < 0 ? -1 : highest / rows;
    const int64_t place = static_cast<int64_t>(min(k, num_nodes_ - 1) - 1) * EP_MAX_NETWORK_CHUNKS;
    const int32_t peer = peer_number(peers_, k, peers_.rank);
    const auto wait = [&](int64_t offset) {
      return wait_for_chunks(own_flags(args_.network, offset) + place, first, last, stamp, peer);
    };
    if (!wait(args_.network_flag_offset)) return false;
    if (args_.has_weights && !wait(args_.weight_flag_offset)) return false;
  }
  return true;
}

}  // namespace
}  // namespace ep::nodes
