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

// Warps have roles: most send rows; the others tell what the rows are, and find out where those
// that come have to go. Then all receive. In a few microseconds what counts is how many
// instructions there are one after the other.
constexpr int kRowWarps = 14;  // with a word a lane as many as 7168 elements of FP8 need
constexpr int kEntryWarps = 4;
constexpr int kWarps = kRowWarps + kEntryWarps;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kEntryThreads = kEntryWarps * kWarpSize;
// The last of the row warps, which has the least to send, does what nobody waits for.
constexpr int kBookkeepingWarp = kRowWarps - 1;
constexpr int kEntryBarrier = 2;  // number of the entry warps' own
// At this one the row warps wait until the entries are sent. Behind rows they would have to wait
// for the links, and the receivers cannot begin without them.
constexpr int kSentBarrier = 3;
constexpr int kItemsAtOnce = 32;  // of a block, whose rows are known at once

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

// What the entry warps send of one token: words that say which experts want it, and its weights.
// What can be is ready before the operation is known.
template <typename Memory>
class Selection {
 public:
  __device__ Selection(const ep_low_latency& common, const Memory& memory)
      : common_(common), memory_(memory) {
    num_expert_words_ = expert_words(common.num_topk);
    num_words_ = num_expert_words_ + (common.has_weights ? weight_words(common.num_topk) : 0);
  }

  __device__ void prepare(int32_t t) {
    t_ = t;
    expert_ = load_expert(common_, t);
    weight_ = load_weight(common_, t);
    route_ = Route();
    route_.find(common_, expert_);
    take(0);
  }

  // To every rank, those that the token does not go to too.
  __device__ void send(const ep_low_latency_dispatch_args& args, const Operation& operation) {
    memory_.delay();
#pragma unroll 1
    for (int32_t first = 0; first < num_words_ * memory_.num_ranks(); first += kWarpSize) {
      if (first != 0) take(first);
      word_.w = operation.epoch;
      if (has_word_ && operation.alive >> to_ & 1) {
        ptx::store_word(memory_.entry(to_, operation.half, memory_.rank(), t_) + j_, word_);
      }
    }
    if (lane_id() == 0) args.handle.ranks[t_] = route_.ranks & operation.alive;
    const bool is_second = route_.is_second();
    if (is_second || route_.is_none) {
      leave_notice(args.notice, is_second ? EP_ROUTING_DUPLICATE : EP_ROUTING_OUT_OF_RANGE, t_,
                   expert_);
    }
  }

 private:
  const ep_low_latency& common_;
  const Memory& memory_;
  int32_t num_expert_words_, num_words_, t_;
  Route route_;
  int64_t expert_;
  float weight_;
  // Of this lane: the j-th word for rank `to`.
  uint4 word_;
  int32_t to_, j_;
  bool has_word_;

  // By the warp: makes the words from the first-th on.
  __device__ void take(int32_t first) {
    const int32_t i = first + lane_id(), behind = i / num_words_;
    j_ = i - behind * num_words_;
    has_word_ = behind < memory_.num_ranks();
    to_ = has_word_ ? memory_.rank_behind(behind + 1) : 0;
    word_ = weight_word(weight_, max(j_ - num_expert_words_, 0));
#pragma unroll 1
    for (int32_t b = 0; b < memory_.num_ranks(); ++b) {
#pragma unroll 1
      for (int32_t j = 0; j < num_expert_words_; ++j) {
        const uint4 word = route_.expert_word(memory_.rank_behind(b + 1), j);
        if (behind == b && j_ == j) word_ = word;
      }
    }
  }
};

// By the entry warps. False after a fault.
template <typename Memory>
__device__ inline bool begin_and_send_entries(const ep_low_latency_dispatch_args& args,
                                              const Memory& memory, const Begin& begin,
                                              Operation* operation) {
  const ep_low_latency& common = args.common;
  const bool sends = common.phases & EP_LOW_LATENCY_SEND;
  const int32_t of_entries = static_cast<int32_t>(threadIdx.x) / kWarpSize - kRowWarps;
  const int32_t num_tokens = sends ? common.num_tokens : 0;
  const int32_t stride = kEntryWarps * gridDim.x;
  int32_t t = of_entries * gridDim.x + blockIdx.x;
  Selection<Memory> selection(common, memory);
  if (t < num_tokens) selection.prepare(t);
  *operation = begin.operation();
  has_read_state(kThreads);
  if (!sends) return operation->can_begin;
  const bool is_fine = operation->can_begin && wait_credits(memory, *operation);
  if (is_fine && of_entries == kEntryWarps - 1 && blockIdx.x == gridDim.x - 1) {
    send_header(memory, *operation, own_header(args));
    if (lane_id() == 0) begin_record(common, *operation, args.handle.epochs);
  }
#pragma unroll 1
  while (is_fine && t < num_tokens) {
    selection.send(args, *operation);
    t += stride;
    if (t < num_tokens) selection.prepare(t);
  }
  ptx::named_arrive(kSentBarrier, kThreads);
  return is_fine;
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

// A lane's part of a unit of a row, loaded: what becomes a word; and, as lane k, the token's k-th
// expert.
struct Source {
  uint4 bits[2];
  int64_t expert;

  __device__ void load(const ep_low_latency_dispatch_args& args, int32_t hidden, const Units& at) {
    const bool is_bf16 = args.format == EP_LOW_LATENCY_BF16;
    const bool is_there = at.word() < hidden / (is_bf16 ? 8 : 16);
    const auto* const x = static_cast<const uint4*>(args.x) +
                          static_cast<int64_t>(at.t) * (hidden / 8) +
                          (is_bf16 ? at.word() : 2 * at.word());
    bits[0] = bits[1] = make_uint4(0, 0, 0, 0);
    ptx::load_global_if(is_there, &bits[0], x);
    ptx::load_global_if(is_there && !is_bf16, &bits[1], x + 1);
    expert = load_expert(args.common, at.t);
  }
};

// By the row warps. The first unit is ready before the warp knows the operation. False after a
// fault.
template <typename Memory>
__device__ inline bool begin_and_send_rows(const ep_low_latency_dispatch_args& args,
                                           const Memory& memory, const Begin& begin,
                                           const RowWords& row, Operation* operation) {
  const ep_low_latency& common = args.common;
  const bool sends = common.phases & EP_LOW_LATENCY_SEND;
  const int32_t num_tokens = sends ? common.num_tokens : 0;
  const bool is_bf16 = args.format == EP_LOW_LATENCY_BF16;
  const bool keeps_books = threadIdx.x / kWarpSize == kBookkeepingWarp;
  bool has_begun = false;
  Units at(all_blocks(), kRowWarps, threadIdx.x / kWarpSize, ceil_div<int32_t>(row.data, kWarpSize),
           1);
  Source next;
  if (at.t < num_tokens) next.load(args, memory.hidden(), at);
#pragma unroll 1
  for (;;) {
    const Units unit = at;
    const Source source = next;
    at.advance();
    if (at.t < num_tokens) next.load(args, memory.hidden(), at);  // on its way meanwhile

    const bool is_there = unit.t < num_tokens, has_word = unit.word() < row.data;
    Route route;
    uint4 word = source.bits[0], scales{};
    if (is_there) {
      route.find(common, source.expert);
      if (is_bf16) {
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
    }
    if (!has_begun) {
      has_begun = true;
      *operation = begin.operation();
      if (!keeps_books) has_read_state(kThreads);
      const bool exchanges = keeps_books && blockIdx.x == gridDim.x - 1;
      // Entries may have to wait for a credit, and so this rank's own credits may not wait for
      // them.
      if (sends && exchanges) ptx::named_arrive(kSentBarrier, kThreads);
      if (sends && !exchanges) ptx::named_barrier(kSentBarrier, kThreads);
      if (!operation->can_begin) break;
      if (exchanges) exchange_credits(memory, begin, *operation);
      if (!sends || !wait_credits(memory, *operation)) break;
    }
    if (!is_there) break;
    memory.delay();
    for_ranks(memory, route.ranks & operation->alive, [&](int32_t r) {
      uint4* const slot = memory.row(r, operation->half, memory.rank(), unit.t);
      if (has_word) ptx::store_word(slot + unit.word(), word);
      if (lane_id() == 0 && !is_bf16) ptx::store_word(slot + row.data + unit.unit, scales);
    });
  }
  if (keeps_books) count_operation(common, begin, *operation, kThreads);
  return operation->can_begin;
}

// ---- Receiving ---------------------------------------------------------------------------------

constexpr int32_t kNotKnown = INT32_MAX;

// What came, in shared memory of a block. Bit n = source * M + token of an expert's line: it gets
// that row. The place of a row among its expert's is the number of bits before it.
class Arrivals {
 public:
  volatile int32_t* num_tokens;  // [R]; kNotKnown before the header is there
  int32_t* num_rows;             // [R] that came from each rank
  int32_t* rows;                 // [kItemsAtOnce, K] of recv_x that an item becomes, or -1

  static __host__ __device__ int64_t bytes(const ep_low_latency& common) {
    return 8 * EP_MAX_PEERS + row_bytes(common.num_topk) +
           16ll * common.num_local_experts * groups_of(common);
  }
  static __host__ __device__ int64_t entry_bytes(const ep_low_latency& common) {
    return 16ll * common.peers.num_ranks * common.max_tokens * expert_words(common.num_topk);
  }
  // shared: bytes(), then entry_bytes() where has_entries.
  __device__ Arrivals(uint8_t* shared, const ep_low_latency& common, bool has_entries)
      : num_tokens(reinterpret_cast<int32_t*>(shared)),
        num_rows(reinterpret_cast<int32_t*>(shared) + EP_MAX_PEERS),
        rows(num_rows + EP_MAX_PEERS),
        lines_(reinterpret_cast<uint4*>(shared + 8 * EP_MAX_PEERS + row_bytes(common.num_topk))),
        groups_(groups_of(common)),
        entries_(has_entries ? lines_ + common.num_local_experts * groups_ : nullptr) {}

  // By the entry warps, before they meet. `thread` is the number of one among them.
  __device__ void clear(int32_t num_local_experts, int32_t thread) const {
#pragma unroll 1
    for (int32_t i = thread; i < num_local_experts * groups_; i += kEntryThreads) {
      lines_[i] = make_uint4(0, 0, 0, 0);
    }
    if (thread < EP_MAX_PEERS) {
      num_rows[thread] = 0;
      num_tokens[thread] = kNotKnown;
    }
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
    for (; n >= 128; n -= 128, ++line) {
      count += __popc(line->x) + __popc(line->y) + __popc(line->z) + __popc(line->w);
    }
    if (n == 0) return count;
    const uint64_t low = static_cast<uint64_t>(line->y) << 32 | line->x;
    const uint64_t high = static_cast<uint64_t>(line->w) << 32 | line->z;
    const uint64_t before = (1ull << (n & 63)) - 1;
    return count + (n < 64 ? __popcll(low & before) : __popcll(low) + __popcll(high & before));
  }

  // Once all headers are there. After a fault some may not be.
  __device__ int32_t most_tokens(int32_t num_ranks) const {
    int32_t most = 0;
    for (int32_t r = 0; r < num_ranks; ++r) {
      if (num_tokens[r] != kNotKnown) most = max(most, num_tokens[r]);
    }
    return most;
  }

  // The words with the experts of row n, where they are kept here; else nullptr.
  __device__ uint4* entry(int32_t n, int32_t words) const {
    return entries_ == nullptr ? nullptr : entries_ + n * words;
  }

 private:
  uint4* lines_;  // [E, groups of 128 bits]
  int32_t groups_;
  uint4* entries_;  // [R, M, words]

  static constexpr __host__ __device__ int32_t row_bytes(int32_t num_topk) {
    return kItemsAtOnce * num_topk * static_cast<int32_t>(sizeof(int32_t));
  }
  static __host__ __device__ int32_t groups_of(const ep_low_latency& common) {
    return ceil_div<int32_t>(common.peers.num_ranks * common.max_tokens, 128);
  }
};

// Tokens of the ranks, rows, lines of whole groups.
static_assert(8 * EP_MAX_PEERS + 4 * kItemsAtOnce * EP_MAX_TOPK + EP_LOW_LATENCY_MAX_PLACES / 8 +
                  16 * EP_MAX_LOCAL_EXPERTS <=
              kMaxShared);

// Waits for a word of the entry of a token, which is there or not: that is known when the header of
// its rank has come. Returns whether it is; *fine becomes false after a fault.
__device__ inline bool wait_for_entry(const ep_peers& peers, const uint4* from, uint4* word,
                                      const volatile int32_t* num_tokens, int32_t t, int32_t source,
                                      uint32_t epoch, bool* fine) {
  if (word->w == epoch) return true;
  Wait wait;
  do {
    if (t >= *num_tokens) return false;
    if (!wait.goes_on(peers, EP_PHASE_PLAN, source, epoch)) {
      *fine = false;
      return false;
    }
    *word = ptx::load_word(from);
  } while (word->w != epoch);
  wait.has_come(peers, source);
  return true;
}

// By the entry warps: waits for every rank's header and entries. False, for some of them, after a
// fault.
template <typename Memory>
__device__ inline bool collect(const ep_low_latency_dispatch_args& args, const Memory& memory,
                               const Operation& operation, const Arrivals& arrivals) {
  const ep_low_latency& common = args.common;
  const int32_t words = expert_words(common.num_topk);
  bool fine = true;
  // The last warp looks for headers first.
  const int32_t thread = threadIdx.x - kRowWarps * kWarpSize;
  const int32_t of_warp = threadIdx.x - (kThreads - kWarpSize);
  if (of_warp >= 0 && of_warp < memory.num_ranks()) {
    int32_t num_tokens = 0;
    if (operation.alive >> of_warp & 1) {
      num_tokens = receive_header(memory, operation, own_header(args), of_warp, blockIdx.x == 0);
    }
    fine = num_tokens >= 0;
    arrivals.num_tokens[of_warp] = max(num_tokens, 0);
  }
#pragma unroll 1
  for (int32_t n = thread; n < memory.num_ranks() * common.max_tokens; n += kEntryThreads) {
    const int32_t source = n / common.max_tokens, t = n - source * common.max_tokens;
    if (!(operation.alive >> source & 1)) continue;  // whatever it may still write
    const uint4* const entry = memory.entry(memory.rank(), operation.half, source, t);
    bool has_row = false;
#pragma unroll 1
    for (int32_t j = 0; j < words; ++j) {
      uint4 word = ptx::load_word(entry + j);
      if (!wait_for_entry(common.peers, entry + j, &word, arrivals.num_tokens + source, t, source,
                          operation.epoch, &fine)) {
        break;
      }
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
  return fine;
}

// After a fault that a block has seen in time: nothing has come, for what reads the outputs.
__device__ inline void leave_nothing(const ep_low_latency_dispatch_args& args) {
  const ep_low_latency& common = args.common;
#pragma unroll 1
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
  for (int32_t e = (kThreads - 1 - threadIdx.x) * gridDim.x + blockIdx.x;
       e < common.num_local_experts; e += kThreads * gridDim.x) {
    const int32_t count = arrivals.before(e, num_places);
    args.recv_count[e] = count;
    if (args.recv_stats != nullptr) args.recv_stats[e] += count;
  }
  const int32_t r = kThreads - 1 - threadIdx.x;
  if (blockIdx.x != 0 || r >= num_ranks) return;
  args.handle.num_tokens[r] = arrivals.num_tokens[r];
  args.handle.num_rows[r] = common.peers.record->num_rows[r] = arrivals.num_rows[r];
}

// Stores the four scales of a word: column-major, rows next to each other.
__device__ inline void store_scales(const ep_low_latency_dispatch_args& args, int32_t hidden,
                                    int64_t row, int32_t index, const uint4& word) {
  const ep_low_latency& common = args.common;
  const int32_t num_rows = common.peers.num_ranks * common.max_tokens;
  const int32_t expert = row / num_rows, place = row - expert * num_rows;
  const int32_t blocks = hidden / kScaleBlock;
  const uint32_t scales[kScalesOfWord] = {word.x, word.y, word.z, word.w};
  auto* const out = static_cast<uint32_t*>(args.recv_scales);
  if (args.format == EP_LOW_LATENCY_UE8M0) {
    uint32_t exponents = 0;
#pragma unroll
    for (int i = 0; i < kScalesOfWord; ++i) exponents |= (scales[i] >> 23 & 0xff) << (8 * i);
    out[static_cast<int64_t>(expert * (blocks / 4) + index) * args.scale_stride + place] =
        exponents;
    return;
  }
#pragma unroll
  for (int i = 0; i < kScalesOfWord; ++i) {
    const int32_t block = index * kScalesOfWord + i;
    if (block >= blocks) break;
    out[static_cast<int64_t>(expert * blocks + block) * args.scale_stride + place] = scales[i];
  }
}

// The row of recv_x that lane k's expert of a row has it in; -1 where there is none.
template <typename Memory>
__device__ inline int32_t find_row(const ep_low_latency& common, const Memory& memory,
                                   const Operation& operation, const Arrivals& arrivals,
                                   int32_t source, int32_t t) {
  const int32_t words = expert_words(common.num_topk),
                num_places = memory.num_ranks() * common.max_tokens;
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

// The receiver's work of a block, cut into items: a part of a row each, so many that every SM has
// one. Own rows are the first of each token's: they are there.
class Items {
 public:
  struct Item {
    int32_t t, source, first_word, end_word;
  };

  // num_tokens: what the other ranks may have too. There may be room for many more.
  __device__ Items(int32_t num_ranks, int32_t num_tokens, int32_t max_tokens, int32_t words_of_row)
      : num_ranks_(num_ranks), words_of_row_(words_of_row) {
    const int32_t rows = num_ranks * max(num_tokens, 1);
    const int32_t units = ceil_div<int32_t>(words_of_row, kWarpSize);
    parts_ = max(1, min(static_cast<int32_t>(gridDim.x) / rows, units));
    units_of_item_ = ceil_div<int32_t>(units, parts_);
    end_at(max_tokens);
  }

  // No rank has more tokens.
  __device__ void end_at(int32_t most_tokens) {
    const int32_t left = num_ranks_ * most_tokens * parts_ - static_cast<int32_t>(blockIdx.x);
    count_ = left <= 0 ? 0 : ceil_div<int32_t>(left, gridDim.x);
  }

  __device__ int32_t count() const { return count_; }
  __device__ int32_t units_of_item() const { return units_of_item_; }

  // The i-th of this block. `source` counts from the own rank on.
  __device__ Item at(int32_t i) const {
    const int32_t item = i * gridDim.x + blockIdx.x;
    const int32_t row = item / parts_, part = item - row * parts_;
    const int32_t t = row / num_ranks_, first = part * units_of_item_ * kWarpSize;
    return {t, row - t * num_ranks_, first, min(first + units_of_item_ * kWarpSize, words_of_row_)};
  }

 private:
  int32_t num_ranks_, words_of_row_, parts_, units_of_item_, count_;
};

// By the entry warps: finds the rows of recv_x that become of the items from `first` on.
template <typename Memory>
__device__ inline void find_rows(const ep_low_latency& common, const Memory& memory,
                                 const Operation& operation, const Arrivals& arrivals,
                                 const Items& items, int32_t first) {
  const int32_t of_entries = threadIdx.x / kWarpSize - kRowWarps;
  const int32_t count = min(items.count() - first, kItemsAtOnce);
#pragma unroll 1
  for (int32_t i = of_entries; i < count; i += kEntryWarps) {
    const Items::Item item = items.at(first + i);
    const int32_t source = memory.rank_behind(item.source);
    int32_t row = -1;
    if (item.t < arrivals.num_tokens[source]) {
      row = find_row(common, memory, operation, arrivals, source, item.t);
    }
    // Those that there are, then as many -1 as there are none.
    const uint32_t lanes = __ballot_sync(kFullWarp, row >= 0), below = (1u << lane_id()) - 1;
    const int32_t place = row >= 0 ? __popc(lanes & below) : __popc(lanes) + __popc(~lanes & below);
    if (lane_id() < common.num_topk) arrivals.rows[i * common.num_topk + place] = row;
  }
}

// By the entry warps: keeps for combine where the experts of the items' rows have them, and the
// weights. False after a fault.
template <typename Memory>
__device__ inline bool keep_rows(const ep_low_latency_dispatch_args& args, const Memory& memory,
                                 const Operation& operation, const Arrivals& arrivals,
                                 const Items& items, int32_t first) {
  const ep_low_latency& common = args.common;
  const int32_t lane = lane_id(), of_entries = threadIdx.x / kWarpSize - kRowWarps;
  const int32_t count = min(items.count() - first, kItemsAtOnce);
  bool fine = true;
#pragma unroll 1
  for (int32_t i = of_entries; i < count; i += kEntryWarps) {
    const Items::Item item = items.at(first + i);
    const int32_t source = memory.rank_behind(item.source);
    if (item.first_word != 0 || item.t >= arrivals.num_tokens[source]) continue;
    const int32_t row = find_row(common, memory, operation, arrivals, source, item.t);
    const uint32_t order = row;  // none is the largest
    int32_t place = 0;
#pragma unroll 1
    for (int32_t k = 0; k < common.num_topk; ++k) {
      const uint32_t other = __shfl_sync(kFullWarp, order, k);
      place += other < order || (other == order && k < lane);
    }
    if (lane >= common.num_topk) continue;
    const int32_t n = source * common.max_tokens + item.t;
    const int64_t at = static_cast<int64_t>(n) * common.num_topk + place;
    args.handle.rows[at] = row < 0 ? -1 : row | lane << kRowBits;
    if (row >= 0) args.recv_src_info[row] = n;
    if (!common.has_weights) continue;
    const uint4* const from = memory.entry(memory.rank(), operation.half, source, item.t) +
                              expert_words(common.num_topk) + lane / kWeightsOfWord;
    uint4 word = ptx::load_word(from);
    fine = fine && wait_for_stamp(common.peers, from, &word, source, operation.epoch);
    if (!fine) continue;
    args.handle.weights[at] = __uint_as_float(weight_of_word(word, lane % kWeightsOfWord));
  }
  return __all_sync(kFullWarp, fine);
}

// What a warp receives: units of items, one after the other, this lane's word of each.
template <typename Memory>
class Receiver {
 public:
  __device__ Receiver(const ep_low_latency_dispatch_args& args, const Memory& memory,
                      const Operation& operation, const RowWords& row, const Items& items)
      : args_(args), memory_(memory), operation_(operation), row_(row), items_(items) {
    const int32_t units = items.units_of_item(), warp = threadIdx.x / kWarpSize;
    i_ = warp / units, unit_ = warp - i_ * units;
    step_i_ = kWarps / units, step_unit_ = kWarps - step_i_ * units;
    load();
  }

  // Those of the items before `end`, whose rows are known. False after a fault.
  __device__ bool receive(const Arrivals& arrivals, int32_t first, int32_t end) {
    const int32_t num_topk = args_.common.num_topk;
#pragma unroll 1
    while (i_ < end) {
      const int32_t t = item_.t, source = memory_.rank_behind(item_.source), at = word_;
      const bool is_in_item = at < item_.end_word;
      const int32_t* const rows = arrivals.rows + (i_ - first) * num_topk;
      uint4 word = incoming_;
      advance();
      load();  // on its way meanwhile

      const int32_t to = lane_id() < num_topk ? rows[lane_id()] : -1;
      const int32_t num_experts = __popc(__ballot_sync(kFullWarp, to >= 0));
      const bool has_word = num_experts != 0 && is_in_item;
      uint4* const from = slot(source, t) + at;
      bool fine = true;
      if (has_word) {
        fine = wait_for_word(args_.common.peers, from, &word, source, operation_.epoch);
      }
      if (!__all_sync(kFullWarp, fine)) return false;
      if (has_word) ptx::store_word(from, waiting_word());
#pragma unroll 1
      for (int32_t k = 0; k < num_experts; ++k) {
        if (!has_word) break;
        const int32_t row = rows[k];
        if (at < row_.data) {
          auto* const out = static_cast<uint4*>(args_.recv_x);
          ptx::store_global(out + static_cast<int64_t>(row) * row_.data + at, word);
        } else {
          store_scales(args_, memory_.hidden(), row, at - row_.data, word);
        }
      }
    }
    return true;
  }

 private:
  const ep_low_latency_dispatch_args& args_;
  const Memory& memory_;
  const Operation& operation_;
  const RowWords& row_;
  const Items& items_;
  int32_t i_, unit_, step_i_, step_unit_;
  Items::Item item_;
  int32_t word_;
  uint4 incoming_;  // whatever is there by now

  __device__ uint4* slot(int32_t source, int32_t t) const {
    return memory_.row(memory_.rank(), operation_.half, source, t);
  }
  __device__ void load() {
    if (i_ >= items_.count()) return;
    item_ = items_.at(i_);
    word_ = item_.first_word + unit_ * kWarpSize + lane_id();
    memory_.delay();
    ptx::load_word_if(word_ < item_.end_word, &incoming_,
                      slot(memory_.rank_behind(item_.source), item_.t) + word_);
  }
  __device__ void advance() {
    i_ += step_i_, unit_ += step_unit_;
    if (unit_ < items_.units_of_item()) return;
    unit_ -= items_.units_of_item(), ++i_;
  }
};

// By all warps of a block. is_fine: for this one, so far.
template <typename Memory>
__device__ inline void receive(const ep_low_latency_dispatch_args& args, const Memory& memory,
                               const Operation& operation, const Arrivals& arrivals,
                               const RowWords& row, bool is_fine) {
  const ep_low_latency& common = args.common;
  const bool is_entry_warp = threadIdx.x >= kRowWarps * kWarpSize;
  Items items(memory.num_ranks(), common.num_tokens, common.max_tokens, row.all);
  Receiver<Memory> receiver(args, memory, operation, row, items);
  if (is_entry_warp) {
    arrivals.clear(common.num_local_experts, threadIdx.x - kRowWarps * kWarpSize);
    ptx::named_barrier(kEntryBarrier, kEntryThreads);
    if (is_fine) is_fine = collect(args, memory, operation, arrivals);
    __syncwarp();
    ptx::named_barrier(kEntryBarrier, kEntryThreads);
    items.end_at(arrivals.most_tokens(memory.num_ranks()));
  }
#pragma unroll 1
  for (int32_t first = 0;; first += kItemsAtOnce) {
    if (is_entry_warp) find_rows(common, memory, operation, arrivals, items, first);
    if (!__syncthreads_and(is_fine)) {
      leave_nothing(args);
      return;
    }
    if (!is_entry_warp) items.end_at(arrivals.most_tokens(memory.num_ranks()));
    const int32_t end = min(first + kItemsAtOnce, items.count());
    if (is_entry_warp) {
      is_fine = keep_rows(args, memory, operation, arrivals, items, first);
    }
    is_fine = is_fine && receiver.receive(arrivals, first, end);
    if (first + kItemsAtOnce >= items.count()) break;
    __syncthreads();  // all have read the rows
  }
  write_counts(args, memory.num_ranks(), arrivals);
}

// ---- The kernel --------------------------------------------------------------------------------

template <int kHidden, int kRanks>
__global__ void __launch_bounds__(kThreads, 1)
    low_latency_dispatch_kernel(const __grid_constant__ ep_low_latency_dispatch_args args,
                                bool has_entries) {
  extern __shared__ __align__(16) uint8_t shared[];
  ptx::wait_for_kernel_before();
  ptx::let_next_kernel_start();  // not before: those that wait would pile up
  const ep_low_latency& common = args.common;
  const Begin begin(common, args.handle.epochs);
  const Memory<kHidden, kRanks> memory(
      common, expert_words(common.num_topk) + weight_words(common.num_topk));
  const RowWords row(memory.hidden(), args.format);
  const Arrivals arrivals(shared, common, has_entries);
  Operation operation;
  bool is_fine;
  if (threadIdx.x < kRowWarps * kWarpSize) {
    is_fine = begin_and_send_rows(args, memory, begin, row, &operation);
  } else {
    is_fine = begin_and_send_entries(args, memory, begin, &operation);
  }
  if (common.phases & EP_LOW_LATENCY_RECEIVE) {
    receive(args, memory, operation, arrivals, row, is_fine);
  }
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
  int64_t bytes = Arrivals::bytes(common);
  const bool has_entries = bytes + Arrivals::entry_bytes(common) <= kMaxShared;
  if (has_entries) bytes += Arrivals::entry_bytes(common);
  const cudaError_t error =
      ep::launch_early(kernel_for<Kernel>(common, CompiledShapes()), common.num_blocks, kThreads,
                       bytes, stream, *args, has_entries);
  return ep::check_cuda(error, "ep_low_latency_dispatch");
}
