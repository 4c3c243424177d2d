// Low-latency combine: each rank adds up a token's weighted rows of its experts, and sends one
// partial row to the token's owner, which adds up those of the ranks. Sending and receiving are one
// kernel, or one each.

#include "common/launch.cuh"
#include "low_latency/route.cuh"
#include "low_latency/shapes.cuh"
#include "low_latency/sums.cuh"

namespace {

using namespace ep;
using namespace ep::low_latency;

constexpr int kWarps = 16;
constexpr int kThreads = kWarps * kWarpSize;
// The last warps have the least to send: one does what nobody waits for.
constexpr int kBookkeepingWarp = kWarps - 2;
constexpr int kManyTokens = 64;  // with which more travels than the links take at once
// Rows of a token's experts of which a lane has a word on its way: those of two units.
constexpr int kStages = 2;
constexpr int kRowsOfStage = 8;
constexpr int kStageWords = kRowsOfStage * kWarpSize;
constexpr int kStageBytes = kWarps * kStages * kStageWords * static_cast<int>(sizeof(uint4));

// The last one to get work.
__device__ inline bool is_last_warp() {
  return threadIdx.x / kWarpSize == kWarps - 1 && blockIdx.x == gridDim.x - 1;
}

__device__ inline Header own_header(const ep_low_latency_combine_args& args) {
  const ep_low_latency& common = args.common;
  return {static_cast<uint32_t>(common.num_tokens), static_cast<uint32_t>(common.has_weights != 0),
          args.handle.epochs[0]};
}

// ---- Sending -----------------------------------------------------------------------------------

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

// By the last warp of all: waits for the headers. They say whether all combine the same dispatch;
// rows tell nothing of that.
template <typename Memory>
__device__ inline void check_headers(const ep_low_latency_combine_args& args, const Memory& memory,
                                     const Operation& operation) {
  const int32_t r = lane_id();
  if (r >= memory.num_ranks()) return;
  args.common.peers.record->num_rows[r] = args.handle.num_rows[r];
  if (operation.alive >> r & 1) receive_header(memory, operation, own_header(args), r, true);
}

// The rows that make up a token's partial row: lane k has the k-th, or -1, and its weight if that
// came with the dispatch.
struct Parts {
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
__device__ inline void begin_copies(const uint4* x, int32_t words_of_row, const Parts& parts,
                                    int32_t word, uint4* stage) {
  const int32_t num_rows = min(parts.num_rows(), kRowsOfStage);
#pragma unroll 1
  for (int32_t k = 0; k < num_rows; ++k) {
    const int64_t row = __shfl_sync(kFullWarp, parts.row, k);
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
                                 Parts& parts, const uint4* stage) {
  const int32_t num_rows = parts.num_rows();
  if (num_rows == 0 || !(operation.alive >> source & 1)) return true;
  const bool fine = parts.complete(memory, operation, source, at.t);
  if (!__all_sync(kFullWarp, fine)) return false;
  const int32_t words_of_row = memory.hidden() / kPer, word = at.word();
  const auto* const x = static_cast<const uint4*>(args.x) + word;
  float sums[kPer];
#pragma unroll
  for (int i = 0; i < kPer; ++i) sums[i] = -0.0f;
#pragma unroll 1
  for (int32_t k = 0; k < num_rows; ++k) {
    const int64_t row = __shfl_sync(kFullWarp, parts.row, k);
    const float weight = __shfl_sync(kFullWarp, parts.weight, k);
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

// The owners whose rows a block sends: those behind this rank from the `first`-th on. With many
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
    return memory.rank_behind(unit.source + share.first);
  };
  Units ahead = at;
  Parts next, after_next;
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
    // for, and weights right behind them.
    if (is_last_warp()) check_headers(args, memory, *operation);
    __syncwarp();
  }
#pragma unroll 1
  while (at.t < most_tokens) {
    const Units unit = at;
    Parts parts = next;
    const uint4* const filled = stages + stage * kStageWords;
    at = ahead, next = after_next, stage ^= 1;
    begin_copies(x, words_of_row, next, at.word(), stages + stage * kStageWords);
    ahead.advance();
    after_next.load(args, source_of(ahead), ahead.t);
    ptx::copy_wait<1>();
    if (!send_unit(args, memory, *operation, unit, source_of(unit), parts, filled)) return false;
  }
  return true;
}

// ---- Receiving ---------------------------------------------------------------------------------

// Ranks that token t comes back from.
__device__ inline uint32_t ranks_of(const ep_low_latency_combine_args& args, int32_t t) {
  return t < args.common.num_tokens ? args.handle.ranks[t] : 0;
}

// A lane's words of a unit of the partial rows, loaded, whatever they are by now.
template <int kHidden, int kRanks>
struct Incoming {
  static constexpr int kMaxRanks = kRanks != 0 ? kRanks : EP_MAX_PEERS;

  uint32_t ranks;  // that the token comes back from
  uint4 words[kMaxRanks];

  __device__ void load(const Memory<kHidden, kRanks>& memory, const Operation& operation,
                       const Units& at, uint32_t ranks_of_token) {
    ranks = at.word() < memory.hidden() / kPer ? ranks_of_token & operation.alive : 0;
    memory.delay();
#pragma unroll
    for (int r = 0; r < kMaxRanks; ++r) {
      words[r] = make_uint4(0, 0, 0, 0);
      ptx::load_word_if(ranks >> r & 1, &words[r], slot(memory, operation, at, r));
    }
  }

  // Waits for all that have not come at once. False after a fault.
  __device__ bool wait(const Memory<kHidden, kRanks>& memory, const Operation& operation,
                       const Units& at) {
    const ep_peers& peers = memory.common.peers;
    Wait wait;
    int32_t missing = -1;
    for (;;) {
      const int32_t last = missing;
      missing = -1;
#pragma unroll
      for (int r = 0; r < kMaxRanks; ++r) {
        if (is_waiting(words[r])) missing = r;
      }
      if (last >= 0 && last != missing) wait.has_come(peers, last);
      if (missing < 0) return true;
      if (!wait.goes_on(peers, EP_PHASE_ROWS, missing, operation.epoch)) return false;
#pragma unroll
      for (int r = 0; r < kMaxRanks; ++r) {
        ptx::load_word_if(is_waiting(words[r]), &words[r], slot(memory, operation, at, r));
      }
    }
  }

  __device__ static uint4* slot(const Memory<kHidden, kRanks>& memory, const Operation& operation,
                                const Units& at, int32_t r) {
    return memory.row(memory.rank(), operation.half, r, at.t) + at.word();
  }
};

// One unit of a combined row, by a warp. False after a fault.
template <int kHidden, int kRanks>
__device__ inline bool receive_unit(const ep_low_latency_combine_args& args,
                                    const Memory<kHidden, kRanks>& memory,
                                    const Operation& operation, const Units& at,
                                    Incoming<kHidden, kRanks>& incoming) {
  const int32_t words_of_row = memory.hidden() / kPer;
  const bool fine = incoming.wait(memory, operation, at);
  if (!__all_sync(kFullWarp, fine)) return false;
  float sums[kPer];
#pragma unroll
  for (int i = 0; i < kPer; ++i) sums[i] = incoming.ranks == 0 ? 0.0f : -0.0f;
#pragma unroll
  for (int r = 0; r < incoming.kMaxRanks; ++r) {
    if (!(incoming.ranks >> r & 1)) continue;
    ptx::store_word(incoming.slot(memory, operation, at, r), waiting_word());
    add(sums, incoming.words[r]);
  }
  if (at.word() < words_of_row) {
    ptx::store_global(static_cast<uint4*>(args.combined_x) +
                          static_cast<int64_t>(at.t) * words_of_row + at.word(),
                      pack<__nv_bfloat16>(sums));
  }
  return true;
}

template <int kHidden, int kRanks>
__device__ inline void receive(const ep_low_latency_combine_args& args,
                               const Memory<kHidden, kRanks>& memory, const Operation& operation) {
  // With weights the send has checked them.
  if (is_last_warp() && !args.common.has_weights) check_headers(args, memory, operation);
  __syncwarp();
  // The last warps first, which had the least to send.
  Units at(all_blocks(), kWarps, kWarps - 1 - threadIdx.x / kWarpSize,
           ceil_div<int32_t>(memory.hidden() / kPer, kWarpSize), 1);
  Incoming<kHidden, kRanks> next;
  next.load(memory, operation, at, ranks_of(args, at.t));
#pragma unroll 1
  while (at.t < args.common.num_tokens) {
    const Units unit = at;
    Incoming<kHidden, kRanks> incoming = next;
    at.advance();
    next.load(memory, operation, at, ranks_of(args, at.t));
    if (!receive_unit(args, memory, operation, unit, incoming)) return;
  }
}

// ---- The kernel --------------------------------------------------------------------------------

template <int kHidden, int kRanks>
__global__ void __launch_bounds__(kThreads, 1)
    low_latency_combine_kernel(const __grid_constant__ ep_low_latency_combine_args args) {
  extern __shared__ __align__(16) uint8_t shared[];
  ptx::wait_for_kernel_before();
  ptx::let_next_kernel_start();  // not before: those that wait would pile up
  const ep_low_latency& common = args.common;
  const Memory<kHidden, kRanks> memory(common, weight_words(common.num_topk));
  Operation operation;
  if (!begin_and_send(args, memory, shared, &operation)) return;
  if (common.phases & EP_LOW_LATENCY_RECEIVE) receive(args, memory, operation);
  low_latency::end_operation(common);
}

template <int kHidden, int kRanks>
struct Kernel {
  static constexpr auto* function = low_latency_combine_kernel<kHidden, kRanks>;
};
const Kernels kernels =
    of_shapes<Kernel>("low-latency combine kernel", kStageBytes, CompiledShapes());

}  // namespace

int32_t ep_low_latency_combine(const ep_low_latency_combine_args* args, void* stream) {
  const ep_low_latency& common = args->common;
  const int32_t status = low_latency::check(common);
  if (status != EP_OK) return status;
  const int32_t bytes = common.phases & EP_LOW_LATENCY_SEND ? kStageBytes : 0;
  const cudaError_t error = ep::launch(kernel_for<Kernel>(common, CompiledShapes()),
                                       common.num_blocks, kThreads, bytes, stream, true, *args);
  return ep::check_cuda(error, "ep_low_latency_combine");
}
