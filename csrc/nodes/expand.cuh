// Expanding all waves, one after the other: as on one node (dispatch/expand.cuh), but of waves
// after the first the rows that stay are read from where the network has put them.
#pragma once

#include "dispatch/expand.cuh"
#include "nodes/rows.cuh"

namespace ep::nodes {

// The units of wave k.
struct WaveUnits : dispatch::Placement {
  const ep_nodes_dispatch_args& all;
  const int32_t k;
  const Relayed relayed;  // where k > 0
  const int32_t first_source = node_after(all.network, all.network.num_nodes - k) * num_ranks;

  __device__ int32_t num_rows(int32_t l) const {
    return args.routing.source_tokens[first_source + l];
  }

  // The most chunks of any rank.
  __device__ int32_t count_chunks() const {
    int32_t num_chunks = 0;
    for (int32_t l = 0; l < num_ranks; ++l) {
      num_chunks = max(num_chunks, ceil_div(num_rows(l), chunk_tokens));
    }
    return num_chunks;
  }

  // As that of one node. unit->source is the local rank.
  __device__ bool open(int32_t chunk, int32_t ranks_after, bool block, dispatch::Unit* unit) const {
    const int32_t l = (args.peers.rank + ranks_after) % num_ranks;
    unit->source = l;
    unit->rows = 0;
    unit->first = chunk * chunk_tokens;
    if (unit->first >= num_rows(l)) return true;
    unit->first_of_source = args.routing.first_of_source[first_source + l];
    if (l == args.peers.rank) return open_rows_that_stay(block, unit);
    const auto flag_at = [this, chunk, l] {
      const int64_t source = static_cast<int64_t>(half_of(wave)) * num_ranks + l;
      return in_memory_of<uint64_t>(args.peers, args.peers.rank, args.flag_offset) +
             source * args.max_chunks + chunk;
    };
    return open_flagged(flag_at, peer_number(args.peers, k, l), block, unit);
  }

  __device__ bool open_rows_that_stay(bool block, dispatch::Unit* unit) const {
    const int32_t end = min(unit->first + chunk_tokens, num_rows(args.peers.rank));
    if (k > 0 && !relayed.open(unit->first, end, block)) return false;
    const int32_t row = unit->first + lane_id();
    unit->rows = __ballot_sync(kFullWarp, row < end && slot_here(row) >= 0);
    return true;
  }
  __device__ int32_t slot_here(int32_t row) const {
    if (k > 0) return relayed.slot(row, args.peers.rank);
    return args.routing.send_slot[static_cast<int64_t>(row) * num_ranks + args.peers.rank];
  }

  // Lane 0 starts to load row j of the unit into stage i, followed by its entry.
  __device__ void load(int32_t i, const dispatch::Unit& unit, int32_t j) const {
    const ep_peers& peers = args.peers;
    int32_t slot = unit.first + j;
    if (unit.source == peers.rank) {
      if (k > 0) {
        relayed.load(stages, i, slot, indices_bytes);
      } else {
        dispatch::load_own_token(args, stages, i, slot, indices_bytes);
      }
      slot = slot_here(slot);
    } else {
      const int64_t region = region_of(unit.source, peers.rank, num_ranks);
      const uint8_t* const slots =
          peers.memory[peers.rank] + args.slot_offset + half_of(wave) * all.slot_half;
      stages.expect(i, bytes + indices_bytes);
      stages.load(i, 0, slots + (region * args.max_tokens + slot) * stride, bytes);
    }
    load_entry(i, unit.first_of_source + slot);
  }
};

// Copies the relay entries to the routing's own memory: the next plan writes over where they came.
__device__ inline void copy_relay_entries(const ep_nodes_dispatch_args& args, int32_t epoch,
                                          int32_t warp, int32_t num_warps) {
  for (int32_t k = 1; k < args.network.num_nodes; ++k) {
    const Relayed relayed(args, epoch, k);
    const volatile int32_t* const from = relayed.planned_entries();
    const int64_t first = args.nodes.relay_first[k], rows = args.nodes.num_relayed[k];
    int32_t* const to = args.nodes.relay + first * relayed.ints();
    for (int64_t i = warp * kWarpSize + lane_id(); i < rows * relayed.ints();
         i += static_cast<int64_t>(num_warps) * kWarpSize) {
      to[i] = from[i];
    }
  }
}

// A warp has read all that it reads of wave k. The last one to say so gives the credit.
__device__ inline void end_wave(const ep_nodes_dispatch_args& args, int32_t k, int32_t wave,
                                int32_t num_warps) {
  if (!is_last_arrival(&args.wave_counters[k], num_warps)) return;
  credit_wave(args.dispatch.peers, args.dispatch.credit_offset, wave, lane_id());
}

// The plan of a new dispatch is complete.
__device__ inline void expand_waves(const ep_nodes_dispatch_args& all, const Stages& stages,
                                    int32_t epoch, int32_t warp, int32_t num_warps) {
  const ep_dispatch_args& args = all.dispatch;
  fence_for_bulk();  // input and output rows are read by bulk loads
  // After a fault in the plan there are no entries.
  if (__any_sync(kFullWarp, aborted(args.peers))) return;
  const bool copies = args.is_planned && args.planned_entries != nullptr;
  if (copies) dispatch::copy_entries(args, warp, num_warps);
  if (args.is_planned) copy_relay_entries(all, epoch, warp, num_warps);
  const int32_t* const entries = copies ? args.planned_entries : args.routing.entries;
  dispatch::write_padding(args, warp, num_warps);

  int32_t through = 0;
  for (int32_t k = 0; k < all.network.num_nodes; ++k) {
    const int32_t wave = wave_number(epoch, all.network.num_nodes, k);
    const WaveUnits units{{args, stages, entries, epoch, wave}, all, k, Relayed(all, epoch, k)};
    through = dispatch::expand_units(units, warp, num_warps, through);
    if (__any_sync(kFullWarp, aborted(args.peers))) break;
    end_wave(all, k, wave, num_warps);
  }
  wait_until_written<0>();
}

}  // namespace ep::nodes
