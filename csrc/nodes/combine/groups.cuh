// Combine between nodes, levels 2 and 3: the rows that make up the sums of a group of tokens,
// listed. Those are the partial rows of this node, and of own tokens the sums of the other nodes
// too.
#pragma once

#include "nodes/combine/lister.cuh"

namespace ep::nodes {
namespace {  // see lister.cuh

// Lists the rows of a group of own tokens: those of this node, and the sums of the others.
__device__ __noinline__ inline int32_t Lister::list_own_group(const Token& token, int32_t t) const {
  const int32_t own_node = args_.network.node;
  const int32_t* const slots = args_.nodes.node_slot + static_cast<int64_t>(t) * num_nodes_;
  OtherNodes others{0, 0};
  for (int32_t node = 0; node < num_nodes_ && token.exists; ++node) {
    if (node == own_node || slots[node] < 0) continue;
    (node < own_node ? others.before : others.after) += 1;
  }
  OtherPlaces places;
  const int32_t total =
      list_group(local_, token, wave_.first_source + peers_.rank,
                 local_.row_offset + wave_.half() * args_.row_half, others, team_.rows(), &places);
  bool is_here = false;
#pragma unroll
  for (int32_t l = 0; l < EP_MAX_PEERS; ++l) is_here |= token.slot[l] >= 0;
  const uint32_t out = static_cast<uint32_t>(lane_id()) << ListedRow::kOutShift;
  int32_t listed = 0;
  for (int32_t node = 0; node < num_nodes_ && token.exists; ++node) {
    if (node == own_node || slots[node] < 0) continue;
    const bool is_before = node < own_node;
    uint32_t what = ListedRow::kFirst | ListedRow::kLastOfNode;
    if (listed == 0 && (is_before || !is_here)) what |= ListedRow::kFirstNode;
    ++listed;
    if (listed == others.before + others.after && !(is_before && is_here)) {
      what |= ListedRow::kLast;
    }
    const int32_t k = distance_before(args_.network, node);
    const uint8_t* const row = args_.network.memory + args_.network_receive_offset +
                               (k - 1) * args_.network_region +
                               static_cast<int64_t>(slots[node]) * local_.row_bytes;
    ListedRow*& place = is_before ? places.before : places.after;
    *place++ = ListedRow{reinterpret_cast<const uint4*>(row), out | what};
  }
  return total;
}

// Lists a group of the wave, and hands it over. False after a fault.
__device__ __noinline__ inline bool Lister::list_group_of_wave(int32_t group) {
  const int32_t begin = group * kGroupTokens;
  const int32_t end = min(begin + kGroupTokens, wave_.num_tokens);
  if (begin >= end) {  // the wave has no tokens: its owner is sent a chunk of none
    if (!(is_last_wave() ? wait_for_sums(begin, end) : wait_to_send())) return false;
    end_group_of(wave_, group);
    return true;
  }
  Token token;
  token.exists = begin + lane_id() < end;
#pragma unroll
  for (int32_t l = 0; l < EP_MAX_PEERS; ++l) {
    token.slot[l] = token.exists && l < peers_.num_ranks ? slot_of(begin + lane_id(), l) : -1;
  }
  if (!wait_for_partials(token)) return false;
  if (!(is_last_wave() ? wait_for_sums(begin, end) : wait_to_send())) return false;
  Done done;
  done.kind = Done::kGroup;
  done.wave = wave_;
  done.group = group;
  if (is_last_wave()) {
    if (local_.combined_weights != nullptr) gather_weights(begin, end);
    auto* const out = reinterpret_cast<uint4*>(local_.combined_x);
    const int32_t num_rows = list_own_group(token, begin + lane_id());
    hand_over(out + static_cast<int64_t>(begin) * vectors_, num_rows, done);
  } else {
    if (args_.has_weights) relay_weights(begin, end);
    auto* const out = reinterpret_cast<uint4*>(place_to_send(
        args_.network_send_offset, args_.network_receive_offset, args_.network_region));
    OtherPlaces none;
    const int32_t num_rows = list_group(local_, token, wave_.first_source + peers_.rank,
                                        local_.row_offset + wave_.half() * args_.row_half,
                                        NoOtherNodes(), team_.rows(), &none);
    hand_over(out + static_cast<int64_t>(begin) * vectors_, num_rows, done);
  }
  return true;
}

}  // namespace
}  // namespace ep::nodes
