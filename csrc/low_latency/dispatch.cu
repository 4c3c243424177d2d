// Low-latency dispatch: one copy of a token for each rank that owns one of its experts, into a slot
// of [source, token]; from there to the rows of its experts, by source and then by token. Sending
// and receiving are one kernel, or one each.

#include "common/launch.cuh"
#include "common/vectors.cuh"
#include "low_latency/epochs.cuh"
#include "low_latency/route.cuh"

namespace {

using namespace ep;
using namespace ep::low_latency;

constexpr int kMaxShared = 200 * 1024;
// Entries of all warps, tokens of the ranks, and a bit a place in lines of whole words.
static_assert(kWarps * Entries::bytes(EP_MAX_PEERS, EP_MAX_TOPK) + 4 * EP_MAX_PEERS +
                  EP_LOW_LATENCY_MAX_PLACES / 8 + 4 * EP_MAX_LOCAL_EXPERTS <=
              kMaxShared);
constexpr float kFp8Max = 448.0f;
constexpr float kSmallestAmax = 1e-4f;
constexpr int kScalesOfWord = 4;

// Words of a row on its way, and those of them that are data; scales follow.
struct RowWords {
  int32_t data, all;

  __host__ __device__ RowWords(int32_t hidden, int32_t format) {
    data = format == EP_LOW_LATENCY_BF16 ? hidden / 8 : hidden / 16;
    const int32_t scales = format == EP_LOW_LATENCY_BF16 ? 0 : hidden / kScaleBlock;
    all = data + ceil_div<int32_t>(scales, kScalesOfWord);
  }
};

__device__ inline uint4* header_of(const ep_low_latency& common, int32_t owner, int32_t half,
                                   int32_t source) {
  return in_memory_of<uint4>(common.peers, owner, common.header_offset) +
         (half * common.peers.num_ranks + source);
}

__device__ inline uint4* entry_of(const ep_low_latency& common, int32_t owner, int32_t half,
                                  int32_t source, int32_t t) {
  const int32_t words = expert_words(common.num_topk) + weight_words(common.num_topk);
  return in_memory_of<uint4>(common.peers, owner, common.entry_offset) +
         place_of(common, half, source, t) * words;
}

// What ranks must do alike, for the header.
__device__ inline uint32_t call_of(const ep_low_latency_dispatch_args& args) {
  return static_cast<uint32_t>(args.format) << 16 |
         static_cast<uint32_t>(args.common.has_weights != 0) << 8 |
         static_cast<uint32_t>(args.common.num_topk);
}

// ---- Sending -----------------------------------------------------------------------------------

__device__ inline void send_header(const ep_low_latency_dispatch_args& args,
                                   const Operation& operation) {
  const ep_low_latency& common = args.common;
  const int32_t r = lane_id();
  if (r >= common.peers.num_ranks) return;
  const uint4 word = make_uint4(static_cast<uint32_t>(common.num_tokens), call_of(args),
                                static_cast<uint32_t>(common.max_tokens), operation.epoch);
  delay(common.peers);
  ptx::store_word(header_of(common, r, operation.half, common.peers.rank), word);
}

// Tells every rank, those that the token does not go to too, which of their experts want it.
__device__ inline void send_entries(const ep_low_latency_dispatch_args& args,
                                    const Operation& operation, Entries& entries, int32_t t) {
  const ep_low_latency& common = args.common;
  Route route = route_of(common, t);
  if (lane_id() == 0) args.handle.ranks[t] = static_cast<int32_t>(route.ranks);
  entries.fill(common, t, &route);
  const int32_t experts = expert_words(common.num_topk);
  const int32_t words = experts + (common.has_weights ? weight_words(common.num_topk) : 0);
  for (int32_t i = lane_id(); i < words * common.peers.num_ranks; i += kWarpSize) {
    const int32_t r = (i / words + common.peers.rank + 1) % common.peers.num_ranks, j = i % words;
    const uint4 word = j < experts ? entries.expert_word(r, j, operation.epoch)
                                   : entries.weight_word(r, j - experts, operation.epoch);
    delay(common.peers);
    ptx::store_word(entry_of(common, r, operation.half, common.peers.rank, t) + j, word);
  }
}

// Scale that is sent along, and what elements are multiplied by. See ep_comm.fp8's low-latency
// rules.
__device__ inline float scale_of(float amax, bool is_rounded, float* multiplier) {
  const float exact = __fdiv_rn(amax, kFp8Max);
  if (!is_rounded) {
    *multiplier = __fdiv_rn(kFp8Max, amax);
    return exact;
  }
  const uint32_t bits = __float_as_uint(exact);
  const uint32_t exponent = min((bits >> 23) + ((bits & 0x7fffff) != 0), 253u);
  *multiplier = __uint_as_float((254 - exponent) << 23);
  return __uint_as_float(exponent << 23);
}

// 16 elements as E4M3, in a block of 128 that eight lanes have; their scale.
__device__ inline uint4 quantized(const uint4 (&bits)[2], bool is_rounded, float* scale) {
  float values[16];
  unpack<__nv_bfloat16>(bits[0], values);
  unpack<__nv_bfloat16>(bits[1], values + 8);
  float amax = kSmallestAmax;
#pragma unroll
  for (float value : values) amax = fmaxf(amax, fabsf(value));  // passes over NaN
#pragma unroll
  for (int step = 1; step < 8; step *= 2) {
    amax = fmaxf(amax, __shfl_xor_sync(kFullWarp, amax, step));
  }
  float multiplier;
  *scale = scale_of(amax, is_rounded, &multiplier);
  union {
    uint4 word;
    uint16_t pairs[8];
  } packed;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    packed.pairs[i] = pack_fp8_pair(values[2 * i] * multiplier, values[2 * i + 1] * multiplier);
  }
  return packed.word;
}

__device__ inline void send_fp8(const ep_low_latency_dispatch_args& args,
                                const Operation& operation, int32_t t, int32_t unit) {
  const ep_low_latency& common = args.common;
  const RowWords row(common.hidden, args.format);
  const LaneWords words(unit, row.data);
  const auto* const x =
      static_cast<const uint4*>(args.x) + static_cast<int64_t>(t) * (common.hidden / 8);
  uint4 bits[kWordsOfLane][2] = {};
#pragma unroll
  for (int j = 0; j < kWordsOfLane; ++j) {
    if (!words.has(j)) continue;
    bits[j][0] = __ldg(x + 2 * words.at(j));
    bits[j][1] = __ldg(x + 2 * words.at(j) + 1);
  }
  const uint32_t ranks = route_of(common, t).ranks;  // while the row is loaded
#pragma unroll
  for (int j = 0; j < kWordsOfLane; ++j) {
    if (words.at(j) - lane_id() >= row.data) break;  // none of this warp's lanes
    float scale;
    const uint4 data = quantized(bits[j], args.format != EP_LOW_LATENCY_FP8, &scale);
    if (!words.has(j)) scale = 1.0f;  // beyond the row: padding, which is no waiting pattern
    uint4 scales;
    scales.x = __float_as_uint(__shfl_sync(kFullWarp, scale, 0));
    scales.y = __float_as_uint(__shfl_sync(kFullWarp, scale, 8));
    scales.z = __float_as_uint(__shfl_sync(kFullWarp, scale, 16));
    scales.w = __float_as_uint(__shfl_sync(kFullWarp, scale, 24));
    const int32_t scale_word = row.data + words.at(j) / kWarpSize;
    for_ranks(common.peers, ranks, [&](int32_t r) {
      uint4* const slot = slot_of(common, r, operation.half, common.peers.rank, t);
      if (words.has(j)) ptx::store_word(slot + words.at(j), data);
      if (lane_id() == 0) ptx::store_word(slot + scale_word, scales);
    });
  }
}

__device__ inline void send_bf16(const ep_low_latency_dispatch_args& args,
                                 const Operation& operation, int32_t t, int32_t unit) {
  const ep_low_latency& common = args.common;
  const LaneWords words(unit, common.hidden / 8);
  const auto* const x =
      static_cast<const uint4*>(args.x) + static_cast<int64_t>(t) * (common.hidden / 8);
  uint4 values[kWordsOfLane];
#pragma unroll
  for (int j = 0; j < kWordsOfLane; ++j) {
    if (words.has(j)) values[j] = __ldg(x + words.at(j));
  }
  const uint32_t ranks = route_of(common, t).ranks;  // while the row is loaded
#pragma unroll
  for (int j = 0; j < kWordsOfLane; ++j) {
    if (!words.has(j)) continue;
    if (is_waiting(values[j])) values[j].x = 0xffff7fffu;  // eight NaN: the first becomes another
    for_ranks(common.peers, ranks, [&](int32_t r) {
      ptx::store_word(slot_of(common, r, operation.half, common.peers.rank, t) + words.at(j),
                      values[j]);
    });
  }
}

__device__ inline void send(const ep_low_latency_dispatch_args& args, const Operation& operation,
                            Entries& entries, Waiter& waiter) {
  const ep_low_latency& common = args.common;
  const int32_t warp = threadIdx.x / kWarpSize;
  // Neighbouring units go to different SMs.
  const int32_t first = warp * gridDim.x + blockIdx.x, stride = kWarps * gridDim.x;
  if (!wait_credits(common, operation, waiter)) return;
  // Entries are what receivers wait for first. The last warps take them: rows begin with the first.
  if (first == stride - 1) send_header(args, operation);
  for (int32_t t = stride - 1 - first; t < common.num_tokens; t += stride) {
    send_entries(args, operation, entries, t);
  }
  const RowWords row(common.hidden, args.format);
  const int32_t units = ceil_div<int32_t>(row.data, kWordsOfUnit);
  for (int32_t u = first; u < common.num_tokens * units; u += stride) {
    const int32_t t = u / units, unit = u % units;
    delay(common.peers);
    if (args.format == EP_LOW_LATENCY_BF16) {
      send_bf16(args, operation, t, unit);
    } else {
      send_fp8(args, operation, t, unit);
    }
  }
}

// ---- Receiving ---------------------------------------------------------------------------------

// Which rows each local expert gets, in shared memory of a block: bit n = source * M + token of the
// expert's line. The place of a row among its expert's is the number of bits before it.
struct Arrivals {
  uint32_t* bits;       // [E, words]
  int32_t* num_tokens;  // [R]
  int32_t words;

  static __host__ __device__ int32_t words_of(const ep_low_latency& common) {
    return ceil_div<int32_t>(common.peers.num_ranks * common.max_tokens, 32);
  }
  static __host__ __device__ int64_t bytes(const ep_low_latency& common) {
    return 4ll * common.num_local_experts * words_of(common) + 4 * EP_MAX_PEERS;
  }
  __device__ Arrivals(uint8_t* shared, const ep_low_latency& common)
      : bits(reinterpret_cast<uint32_t*>(shared + 4 * EP_MAX_PEERS)),
        num_tokens(reinterpret_cast<int32_t*>(shared)),
        words(words_of(common)) {}

  // By the block, before it meets to collect.
  __device__ void clear(const ep_low_latency& common) const {
    for (int32_t i = threadIdx.x; i < common.num_local_experts * words; i += kThreads) bits[i] = 0;
  }

  // By a warp: bits of `expert` before n.
  __device__ int32_t before(int32_t expert, int32_t n) const {
    int32_t count = 0;
    for (int32_t w = lane_id(); w <= n / 32 && w < words; w += kWarpSize) {
      const uint32_t mask = w < n / 32 ? ~0u : (1u << (n % 32)) - 1;
      count += __popc(bits[expert * words + w] & mask);
    }
    return __reduce_add_sync(kFullWarp, count);
  }
};

// By the block: waits for every rank's header and entries. False after a fault.
__device__ inline bool collect(const ep_low_latency_dispatch_args& args, const Operation& operation,
                               Arrivals& arrivals, Waiter& waiter) {
  const ep_low_latency& common = args.common;
  const ep_peers& peers = common.peers;
  bool fine = true;
  if (static_cast<int32_t>(threadIdx.x) < peers.num_ranks) {
    const int32_t source = threadIdx.x;
    const uint4* const word = header_of(common, peers.rank, operation.half, source);
    delay(peers);
    uint4 header = ptx::load_word(word);
    const uint64_t start_ns = ptx::global_timer_ns();
    fine = wait_for_stamp(word, &header, waiter, source, operation.epoch);
    if (blockIdx.x == 0) add_wait(common, source, start_ns);
    const bool is_same = header.y == call_of(args) &&
                         header.z == static_cast<uint32_t>(common.max_tokens) &&
                         header.x <= static_cast<uint32_t>(common.max_tokens);
    if (fine && !is_same) {
      raise_fault(peers, EP_FAULT_MISMATCH, EP_PHASE_PLAN, source, EP_FIELD_CALL, call_of(args),
                  header.y);
      fine = false;
    }
    arrivals.num_tokens[source] = fine ? static_cast<int32_t>(header.x) : 0;
  }
  if (!__syncthreads_and(fine)) return false;
  const int32_t experts = expert_words(common.num_topk);
  for (int32_t n = threadIdx.x; n < peers.num_ranks * common.max_tokens; n += kThreads) {
    const int32_t source = n / common.max_tokens, t = n - source * common.max_tokens;
    if (t >= arrivals.num_tokens[source]) continue;
    const uint4* const entry = entry_of(common, peers.rank, operation.half, source, t);
    for (int32_t j = 0; j < experts; ++j) {
      uint4 word = ptx::load_word(entry + j);
      fine &= wait_for_stamp(entry + j, &word, waiter, source, operation.epoch);
      if (!fine) break;
#pragma unroll
      for (int i = 0; i < kExpertsOfWord; ++i) {
        const uint32_t expert = expert_of_word(word, i);
        if (expert >= static_cast<uint32_t>(common.num_local_experts)) continue;  // no expert
        atomicOr(&arrivals.bits[expert * arrivals.words + n / 32], 1u << (n % 32));
      }
    }
  }
  return __syncthreads_and(fine);
}

// After a fault: nothing has come, for what reads the outputs and for the combine that may follow.
__device__ inline void leave_nothing(const ep_low_latency_dispatch_args& args) {
  const ep_low_latency& common = args.common;
  for (int32_t e = threadIdx.x; e < common.num_local_experts; e += kThreads) args.recv_count[e] = 0;
  if (static_cast<int32_t>(threadIdx.x) < common.peers.num_ranks) {
    args.handle.num_tokens[threadIdx.x] = 0;
  }
}

// The counts of experts, shared out among the blocks.
__device__ inline void write_counts(const ep_low_latency_dispatch_args& args,
                                    const Arrivals& arrivals) {
  const ep_low_latency& common = args.common;
  const int32_t num_rows = common.peers.num_ranks * common.max_tokens;
  const int32_t warp = threadIdx.x / kWarpSize;
  for (int32_t e = warp * gridDim.x + blockIdx.x; e < common.num_local_experts;
       e += kWarps * gridDim.x) {
    const int32_t count = arrivals.before(e, num_rows);
    if (lane_id() != 0) continue;
    args.recv_count[e] = count;
    if (args.recv_stats != nullptr) args.recv_stats[e] += count;
  }
  if (blockIdx.x == 0 && static_cast<int32_t>(threadIdx.x) < common.peers.num_ranks) {
    args.handle.num_tokens[threadIdx.x] = arrivals.num_tokens[threadIdx.x];
  }
}

// Stores the four scales of a word: column-major, rows next to each other.
__device__ inline void store_scales(const ep_low_latency_dispatch_args& args, int64_t row,
                                    int32_t index, const uint4& word) {
  const ep_low_latency& common = args.common;
  const int64_t num_rows = static_cast<int64_t>(common.peers.num_ranks) * common.max_tokens;
  const int64_t expert = row / num_rows, place = row - expert * num_rows;
  const int32_t blocks = common.hidden / kScaleBlock;
  const uint32_t scales[kScalesOfWord] = {word.x, word.y, word.z, word.w};
  auto* const out = static_cast<uint32_t*>(args.recv_scales);
  if (args.format == EP_LOW_LATENCY_UE8M0) {
    uint32_t exponents = 0;
#pragma unroll
    for (int i = 0; i < kScalesOfWord; ++i) exponents |= (scales[i] >> 23 & 0xff) << (8 * i);
    out[(expert * (blocks / 4) + index) * args.scale_stride + place] = exponents;
    return;
  }
#pragma unroll
  for (int i = 0; i < kScalesOfWord; ++i) {
    const int32_t block = index * kScalesOfWord + i;
    if (block < blocks) out[(expert * blocks + block) * args.scale_stride + place] = scales[i];
  }
}

// The expert of lane k: the token's k-th here, in a word that has come.
__device__ inline uint32_t expert_of_lane(const uint4& word) {
  uint32_t expert = kNoExpert;
#pragma unroll
  for (int i = 0; i < kExpertsOfWord; ++i) {
    if (lane_id() % kExpertsOfWord == i) expert = expert_of_word(word, i);
  }
  return expert;
}

// One unit of a received row, by a warp: to all of its experts' rows.
__device__ inline void receive_unit(const ep_low_latency_dispatch_args& args,
                                    const Operation& operation, const Arrivals& arrivals,
                                    int32_t source, int32_t t, int32_t unit, Waiter& waiter) {
  const ep_low_latency& common = args.common;
  const ep_peers& peers = common.peers;
  const int32_t lane = lane_id(), num_topk = common.num_topk;
  const int32_t n = source * common.max_tokens + t;
  const int64_t num_rows = static_cast<int64_t>(peers.num_ranks) * common.max_tokens;
  const RowWords widths(common.hidden, args.format);
  const LaneWords words(unit, widths.all);
  const uint4* const entry = entry_of(common, peers.rank, operation.half, source, t);
  const uint4* const weights = entry + expert_words(num_topk) + lane / kWeightsOfWord;
  uint4* const slot = slot_of(common, peers.rank, operation.half, source, t);
  const bool keeps_weights = unit == 0 && common.has_weights && lane < num_topk;
  // All loads at once: each takes most of a microsecond.
  uint4 values[kWordsOfLane], weight_word{}, expert_word{};
  if (lane < num_topk) expert_word = ptx::load_word(entry + lane / kExpertsOfWord);
  if (keeps_weights) weight_word = ptx::load_word(weights);
  delay(peers);
  load_words(slot, words, values);

  // Lane k has the token's k-th expert here, and its row.
  const uint32_t expert = lane < num_topk ? expert_of_lane(expert_word) : kNoExpert;
  const bool is_expert = expert < static_cast<uint32_t>(common.num_local_experts);
  const int32_t num_experts = __popc(__ballot_sync(kFullWarp, is_expert));
  int64_t row = -1;
  for (int32_t k = 0; k < num_experts; ++k) {
    const uint32_t e = __shfl_sync(kFullWarp, expert, k);
    const int32_t place = arrivals.before(static_cast<int32_t>(e), n);
    if (lane == k) row = e * num_rows + place;
  }
  if (unit == 0 && lane < num_topk) {
    args.handle.rows[static_cast<int64_t>(n) * num_topk + lane] = static_cast<int32_t>(row);
    if (row >= 0) args.recv_src_info[row] = n;
  }
  bool fine = true;
  if (keeps_weights) {
    fine = wait_for_stamp(weights, &weight_word, waiter, source, operation.epoch);
    args.handle.weights[static_cast<int64_t>(n) * num_topk + lane] =
        __uint_as_float(weight_of_word(weight_word, lane % kWeightsOfWord));
  }
  if (num_experts == 0) return;
  fine = fine && wait_for_words(slot, words, values, waiter, source, operation.epoch);
  if (!__all_sync(kFullWarp, fine)) return;
  restore_words(slot, words);
  for (int32_t k = 0; k < num_experts; ++k) {
    const int64_t to = __shfl_sync(kFullWarp, row, k);
    auto* const out = static_cast<uint4*>(args.recv_x) + to * widths.data;
#pragma unroll
    for (int j = 0; j < kWordsOfLane; ++j) {
      if (!words.has(j)) continue;
      if (words.at(j) < widths.data) {
        ptx::store_global(out + words.at(j), values[j]);
      } else {
        store_scales(args, to, words.at(j) - widths.data, values[j]);
      }
    }
  }
}

__device__ inline void receive(const ep_low_latency_dispatch_args& args, const Operation& operation,
                               Arrivals& arrivals, Waiter& waiter) {
  const ep_low_latency& common = args.common;
  if (!collect(args, operation, arrivals, waiter)) {
    leave_nothing(args);
    return;
  }
  write_counts(args, arrivals);
  const int32_t num_ranks = common.peers.num_ranks;
  int32_t most_tokens = 0;
  for (int32_t r = 0; r < num_ranks; ++r) most_tokens = max(most_tokens, arrivals.num_tokens[r]);
  const RowWords row(common.hidden, args.format);
  const int32_t units = ceil_div<int32_t>(row.all, kWordsOfUnit);
  const int32_t warp = threadIdx.x / kWarpSize;
  const int32_t stride = kWarps * gridDim.x;
  // Own rows first: they are there.
  for (int32_t u = warp * gridDim.x + blockIdx.x; u < most_tokens * num_ranks * units;
       u += stride) {
    const int32_t unit = u % units, i = u / units;
    const int32_t source = (common.peers.rank + i / most_tokens) % num_ranks, t = i % most_tokens;
    if (t >= arrivals.num_tokens[source]) continue;
    receive_unit(args, operation, arrivals, source, t, unit, waiter);
  }
}

// ---- The kernel --------------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads, 1)
    low_latency_dispatch_kernel(const __grid_constant__ ep_low_latency_dispatch_args args) {
  extern __shared__ __align__(16) uint8_t shared[];
  const ep_low_latency& common = args.common;
  const int32_t entry_bytes = Entries::bytes(common.peers.num_ranks, common.num_topk);
  Arrivals arrivals(shared + kWarps * entry_bytes, common);
  if (common.phases & EP_LOW_LATENCY_RECEIVE) arrivals.clear(common);
  const Operation operation = begin_operation(common);
  if (!operation.can_begin) {
    leave_nothing(args);
    return;
  }
  Waiter waiter(common.peers);
  if (common.phases & EP_LOW_LATENCY_SEND) {
    Entries entries(shared + threadIdx.x / kWarpSize * entry_bytes, common);
    send(args, operation, entries, waiter);
  }
  if (common.phases & EP_LOW_LATENCY_RECEIVE) receive(args, operation, arrivals, waiter);
  low_latency::end_operation(common);
}

const Kernels kernels("low-latency dispatch kernel", Setup::kShared, kMaxShared,
                      low_latency_dispatch_kernel);

}  // namespace

int32_t ep_low_latency_dispatch(const ep_low_latency_dispatch_args* args, void* stream) {
  const ep_low_latency& common = args->common;
  const int32_t status = low_latency::check(common);
  if (status != EP_OK) return status;
  const int32_t block = args->format == EP_LOW_LATENCY_BF16    ? 8
                        : args->format == EP_LOW_LATENCY_UE8M0 ? 4 * kScaleBlock
                                                               : kScaleBlock;
  if (common.hidden % block != 0) {
    return ep::fail(EP_ERR_ARGUMENT, "hidden = %d is not a multiple of %d", common.hidden, block);
  }
  const int64_t places =
      static_cast<int64_t>(common.num_local_experts) * common.peers.num_ranks * common.max_tokens;
  if (places > EP_LOW_LATENCY_MAX_PLACES) {
    return ep::fail(EP_ERR_ARGUMENT,
                    "%d local experts x %d ranks x %d tokens: the product is at most %d",
                    common.num_local_experts, common.peers.num_ranks, common.max_tokens,
                    EP_LOW_LATENCY_MAX_PLACES);
  }
  const int64_t bytes =
      kWarps * Entries::bytes(common.peers.num_ranks, common.num_topk) + Arrivals::bytes(common);
  low_latency_dispatch_kernel<<<common.num_blocks, kThreads, bytes,
                                static_cast<cudaStream_t>(stream)>>>(*args);
  return ep::check_cuda(cudaGetLastError(), "ep_low_latency_dispatch");
}
