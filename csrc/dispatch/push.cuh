// Pushing: a warp takes this rank's tokens in chunks, stores each row into a slot at every other
// rank it goes to, and has each chunk flagged there once its rows have landed. Lane l issues the
// stores to rank (own + 1 + l): destinations rotate, and each lane can wait for its own stores. It
// waits for credits alone. Flags are raised by one more warp of the block: a fence before a flag
// waits for all stores of its thread, those that are to go on meanwhile too.
#pragma once

#include "dispatch/ring.cuh"
#include "dispatch/slots.cuh"

namespace ep::dispatch {

// In shared memory: the flags that warps hand to the one that raises them, by warp and lane. Zero
// is no flag: every flag has a stamp, which is not zero.
struct LandedChunks {
  static constexpr int kDepth = 2;  // so that a warp seldom waits for its flags
  static constexpr uint64_t kNoMore = ~0ull;
  uint64_t flags[kMaxWarps][EP_MAX_PEERS][kDepth];

  // All threads of the block.
  __device__ void clear() {
    uint64_t* const all = &flags[0][0][0];
    for (int32_t i = threadIdx.x; i < kMaxWarps * EP_MAX_PEERS * kDepth; i += blockDim.x) {
      all[i] = 0;
    }
    __syncthreads();
  }
};

struct PushedChunk {
  int32_t chunk = -1;  // -1: none
  int32_t first = 0;
  int32_t count = 0;
};

// Where the flag of this rank's chunk 0 stands at a peer.
__device__ inline uint64_t* flags_at(const ep_dispatch_args& args, int32_t peer) {
  return in_memory_of<uint64_t>(args.peers, peer, args.flag_offset) +
         static_cast<int64_t>(args.peers.rank) * args.max_chunks;
}

// By one warp: raises the flags of all chunks that the block's other warps push, `first_warp` and
// those after it of `num_warps` in all blocks. Each lane serves some of their lanes. This ends: a
// lane hands over all its flags, or says that it gave up.
__device__ inline void raise_flags(const ep_dispatch_args& args, LandedChunks* landed,
                                   int32_t first_warp, int32_t warps_of_block, int32_t num_warps) {
  constexpr int kServed = ceil_div(kMaxWarps * EP_MAX_PEERS, kWarpSize);
  const ep_peers& peers = args.peers;
  const int32_t destinations = peers.num_ranks - 1;
  if (destinations == 0) return;
  const int32_t num_chunks = ceil_div(args.routing.num_tokens, args.chunk_tokens);
  int32_t raised[kServed] = {};
  bool waiting = true;
  while (__any_sync(kFullWarp, waiting)) {
    waiting = false;
    uint64_t* flags[kServed];
    uint64_t values[kServed];
    bool any = false;
#pragma unroll
    for (int s = 0; s < kServed; ++s) {
      const int32_t served = lane_id() + s * kWarpSize;
      const int32_t warp = served / destinations, lane = served % destinations;
      const int32_t chunk = first_warp + warp + raised[s] * num_warps;
      values[s] = 0;
      if (warp >= warps_of_block || raised[s] < 0 || chunk >= num_chunks) continue;
      waiting = true;
      const uint64_t value =
          ptx::take_from_block(&landed->flags[warp][lane][raised[s] % LandedChunks::kDepth]);
      if (value == 0) continue;
      if (value == LandedChunks::kNoMore) {
        raised[s] = -1;
        continue;
      }
      ++raised[s];
      flags[s] = flags_at(args, (peers.rank + 1 + lane) % peers.num_ranks) + chunk;
      values[s] = value;
      any = true;
    }
    if (!any) continue;
    delay(peers);
    ptx::fence_acq_rel_sys();
#pragma unroll
    for (int s = 0; s < kServed; ++s) {
      if (values[s] != 0) ptx::store_relaxed_sys(flags[s], values[s]);
    }
  }
}

// By one warp: pushes its chunks. `handed`: the warp's place in LandedChunks.
__device__ inline void push(const ep_dispatch_args& args, const Stages& stages, int32_t epoch,
                            int32_t warp, int32_t num_warps, uint64_t* handed) {
  const ep_peers& peers = args.peers;
  const int32_t num_ranks = peers.num_ranks, chunk_tokens = args.chunk_tokens;
  const int32_t lane = lane_id();
  const bool sends = lane < num_ranks - 1;  // this lane serves a destination
  const int32_t peer = (peers.rank + 1 + (sends ? lane : 0)) % num_ranks;
  const int32_t num_chunks = ceil_div(args.routing.num_tokens, chunk_tokens);
  const int32_t my_chunks = warp < num_chunks ? ceil_div(num_chunks - warp, num_warps) : 0;
  const int32_t my_tokens = my_chunks * chunk_tokens;
  const int32_t bytes = slot_bytes(args);
  const int64_t stride = slot_stride(args);

  bool may_send = !aborted(peers);  // after a fault elsewhere the input may be garbage
  if (may_send && sends) {
    may_send = wait_credit(peers, args.credit_offset, epoch, peer);
    fence_for_bulk();  // the slots are written by bulk stores
  }
  uint64_t* const my_flags = handed + lane * LandedChunks::kDepth;
  if (!__all_sync(kFullWarp, may_send)) {
    if (sends) ptx::put_into_block(my_flags, LandedChunks::kNoMore);
    return;
  }

  uint8_t* const slots =
      peers.memory[peer] + args.slot_offset +
      static_cast<int64_t>(region_of(peers.rank, peer, num_ranks)) * args.max_tokens * stride;
  const auto token = [&](int32_t i) {
    return (warp + i / chunk_tokens * num_warps) * chunk_tokens + i % chunk_tokens;
  };
  const auto load = [&](int32_t i) {
    if (lane == 0 && i < my_tokens && token(i) < args.routing.num_tokens) {
      load_own_token(args, stages, i, token(i), 0);
    }
  };
  int32_t num_handed = 0;
  const auto hand_over = [&](const PushedChunk& pushed) {
    if (!sends || pushed.chunk < 0) return;
    uint64_t* const flag = &my_flags[num_handed++ % LandedChunks::kDepth];
    const uint32_t stamp = chunk_stamp(epoch, args.tag);
    while (!ptx::put_into_block(flag, pack_flag(stamp, pushed.first, pushed.count))) {
    }
  };

  const int32_t ahead = stages.num_stages - 1;
  for (int32_t i = 0; i < ahead; ++i) load(i);
  PushedChunk current, landing;
  for (int32_t i = 0; i < my_tokens; ++i) {
    const int32_t t = token(i);
    if (i % chunk_tokens == 0) {
      landing = current;
      current = PushedChunk{t / chunk_tokens, 0, 0};
    }
    if (t < args.routing.num_tokens) {
      const int32_t slot =
          sends ? args.routing.send_slot[static_cast<int64_t>(t) * num_ranks + peer] : -1;
      stages.wait(i);
      if (slot >= 0) {
        if (current.count++ == 0) current.first = slot;
        store_bulk(slots + slot * stride, stages.stage(i), bytes);
      }
    }
    end_group();  // every lane, every token: one group each
    if (i % chunk_tokens == kFlagLag && landing.chunk >= 0) {
      wait_until_written<kFlagLag + 1>();
      hand_over(landing);
      landing.chunk = -1;
    }
    // The stage of token i - 1 is the next to be filled.
    stages.wait_for_room();
    load(i + ahead);
  }
  wait_until_written<0>();
  hand_over(landing);
  hand_over(current);
}

}  // namespace ep::dispatch
