// Low-latency dispatch: one copy of a token for each rank that owns one of its experts, into a slot
// of [source, token]; from there to the rows of its experts, by source and then by token. Sending
// and receiving are one kernel, or one each.

#include "common/launch.cuh"
#include "common/vectors.cuh"
#include "low_latency/route.cuh"
#include "low_latency/shapes.cuh"

namespace {

using namespace ep;
using namespace ep::low_latency;

constexpr int kMaxShared = 200 * 1024;
constexpr float kFp8Max = 448.0f;
constexpr float kSmallestAmax = 1e-4f;
constexpr int kScalesOfWord = 4;

// Words of a row on its way, and those of them that are data; scales follow. A unit of data in FP8
// has the blocks of one word of scales.
struct RowWords {
  int32_t data, all;

  __device__ RowWords(int32_t hidden, int32_t format) {
    data = format == EP_LOW_LATENCY_BF16 ? hidden / 8 : hidden / 16;
    const int32_t scales = format == EP_LOW_LATENCY_BF16 ? 0 : hidden / kScaleBlock;
    all = data + ceil_div<int32_t>(scales, kScalesOfWord);
  }
};
static_assert(kScalesOfWord * kScaleBlock == kWarpSize * 16);

__device__ inline Header own_header(const ep_low_latency_dispatch_args& args) {
  const ep_low_latency& common = args.common;
  return {static_cast<uint32_t>(common.num_tokens),
          static_cast<uint32_t>(args.format) << 16 |
              static_cast<uint32_t>(common.has_weights != 0) << 8 |
              static_cast<uint32_t>(common.num_topk),
          static_cast<uint32_t>(common.max_tokens)};
}

// ---- Sending -----------------------------------------------------------------------------------

// Token and what is loaded of it before the kernel knows which operation it is part of.
struct Selection {
  int32_t t;
  int64_t expert;
  float weight;

  __device__ Selection(const ep_low_latency& common, int32_t token)
      : t(token), expert(load_expert(common, t)), weight(load_weight(common, t)) {}
};

// Tells every rank, those that the token does not go to too, which of their experts want it.
template <typename Memory>
__device__ inline void send_entries(const ep_low_latency_dispatch_args& args, const Memory& memory,
                                    const Operation& operation, Entries& entries,
                                    const Selection& selection) {
  const ep_low_latency& common = args.common;
  Route route(common, operation.alive, selection.expert);
  if (lane_id() == 0) args.handle.ranks[selection.t] = static_cast<int32_t>(route.ranks);
  const bool is_second = route.find_places(common.num_topk);
  entries.fill(route, memory.num_ranks(), selection.weight);
  const int32_t experts = expert_words(common.num_topk);
  const int32_t words = experts + (common.has_weights ? weight_words(common.num_topk) : 0);
#pragma unroll 1
  for (int32_t i = lane_id(); i < words * memory.num_ranks(); i += kWarpSize) {
    const int32_t which = i / words, j = i - which * words;
    const int32_t r = memory.rank_behind(which + 1);
    const uint4 word = j < experts ? entries.expert_word(r, j, operation.epoch)
                                   : entries.weight_word(r, j - experts, operation.epoch);
    delay(common.peers);
    if (operation.alive >> r & 1) {
      ptx::store_word(memory.entry(r, operation.half, memory.rank(), selection.t) + j, word);
    }
  }
  const bool is_none =
      lane_id() < common.num_topk && selection.expert != -1 &&
      !Route::is_expert(common, selection.expert);
  if (is_none || is_second) {
    leave_notice(args.notice, is_none ? EP_ROUTING_OUT_OF_RANGE : EP_ROUTING_DUPLICATE,
                 selection.t, selection.expert);
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

// A lane's part of a unit of a row, loaded: what becomes a word.
struct Source {
  uint4 bits[2];
  int64_t expert;

  __device__ void load(const ep_low_latency_dispatch_args& args, int32_t hidden,
                       const Units& at) {
    const bool is_bf16 = args.format == EP_LOW_LATENCY_BF16;
    const bool is_there = at.t < args.common.num_tokens && at.word() < hidden / (is_bf16 ? 8 : 16);
    const auto* const x =
        static_cast<const uint4*>(args.x) + static_cast<int64_t>(at.t) * (hidden / 8);
    bits[0] = bits[1] = make_uint4(0, 0, 0, 0);
    expert = load_expert(args.common, at.t);
    if (is_there) bits[0] = __ldg(x + (is_bf16 ? at.word() : 2 * at.word()));
    if (is_there && !is_bf16) bits[1] = __ldg(x + 2 * at.word() + 1);
  }
};

// One unit of a row, by a warp.
template <typename Memory>
__device__ inline void send_unit(const ep_low_latency_dispatch_args& args, const Memory& memory,
                                 const Operation& operation, const Units& at, const Source& source,
                                 const RowWords& row) {
  const uint32_t ranks = Route(args.common, operation.alive, source.expert).ranks;
  const bool has_word = at.word() < row.data;
  uint4 word = source.bits[0], scales{};
  if (args.format == EP_LOW_LATENCY_BF16) {
    if (is_waiting(word)) word.x = 0xffff7fffu;  // eight NaN: the first becomes another
  } else {
    float scale;
    word = quantized(source.bits, args.format != EP_LOW_LATENCY_FP8, &scale);
    if (!has_word) scale = 1.0f;  // beyond the row: padding, which is no waiting pattern
    scales.x = __float_as_uint(__shfl_sync(kFullWarp, scale, 0));
    scales.y = __float_as_uint(__shfl_sync(kFullWarp, scale, 8));
    scales.z = __float_as_uint(__shfl_sync(kFullWarp, scale, 16));
    scales.w = __float_as_uint(__shfl_sync(kFullWarp, scale, 24));
  }
  const bool has_scales = lane_id() == 0 && row.all != row.data;
  delay(args.common.peers);
  for_ranks(memory, ranks, [&](int32_t r) {
    uint4* const slot = memory.row(r, operation.half, memory.rank(), at.t);
    if (has_word) ptx::store_word(slot + at.word(), word);
    if (has_scales) ptx::store_word(slot + row.data + at.unit, scales);
  });
}

// ---- Receiving ---------------------------------------------------------------------------------

// What came, in shared memory of a block. Bit n = source * M + token of an expert's line: it gets
// that row. The place of a row among its expert's is the number of bits before it.
class Arrivals {
 public:
  int32_t* num_tokens;  // [R]
  int32_t* num_rows;    // [R] that came from each rank

  static __host__ __device__ int64_t bytes(const ep_low_latency& common) {
    return 8 * EP_MAX_PEERS + 16ll * common.num_local_experts * groups_of(common);
  }
  static __host__ __device__ int64_t entry_bytes(const ep_low_latency& common) {
    return 16ll * common.peers.num_ranks * common.max_tokens * expert_words(common.num_topk);
  }
  // shared: bytes(), then entry_bytes() where has_entries.
  __device__ Arrivals(uint8_t* shared, const ep_low_latency& common, bool has_entries)
      : num_tokens(reinterpret_cast<int32_t*>(shared)),
        num_rows(num_tokens + EP_MAX_PEERS),
        lines_(reinterpret_cast<uint4*>(num_rows + EP_MAX_PEERS)),
        groups_(groups_of(common)),
        entries_(has_entries ? lines_ + common.num_local_experts * groups_ : nullptr) {}

  // By the block, before it meets to collect.
  __device__ void clear(int32_t num_local_experts) const {
#pragma unroll 1
    for (int32_t i = threadIdx.x; i < num_local_experts * groups_; i += kThreads) {
      lines_[i] = make_uint4(0, 0, 0, 0);
    }
    if (threadIdx.x < EP_MAX_PEERS) num_rows[threadIdx.x] = 0;
  }

  __device__ void mark(uint32_t expert, int32_t n) const {
    auto* const line = reinterpret_cast<uint32_t*>(lines_ + expert * groups_);
    atomicOr(line + n / 32, 1u << (n % 32));
  }

  // Rows of `expert` before n.
  __device__ int32_t before(int32_t expert, int32_t n) const {
    const uint4* line = lines_ + expert * groups_;
    int32_t count = 0;
#pragma unroll 1
    for (; n > 0; n -= 128, ++line) {
      const uint32_t bits[4] = {line->x, line->y, line->z, line->w};
#pragma unroll
      for (int i = 0; i < 4; ++i) count += __popc(bits[i] & first_bits(n - 32 * i));
    }
    return count;
  }

  // The words with the experts of row n, where they are kept here; else nullptr.
  __device__ uint4* entry(int32_t n, int32_t words) const {
    return entries_ == nullptr ? nullptr : entries_ + n * words;
  }

 private:
  uint4* lines_;  // [E, groups of 128 bits]
  int32_t groups_;
  uint4* entries_;  // [R, M, words]

  static __host__ __device__ int32_t groups_of(const ep_low_latency& common) {
    return ceil_div<int32_t>(common.peers.num_ranks * common.max_tokens, 128);
  }
  static __device__ uint32_t first_bits(int32_t n) {
    return n >= 32 ? ~0u : n <= 0 ? 0 : (1u << n) - 1;
  }
};

// Lines of whole groups, entries of all warps, tokens of the ranks.
static_assert(kWarps * Entries::bytes(EP_MAX_PEERS, EP_MAX_TOPK) + 8 * EP_MAX_PEERS +
                  EP_LOW_LATENCY_MAX_PLACES / 8 + 16 * EP_MAX_LOCAL_EXPERTS <=
              kMaxShared);

// By the block: waits for every rank's header and entries. False after a fault.
template <typename Memory>
__device__ inline bool collect(const ep_low_latency_dispatch_args& args, const Memory& memory,
                               const Operation& operation, const Arrivals& arrivals) {
  const ep_low_latency& common = args.common;
  bool fine = true;
  if (static_cast<int32_t>(threadIdx.x) < memory.num_ranks()) {
    const int32_t source = threadIdx.x;
    int32_t num_tokens = 0;
    if (operation.alive >> source & 1) {
      num_tokens = receive_header(memory, operation, own_header(args), source);
    }
    fine = num_tokens >= 0;
    arrivals.num_tokens[source] = max(num_tokens, 0);
  }
  if (!__syncthreads_and(fine)) return false;
  const int32_t words = expert_words(common.num_topk);
#pragma unroll 1
  for (int32_t n = threadIdx.x; n < memory.num_ranks() * common.max_tokens; n += kThreads) {
    const int32_t source = n / common.max_tokens, t = n - source * common.max_tokens;
    if (t >= arrivals.num_tokens[source]) continue;
    const uint4* const entry = memory.entry(memory.rank(), operation.half, source, t);
    bool has_row = false;
#pragma unroll 1
    for (int32_t j = 0; j < words; ++j) {
      uint4 word = ptx::load_word(entry + j);
      fine &= wait_for_stamp(common.peers, entry + j, &word, source, operation.epoch);
      if (!fine) break;
      uint4* const copy = arrivals.entry(n, words);
      if (copy != nullptr) copy[j] = word;
#pragma unroll
      for (int i = 0; i < kExpertsOfWord; ++i) {
        const uint32_t expert = expert_of_word(word, i);
        if (expert >= static_cast<uint32_t>(common.num_local_experts)) continue;  // no expert
        arrivals.mark(expert, n);
        has_row = true;
      }
    }
    if (has_row && blockIdx.x == 0) atomicAdd(arrivals.num_rows + source, 1);
  }
  return __syncthreads_and(fine);
}

// After a fault: nothing has come, for what reads the outputs and for the combine that may follow.
__device__ inline void leave_nothing(const ep_low_latency_dispatch_args& args) {
  const ep_low_latency& common = args.common;
  for (int32_t e = threadIdx.x; e < common.num_local_experts; e += kThreads) args.recv_count[e] = 0;
  if (static_cast<int32_t>(threadIdx.x) < common.peers.num_ranks) {
    args.handle.num_tokens[threadIdx.x] = 0;
    args.handle.num_rows[threadIdx.x] = 0;
  }
}

// The counts of experts, shared out among the blocks, and those of ranks.
__device__ inline void write_counts(const ep_low_latency_dispatch_args& args, int32_t num_ranks,
                                    const Arrivals& arrivals) {
  const ep_low_latency& common = args.common;
  const int32_t num_places = num_ranks * common.max_tokens;
#pragma unroll 1
  for (int32_t e = threadIdx.x * gridDim.x + blockIdx.x; e < common.num_local_experts;
       e += kThreads * gridDim.x) {
    const int32_t count = arrivals.before(e, num_places);
    args.recv_count[e] = count;
    if (args.recv_stats != nullptr) args.recv_stats[e] += count;
  }
  const int32_t r = threadIdx.x;
  if (blockIdx.x != 0 || r >= num_ranks) return;
  args.handle.num_tokens[r] = arrivals.num_tokens[r];
  args.handle.num_rows[r] = common.peers.record->num_rows[r] = arrivals.num_rows[r];
}

// Stores the four scales of a word: column-major, rows next to each other.
__device__ inline void store_scales(const ep_low_latency_dispatch_args& args, int32_t hidden,
                                    int64_t row,
                                    int32_t index, const uint4& word) {
  const ep_low_latency& common = args.common;
  const int64_t num_rows = static_cast<int64_t>(common.peers.num_ranks) * common.max_tokens;
  const int64_t expert = row / num_rows, place = row - expert * num_rows;
  const int32_t blocks = hidden / kScaleBlock;
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

// Lane k's expert of a row that came, and the row of recv_x that it becomes: -1 where there is none.
template <typename Memory>
__device__ inline int32_t find_row(const ep_low_latency& common, const Memory& memory,
                                   const Operation& operation, const Arrivals& arrivals,
                                   int32_t source, int32_t t) {
  const int32_t words = expert_words(common.num_topk), num_places = memory.num_ranks() * common.max_tokens;
  const int32_t n = source * common.max_tokens + t, j = lane_id() / kExpertsOfWord;
  if (lane_id() >= common.num_topk) return -1;
  const uint4* const copy = arrivals.entry(n, words);
  const uint4 word =
      copy != nullptr ? copy[j]
                      : ptx::load_word(memory.entry(memory.rank(), operation.half, source, t) + j);
  const uint32_t expert = expert_of_word(word, lane_id() % kExpertsOfWord);
  if (expert >= static_cast<uint32_t>(common.num_local_experts)) return -1;
  return expert * num_places + arrivals.before(expert, n);
}

// Keeps for combine where a row's experts have it, and their weights. False after a fault.
template <typename Memory>
__device__ inline bool keep_row(const ep_low_latency_dispatch_args& args, const Memory& memory,
                                const Operation& operation, int32_t source, int32_t t,
                                int32_t row) {
  const ep_low_latency& common = args.common;
  const int32_t lane = lane_id(), n = source * common.max_tokens + t;
  if (lane >= common.num_topk) return true;
  const int64_t i = static_cast<int64_t>(n) * common.num_topk + lane;
  args.handle.rows[i] = row;
  if (row >= 0) args.recv_src_info[row] = n;
  if (!common.has_weights) return true;
  const uint4* const from = memory.entry(memory.rank(), operation.half, source, t) +
                            expert_words(common.num_topk) + lane / kWeightsOfWord;
  uint4 word = ptx::load_word(from);
  if (!wait_for_stamp(common.peers, from, &word, source, operation.epoch)) return false;
  args.handle.weights[i] = __uint_as_float(weight_of_word(word, lane % kWeightsOfWord));
  return true;
}

// One unit of a received row, by a warp: to all of its experts' rows. False after a fault.
template <typename Memory>
__device__ inline bool receive_unit(const ep_low_latency_dispatch_args& args, const Memory& memory,
                                    const Operation& operation, const Arrivals& arrivals,
                                    const UnitsOfRanks<Memory>& at, uint4 word,
                                    const RowWords& row) {
  const ep_low_latency& common = args.common;
  const int32_t to = find_row(common, memory, operation, arrivals, at.rank, at.t);
  const int32_t num_experts = __popc(__ballot_sync(kFullWarp, to >= 0));
  bool fine = true;
  if (at.unit == 0) fine = keep_row(args, memory, operation, at.rank, at.t, to);
  const bool has_word = num_experts != 0 && at.word() < row.all;
  uint4* const from = memory.row(memory.rank(), operation.half, at.rank, at.t) + at.word();
  if (has_word) {
    fine = fine && wait_for_word(common.peers, from, &word, at.rank, operation.epoch);
  }
  if (!__all_sync(kFullWarp, fine)) return false;
  if (has_word) ptx::store_word(from, waiting_word());
#pragma unroll 1
  for (int32_t k = 0; k < num_experts; ++k) {
    const int64_t i = __shfl_sync(kFullWarp, to, k);
    if (at.word() < row.data) {
      ptx::store_global(static_cast<uint4*>(args.recv_x) + i * row.data + at.word(), word);
    } else if (has_word) {
      store_scales(args, memory.hidden(), i, at.word() - row.data, word);
    }
  }
  return true;
}

template <typename Memory>
__device__ inline void receive(const ep_low_latency_dispatch_args& args, const Memory& memory,
                               const Operation& operation, const Arrivals& arrivals,
                               const RowWords& row) {
  if (!collect(args, memory, operation, arrivals)) {
    leave_nothing(args);
    return;
  }
  // Own rows first: they are there.
  UnitsOfRanks<Memory> at(memory, ceil_div<int32_t>(row.all, kWarpSize), 0, arrivals.num_tokens);
  const auto load = [&] {
    uint4 word{};
    if (at.find()) {
      const bool has_word = at.word() < row.all;
      delay(args.common.peers);
      ptx::load_word_if(has_word, &word,
                        memory.row(memory.rank(), operation.half, at.rank, at.t) + at.word());
    }
    return word;
  };
  uint4 next = load();
  write_counts(args, memory.num_ranks(), arrivals);
  while (at.is_there()) {
    const auto unit = at;
    const uint4 word = next;
    at.advance();
    next = load();  // on its way meanwhile
    if (!receive_unit(args, memory, operation, arrivals, unit, word, row)) return;
  }
}

// ---- The kernel --------------------------------------------------------------------------------

template <int kHidden, int kRanks>
__global__ void __launch_bounds__(kThreads, 1)
    low_latency_dispatch_kernel(const __grid_constant__ ep_low_latency_dispatch_args args,
                                bool has_entries) {
  extern __shared__ __align__(16) uint8_t shared[];
  const ep_low_latency& common = args.common;
  const Memory<kHidden, kRanks> memory(
      common, expert_words(common.num_topk) + weight_words(common.num_topk));
  const RowWords row(memory.hidden(), args.format);
  const bool sends = common.phases & EP_LOW_LATENCY_SEND;
  const int32_t entry_bytes = Entries::bytes(memory.num_ranks(), common.num_topk);
  const Arrivals arrivals(shared + kWarps * entry_bytes, common, has_entries);

  // What is sent does not depend on the operation: it is loaded while the block learns that.
  Units at(ceil_div<int32_t>(row.data, kWarpSize));
  const int32_t first = threadIdx.x / kWarpSize * gridDim.x + blockIdx.x;
  const int32_t stride = kWarps * gridDim.x;
  Selection selection(common, sends ? stride - 1 - first : common.num_tokens);
  Source next;
  if (sends) next.load(args, memory.hidden(), at);
  if (common.phases & EP_LOW_LATENCY_RECEIVE) arrivals.clear(common.num_local_experts);
  const Operation operation = begin_operation(memory, args.handle.epochs);
  if (!operation.can_begin) {
    leave_nothing(args);
    return;
  }
  if (sends && wait_credits(memory, operation)) {
    // Entries are what receivers wait for first. The last warps take them: rows begin with the
    // first.
    Entries entries(shared + threadIdx.x / kWarpSize * entry_bytes, common);
    if (first == stride - 1) send_header(memory, operation, own_header(args));
#pragma unroll 1
    while (selection.t < common.num_tokens) {
      send_entries(args, memory, operation, entries, selection);
      selection = Selection(common, selection.t + stride);
    }
#pragma unroll 1
    while (at.t < common.num_tokens) {
      const Units unit = at;
      const Source source = next;
      at.advance();
      next.load(args, memory.hidden(), at);
      send_unit(args, memory, operation, unit, source, row);
    }
  }
  if (common.phases & EP_LOW_LATENCY_RECEIVE) receive(args, memory, operation, arrivals, row);
  low_latency::end_operation(common);
}

template <int kHidden, int kRanks>
struct Kernel {
  static constexpr auto* function = low_latency_dispatch_kernel<kHidden, kRanks>;
};
const Kernels kernels =
    of_shapes<Kernel>("low-latency dispatch kernel", kMaxShared, CompiledShapes());

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
  int64_t bytes =
      kWarps * Entries::bytes(common.peers.num_ranks, common.num_topk) + Arrivals::bytes(common);
  const bool has_entries = bytes + Arrivals::entry_bytes(common) <= kMaxShared;
  if (has_entries) bytes += Arrivals::entry_bytes(common);
  kernel_for<Kernel>(common, CompiledShapes())<<<common.num_blocks, kThreads, bytes,
                                                 static_cast<cudaStream_t>(stream)>>>(*args,
                                                                                      has_entries);
  return ep::check_cuda(cudaGetLastError(), "ep_low_latency_dispatch");
}
