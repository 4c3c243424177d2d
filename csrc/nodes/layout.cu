// ep_nodes_layout(): where everything stands in the memory of a buffer between nodes. Host code.

#include <climits>

#include "common/cut.cuh"
#include "common/launch.cuh"
#include "dispatch/slots.cuh"
#include "low_latency/memory.cuh"
#include "nodes/nodes.cuh"

namespace {

using namespace ep;

int32_t check_sizes(const ep_nodes_layout_args& args) {
  const int32_t status = nodes::check_group(args.num_nodes, args.ranks_per_node);
  if (status != EP_OK) return status;
  return check_buffer_sizes(args);
}

// Where messages of low-latency operations stand, of which there are two of each kind.
void cut_low_latency(const ep_nodes_layout_args& args, Cut* network, ep_nodes_offsets* offsets) {
  const int64_t room = args.low_latency_tokens;
  const int64_t ranks = args.num_nodes * args.ranks_per_node;
  const int64_t places = room == 0 ? 0 : 2 * ranks;
  const int64_t weight_words = low_latency::weight_words(args.num_topk);
  const int64_t entry_words = low_latency::expert_words(args.num_topk) + weight_words;
  offsets->low_latency_head_region[0] = round_up(16 * (1 + room * entry_words), Cut::kAlignment);
  offsets->low_latency_head_region[1] = round_up(16 * (1 + room * weight_words), Cut::kAlignment);
  offsets->low_latency_row_region = round_up(room * 2 * args.hidden, Cut::kAlignment);
  offsets->low_latency_credits = network->take<uint64_t>(2 * places);
  offsets->low_latency_head_flags = network->take<uint64_t>(2 * places);
  offsets->low_latency_row_flags = network->take<uint64_t>(2 * places * EP_LOW_LATENCY_CHUNKS);
  for (int kind = 0; kind < 2; ++kind) {
    const int64_t heads = places * offsets->low_latency_head_region[kind];
    const int64_t rows = places * offsets->low_latency_row_region;
    offsets->low_latency_heads_to_send[kind] = network->take<uint8_t>(heads);
    offsets->low_latency_heads_received[kind] = network->take<uint8_t>(heads);
    offsets->low_latency_rows_to_send[kind] = network->take<uint8_t>(rows);
    offsets->low_latency_rows_received[kind] = network->take<uint8_t>(rows);
  }
}

}  // namespace

namespace ep::nodes {

int32_t check_group(int32_t num_nodes, int32_t ranks_per_node) {
  if (ranks_per_node < 1 || ranks_per_node > EP_MAX_PEERS) {
    return fail(EP_ERR_ARGUMENT, "ranks_per_node = %d is not in [1, %d]", ranks_per_node,
                EP_MAX_PEERS);
  }
  if (num_nodes < 1 || num_nodes > EP_MAX_NODES || num_nodes * ranks_per_node > EP_MAX_NODE_RANKS) {
    return fail(EP_ERR_ARGUMENT, "%d nodes of %d ranks: at most %d nodes and %d ranks", num_nodes,
                ranks_per_node, EP_MAX_NODES, EP_MAX_NODE_RANKS);
  }
  return EP_OK;
}

}  // namespace ep::nodes

int32_t ep_nodes_layout(const ep_nodes_layout_args* args, ep_nodes_offsets* offsets) {
  const int32_t status = check_sizes(*args);
  if (status != EP_OK) return status;
  const int64_t locals = args->ranks_per_node, nodes = args->num_nodes, ranks = locals * nodes;
  const int64_t others = locals - 1, far = nodes - 1;
  const int64_t tokens = args->max_tokens, entries = tokens * args->num_topk;
  const int64_t chunks = ceil_div<int64_t>(tokens, EP_MIN_CHUNK_TOKENS);
  const int64_t slots = tokens * longest_slot(args->row_bytes, args->num_topk);
  const int64_t rows = round_up(tokens * args->row_bytes, Cut::kAlignment);
  const int64_t plan_ints =
      nodes::kRelayHeaderInts +
      tokens * nodes::entry_ints(static_cast<int32_t>(locals), args->num_topk);
  offsets->dispatch_slots_half = round_up(others * slots, Cut::kAlignment);
  offsets->combine_rows_half = round_up(others * tokens * args->row_bytes, Cut::kAlignment);
  offsets->plan_region = round_up(4 * plan_ints, Cut::kAlignment);
  offsets->dispatch_region = round_up(slots, Cut::kAlignment);
  offsets->combine_region = rows;
  offsets->weights_region = round_up(4 * entries, Cut::kAlignment);

  Cut cut;
  offsets->farewells = cut.take<int32_t>(ranks);
  offsets->plan_flags = cut.take<uint32_t>(ranks);
  offsets->dispatch_credits = cut.take<uint32_t>(locals);
  offsets->combine_credits = cut.take<uint32_t>(locals);
  offsets->plan_headers = cut.take<int32_t>(ranks * plan::kHeaderInts);
  offsets->dispatch_flags = cut.take<uint64_t>(2 * locals * chunks);
  offsets->combine_flags = cut.take<uint32_t>(2 * locals * chunks);
  offsets->plan_idx = cut.take<int32_t>(ranks * entries);
  offsets->combine_weights = cut.take<float>(2 * locals * entries);
  offsets->dispatch_slots = cut.take<uint8_t>(2 * offsets->dispatch_slots_half);
  offsets->combine_rows = cut.take<uint8_t>(2 * offsets->combine_rows_half);
  offsets->zeros = cut.take<uint8_t>(args->row_bytes);
  offsets->total = cut.end();

  Cut network;
  offsets->network_credits = network.take<uint64_t>(2 * far);
  offsets->network_greetings = network.take<uint64_t>(ranks);
  offsets->network_plan_flags = network.take<uint64_t>(far);
  offsets->network_dispatch_flags = network.take<uint64_t>(far * EP_MAX_NETWORK_CHUNKS);
  offsets->network_combine_flags = network.take<uint64_t>(far * EP_MAX_NETWORK_CHUNKS);
  offsets->network_weight_flags = network.take<uint64_t>(far * EP_MAX_NETWORK_CHUNKS);
  offsets->plan_to_send = network.take<uint8_t>(far * offsets->plan_region);
  offsets->plan_received = network.take<uint8_t>(far * offsets->plan_region);
  offsets->dispatch_to_send = network.take<uint8_t>(far * offsets->dispatch_region);
  offsets->dispatch_received = network.take<uint8_t>(far * offsets->dispatch_region);
  offsets->combine_to_send = network.take<uint8_t>(far * offsets->combine_region);
  offsets->combine_received = network.take<uint8_t>(far * offsets->combine_region);
  offsets->weights_to_send = network.take<uint8_t>(far * offsets->weights_region);
  offsets->weights_received = network.take<uint8_t>(far * offsets->weights_region);
  cut_low_latency(*args, &network, offsets);
  offsets->network_total = network.end();
  offsets->max_chunks = static_cast<int32_t>(chunks);
  offsets->network_chunk_rows = static_cast<int32_t>(round_up<int64_t>(
      ceil_div<int64_t>(tokens, EP_MAX_NETWORK_CHUNKS), dispatch::kMaxChunkTokens));
  return EP_OK;
}
