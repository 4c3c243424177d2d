// Where a received row goes: its entry of a routing, see ep_routing.
#pragma once

#include <cstdint>

#include "ep_comm.h"

namespace ep {

// What an entry says, in the order in which it stands there; K4 numbers each.
enum EntryPart { kRowOfK, kLocalExperts, kRowsAscending, kEntryParts };

// Index among a routing's entries of what that of received row n says.
__device__ inline int64_t place_in_entries(const ep_routing& routing, int32_t n, EntryPart part) {
  const int32_t entry = min(n, routing.last_entry);
  return (static_cast<int64_t>(entry) * kEntryParts + part) * routing.num_topk4;
}

}  // namespace ep
