// Where a received row goes: its entry of a routing, see ep_routing.
#pragma once

#include <cstdint>

#include "ep_comm.h"

namespace ep {

// The parts of an entry in their order. Each has K4 numbers.
enum EntryPart { kRowOfK, kLocalExperts, kRowsAscending, kEntryParts };

// Returns the index, in the routing's entries, of a part of received row n's entry.
__device__ inline int64_t place_in_entries(const ep_routing& routing, int32_t n, EntryPart part) {
  const int32_t entry = min(n, routing.last_entry);
  return (static_cast<int64_t>(entry) * kEntryParts + part) * routing.num_topk4;
}

}  // namespace ep
