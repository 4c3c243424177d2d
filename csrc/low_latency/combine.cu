// Low-latency combine: each rank adds up a token's weighted rows of its experts, and sends one
// partial row to the token's owner, which adds up those of the ranks. Sending and receiving are one
// kernel, or one each.

#include "common/launch.cuh"
#include "common/vectors.cuh"
#include "low_latency/epochs.cuh"
#include "low_latency/route.cuh"

namespace {

using namespace ep;
using namespace ep::low_latency;

constexpr int kPer = kPerVector<__nv_bfloat16>;

// Weights of a token of `source` that are given to combine, in words with the epoch.
__device__ inline uint4* weights_of(const ep_low_latency& common, int32_t at, int32_t half,
                                    int32_t source, int32_t t) {
  return in_memory_of<uint4>(common.peers, at, common.entry_offset) +
         place_of(common, half, source, t) * weight_words(common.num_topk);
}

// ---- Sending -----------------------------------------------------------------------------------

__device__ inline void send_weights(const ep_low_latency& common, const Operation& operation,
                                    Entries& entries, int32_t first, int32_t stride) {
  const int32_t num_words = weight_words(common.num_topk), num_ranks = common.peers.num_ranks;
  for (int32_t t = first; t < common.num_tokens; t += stride) {
    Route route = route_of(common, t);
    entries.fill(common, t, &route);
    for (int32_t i = lane_id(); i < num_words * num_ranks; i += kWarpSize) {
      const int32_t r = (i / num_words + common.peers.rank + 1) % num_ranks, j = i % num_words;
      if (!(route.ranks >> r & 1)) continue;
      delay(common.peers);
      ptx::store_word(weights_of(common, r, operation.half, common.peers.rank, t) + j,
                      entries.weight_word(r, j, operation.epoch));
    }
  }
}

// The weight of lane k's row, in the order of the handle's rows. False after a fault.
__device__ inline bool find_weight(const ep_low_latency_combine_args& args,
                                   const Operation& operation, int32_t source, int32_t t,
                                   bool has_row, float* weight, Waiter& waiter) {
  const ep_low_latency& common = args.common;
  const int32_t lane = lane_id();
  bool fine = true;
  if (has_row && common.has_weights) {
    const uint4* const from =
        weights_of(common, common.peers.rank, operation.half, source, t) + lane / kWeightsOfWord;
    uint4 word = ptx::load_word(from);
    fine = wait_for_stamp(from, &word, waiter, source, operation.epoch);
    *weight = __uint_as_float(weight_of_word(word, lane % kWeightsOfWord));
  } else if (has_row) {
    const int64_t n = static_cast<int64_t>(source) * common.max_tokens + t;
    *weight = args.handle.weights[n * common.num_topk + lane];
  }
  return __all_sync(kFullWarp, fine);
}

// One unit of a token's partial row, by a warp.
__device__ inline void send_unit(const ep_low_latency_combine_args& args,
                                 const Operation& operation, int32_t source, int32_t t,
                                 int32_t unit, Waiter& waiter) {
  const ep_low_latency& common = args.common;
  const int32_t lane = lane_id(), num_words = common.hidden / kPer;
  const int64_t n = static_cast<int64_t>(source) * common.max_tokens + t;
  const int32_t row = lane < common.num_topk ? args.handle.rows[n * common.num_topk + lane] : -1;
  const int32_t num_rows = __popc(__ballot_sync(kFullWarp, row >= 0));
  if (num_rows == 0) return;
  float weight = 0.0f;
  if (!find_weight(args, operation, source, t, row >= 0, &weight, waiter)) return;
  const LaneWords words(unit, num_words);
  // A sum that starts from -0 is its first term's, whatever that is.
  float sums[kWordsOfLane][kPer];
#pragma unroll
  for (int j = 0; j < kWordsOfLane; ++j) {
#pragma unroll
    for (int i = 0; i < kPer; ++i) sums[j][i] = -0.0f;
  }
#pragma unroll 1
  for (int32_t k = 0; k < num_rows; ++k) {
    const int64_t from = __shfl_sync(kFullWarp, row, k);
    const float factor = __shfl_sync(kFullWarp, weight, k);
    const auto* const x = static_cast<const uint4*>(args.x) + from * num_words;
    uint4 bits[kWordsOfLane];
#pragma unroll
    for (int j = 0; j < kWordsOfLane; ++j) {
      if (words.has(j)) bits[j] = __ldg(x + words.at(j));
    }
#pragma unroll
    for (int j = 0; j < kWordsOfLane; ++j) {
      if (!words.has(j)) continue;
      float values[kPer];
      unpack<__nv_bfloat16>(bits[j], values);
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        sums[j][i] = __fadd_rn(sums[j][i], __fmul_rn(factor, values[i]));
      }
    }
  }
  uint4* const slot = slot_of(common, source, operation.half, common.peers.rank, t);
  delay(common.peers);
#pragma unroll
  for (int j = 0; j < kWordsOfLane; ++j) {
    // A rounded NaN is 0x7fff: no word is the waiting pattern.
    if (words.has(j)) ptx::store_word(slot + words.at(j), pack<__nv_bfloat16>(sums[j]));
  }
}

__device__ inline void send(const ep_low_latency_combine_args& args, const Operation& operation,
                            Entries& entries, Waiter& waiter) {
  const ep_low_latency& common = args.common;
  const int32_t num_ranks = common.peers.num_ranks;
  const int32_t first = threadIdx.x / kWarpSize * gridDim.x + blockIdx.x;
  const int32_t stride = kWarps * gridDim.x;
  if (!wait_credits(common, operation, waiter)) return;
  if (common.has_weights) {
    send_weights(common, operation, entries, stride - 1 - first, stride);
  }
  int32_t most_tokens = 0;
  for (int32_t r = 0; r < num_ranks; ++r) most_tokens = max(most_tokens, args.handle.num_tokens[r]);
  const int32_t units = ceil_div<int32_t>(common.hidden / kPer, kWordsOfUnit);
  // Rows that travel first, the own ones last.
  for (int32_t u = first; u < most_tokens * num_ranks * units; u += stride) {
    const int32_t unit = u % units, i = u / units;
    const int32_t source = (common.peers.rank + 1 + i / most_tokens) % num_ranks;
    const int32_t t = i % most_tokens;
    if (t >= args.handle.num_tokens[source]) continue;
    send_unit(args, operation, source, t, unit, waiter);
  }
}

// ---- Receiving ---------------------------------------------------------------------------------

__device__ inline void receive_unit(const ep_low_latency_combine_args& args,
                                    const Operation& operation, int32_t t, int32_t unit,
                                    Waiter& waiter) {
  const ep_low_latency& common = args.common;
  const int32_t num_words = common.hidden / kPer;
  const uint32_t ranks = args.handle.ranks[t];
  const LaneWords words(unit, num_words);
  float sums[kWordsOfLane][kPer];
#pragma unroll
  for (int j = 0; j < kWordsOfLane; ++j) {
#pragma unroll
    for (int i = 0; i < kPer; ++i) sums[j][i] = ranks == 0 ? 0.0f : -0.0f;
  }
  const auto slot_from = [&](int32_t r) {
    return slot_of(common, common.peers.rank, operation.half, r, t);
  };
  // The next rank's words are loaded while those of this one are added.
  uint4 bits[kWordsOfLane], next[kWordsOfLane];
  uint32_t left = ranks;
  if (left != 0) load_words(slot_from(__ffs(left) - 1), words, next);
#pragma unroll 1
  while (left != 0) {
    const int32_t r = __ffs(left) - 1;
    left &= left - 1;
#pragma unroll
    for (int j = 0; j < kWordsOfLane; ++j) bits[j] = next[j];
    if (left != 0) load_words(slot_from(__ffs(left) - 1), words, next);
    delay(common.peers);
    const uint64_t start_ns = ptx::global_timer_ns();
    const bool fine = wait_for_words(slot_from(r), words, bits, waiter, r, operation.epoch);
    if (t == 0 && unit == 0 && lane_id() == 0) add_wait(common, r, start_ns);
    if (!__all_sync(kFullWarp, fine)) return;
    restore_words(slot_from(r), words);
#pragma unroll
    for (int j = 0; j < kWordsOfLane; ++j) {
      float values[kPer];
      unpack<__nv_bfloat16>(bits[j], values);
#pragma unroll
      for (int i = 0; i < kPer; ++i) sums[j][i] = __fadd_rn(sums[j][i], values[i]);
    }
  }
  auto* const out = static_cast<uint4*>(args.combined_x) + static_cast<int64_t>(t) * num_words;
#pragma unroll
  for (int j = 0; j < kWordsOfLane; ++j) {
    if (words.has(j)) ptx::store_global(out + words.at(j), pack<__nv_bfloat16>(sums[j]));
  }
}

__device__ inline void receive(const ep_low_latency_combine_args& args, const Operation& operation,
                               Waiter& waiter) {
  const ep_low_latency& common = args.common;
  const int32_t units = ceil_div<int32_t>(common.hidden / kPer, kWordsOfUnit);
  const int32_t stride = kWarps * gridDim.x;
  for (int32_t u = threadIdx.x / kWarpSize * gridDim.x + blockIdx.x; u < common.num_tokens * units;
       u += stride) {
    receive_unit(args, operation, u / units, u % units, waiter);
  }
}

// ---- The kernel --------------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads, 1)
    low_latency_combine_kernel(const __grid_constant__ ep_low_latency_combine_args args) {
  extern __shared__ __align__(16) uint8_t shared[];
  const ep_low_latency& common = args.common;
  const Operation operation = begin_operation(common);
  if (!operation.can_begin) return;
  Waiter waiter(common.peers);
  if (common.phases & EP_LOW_LATENCY_SEND) {
    const int32_t warp = threadIdx.x / kWarpSize;
    Entries entries(shared + warp * Entries::bytes(common.peers.num_ranks, common.num_topk),
                    common);
    send(args, operation, entries, waiter);
  }
  if (common.phases & EP_LOW_LATENCY_RECEIVE) receive(args, operation, waiter);
  low_latency::end_operation(common);
}

const Kernels kernels("low-latency combine kernel", Setup::kShared, 100 * 1024,
                      low_latency_combine_kernel);

}  // namespace

int32_t ep_low_latency_combine(const ep_low_latency_combine_args* args, void* stream) {
  const ep_low_latency& common = args->common;
  const int32_t status = low_latency::check(common);
  if (status != EP_OK) return status;
  const int32_t bytes = kWarps * Entries::bytes(common.peers.num_ranks, common.num_topk);
  low_latency_combine_kernel<<<common.num_blocks, kThreads, bytes,
                               static_cast<cudaStream_t>(stream)>>>(*args);
  return ep::check_cuda(cudaGetLastError(), "ep_low_latency_combine");
}
