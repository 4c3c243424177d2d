// Combine between nodes, level 1: this rank's partial rows of an owner's tokens, listed.
#pragma once

#include "nodes/combine/lister.cuh"

namespace ep::nodes {
namespace {  // see lister.cuh

// Lists a unit of the wave, and hands it over. False after a fault.
__device__ __noinline__ inline bool Lister::list_unit_of_wave(int32_t unit) {
  const int32_t num_ranks = peers_.num_ranks, num_others = num_ranks - 1;
  const int32_t owner = (peers_.rank + 1 + unit % num_others) % num_ranks;
  const int32_t source = wave_.first_source + owner;
  const int32_t begin = unit / num_others * unit_rows();
  const int32_t end = min(begin + unit_rows(), local_.routing.num_recv[source]);
  if (begin >= end) return true;  // and nobody waits for it
  if (!may_push_ && !wait_for_credits()) return false;
  may_push_ = true;
  const int32_t num_rows = list_unit(local_, source, begin, end, team_.rows());
  if (local_.weights != nullptr) {
    send_weights(local_, source, owner, weights_of_half(), begin, end);
  }
  const int64_t region = region_of(peers_.rank, owner, num_ranks);
  auto* const rows =
      in_memory_of<uint4>(peers_, owner, local_.row_offset + wave_.half() * args_.row_half);
  Done done;
  done.kind = Done::kUnit;
  done.wave = wave_;
  done.owner = owner;
  done.first_chunk = begin / local_.chunk_rows;
  done.num_chunks = ceil_div(end - begin, local_.chunk_rows);
  hand_over(rows + (region * local_.max_tokens + begin) * vectors_, num_rows, done);
  return true;
}

}  // namespace
}  // namespace ep::nodes
