// Low-latency dispatch between nodes, receiving: from the messages to the rows of the experts.
#pragma once

#include "low_latency/dispatch/scales.cuh"
#include "nodes/low_latency/dispatch_send.cuh"

namespace ep::low_latency::far {

constexpr int kPartWords = 4 * kWarpSize;  // of a row that a warp moves at once, four a lane

// What came: from what row on those of the rank k before this one stand among all, and a
// bitmap for each expert. Bit n = source * M + token: it gets that row.
struct Arrivals {
  int32_t* first;  // [R + 1]
  Bitmaps rows;

  static __host__ __device__ int64_t bytes(const ep_low_latency& common, int32_t num_ranks) {
    return Sends::first_bytes(num_ranks) +
           Bitmaps::bytes(common.num_local_experts, num_ranks * common.max_tokens);
  }
  __device__ Arrivals(uint8_t* shared, const ep_low_latency& common, int32_t num_ranks)
      : first(reinterpret_cast<int32_t*>(shared)),
        rows(shared + Sends::first_bytes(num_ranks), num_ranks * common.max_tokens) {}
};

// One of the rows that came, by its number among all.
struct Arrival {
  int32_t source, place;
  const uint4* entry;

  __device__ Arrival(const Memory& memory, const FarOperation& operation, const int32_t* first,
                     int32_t number) {
    const int32_t k = group_of(number, first, memory.num_ranks());
    source = memory.rank_before(k);
    place = number - first[k];
    entry = memory.head(operation.half, source) + 1 +
            static_cast<int64_t>(place) * entry_words(memory.common);
  }
};

// By all threads of a block: waits for all heads, and finds which experts want which rows. False
// after a fault.
__device__ inline bool collect(const ep_low_latency_dispatch_args& args, const Memory& memory,
                               const FarOperation& operation, const Arrivals& arrivals) {
  const ep_low_latency& common = args.common;
  const int32_t num_ranks = memory.num_ranks(), words = expert_words(common.num_topk);
  const Header own = dispatch::own_header(args);
  arrivals.rows.clear(common.num_local_experts, threadIdx.x, kThreads);
  bool fine = true;
#pragma unroll 1
  for (int32_t k = threadIdx.x; k < num_ranks; k += kThreads) {
    const int32_t source = memory.rank_before(k);
    int32_t count = 0;
    if (is_alive(common, source)) {
      count = blockIdx.x == 0 ? time_head(memory, operation, own, source)
                              : wait_head(memory, operation, own, source);
    }
    fine = fine && count >= 0;
    arrivals.first[k] = count;
    if (fine && blockIdx.x == 0) args.handle.num_rows[source] = count;
  }
  if (!__syncthreads_and(fine)) return false;
  if (threadIdx.x < kWarpSize) {
    prefix_sums(arrivals.first, num_ranks, [&](int32_t k) { return arrivals.first[k]; });
  }
  __syncthreads();
#pragma unroll 1
  for (int32_t i = threadIdx.x; i < arrivals.first[num_ranks]; i += kThreads) {
    const Arrival arrival(memory, operation, arrivals.first, i);
    int32_t t = 0;
#pragma unroll 1
    for (int32_t j = 0; j < words; ++j) {
      uint4 word;
      ptx::load_global_if(true, &word, arrival.entry + j);
      if (j == 0) t = static_cast<int32_t>(word.w);
      if (t < 0 || t >= common.max_tokens) break;  // a network that breaks its promises
#pragma unroll
      for (int e = 0; e < kExpertsOfWord; ++e) {
        const uint32_t expert = expert_of_word(word, e);
        if (expert >= static_cast<uint32_t>(common.num_local_experts)) continue;  // no expert
        arrivals.rows.set(expert, arrival.source * common.max_tokens + t);
      }
    }
  }
  __syncthreads();
  return true;
}

// After a fault: nothing has come, for what reads the outputs.
__device__ inline void leave_nothing(const ep_low_latency_dispatch_args& args, int32_t num_ranks) {
#pragma unroll 1
  for (int32_t e = threadIdx.x; e < args.common.num_local_experts; e += kThreads) {
    args.recv_count[e] = 0;
  }
#pragma unroll 1
  for (int32_t r = threadIdx.x; r < num_ranks; r += kThreads) args.handle.num_rows[r] = 0;
}

__device__ inline void write_counts(const ep_low_latency_dispatch_args& args,
                                    const Arrivals& arrivals, int32_t num_places) {
#pragma unroll 1
  for (int32_t e = threadIdx.x * gridDim.x + blockIdx.x; e < args.common.num_local_experts;
       e += kThreads * gridDim.x) {
    const int32_t count = arrivals.rows.count_before(e, num_places);
    args.recv_count[e] = count;
    if (args.recv_stats != nullptr) args.recv_stats[e] += count;
  }
}

// By a warp: keeps for combine where the experts of a row have it, and the weights. Lane k has the
// row of recv_x of the k-th expert, or -1. n: source * M + token.
__device__ inline void keep_row(const ep_low_latency_dispatch_args& args, const Arrival& arrival,
                                int32_t row, int32_t n) {
  const ep_low_latency& common = args.common;
  const int32_t num_topk = common.num_topk, lane = lane_id();
  const uint32_t order = row;  // none is the largest
  int32_t place = 0;
#pragma unroll 1
  for (int32_t k = 0; k < num_topk; ++k) {
    const uint32_t other = __shfl_sync(kFullWarp, order, k);
    place += other < order || (other == order && k < lane);
  }
  if (lane >= num_topk) return;
  const int64_t slot = static_cast<int64_t>(arrival.source) * common.max_tokens + arrival.place;
  const int64_t at = slot * num_topk + place;
  args.handle.rows[at] = row < 0 ? -1 : row | lane << kRowBits;
  if (row >= 0) args.recv_src_info[row] = n;
  if (!common.has_weights) return;
  uint4 word;
  ptx::load_global_if(true, &word, arrival.entry + expert_words(num_topk) + lane / kWeightsOfWord);
  args.handle.weights[at] = __uint_as_float(weight_of_word(word, lane % kWeightsOfWord));
}

// By a warp: a part of a row, to all experts that want it. False after a fault.
__device__ inline bool receive_part(const ep_low_latency_dispatch_args& args, const Memory& memory,
                                    const FarOperation& operation, const Arrivals& arrivals,
                                    const RowWords& row, const Arrival& arrival, int32_t part) {
  const ep_low_latency& common = args.common;
  const int32_t lane = lane_id(), num_places = memory.num_ranks() * common.max_tokens;
  uint4 first_word, word;
  ptx::load_global_if(true, &first_word, arrival.entry);
  const int32_t n = arrival.source * common.max_tokens + static_cast<int32_t>(first_word.w);
  int32_t to = -1;
  if (lane < common.num_topk) {
    ptx::load_global_if(true, &word, arrival.entry + lane / kExpertsOfWord);
    const uint32_t expert = expert_of_word(word, lane % kExpertsOfWord);
    if (expert < static_cast<uint32_t>(common.num_local_experts) && n < num_places) {
      to = expert * num_places + arrivals.rows.count_before(expert, n);
    }
  }
  if (part == 0) keep_row(args, arrival, to, n);
  const bool fine = lane != 0 || wait_rows(memory, operation, arrival.source,
                                           arrival.place / memory.chunk_rows());
  if (!__all_sync(kFullWarp, fine)) return false;
  __syncwarp();
  const uint4* const from =
      memory.rows(operation.half, arrival.source) + static_cast<int64_t>(arrival.place) * row.all;
  constexpr int kAtOnce = kPartWords / kWarpSize;
  const int32_t first = part * kPartWords + lane;
  uint4 words[kAtOnce];
#pragma unroll
  for (int q = 0; q < kAtOnce; ++q) {
    const int32_t at = first + q * kWarpSize;
    ptx::load_global_if(at < row.all, &words[q], from + at);
  }
  const dispatch::ScaleRow own(to, num_places);
  uint32_t lanes = __ballot_sync(kFullWarp, to >= 0);
#pragma unroll 1
  for (; lanes != 0; lanes &= lanes - 1) {
    const int32_t k = __ffs(lanes) - 1, out = __shfl_sync(kFullWarp, to, k);
    const dispatch::ScaleRow scale_row = own.of_lane(k);
    auto* const rows = static_cast<uint4*>(args.recv_x) + static_cast<int64_t>(out) * row.data;
#pragma unroll
    for (int q = 0; q < kAtOnce; ++q) {
      const int32_t at = first + q * kWarpSize;
      if (at < row.data) {
        ptx::store_global(rows + at, words[q]);
      } else if (at < row.all) {
        dispatch::store_scales(args, common.hidden, scale_row, at - row.data, words[q]);
      }
    }
  }
  return true;
}

// By all threads of a block. False after a fault.
__device__ inline bool receive(const ep_low_latency_dispatch_args& args, const Memory& memory,
                               const FarOperation& operation, const RowWords& row,
                               uint8_t* shared) {
  const int32_t num_ranks = memory.num_ranks();
  const Arrivals arrivals(shared, args.common, num_ranks);
  if (!collect(args, memory, operation, arrivals)) return false;
  write_counts(args, arrivals, num_ranks * args.common.max_tokens);
  const int32_t parts = ceil_div(row.all, kPartWords), count = arrivals.first[num_ranks] * parts;
  bool fine = true;
  // Parts of a row are neighbours, and neighbours go to different SMs.
#pragma unroll 1
  for (int32_t u = threadIdx.x / kWarpSize * gridDim.x + blockIdx.x; fine && u < count;
       u += kWarps * gridDim.x) {
    const Arrival arrival(memory, operation, arrivals.first, u / parts);
    fine = receive_part(args, memory, operation, arrivals, row, arrival, u % parts);
  }
  return __syncthreads_and(fine);
}

}  // namespace ep::low_latency::far
