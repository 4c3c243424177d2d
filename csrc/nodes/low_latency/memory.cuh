// Low latency between nodes: where the messages of an operation stand. Every rank is a node of its
// own here: what the network calls the node k after is the rank k after.
#pragma once

#include "low_latency/bitmaps.cuh"
#include "low_latency/memory.cuh"
#include "network/network.cuh"

namespace ep::low_latency::far {

using network::Flag;

constexpr int kWarps = 16;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kMaxShared = 200 * 1024;
constexpr int kLeastChunkRows = 8;  // fewer are not worth a message

// The network memory of this rank, and how to send to that of others. Rows to one rank, and from
// one, stand by their place among them. Sources and destinations are ranks, or their distance k:
// so many ranks after this one, none for itself.
class Memory {
 public:
  const ep_low_latency& common;
  const ep_nodes_low_latency& nodes;

  __device__ Memory(const ep_low_latency& arguments, const ep_nodes_low_latency& places)
      : common(arguments), nodes(places) {}

  __device__ int32_t num_ranks() const { return nodes.network.num_nodes; }
  __device__ int32_t rank() const { return nodes.network.node; }
  __device__ int32_t rank_after(int32_t k) const {
    const int32_t r = rank() + k;
    return r < num_ranks() ? r : r - num_ranks();
  }
  __device__ int32_t rank_before(int32_t k) const {
    const int32_t r = rank() - k;
    return r >= 0 ? r : r + num_ranks();
  }
  // Number of a rank among the peers of an operation between nodes.
  __device__ int32_t peer_of(int32_t r) const {
    const int32_t size = nodes.ranks_per_node, num_nodes = num_ranks() / size;
    const int32_t before = (rank() / size - r / size + num_nodes) % num_nodes;
    return before * size + r % size;
  }

  // Rows of a chunk; the last one may have fewer.
  __device__ int32_t chunk_rows() const {
    return max(kLeastChunkRows, ceil_div(common.max_tokens, EP_LOW_LATENCY_CHUNKS));
  }

  // ---- Of this rank, written by others ----

  __device__ const Flag* credit(int32_t half, int32_t r) const {
    return flags(nodes.credit_offset) + half * num_ranks() + r;
  }
  __device__ const Flag* head_flag(int32_t half, int32_t source) const {
    return flags(nodes.head_flag_offset) + half * num_ranks() + source;
  }
  __device__ const Flag* row_flag(int32_t half, int32_t source, int32_t chunk) const {
    return flags(nodes.row_flag_offset) + (half * num_ranks() + source) * EP_LOW_LATENCY_CHUNKS +
           chunk;
  }
  // The header, followed by entries or weights.
  __device__ const uint4* head(int32_t half, int32_t source) const {
    return words(nodes.head_receive_offset + place(half, source) * nodes.head_region);
  }
  __device__ const uint4* rows(int32_t half, int32_t source) const {
    return words(nodes.row_receive_offset + place(half, source) * nodes.row_region);
  }

  // ---- To the rank k after ----

  // Where to write a head, or the rows.
  __device__ uint4* head_to_write(int32_t half, int32_t k) const {
    return to_write(k, nodes.head_send_offset, nodes.head_receive_offset, nodes.head_region, half);
  }
  __device__ uint4* rows_to_write(int32_t half, int32_t k) const {
    return to_write(k, nodes.row_send_offset, nodes.row_receive_offset, nodes.row_region, half);
  }

  // Sends what was written there. All threads of the group, which have met after the writes.
  template <typename Group>
  __device__ void send_head(int32_t half, int32_t k, int64_t num_bytes, Flag value,
                            Group group) const {
    const int64_t from = nodes.head_send_offset + place(half, rank_after(k)) * nodes.head_region;
    const int64_t to = nodes.head_receive_offset + place(half, rank()) * nodes.head_region;
    send(k, from, to, num_bytes, nodes.head_flag_offset + 8 * place(half, rank()), value, group);
  }
  template <typename Group>
  __device__ void send_rows(int32_t half, int32_t k, int32_t chunk, int64_t first_byte,
                            int64_t num_bytes, Flag value, Group group) const {
    const int64_t from = nodes.row_send_offset + place(half, rank_after(k)) * nodes.row_region;
    const int64_t to = nodes.row_receive_offset + place(half, rank()) * nodes.row_region;
    const int64_t flag = place(half, rank()) * EP_LOW_LATENCY_CHUNKS + chunk;
    send(k, from + first_byte, to + first_byte, num_bytes, nodes.row_flag_offset + 8 * flag, value,
         group);
  }
  // One thread.
  __device__ void send_credit(int32_t half, int32_t k, Flag value) const {
    network::raise_far(common.peers, nodes.network, k,
                       nodes.credit_offset + 8 * place(half, rank()), value);
  }

 private:
  __device__ int64_t place(int32_t half, int32_t r) const { return half * num_ranks() + r; }
  __device__ const Flag* flags(int64_t offset) const {
    return reinterpret_cast<const Flag*>(nodes.network.memory + offset);
  }
  __device__ const uint4* words(int64_t offset) const {
    return reinterpret_cast<const uint4*>(nodes.network.memory + offset);
  }

  // Its own rows a rank writes where it receives them.
  __device__ uint4* to_write(int32_t k, int64_t send_offset, int64_t receive_offset, int64_t region,
                             int32_t half) const {
    const int64_t from = send_offset + place(half, rank_after(k)) * region;
    const int64_t to = receive_offset + place(half, rank()) * region;
    uint8_t* const at =
        k == 0 ? nodes.network.memory + to : network::place_to_write(nodes.network, k, from, to);
    return reinterpret_cast<uint4*>(at);
  }

  template <typename Group>
  __device__ void send(int32_t k, int64_t from, int64_t to, int64_t num_bytes, int64_t flag,
                       Flag value, Group group) const {
    if (k != 0) {
      network::put(common.peers, nodes.network, k, from, to, num_bytes, flag, value, group);
    } else if (group.index() == 0) {
      signal(common.peers, reinterpret_cast<Flag*>(nodes.network.memory + flag), value);
    }
  }
};

static_assert(sizeof(Flag) == 8);

}  // namespace ep::low_latency::far
