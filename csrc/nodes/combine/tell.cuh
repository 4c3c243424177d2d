// Combine between nodes: telling what the team has done. That is flags of partial rows, chunks to
// the network, credits of waves.
#pragma once

#include "nodes/combine/lister.cuh"

namespace ep::nodes {
namespace {  // see lister.cuh

// Flags a unit's chunks in their owner's memory.
__device__ inline void Lister::raise(const Done& unit) const {
  if (lane_id() >= unit.num_chunks) return;
  uint32_t* const flags = partial_flags(unit.owner, unit.wave.half(), peers_.rank);
  signal(peers_, &flags[unit.first_chunk + lane_id()], chunk_stamp(unit.wave.number, local_.tag));
}

// Puts chunk c of wave j to the owner of its tokens.
__device__ inline void Lister::send_chunk(int32_t j, int32_t c, int32_t rows) const {
  const int64_t first = static_cast<int64_t>(c) * args_.network_chunk_rows;
  const int64_t flag = (j * EP_MAX_NETWORK_CHUNKS + c) * int64_t{sizeof(network::Flag)};
  const network::Flag stamp = pack_chunk(chunk_stamp(epoch_, local_.tag), rows);
  const auto put = [&](int64_t from, int64_t to, int64_t region, int64_t row_bytes, int64_t flags) {
    const int64_t place = j * region + first * row_bytes;
    network::put(peers_, args_.network, j + 1, from + place, to + place, rows * row_bytes,
                 flags + flag, stamp, network::WarpGroup());
  };
  if (args_.has_weights) {
    put(args_.weight_send_offset, args_.weight_receive_offset, args_.weight_region,
        local_.routing.num_topk * int64_t{sizeof(float)}, args_.weight_flag_offset);
  }
  put(args_.network_send_offset, args_.network_receive_offset, args_.network_region,
      local_.row_bytes, args_.network_flag_offset);
}

// A group's sums have been written. The last of a chunk sends it. The last of the wave gives the
// credit: all that the ranks of this node have sent in it, and before it, has been read. A wave may
// be done before an earlier one. So its credit waits for two arrivals, its groups and the credit of
// the wave before; that of wave 0 for one.
__device__ __noinline__ inline void Lister::end_group_of(const Wave& wave, int32_t group) const {
  if (wave.j < num_nodes_ - 1) {
    const int32_t chunk_rows = args_.network_chunk_rows;
    const int32_t c = group * kGroupTokens / chunk_rows;
    const int32_t rows = min(chunk_rows, wave.num_tokens - c * chunk_rows);
    const int32_t num_groups = max(1, ceil_div(rows, kGroupTokens));
    int32_t* const counters = local_.counters + kGroupsDone + num_nodes_;
    if (is_last_arrival(&counters[wave.j * EP_MAX_NETWORK_CHUNKS + c], num_groups)) {
      send_chunk(wave.j, c, rows);
    }
  }
  int32_t* const waves = local_.counters + kGroupsDone;
  int32_t* const credits = waves + num_nodes_ * (1 + EP_MAX_NETWORK_CHUNKS);
  if (!is_last_arrival(&waves[wave.j], wave.num_groups)) return;
  for (int32_t j = wave.j; j < num_nodes_ && is_last_arrival(&credits[j], j == 0 ? 1 : 2); ++j) {
    credit_wave(peers_, local_.credit_offset, wave_number(epoch_, num_nodes_, j), lane_id());
  }
}

// Hands the next list over. The one before has been written then, and that is told.
__device__ inline void Lister::hand_over(uint4* out, int32_t num_rows, const Done& next) {
  team_.hand_over(out, num_rows);
  const Done done = done_;
  done_ = next;
  if (done.kind == Done::kUnit) raise(done);
  if (done.kind == Done::kGroup) end_group_of(done.wave, done.group);
}

// Has the team finish, and tells what it has done. Before every wait.
__device__ inline void Lister::flush() {
  if (done_.kind != Done::kNothing) hand_over(nullptr, 0, Done());
}

}  // namespace
}  // namespace ep::nodes
