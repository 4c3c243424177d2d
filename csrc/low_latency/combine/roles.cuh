// Low-latency combine: who does what in a block, and what ranks tell each other before rows.
#pragma once

#include "low_latency/epochs.cuh"

namespace ep::low_latency::combine {

constexpr int kWarps = 16;
constexpr int kThreads = kWarps * kWarpSize;
// The last warps have the least to send: one does what nobody waits for.
constexpr int kBookkeepingWarp = kWarps - 2;

// The last one to get work.
__device__ inline bool is_last_warp() {
  return threadIdx.x / kWarpSize == kWarps - 1 && blockIdx.x == gridDim.x - 1;
}

__device__ inline Header own_header(const ep_low_latency_combine_args& args) {
  const ep_low_latency& common = args.common;
  return {static_cast<uint32_t>(common.num_tokens), static_cast<uint32_t>(common.has_weights != 0),
          args.handle.epochs[0]};
}

// By the last warp of all: waits for the headers. They say whether all combine the same dispatch;
// rows tell nothing of that.
template <typename Memory>
__device__ inline void check_headers(const ep_low_latency_combine_args& args, const Memory& memory,
                                     const Operation& operation) {
  const int32_t r = lane_id();
  if (r >= memory.num_ranks()) return;
  args.common.peers.record->num_rows[r] = args.handle.num_rows[r];
  if (operation.alive >> r & 1) receive_header(memory, operation, own_header(args), r, true);
}

}  // namespace ep::low_latency::combine
