// Pushing: a warp takes this rank's tokens in chunks, stores each row into a slot at every other
// rank it goes to, and flags each chunk there once its rows have landed. Lane l issues the stores
// to rank (own + 1 + l): destinations rotate, and each lane can wait for its own stores and raise
// its own flags. It waits for credits alone.
#pragma once

#include "dispatch/slots.cuh"

namespace ep::dispatch {

struct PushedChunk {
  int32_t chunk = -1;  // -1: none
  int32_t first = 0;
  int32_t count = 0;
};

__device__ inline void push(const ep_dispatch_args& args, const Stages& stages, int32_t epoch,
                            int32_t warp, int32_t num_warps) {
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
  if (!__all_sync(kFullWarp, may_send)) return;

  uint8_t* const slots =
      peers.memory[peer] + args.slot_offset +
      static_cast<int64_t>(region_of(peers.rank, peer, num_ranks)) * args.max_tokens * stride;
  uint64_t* const flags = in_memory_of<uint64_t>(peers, peer, args.flag_offset) +
                          static_cast<int64_t>(peers.rank) * args.max_chunks;
  const auto token = [&](int32_t i) {
    return (warp + i / chunk_tokens * num_warps) * chunk_tokens + i % chunk_tokens;
  };
  const auto load = [&](int32_t i) {
    if (lane == 0 && i < my_tokens && token(i) < args.routing.num_tokens) {
      load_own_token(args, stages, i, token(i), 0);
    }
  };
  const auto raise = [&](const PushedChunk& pushed) {
    if (!sends || pushed.chunk < 0) return;
    const uint32_t stamp = chunk_stamp(epoch, args.tag);
    signal(peers, &flags[pushed.chunk], pack_flag(stamp, pushed.first, pushed.count));
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
      raise(landing);
      landing.chunk = -1;
    }
    // The stage of token i - 1 is the next to be filled.
    stages.wait_for_room();
    load(i + ahead);
  }
  wait_until_written<0>();
  raise(landing);
  raise(current);
}

}  // namespace ep::dispatch
