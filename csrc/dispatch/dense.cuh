// Expanding rows that copy engines have brought: all tokens of a source, in order. Which of them
// came for this rank's experts the plan knows, as bits.
#pragma once

#include "dispatch/expand.cuh"
#include "wire/wire.cuh"

namespace ep::dispatch {

// The units of a launch: tokens [first_token, end_token) of every rank.
struct DenseExpansion : Expansion {
  // The most units of any source.
  __device__ int32_t count_chunks() const {
    int32_t most = 0;
    for (int32_t r = 0; r < num_ranks; ++r) most = max(most, args.routing.source_tokens[r]);
    return ceil_div(max(min(most, args.end_token) - args.first_token, 0), chunk_tokens);
  }

  // As Expansion's.
  __device__ bool open(int32_t unit_index, int32_t ranks_after, bool block, Unit* unit) const {
    unit->source = (args.peers.rank + ranks_after) % num_ranks;
    unit->rows = 0;
    unit->first = args.first_token + unit_index * chunk_tokens;
    const int32_t end = min(args.end_token, args.routing.source_tokens[unit->source]);
    if (unit->first >= end) return true;
    unit->first_of_source = args.routing.first_of_source[unit->source];
    if (unit->source == args.peers.rank) {
      unit->rows = tokens_that_stay(unit->first);
      return true;
    }
    return open_pushed(block, unit);
  }

  __device__ bool open_pushed(bool block, Unit* unit) const {
    const ep_peers& peers = args.peers;
    const int32_t source = unit->source;
    bool landed = true;
    if (lane_id() == 0) {
      const int32_t chunk = wire::kFirstChunk + unit->first / args.wire.chunk_rows;
      const auto has_landed = [&](int32_t flag, int32_t tag) {
        return wire::has_landed(peers, args.wire, source, flag, tag, epoch, block);
      };
      landed = has_landed(wire::kHead, args.tag) && has_landed(chunk, args.rows_tag);
      if (landed) fence_for_bulk();  // the rows are read by bulk loads
    }
    if (!__shfl_sync(kFullWarp, landed, 0)) return false;
    const int32_t words_of_source = ceil_div(args.max_tokens, kWordTokens);
    const int64_t word = static_cast<int64_t>(source) * words_of_source + unit->first / kWordTokens;
    const uint32_t* const bits = args.routing.token_bits + 2 * word;
    const uint32_t came = bits[0];
    const int32_t shift = unit->first % kWordTokens;
    unit->came = unit->rows = came >> shift & 0xffffffffu >> (kWordTokens - chunk_tokens);
    unit->first_of_source += static_cast<int32_t>(bits[1]) + __popc(came & ((1u << shift) - 1));
    return true;
  }

  // As Expansion's. unit.first_of_source is the received row of the unit's first token that came.
  __device__ void load(int32_t i, const Unit& unit, int32_t j) const {
    const ep_peers& peers = args.peers;
    if (unit.source == peers.rank) {
      Expansion::load(i, unit, j);
      return;
    }
    const int64_t t = unit.first + j, most = args.max_tokens;
    const uint8_t* from = peers.memory[peers.rank] + args.slot_offset +
                          region_of(unit.source, peers.rank, num_ranks) * args.region_bytes;
    stages.expect(i, bytes + indices_bytes);
    int32_t offset = 0;
    for (const int32_t part : {args.row_bytes, args.scale_bytes, args.weight_bytes}) {
      if (part == 0) continue;
      stages.load(i, offset, from + t * part, part);
      offset += part;
      from += most * part;
    }
    load_entry(i, unit.first_of_source + __popc(unit.came & ((1u << j) - 1)));
  }

 private:
  static constexpr int32_t kWordTokens = 32;  // of a word of token_bits
};

// The whole of a launch.
__device__ inline void expand_dense(const ep_dispatch_args& args, const Stages& stages,
                                    int32_t epoch, int32_t warp, int32_t num_warps) {
  fence_for_bulk();                                        // output rows are read by bulk loads
  if (__any_sync(kFullWarp, aborted(args.peers))) return;  // the plan may have left no entries
  const bool copies = args.is_planned && args.planned_entries != nullptr;
  if (args.first_token == 0) {
    if (copies) copy_entries(args, warp, num_warps);
    write_padding(args, warp, num_warps);
  }
  const int32_t* const entries = copies ? args.planned_entries : args.routing.entries;
  expand_units(DenseExpansion{{{args, stages, entries, epoch, epoch}}}, warp, num_warps, 0);
  wait_until_written<0>();
}

}  // namespace ep::dispatch
