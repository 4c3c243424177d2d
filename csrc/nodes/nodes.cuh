// What the kernels between nodes know: numbers of peers, relay entries, waves.
#pragma once

#include "network/network.cuh"
#include "plan/plan.cuh"

namespace ep::nodes {

// Refuses groups that the kernels cannot serve. Host code.
int32_t check_group(int32_t num_nodes, int32_t ranks_per_node);

// The node k after this one.
__device__ inline int32_t node_after(const ep_network& network, int32_t k) {
  return (network.node + k) % network.num_nodes;
}
// How far another node is before this one.
__device__ inline int32_t distance_before(const ep_network& network, int32_t node) {
  return (network.node - node + network.num_nodes) % network.num_nodes;
}

// Number of the rank (k, l) among the peers.
__device__ inline int32_t peer_number(const ep_peers& peers, int32_t k, int32_t l) {
  return k * peers.num_ranks + l;
}

// ---- Waves -------------------------------------------------------------------------------------

// Number of wave k of the operation `epoch`. Epochs wrap around, and so do these.
__device__ inline int32_t wave_number(int32_t epoch, int32_t num_nodes, int32_t k) {
  return static_cast<int32_t>((static_cast<uint32_t>(epoch) - 1) * num_nodes + k + 1);
}
// Which half of the staging memory a wave uses.
__device__ inline int32_t half_of(int32_t wave) { return wave & 1; }

// Waits until local rank l has read a wave, for the operation `epoch`.
__device__ inline bool wait_for_wave(const ep_peers& peers, int64_t credit_offset, int32_t wave,
                                     int32_t epoch, int32_t l) {
  const auto has_read = [wave](uint32_t value) {
    return static_cast<int32_t>(value - static_cast<uint32_t>(wave)) >= 0;
  };
  const uint32_t* const credit = in_memory_of<uint32_t>(peers, peers.rank, credit_offset) + l;
  uint32_t seen;
  return wait_flag(peers, credit, has_read, &seen, EP_PHASE_CREDIT, l, epoch - 1);
}
// Tells the ranks of this node that this one has read a wave: `thread` numbers the callers, which
// are a warp or more.
__device__ inline void credit_wave(const ep_peers& peers, int64_t credit_offset, int32_t wave,
                                   int32_t thread) {
  if (thread >= peers.num_ranks || aborted(peers)) return;
  signal(peers, in_memory_of<uint32_t>(peers, thread, credit_offset) + peers.rank,
         static_cast<uint32_t>(wave));
}

// By a warp: adds one to a counter. True in all lanes where that makes it `all`: then they see all
// that the others did before they added, and the counter is zero again.
__device__ inline bool is_last_arrival(int32_t* counter, int32_t all) {
  bool last = false;
  __syncwarp();
  if (lane_id() == 0) {
    ptx::fence_acq_rel_sys();
    last = atomicAdd(counter, 1) == all - 1;
    if (last) *counter = 0;
    ptx::fence_acq_rel_sys();
  }
  __syncwarp();  // what one lane has seen, all have: they send and give credits
  return __shfl_sync(kFullWarp, last, 0);
}

// ---- The rail ----------------------------------------------------------------------------------

__device__ inline network::Flag* own_flags(const ep_network& network, int64_t offset) {
  return reinterpret_cast<network::Flag*>(network.memory + offset);
}

// Waits until the rank on the node k after has read all of the operation `epoch`.
__device__ inline bool wait_for_rail(const ep_peers& peers, const ep_network& network,
                                     int64_t credit_offset, int32_t epoch, int32_t k) {
  const auto has_read = [epoch](network::Flag value) {
    return static_cast<int32_t>(static_cast<uint32_t>(value) - static_cast<uint32_t>(epoch)) >= 0;
  };
  network::Flag seen;
  return wait_flag(peers, own_flags(network, credit_offset) + k - 1, has_read, &seen,
                   EP_PHASE_CREDIT, peer_number(peers, network.num_nodes - k, peers.rank), epoch);
}

// One thread waits for the plan's message of the node k before, whose flag is one of those at
// `flag_offset`.
__device__ inline bool wait_for_message(const ep_peers& peers, const ep_network& network,
                                        int64_t flag_offset, int32_t epoch, int32_t k) {
  const auto is_there = [epoch](network::Flag value) {
    return static_cast<int32_t>(static_cast<uint32_t>(value) - static_cast<uint32_t>(epoch)) >= 0;
  };
  const network::Flag* const flag = own_flags(network, flag_offset) + k - 1;
  network::Flag seen;
  const bool fine = wait_flag(peers, flag, is_there, &seen, EP_PHASE_PLAN,
                              peer_number(peers, k, peers.rank), epoch);
  if (fine) network::after_wait(flag, seen);
  return fine;
}

// Tells the rail that this rank has read all of the operation `epoch`. All threads of a block; the
// rank k before this one is N - k after it, and keeps our credit as that of the node k after.
__device__ inline void credit_rail(const ep_peers& peers, const ep_network& network,
                                   int64_t credit_offset, int32_t epoch) {
  for (int32_t k = 1 + static_cast<int32_t>(threadIdx.x); k < network.num_nodes; k += blockDim.x) {
    network::raise_far(peers, network, network.num_nodes - k,
                       credit_offset + (k - 1) * int64_t{sizeof(network::Flag)},
                       static_cast<uint32_t>(epoch));
  }
}

// The flag of a chunk of rows: stamp | rows in all.
__device__ inline network::Flag pack_chunk(uint32_t stamp, int32_t num_rows) {
  return static_cast<network::Flag>(stamp) << 32 | static_cast<uint32_t>(num_rows);
}
__device__ inline int32_t rows_in_all(network::Flag flag) {
  return static_cast<int32_t>(flag & 0x7fffffffu);
}

// ---- Relay entries -----------------------------------------------------------------------------

// A plan's message: a header of this many int32, then relay entries. The header is that of a plan
// on one node (rows in all instead of rows to one rank), then rows for each rank of the node.
constexpr int kRelayHeaderInts = 16;
constexpr int kRowsPushed = 2 + EP_NUM_FIELDS;  // of a local header: rows that come in chunks
constexpr int kRowsOfRank = 2 + EP_NUM_FIELDS;  // of the message's: [L]
static_assert(kRowsOfRank + EP_MAX_PEERS <= kRelayHeaderInts, "a header has room for all ranks");
static_assert(kRowsPushed < plan::kHeaderInts, "a header has room for the rows pushed");

// int32 of a row's entry: its slots at the L ranks, then its K experts within the node, or -1.
__host__ __device__ inline int32_t entry_ints(int32_t num_local_ranks, int32_t num_topk) {
  return num_local_ranks + num_topk;
}

}  // namespace ep::nodes
