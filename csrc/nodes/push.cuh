// Pushing a wave: as on one node (dispatch/push.cuh), but rows of waves after the first are those
// that the network brings, as their chunks come.
#pragma once

#include "nodes/rows.cuh"

namespace ep::nodes {

// This rank's own tokens: wave 0.
class OwnTokens {
 public:
  __device__ explicit OwnTokens(const ep_dispatch_args& args) : args_(args) {}
  __device__ bool begin() const { return true; }
  __device__ int32_t count() const { return args_.routing.num_tokens; }
  __device__ bool open(int32_t, int32_t, bool) const { return true; }
  __device__ int32_t slot(int32_t t, int32_t l) const {
    return args_.routing.send_slot[static_cast<int64_t>(t) * args_.peers.num_ranks + l];
  }
  __device__ void load(const Stages& stages, int32_t i, int32_t t, int32_t extra) const {
    dispatch::load_own_token(args_, stages, i, t, extra);
  }

 private:
  const ep_dispatch_args& args_;
};

// A chunk whose rows are on their way.
struct PushedChunk {
  int32_t chunk = -1;  // -1: none
  int32_t first = 0;
  int32_t count = 0;
};

// Pushes this warp's rows of a wave. *through rows have been through its stages before, and
// afterwards those of this wave have too. False after a fault.
template <typename Rows>
__device__ inline bool push_wave(const ep_nodes_dispatch_args& all, const Stages& stages,
                                 Rows& rows, int32_t epoch, int32_t wave, int32_t warp,
                                 int32_t num_warps, int32_t* through) {
  const ep_dispatch_args& args = all.dispatch;
  const ep_peers& peers = args.peers;
  const int32_t num_ranks = peers.num_ranks, chunk_tokens = args.chunk_tokens;
  const int32_t lane = lane_id();
  // Every warp has seen the first chunk: none may be left unseen when the credit is given.
  if (!rows.begin()) return false;
  const int32_t num_rows = num_ranks == 1 ? 0 : rows.count();  // nobody else is here
  const bool sends = lane < num_ranks - 1;                     // this lane serves a destination
  const int32_t peer = (peers.rank + 1 + (sends ? lane : 0)) % num_ranks;
  const int32_t num_chunks = ceil_div(num_rows, chunk_tokens);
  const int32_t my_chunks = warp < num_chunks ? ceil_div(num_chunks - warp, num_warps) : 0;
  const int32_t my_rows = my_chunks * chunk_tokens;

  bool may_send = true;
  if (sends) {
    may_send = wait_for_wave(peers, args.credit_offset, wave - 2, epoch, peer);
    fence_for_bulk();  // the slots are written by bulk stores
  }
  if (!__all_sync(kFullWarp, may_send)) return false;

  const int32_t half = half_of(wave), bytes = dispatch::slot_bytes(args), base = *through;
  const int64_t stride = dispatch::slot_stride(args);
  const int64_t region = region_of(peers.rank, peer, num_ranks);
  uint8_t* const slots = peers.memory[peer] + args.slot_offset + half * all.slot_half +
                         region * args.max_tokens * stride;
  uint64_t* const flags = in_memory_of<uint64_t>(peers, peer, args.flag_offset) +
                          (static_cast<int64_t>(half) * num_ranks + peers.rank) * args.max_chunks;
  const auto row_of = [&](int32_t i) {
    return (warp + i / chunk_tokens * num_warps) * chunk_tokens + i % chunk_tokens;
  };
  // Rows [0, ready) of this warp have come. After a fault no more do.
  int32_t ready = 0, end = my_rows;
  bool fine = true;
  const auto load = [&](int32_t i) {
    if (i >= end) return;
    const int32_t row = row_of(i);
    if (row >= num_rows) return;
    if (i >= ready) {
      const int32_t last = min(row + chunk_tokens - i % chunk_tokens, num_rows);
      if (!rows.open(row, last, true)) {
        fine = false;
        end = i;
        return;
      }
      ready = i + last - row;
    }
    if (lane == 0) rows.load(stages, base + i, row, 0);
  };
  const auto raise = [&](const PushedChunk& pushed) {
    if (!sends || pushed.chunk < 0 || !fine) return;
    const uint32_t stamp = chunk_stamp(wave, args.tag);
    signal(peers, &flags[pushed.chunk], dispatch::pack_flag(stamp, pushed.first, pushed.count));
  };

  const int32_t ahead = stages.num_stages - 1;
  for (int32_t i = 0; i < ahead; ++i) load(i);
  PushedChunk current, landing;
  for (int32_t i = 0; i < end; ++i) {
    const int32_t row = row_of(i);
    if (i % chunk_tokens == 0) {
      landing = current;
      current = PushedChunk{row / chunk_tokens, 0, 0};
    }
    if (row < num_rows) {
      const int32_t slot = sends ? rows.slot(row, peer) : -1;
      stages.wait(base + i);
      // Entries of a rank with another top-k mean nothing. The plan tells it, but later.
      if (slot >= 0 && slot < args.max_tokens) {
        if (current.count++ == 0) current.first = slot;
        store_bulk(slots + slot * stride, stages.stage(base + i), bytes);
      }
      *through = base + i + 1;
    }
    end_group();  // every lane, every row: one group each
    if (i % chunk_tokens == dispatch::kFlagLag && landing.chunk >= 0) {
      wait_until_written<dispatch::kFlagLag + 1>();
      raise(landing);
      landing.chunk = -1;
    }
    // The stage of row i - 1 is the next to be filled.
    stages.wait_for_room();
    load(i + ahead);
  }
  wait_until_written<0>();
  raise(landing);
  raise(current);
  return fine;
}

__device__ inline void push_waves(const ep_nodes_dispatch_args& args, const Stages& stages,
                                  int32_t epoch, int32_t warp, int32_t num_warps) {
  // After a fault elsewhere the input may be garbage.
  if (__any_sync(kFullWarp, aborted(args.dispatch.peers))) return;
  fence_for_bulk();  // the input is read by bulk loads
  int32_t through = 0;
  for (int32_t k = args.first_wave; k < args.end_wave; ++k) {
    const int32_t wave = wave_number(epoch, args.network.num_nodes, k);
    bool fine;
    if (k == 0) {
      OwnTokens rows(args.dispatch);
      fine = push_wave(args, stages, rows, epoch, wave, warp, num_warps, &through);
    } else {
      Relayed rows(args, epoch, k);
      fine = push_wave(args, stages, rows, epoch, wave, warp, num_warps, &through);
    }
    if (!fine) return;
  }
}

}  // namespace ep::nodes
