// Combine between nodes: gradients of probabilities, added up as rows are.
#pragma once

#include "nodes/combine/lister.cuh"

namespace ep::nodes {
namespace {  // see lister.cuh

// That of entry `which` of a row with slot `slot` at local rank l, of the owner with our number.
__device__ inline float Lister::weight_on_node(int32_t l, int32_t slot, int32_t which) const {
  if (l == peers_.rank) {
    const int32_t first = local_.routing.first_of_source[wave_.first_source + peers_.rank];
    return weight_of(local_, first + slot, which);
  }
  // Other GPUs wrote it while this kernel ran.
  const volatile float* const staged = in_memory_of<float>(peers_, peers_.rank, weights_of_half());
  return staged[(static_cast<int64_t>(l) * local_.max_tokens + slot) * local_.routing.num_topk +
                which];
}

// What another node has sent of a token.
__device__ inline float Lister::weight_from_node(int32_t node, int32_t t, int32_t which) const {
  const int32_t k = distance_before(args_.network, node);
  const auto* const received = reinterpret_cast<const volatile float*>(
      args_.network.memory + args_.weight_receive_offset + (k - 1) * args_.weight_region);
  const int32_t slot = args_.nodes.node_slot[static_cast<int64_t>(t) * num_nodes_ + node];
  return received[static_cast<int64_t>(slot) * local_.routing.num_topk + which];
}

// Adds entry `which` of the rows of a token that the ranks of this node have.
template <typename SlotOf>
__device__ inline void Lister::add_on_node(WeightSum* sum, const SlotOf& slot_at,
                                           int32_t which) const {
#pragma unroll 1
  for (int32_t l = 0; l < peers_.num_ranks; ++l) {
    const int32_t slot = slot_at(l);
    if (slot >= 0) sum->add(weight_on_node(l, slot, which));
  }
  sum->end_node();
}

// Adds entry `which` of an own token on all nodes.
__device__ inline void Lister::add_on_all_nodes(WeightSum* sum, int32_t t, int32_t which) const {
#pragma unroll 1
  for (int32_t node = 0; node < num_nodes_; ++node) {
    if (node == args_.network.node) {
      add_on_node(sum, [&](int32_t l) { return slot_of(t, l); }, which);
    } else if (args_.nodes.node_slot[static_cast<int64_t>(t) * num_nodes_ + node] >= 0) {
      sum->add(weight_from_node(node, t, which));
      sum->end_node();
    }
  }
}

// Of tokens [begin, end) of another node's rank: to the network memory.
__device__ inline void Lister::relay_weights(int32_t begin, int32_t end) const {
  const int32_t num_topk = local_.routing.num_topk;
  auto* const out = reinterpret_cast<float*>(
      place_to_send(args_.weight_send_offset, args_.weight_receive_offset, args_.weight_region));
  for (int32_t i = begin * num_topk + lane_id(); i < end * num_topk; i += kWarpSize) {
    const int32_t* const entry = relay_entry(i / num_topk);
    const int32_t expert = entry[peers_.num_ranks + i % num_topk];
    WeightSum sum;
    if (local_.adds_weights) {
      add_on_node(&sum, [&](int32_t l) { return entry[l]; }, i % num_topk);
    } else if (expert >= 0) {
      const int32_t l = expert / local_.num_local_experts;
      sum.add(weight_on_node(l, entry[l], i % num_topk));
    }
    out[i] = sum.value();
  }
}

// Of own tokens [begin, end): to the output.
__device__ inline void Lister::gather_weights(int32_t begin, int32_t end) const {
  const int32_t num_topk = local_.routing.num_topk, num_ranks = peers_.num_ranks;
  for (int32_t i = begin * num_topk + lane_id(); i < end * num_topk; i += kWarpSize) {
    const int32_t expert = local_.routing.topk_idx[i];
    const int32_t t = i / num_topk, which = i % num_topk;
    WeightSum sum;
    if (local_.adds_weights) {
      add_on_all_nodes(&sum, t, which);
    } else if (expert >= 0) {
      const int32_t rank = expert / local_.num_local_experts;
      const int32_t node = rank / num_ranks, l = rank % num_ranks;
      const bool is_here = node == args_.network.node;
      sum.add(is_here ? weight_on_node(l, slot_of(t, l), which) : weight_from_node(node, t, which));
    }
    local_.combined_weights[i] = sum.value();
  }
}

}  // namespace
}  // namespace ep::nodes
