// The end of an operation between nodes.
#pragma once

#include "nodes/nodes.cuh"

namespace ep::nodes {

// Called by all of an operation's blocks. The last one tells the rail that this rank has read all,
// writes the record, and counts the operation. rows_to(p): rows of row_bytes each that were sent to
// peer p. True in the last block.
template <typename RowsTo>
__device__ inline bool end_operation(const ep_peers& peers, const ep_network& network,
                                     int32_t* counter, int32_t num_blocks, int64_t credit_offset,
                                     const RowsTo& rows_to, int32_t row_bytes) {
  const int32_t epoch = epoch_of(peers);
  const bool last = is_last_block(counter, num_blocks);
  if (!last || aborted(peers)) return last;
  credit_rail(peers, network, credit_offset, epoch);
  const int32_t num_peers = peers.num_ranks * network.num_nodes;
  auto* const record = reinterpret_cast<int64_t*>(peers.record);
  for (int32_t p = threadIdx.x; p < num_peers; p += blockDim.x) {
    const int64_t rows = rows_to(p);
    record[EP_NODES_RECORD_WAITS + p] = peers.longest_wait_ns[p];
    record[EP_NODES_RECORD_WAITS + num_peers + p] = rows;
    peers.longest_wait_ns[p] = 0;
    if (p == peers.rank) continue;
    atomicAdd(reinterpret_cast<unsigned long long*>(peers.wire_bytes),
              static_cast<unsigned long long>(rows * row_bytes));
  }
  if (threadIdx.x == 0) {
    peers.record->epoch = epoch;
    peers.record->end_ns = static_cast<int64_t>(ptx::global_timer_ns());
    *peers.epoch = static_cast<uint32_t>(epoch);
  }
  return true;
}

}  // namespace ep::nodes
