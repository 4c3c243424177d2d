// Placing rows: from a stage in shared memory to all output rows of a received row. Lane k issues
// the store for the token's k-th expert. FP8 rows that are to be BF16 or FP32 are converted once,
// into shared memory, and copied from there.
#pragma once

#include "common/vectors.cuh"
#include "dispatch/slots.cuh"
#include "routing/entries.cuh"

namespace ep::dispatch {

// Scale b of an expert-major row stands at first + b * step.
struct ScalePlace {
  int64_t first = 0;
  int64_t step = 0;
};

// Where the scales of output row `row` stand, a row of local expert e.
__device__ inline ScalePlace place_of_scales(const ep_dispatch_args& args, int32_t e, int32_t row) {
  const int32_t begin = args.routing.expert_first_row[e];
  const int32_t end = args.routing.expert_first_row[e + 1];
  return {static_cast<int64_t>(begin) * (args.scale_bytes / 4) + (row - begin), end - begin};
}

// Writes entry k of an output row's local experts.
__device__ inline void write_expert(const ep_dispatch_args& args, int32_t row, int32_t k,
                                    int32_t expert) {
  const int64_t place = static_cast<int64_t>(row) * args.routing.num_topk + k;
  if (args.recv_idx_bytes == 8) {
    static_cast<int64_t*>(args.recv_topk_idx)[place] = expert;
  } else {
    static_cast<int32_t*>(args.recv_topk_idx)[place] = expert;
  }
}

// Writes the row in `stage` times its scales to `out`, in shared memory: one product and one
// rounding an element.
template <typename Out>
__device__ inline void convert(const ep_dispatch_args& args, const uint8_t* stage, Out* out) {
  constexpr int kElements = kPerVector<Out>;
  const auto* const scales = reinterpret_cast<const float*>(stage + args.row_bytes);
  for (int32_t i = lane_id(); i < args.row_bytes / kElements; i += kWarpSize) {
    const float scale = scales[i * kElements / kScaleBlock];
    float values[kElements];
    const auto* const pairs = reinterpret_cast<const uint16_t*>(stage) + i * kElements / 2;
#pragma unroll
    for (int j = 0; j < kElements / 2; ++j) {
      const float2 pair = unpack_fp8_pair(pairs[j]);
      values[2 * j] = pair.x * scale;
      values[2 * j + 1] = pair.y * scale;
    }
    reinterpret_cast<uint4*>(out)[i] = pack<Out>(values);
  }
}

// A run of received rows: bit j of `rows` says that there is a row j. Rows from other ranks stand
// in slots first + j; rows of this rank are tokens first + j.
struct Unit {
  int32_t source = 0;
  int32_t first = 0;
  uint32_t rows = 0;
  int32_t first_of_source = 0;  // the received row in the source's slot 0
  uint32_t came = 0;            // dense rows (dispatch/dense.cuh): what `rows` was at first
};

// How a warp that expands moves a row from a stage to where it belongs. All its lanes call a step
// together, but for load_entry().
struct Placement {
  const ep_dispatch_args& args;
  const Stages& stages;
  const int32_t* const entries;  // of the routing, see ep_routing
  const int32_t epoch;           // of the operation
  const int32_t wave;            // what flags are stamped with: on one node the same
  const int32_t num_ranks = args.peers.num_ranks, chunk_tokens = args.chunk_tokens;
  const int32_t bytes = slot_bytes(args), out_bytes = out_row_bytes(args);
  const int64_t stride = slot_stride(args);
  const bool needs_experts = args.routing.expert_major
                                 ? args.recv_scales != nullptr
                                 : args.recv_topk_idx != nullptr || args.recv_weights != nullptr;
  // In a stage a row is followed by its output rows and, where they are asked for, its experts.
  const int32_t index_bytes = args.routing.num_topk4 * 4;
  const int32_t rows_offset = bytes, experts_offset = rows_offset + index_bytes;
  const int32_t indices_bytes = needs_experts ? 2 * index_bytes : index_bytes;

  // Opens the unit whose rows a peer has flagged, see open(). `peer` is its number for waits; lane
  // 0 asks flag_at() where the flag stands.
  template <typename FlagAt>
  __device__ bool open_flagged(const FlagAt& flag_at, int32_t peer, bool block, Unit* unit) const {
    const ep_peers& peers = args.peers;
    uint64_t flag = 0;
    bool arrived = true;
    if (lane_id() == 0) {
      const uint64_t* const chunk_flag = flag_at();
      const uint32_t stamp = chunk_stamp(wave, args.tag);
      const auto is_of_this_epoch = [stamp](uint64_t value) {
        return flag_stamp(value) >> 8 == stamp >> 8;
      };
      if (block) {
        arrived = wait_flag(peers, chunk_flag, is_of_this_epoch, &flag, EP_PHASE_ROWS, peer, epoch);
      } else {
        flag = ptx::load_acquire_sys(chunk_flag);
        arrived = is_of_this_epoch(flag);
      }
      if (arrived && !same_call(peers, stamp, flag_stamp(flag), peer)) arrived = false;
      if (arrived) fence_for_bulk();  // the rows are read by bulk loads
    }
    if (!__shfl_sync(kFullWarp, arrived, 0)) return false;
    flag = __shfl_sync(kFullWarp, flag, 0);
    unit->first = flag_first(flag);
    const int32_t count = flag_count(flag);
    unit->rows = count == 0 ? 0 : 0xffffffffu >> (32 - count);
    return true;
  }

  // Lane 0 starts to load the entry of received row n into stage i, after the row. Whoever loads
  // the row announces these bytes too.
  __device__ void load_entry(int32_t i, int32_t n) const {
    static_assert(kLocalExperts == kRowOfK + 1, "the experts stand after the output rows");
    stages.load(i, rows_offset, entries + place_in_entries(args.routing, n, kRowOfK),
                indices_bytes);
  }

  // Waits for the row in stage i and writes it to all of its output rows: lane k to that of its
  // k-th expert.
  __device__ void store(int32_t i) const {
    const int32_t lane = lane_id(), num_topk = args.routing.num_topk;
    const uint8_t* const stage = stages.stage(i);
    const auto* const rows = reinterpret_cast<const int32_t*>(stage + rows_offset);
    const auto* const experts = reinterpret_cast<const int32_t*>(stage + experts_offset);
    const auto* const weights =
        reinterpret_cast<const float*>(stage + args.row_bytes + args.scale_bytes);
    stages.wait(i);
    const int32_t row = lane < num_topk ? rows[lane] : -1;
    const int32_t expert = needs_experts && lane < num_topk ? experts[lane] : -1;
    const uint8_t* const out = row_to_give_out(stage);
    if (row >= 0) {
      store_bulk(args.recv_x + static_cast<int64_t>(row) * out_bytes, out, out_bytes);
    }
    if (args.recv_scales != nullptr) store_scales(stage, row, expert);
    end_group();
    store_probabilities(weights, rows, row, expert);
  }

  // The row as the caller wants it, in shared memory.
  __device__ const uint8_t* row_to_give_out(const uint8_t* stage) const {
    if (args.recv_kind == EP_RECV_BYTES) return stage;
    stages.begin_conversion();
    if (args.recv_kind == EP_RECV_BF16) {
      convert(args, stage, reinterpret_cast<__nv_bfloat16*>(stages.converted()));
    } else {
      convert(args, stage, reinterpret_cast<float*>(stages.converted()));
    }
    stages.end_conversion();
    return stages.converted();
  }

  // Writes the scales of the row in `stage` for lane k's output row, which is `expert`'s.
  __device__ void store_scales(const uint8_t* stage, int32_t row, int32_t expert) const {
    const uint8_t* const scales = stage + args.row_bytes;
    if (!args.routing.expert_major) {
      if (row >= 0) {
        store_bulk(reinterpret_cast<uint8_t*>(args.recv_scales) +
                       static_cast<int64_t>(row) * args.scale_bytes,
                   scales, args.scale_bytes);
      }
      return;
    }
    // Scales of an expert-major row stand apart: all lanes write those of one output row at a time.
    ScalePlace place;
    if (row >= 0) place = place_of_scales(args, expert, row);
    for (uint32_t left = __ballot_sync(kFullWarp, row >= 0); left != 0; left &= left - 1) {
      const int32_t k = __ffs(left) - 1;
      const int64_t first = __shfl_sync(kFullWarp, place.first, k);
      const int64_t step = __shfl_sync(kFullWarp, place.step, k);
      for (int32_t b = lane_id(); b < args.scale_bytes / 4; b += kWarpSize) {
        args.recv_scales[first + b * step] = reinterpret_cast<const float*>(scales)[b];
      }
    }
  }

  // Writes the row's probabilities, and the experts of a rank-major row.
  __device__ void store_probabilities(const float* weights, const int32_t* rows, int32_t row,
                                      int32_t expert) const {
    const int32_t lane = lane_id(), num_topk = args.routing.num_topk;
    if (args.routing.expert_major) {
      if (args.recv_weights != nullptr && row >= 0) args.recv_weights[row] = weights[lane];
      return;
    }
    if (lane >= num_topk || rows[0] < 0) return;
    if (args.recv_topk_idx != nullptr) write_expert(args, rows[0], lane, expert);
    if (args.recv_weights != nullptr) {
      args.recv_weights[static_cast<int64_t>(rows[0]) * num_topk + lane] =
          expert >= 0 ? weights[lane] : 0.0f;
    }
  }
};

}  // namespace ep::dispatch
