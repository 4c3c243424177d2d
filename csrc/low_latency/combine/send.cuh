// Low-latency combine, sending: the weighted rows of a token's experts, added up, to its owner.
#pragma once

#include "low_latency/combine/roles.cuh"
#include "low_latency/route.cuh"
#include "low_latency/sums.cuh"

namespace ep::low_latency::combine {

constexpr int kManyTokens = 64;  // with which more travels than the links take at once
// A warp copies the rows of its next unit into one stage while it adds up those in the other. Rows
// for which a stage has no room are loaded when they are added.
constexpr int kStages = 2;
constexpr int kRowsOfStage = 8;
constexpr int kStageWords = kRowsOfStage * kWarpSize;
constexpr int kStageBytes = kWarps * kStages * kStageWords * static_cast<int>(sizeof(uint4));

// Weights that are given to combine go to the experts' ranks first. By the last warps, which have
// the fewest rows.
template <typename Memory>
__device__ inline void send_weights(const ep_low_latency_combine_args& args, const Memory& memory,
                                    const Operation& operation) {
  const ep_low_latency& common = args.common;
  const int32_t num_tokens = common.num_tokens, num_topk = common.num_topk;
  const int32_t count = weight_words(num_topk) * memory.num_ranks() * num_tokens;
  const int32_t warp = threadIdx.x / kWarpSize * gridDim.x + blockIdx.x;
  const int32_t num_warps = kWarps * gridDim.x;
#pragma unroll 1
  for (int32_t i = (num_warps - 1 - warp) * kWarpSize + lane_id(); i < count;
       i += num_warps * kWarpSize) {
    const EntryWord at(memory, num_tokens, i);
    if (!((args.handle.ranks[at.t] & operation.alive) >> at.to & 1)) continue;
    const int32_t k = at.j * kWeightsOfWord;
    uint4 word =
        weight_word(common.weights + static_cast<int64_t>(at.t) * num_topk + k, num_topk - k);
    word.w = operation.epoch;
    memory.delay();
    ptx::store_word(memory.entry(at.to, operation.half, memory.rank(), at.t) + at.j, word);
  }
  __syncwarp();
}

// The rows whose weighted sum is a token's partial row: lane k has the k-th, or -1, and its weight
// if that came with the dispatch.
struct Terms {
  int32_t row = -1;
  int32_t k = 0;  // which of the token's top-k it is
  float weight = 0.0f;

  __device__ void load(const ep_low_latency_combine_args& args, int32_t source, int32_t t) {
    const ep_low_latency& common = args.common;
    row = -1;
    if (t >= common.max_tokens || lane_id() >= common.num_topk) return;
    const int64_t i =
        (static_cast<int64_t>(source) * common.max_tokens + t) * common.num_topk + lane_id();
    const int32_t num_tokens = args.handle.num_tokens[source];
    const int32_t found = args.handle.rows[i];  // nothing, where there is no such token
    if (!common.has_weights) weight = args.handle.weights[i];
    const int32_t at = found & ((1 << kRowBits) - 1);
    const int32_t num_places =
        common.num_local_experts * common.peers.num_ranks * common.max_tokens;
    // After a fault of the dispatch anything may stand there: it is looked at before that is known.
    if (t >= num_tokens || found < 0 || at >= num_places) return;
    row = at, k = found >> kRowBits;
  }

  __device__ int32_t num_rows() const { return __popc(__ballot_sync(kFullWarp, row >= 0)); }

  // Waits for a weight that is given to combine. False after a fault.
  template <typename Memory>
  __device__ bool complete(const Memory& memory, const Operation& operation, int32_t source,
                           int32_t t) {
    if (!memory.common.has_weights || row < 0) return true;
    const uint4* const from =
        memory.entry(memory.rank(), operation.half, source, t) + k / kWeightsOfWord;
    memory.delay();
    uint4 word = ptx::load_word(from);
    if (!wait_for_stamp(memory.common.peers, from, &word, source, operation.epoch)) return false;
    weight = __uint_as_float(weight_of_word(word, k % kWeightsOfWord));
    return true;
  }
};

// Begins to copy this lane's words of the rows into a stage, those for which there is room.
__device__ inline void begin_copies(const uint4* x, int32_t words_of_row, const Terms& terms,
                                    int32_t word, uint4* stage) {
  const int32_t num_rows = min(terms.num_rows(), kRowsOfStage);
#pragma unroll 1
  for (int32_t k = 0; k < num_rows; ++k) {
    const int64_t row = __shfl_sync(kFullWarp, terms.row, k);
    if (word < words_of_row) {
      ptx::copy_word(stage + k * kWarpSize + lane_id(), x + row * words_of_row + word);
    }
  }
  ptx::copy_commit();
}

// Sums a unit of a token's partial row, and sends it. By a warp; false after a fault.
template <typename Memory>
__device__ inline bool send_unit(const ep_low_latency_combine_args& args, const Memory& memory,
                                 const Operation& operation, const Units& at, int32_t source,
                                 Terms& terms, const uint4* stage) {
  const int32_t num_rows = terms.num_rows();
  if (num_rows == 0 || !(operation.alive >> source & 1)) return true;
  const bool fine = terms.complete(memory, operation, source, at.t);
  if (!__all_sync(kFullWarp, fine)) return false;
  const int32_t words_of_row = memory.hidden() / kPer, word = at.word();
  const auto* const x = static_cast<const uint4*>(args.x) + word;
  float sums[kPer];
#pragma unroll
  for (int i = 0; i < kPer; ++i) sums[i] = -0.0f;
#pragma unroll 1
  for (int32_t k = 0; k < num_rows; ++k) {
    const int64_t row = __shfl_sync(kFullWarp, terms.row, k);
    const float weight = __shfl_sync(kFullWarp, terms.weight, k);
    if (word >= words_of_row) continue;
    uint4 bits;
    if (k < kRowsOfStage) {
      bits = stage[k * kWarpSize + lane_id()];
    } else {
      ptx::load_global_if(true, &bits, x + row * words_of_row);
    }
    add(sums, bits, weight);
  }
  memory.delay();
  // A rounded NaN is 0x7fff: no word is the waiting pattern.
  if (word < words_of_row) {
    ptx::store_word(memory.row(source, operation.half, memory.rank(), at.t) + word,
                    pack<__nv_bfloat16>(sums));
  }
  return true;
}

// The owners whose rows a block sends: those after this rank from the `first`-th on. With many
// tokens some blocks send what travels, and the others the own rows.
struct Share {
  Part part;
  int32_t first, num_sources;

  template <typename Memory>
  __device__ explicit Share(const Memory& memory)
      : part(all_blocks()), first(1), num_sources(memory.num_ranks()) {
    const int32_t num_ranks = num_sources, num_blocks = part.num_blocks;
    if (num_ranks == 1 || num_blocks == 1 || memory.common.max_tokens < kManyTokens) return;
    const int32_t travelling =
        max(1, min(num_blocks * (num_ranks - 1) / num_ranks, num_blocks - 1));
    if (part.block < travelling) {
      part.num_blocks = travelling, num_sources = num_ranks - 1;
    } else {
      part = {num_blocks - travelling, part.block - travelling};
      first = num_ranks, num_sources = 1;
    }
  }
};

// Begins the operation, and sends. Rows that are added are on their way before the block learns
// which operation it is part of. False after a fault.
template <typename Memory>
__device__ inline bool begin_and_send(const ep_low_latency_combine_args& args, const Memory& memory,
                                      uint8_t* shared, Operation* operation) {
  const ep_low_latency& common = args.common;
  const Begin begin(common, args.handle.epochs);
  const bool sends = common.phases & EP_LOW_LATENCY_SEND;
  const int32_t words_of_row = memory.hidden() / kPer, warp = threadIdx.x / kWarpSize;
  const auto* const x = static_cast<const uint4*>(args.x);
  uint4* const stages = reinterpret_cast<uint4*>(shared) + warp * kStages * kStageWords;
  const int32_t units_of_row = ceil_div<int32_t>(words_of_row, kWarpSize);
  const Share share(memory);
  Units at(share.part, kWarps, warp, units_of_row, share.num_sources);
  const auto source_of = [&](const Units& unit) {
    return memory.rank_after(unit.source + share.first);
  };
  Units ahead = at;
  Terms next, after_next;
  int32_t most_tokens = 0, stage = 0;
  if (sends) {
    next.load(args, source_of(at), at.t);
    for (int32_t r = 0; r < memory.num_ranks(); ++r) {
      most_tokens = max(most_tokens, args.handle.num_tokens[r]);
    }
    ahead.advance();
    after_next.load(args, source_of(ahead), ahead.t);
    begin_copies(x, words_of_row, next, at.word(), stages);
  }
  *operation = begin.operation();
  const bool keeps_books = warp == kBookkeepingWarp;
  if (!keeps_books) has_read_state(kThreads);
  if (keeps_books && operation->can_begin && blockIdx.x == gridDim.x - 1) {
    exchange_credits(memory, begin, *operation);
  }
  if (keeps_books) count_operation(common, begin, *operation, kThreads);
  if (!operation->can_begin) return false;
  if (!sends) return true;
  if (!wait_credits(memory, *operation)) return false;
  if (is_last_warp()) {
    send_header(memory, *operation, own_header(args));
    if (lane_id() == 0) begin_record(common, *operation, args.handle.epochs);
  }
  if (common.has_weights) {
    send_weights(args, memory, *operation);
    // Before anybody waits for weights of a rank that sends none: headers come without being asked
    // for, and weights right after them.
    if (is_last_warp()) check_headers(args, memory, *operation);
    __syncwarp();
  }
#pragma unroll 1
  while (at.t < most_tokens) {
    const Units unit = at;
    Terms terms = next;
    const uint4* const filled = stages + stage * kStageWords;
    at = ahead, next = after_next, stage ^= 1;
    begin_copies(x, words_of_row, next, at.word(), stages + stage * kStageWords);
    ahead.advance();
    after_next.load(args, source_of(ahead), ahead.t);
    ptx::copy_wait<1>();
    if (!send_unit(args, memory, *operation, unit, source_of(unit), terms, filled)) return false;
  }
  return true;
}

}  // namespace ep::low_latency::combine
