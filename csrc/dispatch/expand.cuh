// Expanding: a warp takes (chunk, source) units whose flags are there, and copies each row from its
// slot to its output rows; lane k issues the store for the token's k-th expert. Rows that stay on
// this rank are read from the input, without a slot, while no others have come. FP8 rows that are
// to be BF16 or FP32 are converted once, into shared memory, and copied from there.
#pragma once

#include "common/vectors.cuh"
#include "dispatch/slots.cuh"
#include "routing/entries.cuh"

namespace ep::dispatch {

// Scale b of an expert-major row stands at first + b * step.
struct ScalePlace {
  int64_t first = 0;
  int64_t step = 0;
};

// Where the scales of output row `row` stand, a row of local expert e.
__device__ inline ScalePlace place_of_scales(const ep_dispatch_args& args, int32_t e, int32_t row) {
  const int32_t begin = args.routing.expert_first_row[e];
  const int32_t end = args.routing.expert_first_row[e + 1];
  return {static_cast<int64_t>(begin) * (args.scale_bytes / 4) + (row - begin), end - begin};
}

// Writes entry k of an output row's local experts.
__device__ inline void write_expert(const ep_dispatch_args& args, int32_t row, int32_t k,
                                    int32_t expert) {
  const int64_t place = static_cast<int64_t>(row) * args.routing.num_topk + k;
  if (args.recv_idx_bytes == 8) {
    static_cast<int64_t*>(args.recv_topk_idx)[place] = expert;
  } else {
    static_cast<int32_t*>(args.recv_topk_idx)[place] = expert;
  }
}

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
// behind all groups.
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

// Writes the row in `stage` times its scales to `out`, in shared memory: one product and one
// rounding an element.
template <typename Out>
__device__ inline void convert(const ep_dispatch_args& args, const uint8_t* stage, Out* out) {
  constexpr int kElements = kPerVector<Out>;
  const auto* const scales = reinterpret_cast<const float*>(stage + args.row_bytes);
  for (int32_t i = lane_id(); i < args.row_bytes / kElements; i += kWarpSize) {
    const float scale = scales[i * kElements / kScaleBlock];
    float values[kElements];
    const auto* const pairs = reinterpret_cast<const uint16_t*>(stage) + i * kElements / 2;
#pragma unroll
    for (int j = 0; j < kElements / 2; ++j) {
      const float2 pair = unpack_fp8_pair(pairs[j]);
      values[2 * j] = pair.x * scale;
      values[2 * j + 1] = pair.y * scale;
    }
    reinterpret_cast<uint4*>(out)[i] = pack<Out>(values);
  }
}

// A run of received rows: bit j of `rows` says that there is a row j. Rows from other ranks stand
// in slots first + j; rows of this rank are tokens first + j.
struct Unit {
  int32_t source = 0;
  int32_t first = 0;
  uint32_t rows = 0;
  int32_t first_of_source = 0;  // the received row in the source's slot 0
  uint32_t came = 0;            // dense rows (dispatch/dense.cuh): what `rows` was at first
};

// How a warp that expands moves a row from a stage to where it belongs. All its lanes call a step
// together, but for load_entry().
struct Placement {
  const ep_dispatch_args& args;
  const Stages& stages;
  const int32_t* const entries;  // of the routing, see ep_routing
  const int32_t epoch;           // of the operation
  const int32_t wave;            // what flags are stamped with: on one node the same
  const int32_t num_ranks = args.peers.num_ranks, chunk_tokens = args.chunk_tokens;
  const int32_t bytes = slot_bytes(args), out_bytes = out_row_bytes(args);
  const int64_t stride = slot_stride(args);
  const bool needs_experts = args.routing.expert_major
                                 ? args.recv_scales != nullptr
                                 : args.recv_topk_idx != nullptr || args.recv_weights != nullptr;
  // Behind a row in its stage: its output rows and, where they are asked for, its experts.
  const int32_t index_bytes = args.routing.num_topk4 * 4;
  const int32_t rows_offset = bytes, experts_offset = rows_offset + index_bytes;
  const int32_t indices_bytes = needs_experts ? 2 * index_bytes : index_bytes;

  // Opens the unit whose rows a peer has flagged, see open(). `peer` is its number for waits; lane
  // 0 asks flag_at() where the flag stands.
  template <typename FlagAt>
  __device__ bool open_flagged(const FlagAt& flag_at, int32_t peer, bool block, Unit* unit) const {
    const ep_peers& peers = args.peers;
    uint64_t flag = 0;
    bool arrived = true;
    if (lane_id() == 0) {
      const uint64_t* const chunk_flag = flag_at();
      const uint32_t stamp = chunk_stamp(wave, args.tag);
      const auto is_of_this_epoch = [stamp](uint64_t value) {
        return flag_stamp(value) >> 8 == stamp >> 8;
      };
      if (block) {
        arrived = wait_flag(peers, chunk_flag, is_of_this_epoch, &flag, EP_PHASE_ROWS, peer, epoch);
      } else {
        flag = ptx::load_acquire_sys(chunk_flag);
        arrived = is_of_this_epoch(flag);
      }
      if (arrived && !same_call(peers, stamp, flag_stamp(flag), peer)) arrived = false;
      if (arrived) fence_for_bulk();  // the rows are read by bulk loads
    }
    if (!__shfl_sync(kFullWarp, arrived, 0)) return false;
    flag = __shfl_sync(kFullWarp, flag, 0);
    unit->first = flag_first(flag);
    const int32_t count = flag_count(flag);
    unit->rows = count == 0 ? 0 : 0xffffffffu >> (32 - count);
    return true;
  }

  // Lane 0 starts to load the entry of received row n behind the row in stage i, which announces
  // its bytes.
  __device__ void load_entry(int32_t i, int32_t n) const {
    static_assert(kLocalExperts == kRowOfK + 1, "the experts stand behind the output rows");
    stages.load(i, rows_offset, entries + place_in_entries(args.routing, n, kRowOfK),
                indices_bytes);
  }

  // Waits for the row in stage i and writes it to all of its output rows: lane k to that of its
  // k-th expert.
  __device__ void store(int32_t i) const {
    const int32_t lane = lane_id(), num_topk = args.routing.num_topk;
    const uint8_t* const stage = stages.stage(i);
    const auto* const rows = reinterpret_cast<const int32_t*>(stage + rows_offset);
    const auto* const experts = reinterpret_cast<const int32_t*>(stage + experts_offset);
    const auto* const weights =
        reinterpret_cast<const float*>(stage + args.row_bytes + args.scale_bytes);
    stages.wait(i);
    const int32_t row = lane < num_topk ? rows[lane] : -1;
    const int32_t expert = needs_experts && lane < num_topk ? experts[lane] : -1;
    const uint8_t* const out = row_to_give_out(stage);
    if (row >= 0) {
      store_bulk(args.recv_x + static_cast<int64_t>(row) * out_bytes, out, out_bytes);
    }
    if (args.recv_scales != nullptr) store_scales(stage, row, expert);
    end_group();
    store_probabilities(weights, rows, row, expert);
  }

  // The row as the caller wants it, in shared memory.
  __device__ const uint8_t* row_to_give_out(const uint8_t* stage) const {
    if (args.recv_kind == EP_RECV_BYTES) return stage;
    stages.begin_conversion();
    if (args.recv_kind == EP_RECV_BF16) {
      convert(args, stage, reinterpret_cast<__nv_bfloat16*>(stages.converted()));
    } else {
      convert(args, stage, reinterpret_cast<float*>(stages.converted()));
    }
    stages.end_conversion();
    return stages.converted();
  }

  // Writes the scales of the row in `stage` for lane k's output row, which is `expert`'s.
  __device__ void store_scales(const uint8_t* stage, int32_t row, int32_t expert) const {
    const uint8_t* const scales = stage + args.row_bytes;
    if (!args.routing.expert_major) {
      if (row >= 0) {
        store_bulk(reinterpret_cast<uint8_t*>(args.recv_scales) +
                       static_cast<int64_t>(row) * args.scale_bytes,
                   scales, args.scale_bytes);
      }
      return;
    }
    // Scales of an expert-major row stand apart: all lanes write those of one output row at a time.
    ScalePlace place;
    if (row >= 0) place = place_of_scales(args, expert, row);
    for (uint32_t left = __ballot_sync(kFullWarp, row >= 0); left != 0; left &= left - 1) {
      const int32_t k = __ffs(left) - 1;
      const int64_t first = __shfl_sync(kFullWarp, place.first, k);
      const int64_t step = __shfl_sync(kFullWarp, place.step, k);
      for (int32_t b = lane_id(); b < args.scale_bytes / 4; b += kWarpSize) {
        args.recv_scales[first + b * step] = reinterpret_cast<const float*>(scales)[b];
      }
    }
  }

  // Writes the row's probabilities, and the experts of a rank-major row.
  __device__ void store_probabilities(const float* weights, const int32_t* rows, int32_t row,
                                      int32_t expert) const {
    const int32_t lane = lane_id(), num_topk = args.routing.num_topk;
    if (args.routing.expert_major) {
      if (args.recv_weights != nullptr && row >= 0) args.recv_weights[row] = weights[lane];
      return;
    }
    if (lane >= num_topk || rows[0] < 0) return;
    if (args.recv_topk_idx != nullptr) write_expert(args, rows[0], lane, expert);
    if (args.recv_weights != nullptr) {
      args.recv_weights[static_cast<int64_t>(rows[0]) * num_topk + lane] =
          expert >= 0 ? weights[lane] : 0.0f;
    }
  }
};

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

  // Lane 0 starts to load row j of the unit into stage i, and its entry behind it.
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
