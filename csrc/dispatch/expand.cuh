// Expanding: a warp takes (chunk, source) units whose flags are there, and copies each row from its
// slot to its output rows (dispatch/placement.cuh). Rows that stay on this rank are read from the
// input, without a slot, while no others have come.
#pragma once

#include "dispatch/placement.cuh"
#include "dispatch/slots.cuh"
#include "routing/entries.cuh"

namespace ep::dispatch {

// Writes a row of zeros, with probability 0 and no expert.
__device__ inline void write_zero_row(const ep_dispatch_args& args, int32_t row) {
  const int32_t lane = lane_id(), row_bytes = out_row_bytes(args);
  auto* const out = reinterpret_cast<uint4*>(args.recv_x + static_cast<int64_t>(row) * row_bytes);
  for (int32_t i = lane; i < row_bytes / 16; i += kWarpSize) out[i] = make_uint4(0, 0, 0, 0);
  const int32_t width = args.routing.expert_major ? 1 : args.routing.num_topk;
  if (lane >= width) return;
  if (args.recv_topk_idx != nullptr) write_expert(args, row, lane, -1);
  if (args.recv_weights != nullptr) {
    args.recv_weights[static_cast<int64_t>(row) * width + lane] = 0.0f;
  }
}

// Writes zeros with scale 1 into the rows between an expert's group and the next, and into those
// after all groups.
__device__ inline void write_padding(const ep_dispatch_args& args, int32_t warp,
                                     int32_t num_warps) {
  const int32_t lane = lane_id(), num_scales = args.scale_bytes / 4;
  if (args.routing.expert_major) {
    for (int32_t e = warp; e < args.num_local_experts; e += num_warps) {
      const int32_t begin = args.routing.expert_first_row[e] + args.routing.expert_tokens[e];
      const int32_t end = args.routing.expert_first_row[e + 1];
      for (int32_t row = begin; row < end; ++row) {
        write_zero_row(args, row);
        if (args.recv_scales == nullptr) continue;
        const ScalePlace place = place_of_scales(args, e, row);
        for (int32_t b = lane; b < num_scales; b += kWarpSize) {
          args.recv_scales[place.first + b * place.step] = 1.0f;
        }
      }
    }
  }
  const int32_t end = args.routing.expert_first_row[args.num_local_experts];
  for (int32_t row = end + warp; row < args.num_rows; row += num_warps) {
    write_zero_row(args, row);
    if (args.recv_scales == nullptr) continue;
    float* const scales = args.recv_scales + static_cast<int64_t>(row) * num_scales;
    for (int32_t b = lane; b < num_scales; b += kWarpSize) scales[b] = 1.0f;
  }
}

// Copies the entries to the routing's own memory, which is as large as what came: the next plan
// writes over where this one left them. Nothing in this kernel reads the copy.
__device__ inline void copy_entries(const ep_dispatch_args& args, int32_t warp, int32_t num_warps) {
  const auto* const __restrict__ from = reinterpret_cast<const uint4*>(args.planned_entries);
  auto* const __restrict__ to = reinterpret_cast<uint4*>(args.routing.entries);
  const int32_t vectors_of_a_row = kEntryParts * args.routing.num_topk4 / 4;
  const int64_t num_vectors = static_cast<int64_t>(args.num_received) * vectors_of_a_row;
  const int64_t step = static_cast<int64_t>(num_warps) * kWarpSize;
#pragma unroll 4
  for (int64_t i = warp * kWarpSize + lane_id(); i < num_vectors; i += step) to[i] = from[i];
}

// What a warp that expands knows of the units of one node.
struct Expansion : Placement {
  // The most chunks of any source.
  __device__ int32_t count_chunks() const {
    int32_t num_chunks = 0;
    for (int32_t r = 0; r < num_ranks; ++r) {
      num_chunks = max(num_chunks, ceil_div(args.routing.source_tokens[r], chunk_tokens));
    }
    return num_chunks;
  }

  // True when the chunk of the rank so many after this one can be read. With `block` it waits until
  // then, and false means a fault.
  __device__ bool open(int32_t chunk, int32_t ranks_after, bool block, Unit* unit) const {
    unit->source = (args.peers.rank + ranks_after) % num_ranks;
    unit->rows = 0;
    unit->first = chunk * chunk_tokens;
    if (unit->first >= args.routing.source_tokens[unit->source]) return true;
    unit->first_of_source = args.routing.first_of_source[unit->source];
    if (unit->source == args.peers.rank) {
      unit->rows = tokens_that_stay(unit->first);
      return true;
    }
    return open_chunk(chunk, block, unit);
  }

  // Bit j says that token first + j of this rank has an expert here.
  __device__ uint32_t tokens_that_stay(int32_t first) const {
    const int32_t t = first + lane_id();
    const bool stays =
        lane_id() < chunk_tokens && t < args.routing.num_tokens &&
        args.routing.send_slot[static_cast<int64_t>(t) * num_ranks + args.peers.rank] >= 0;
    return __ballot_sync(kFullWarp, stays);
  }

  // open() for a chunk that another rank pushes.
  __device__ bool open_chunk(int32_t chunk, bool block, Unit* unit) const {
    const int32_t source = unit->source;
    const auto flag_at = [this, chunk, source] {
      return in_memory_of<uint64_t>(args.peers, args.peers.rank, args.flag_offset) +
             static_cast<int64_t>(source) * args.max_chunks + chunk;
    };
    return open_flagged(flag_at, source, block, unit);
  }

  // Lane 0 starts to load row j of the unit into stage i, followed by its entry.
  __device__ void load(int32_t i, const Unit& unit, int32_t j) const {
    const ep_peers& peers = args.peers;
    int32_t slot = unit.first + j;
    if (unit.source == peers.rank) {
      slot = args.routing.send_slot[static_cast<int64_t>(slot) * num_ranks + peers.rank];
      load_own_token(args, stages, i, unit.first + j, indices_bytes);
    } else {
      const int64_t region = region_of(unit.source, peers.rank, num_ranks);
      stages.expect(i, bytes + indices_bytes);
      stages.load(
          i, 0,
          peers.memory[peers.rank] + args.slot_offset + (region * args.max_tokens + slot) * stride,
          bytes);
    }
    load_entry(i, unit.first_of_source + slot);
  }
};

// The units that a warp has not opened yet. All warps have as many of this rank's as of the
// others': else those with this rank's would be done while the others still wait for rows. Where
// they do not come out even, the first warps have one more of the others', the last ones one of
// this rank's.
template <typename Units>
struct Remaining {
  const Units& units;
  const int32_t num_warps, num_chunks;
  int32_t own, from_others;  // by chunk, and by chunk and source

  __device__ Remaining(const Units& units, int32_t warp, int32_t num_warps)
      : units(units),
        num_warps(num_warps),
        num_chunks(units.count_chunks()),
        own(num_warps - 1 - warp),
        from_others(warp) {}

  __device__ int32_t num_others() const { return units.num_ranks - 1; }
  __device__ bool has_own() const { return own < num_chunks; }
  __device__ bool has_from_others() const { return from_others < num_chunks * num_others(); }

  // Opens the next unit that can be read: one of the others' rather than an own one, which need not
  // be waited for. With `block` it waits until there is one, and false means a fault.
  __device__ bool open_next(bool block, Unit* unit) {
    if (has_from_others()) {
      const int32_t chunk = from_others / num_others(), other = from_others % num_others();
      if (units.open(chunk, 1 + other, block && !has_own(), unit)) {
        from_others += num_warps;
        return true;
      }
    }
    if (!has_own() || !units.open(own, 0, block, unit)) return false;
    own += num_warps;
    return true;
  }
};

// Moves the units of a warp. `first` rows have been through its stages before; returns how many
// have now.
template <typename Units>
__device__ inline int32_t expand_units(const Units& units, int32_t warp, int32_t num_warps,
                                       int32_t first) {
  const Stages& stages = units.stages;
  Remaining<Units> remaining(units, warp, num_warps);
  Unit unit;
  int32_t loaded = first, stored = first;
  bool fine = true;
  while (true) {
    // One stage stays free: the one whose stores may still be reading.
    while (loaded - stored < stages.num_stages - 1) {
      if (unit.rows == 0) {
        if (!fine || !(remaining.has_own() || remaining.has_from_others())) break;
        const bool nothing_else_to_do = loaded == stored;
        if (!remaining.open_next(nothing_else_to_do, &unit)) {
          unit.rows = 0;
          fine = !nothing_else_to_do;
          break;
        }
        continue;
      }
      const int32_t j = __ffs(unit.rows) - 1;
      unit.rows &= unit.rows - 1;
      stages.wait_for_room();
      if (lane_id() == 0) units.load(loaded, unit, j);
      ++loaded;
    }
    if (loaded == stored) break;  // nothing left, or a fault
    units.store(stored++);
  }
  return stored;
}

__device__ inline void expand(const ep_dispatch_args& args, const Stages& stages, int32_t epoch,
                              int32_t warp, int32_t num_warps) {
  ptx::wait_for_kernel_before();  // is_behind_plan: the plan's second one
  fence_for_bulk();               // output rows are read by bulk loads
  // After a fault in the plan there are no entries. The host launches this without having waited
  // for the plan, where the caller gave the number of rows.
  if (__any_sync(kFullWarp, aborted(args.peers))) return;
  const bool copies = args.is_planned && args.planned_entries != nullptr;
  if (copies) copy_entries(args, warp, num_warps);
  const int32_t* const entries = copies ? args.planned_entries : args.routing.entries;
  write_padding(args, warp, num_warps);

  expand_units(Expansion{{args, stages, entries, epoch, epoch}}, warp, num_warps, 0);
  wait_until_written<0>();
}

}  // namespace ep::dispatch
