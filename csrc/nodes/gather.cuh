// Gathering: a block copies the rows of a chunk together in the network memory, and puts it to the
// rail. It waits for the network's credit alone: for no wave.
#pragma once

#include "nodes/rows.cuh"

namespace ep::nodes {

// Copies rows [begin, end) of those for the node k after. `through` rows have been through the
// warp's stages before; returns how many have now.
__device__ inline int32_t gather_rows(const ep_nodes_dispatch_args& args, const Stages& stages,
                                      int32_t k, int32_t begin, int32_t end, int32_t through) {
  const int32_t warp = threadIdx.x / kWarpSize, num_warps = blockDim.x / kWarpSize;
  const int32_t bytes = dispatch::slot_bytes(args.dispatch), lane = lane_id();
  const int32_t count = max(0, ceil_div(end - begin - warp, num_warps));
  const int32_t* const tokens =
      args.nodes.node_tokens + static_cast<int64_t>(k) * args.dispatch.max_tokens;
  const int64_t region = (k - 1) * args.network_region;
  uint8_t* const rows = network::place_to_write(args.network, k, args.network_send_offset + region,
                                                args.network_receive_offset + region);
  const auto row = [&](int32_t i) { return begin + warp + i * num_warps; };
  const auto load = [&](int32_t i) {
    if (lane == 0 && i < count) {
      dispatch::load_own_token(args.dispatch, stages, through + i, tokens[row(i)], 0);
    }
  };
  const int32_t ahead = stages.num_stages - 1;
  for (int32_t i = 0; i < ahead; ++i) load(i);
  for (int32_t i = 0; i < count; ++i) {
    stages.wait(through + i);
    if (lane == 0) {
      store_bulk(rows + static_cast<int64_t>(row(i)) * bytes, stages.stage(through + i), bytes);
    }
    end_group();
    stages.wait_for_room();
    load(i + ahead);
  }
  wait_until_written<0>();
  return through + count;
}

// All warps of a block.
__device__ inline void gather(const ep_nodes_dispatch_args& args, const Stages& stages,
                              int32_t epoch, int32_t block, int32_t num_blocks) {
  const ep_peers& peers = args.dispatch.peers;
  const ep_network& network = args.network;
  // After a fault elsewhere the counts may be garbage.
  if (__syncthreads_or(aborted(peers))) return;
  int32_t item = 0, through = 0;
  for (int32_t k = 1; k < network.num_nodes; ++k) {
    const int32_t num_rows = args.nodes.num_to_node[node_after(network, k)];
    const int32_t num_chunks = max(1, ceil_div(num_rows, args.network_chunk_rows));
    bool has_credit = false;
    for (int32_t c = 0; c < num_chunks; ++c, ++item) {
      if (item % num_blocks != block) continue;
      if (!has_credit) {
        const bool fine = threadIdx.x != 0 ||
                          wait_for_rail(peers, network, args.network_credit_offset, epoch - 1, k);
        if (!__syncthreads_and(fine)) return;
        has_credit = true;
        fence_for_bulk();  // the rows are written by bulk stores
      }
      const int32_t begin = c * args.network_chunk_rows;
      const int32_t end = min(begin + args.network_chunk_rows, num_rows);
      through = gather_rows(args, stages, k, begin, end, through);
      __syncthreads();
      const int32_t bytes = dispatch::slot_bytes(args.dispatch);
      const int64_t place = (k - 1) * args.network_region + static_cast<int64_t>(begin) * bytes;
      const int64_t flag = (k - 1) * EP_MAX_NETWORK_CHUNKS + c;
      network::put(peers, network, k, args.network_send_offset + place,
                   args.network_receive_offset + place, static_cast<int64_t>(end - begin) * bytes,
                   args.network_flag_offset + flag * int64_t{sizeof(network::Flag)},
                   pack_chunk(chunk_stamp(epoch, args.dispatch.tag), num_rows),
                   network::BlockGroup());
    }
  }
}

}  // namespace ep::nodes
