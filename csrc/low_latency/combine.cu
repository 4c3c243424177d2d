// Low-latency combine: each rank adds up a token's weighted rows of its experts, and sends one
// partial row to the token's owner, which adds up those of the ranks. Sending and receiving are one
// kernel, or one each.

#include "common/launch.cuh"
#include "common/vectors.cuh"
#include "low_latency/route.cuh"
#include "low_latency/shapes.cuh"

namespace {

using namespace ep;
using namespace ep::low_latency;

constexpr int kPer = kPerVector<__nv_bfloat16>;
constexpr int kRowsAtOnce = 8;  // of a token's experts, of which a lane loads a word each
constexpr int kMaxShared = kWarps * Entries::bytes(EP_MAX_PEERS, EP_MAX_TOPK);

// Adds to a sum that begins at -0: then the first term is what it is, whatever that is.
__device__ inline void add(float (&sums)[kPer], const uint4& word) {
  float values[kPer];
  unpack<__nv_bfloat16>(word, values);
#pragma unroll
  for (int i = 0; i < kPer; ++i) sums[i] = __fadd_rn(sums[i], values[i]);
}

__device__ inline void add(float (&sums)[kPer], const uint4& word, float weight) {
  float values[kPer];
  unpack<__nv_bfloat16>(word, values);
#pragma unroll
  for (int i = 0; i < kPer; ++i) sums[i] = __fadd_rn(sums[i], __fmul_rn(weight, values[i]));
}

__device__ inline Header own_header(const ep_low_latency_combine_args& args) {
  const ep_low_latency& common = args.common;
  return {static_cast<uint32_t>(common.num_tokens), static_cast<uint32_t>(common.has_weights != 0),
          args.handle.epochs[0]};
}

// ---- Sending -----------------------------------------------------------------------------------

// Weights that are given to combine go to the experts' ranks first.
template <typename Memory>
__device__ inline void send_weights(const Memory& memory, const Operation& operation,
                                    Entries& entries, int32_t first, int32_t stride) {
  const ep_low_latency& common = memory.common;
  const int32_t words = weight_words(common.num_topk);
#pragma unroll 1
  for (int32_t t = first; t < common.num_tokens; t += stride) {
    Route route(common, operation.alive, load_expert(common, t));
    route.find_places(common.num_topk);
    entries.fill(route, memory.num_ranks(), load_weight(common, t));
#pragma unroll 1
    for (int32_t i = lane_id(); i < words * memory.num_ranks(); i += kWarpSize) {
      const int32_t which = i / words, j = i - which * words;
      const int32_t r = memory.rank_behind(which + 1);
      if (!(route.ranks >> r & 1)) continue;
      delay(common.peers);
      ptx::store_word(memory.entry(r, operation.half, memory.rank(), t) + j,
                      entries.weight_word(r, j, operation.epoch));
    }
  }
}

// Which rows make up a token's partial row, loaded: lane k has the k-th, and its weight, or the
// word in which that is to come.
struct Parts {
  int32_t row;
  float weight;
  uint4 word;

  template <typename Memory>
  __device__ void load(const ep_low_latency_combine_args& args, const Memory& memory, int32_t half,
                       int32_t source, int32_t t) {
    const ep_low_latency& common = args.common;
    row = -1;
    if (lane_id() >= common.num_topk) return;
    const int64_t n = static_cast<int64_t>(source) * common.max_tokens + t;
    row = args.handle.rows[n * common.num_topk + lane_id()];
    if (common.has_weights) {
      delay(common.peers);
      word = ptx::load_word(weight_word(memory, half, source, t));
    } else {
      weight = args.handle.weights[n * common.num_topk + lane_id()];
    }
  }

  // Waits for a weight that is to come. False after a fault.
  template <typename Memory>
  __device__ bool complete(const Memory& memory, const Operation& operation, int32_t source,
                           int32_t t) {
    if (!memory.common.has_weights || row < 0) return true;
    if (!wait_for_stamp(memory.common.peers, weight_word(memory, operation.half, source, t), &word,
                        source, operation.epoch)) {
      return false;
    }
    weight = __uint_as_float(weight_of_word(word, lane_id() % kWeightsOfWord));
    return true;
  }

  template <typename Memory>
  __device__ static const uint4* weight_word(const Memory& memory, int32_t half, int32_t source,
                                             int32_t t) {
    return memory.entry(memory.rank(), half, source, t) + lane_id() / kWeightsOfWord;
  }
};

// One unit of a token's partial row, by a warp. False after a fault.
template <typename Memory>
__device__ inline bool send_unit(const ep_low_latency_combine_args& args, const Memory& memory,
                                 const Operation& operation, const UnitsOfRanks<Memory>& at,
                                 Parts& parts) {
  const int32_t num_rows = __popc(__ballot_sync(kFullWarp, parts.row >= 0));
  if (num_rows == 0) return true;
  const int32_t words_of_row = memory.hidden() / kPer, word = at.word();
  const bool has_word = word < words_of_row;
  const auto* const x = static_cast<const uint4*>(args.x) + word;
  float sums[kPer];
#pragma unroll
  for (int i = 0; i < kPer; ++i) sums[i] = -0.0f;
#pragma unroll 1
  for (int32_t first = 0; first < num_rows; first += kRowsAtOnce) {
    uint4 words[kRowsAtOnce];
#pragma unroll
    for (int k = 0; k < kRowsAtOnce; ++k) {
      const int64_t row = __shfl_sync(kFullWarp, parts.row, (first + k) % kWarpSize);
      ptx::load_global_if(has_word && first + k < num_rows, &words[k], x + row * words_of_row);
    }
    if (first == 0) {
      const bool fine = parts.complete(memory, operation, at.rank, at.t);
      if (!__all_sync(kFullWarp, fine)) return false;
    }
#pragma unroll
    for (int k = 0; k < kRowsAtOnce; ++k) {
      if (first + k >= num_rows) break;
      add(sums, words[k], __shfl_sync(kFullWarp, parts.weight, first + k));
    }
  }
  delay(args.common.peers);
  // A rounded NaN is 0x7fff: no word is the waiting pattern.
  if (has_word) {
    ptx::store_word(memory.row(at.rank, operation.half, memory.rank(), at.t) + word,
                    pack<__nv_bfloat16>(sums));
  }
  return true;
}

// ---- Receiving ---------------------------------------------------------------------------------

// One unit of a combined row, by a warp. False after a fault.
template <int kHidden, int kRanks>
__device__ inline bool receive_unit(const ep_low_latency_combine_args& args,
                                    const Memory<kHidden, kRanks>& memory,
                                    const Operation& operation, const Units& at, uint32_t ranks) {
  constexpr int kMaxRanks = kRanks != 0 ? kRanks : EP_MAX_PEERS;
  const ep_peers& peers = args.common.peers;
  const int32_t words_of_row = memory.hidden() / kPer, word = at.word();
  if (word >= words_of_row) return true;
  const auto slot = [&](int32_t r) {
    return memory.row(memory.rank(), operation.half, r, at.t) + word;
  };
  delay(peers);
  uint4 words[kMaxRanks];
#pragma unroll
  for (int r = 0; r < kMaxRanks; ++r) {
    words[r] = make_uint4(0, 0, 0, 0);
    ptx::load_word_if(ranks >> r & 1, &words[r], slot(r));
  }
  // All that have not come are looked for at once.
  Wait wait;
  int32_t missing = -1;
  for (;;) {
    int32_t last = missing;
    missing = -1;
#pragma unroll
    for (int r = 0; r < kMaxRanks; ++r) {
      if (is_waiting(words[r])) missing = r;
    }
    if (last >= 0 && last != missing) wait.has_come(peers, last);
    if (missing < 0) break;
    if (!wait.goes_on(peers, EP_PHASE_ROWS, missing, operation.epoch)) return false;
#pragma unroll
    for (int r = 0; r < kMaxRanks; ++r) {
      ptx::load_word_if(is_waiting(words[r]), &words[r], slot(r));
    }
  }
  float sums[kPer];
#pragma unroll
  for (int i = 0; i < kPer; ++i) sums[i] = ranks == 0 ? 0.0f : -0.0f;
#pragma unroll
  for (int r = 0; r < kMaxRanks; ++r) {
    if (!(ranks >> r & 1)) continue;
    ptx::store_word(slot(r), waiting_word());
    add(sums, words[r]);
  }
  ptx::store_global(
      static_cast<uint4*>(args.combined_x) + static_cast<int64_t>(at.t) * words_of_row + word,
      pack<__nv_bfloat16>(sums));
  return true;
}

// Ranks that token t comes back from.
__device__ inline uint32_t ranks_of(const ep_low_latency_combine_args& args, int32_t t) {
  return t < args.common.num_tokens ? args.handle.ranks[t] : 0;
}

// By the first warp of the first block: waits for all headers. They say whether all combine the
// same dispatch; rows tell nothing of that.
template <typename Memory>
__device__ inline void check_headers(const ep_low_latency_combine_args& args, const Memory& memory,
                                     const Operation& operation) {
  const int32_t r = threadIdx.x;
  if (blockIdx.x != 0 || r >= memory.num_ranks()) return;
  args.common.peers.record->num_rows[r] = args.handle.num_rows[r];
  if (operation.alive >> r & 1) receive_header(memory, operation, own_header(args), r);
}

// ---- The kernel --------------------------------------------------------------------------------

template <int kHidden, int kRanks>
__global__ void __launch_bounds__(kThreads, 1)
    low_latency_combine_kernel(const __grid_constant__ ep_low_latency_combine_args args) {
  extern __shared__ __align__(16) uint8_t shared[];
  __shared__ int32_t num_tokens[EP_MAX_PEERS];
  const ep_low_latency& common = args.common;
  const Memory<kHidden, kRanks> memory(common, weight_words(common.num_topk));
  const int32_t units_of_row = ceil_div<int32_t>(memory.hidden() / kPer, kWarpSize);
  const int32_t first = threadIdx.x / kWarpSize * gridDim.x + blockIdx.x;
  const int32_t stride = kWarps * gridDim.x;
  if (static_cast<int32_t>(threadIdx.x) < memory.num_ranks()) {
    num_tokens[threadIdx.x] = args.handle.num_tokens[threadIdx.x];
  }
  const Operation operation = begin_operation(memory, args.handle.epochs);
  if (!operation.can_begin) return;
  if (common.phases & EP_LOW_LATENCY_SEND && wait_credits(memory, operation)) {
    if (first == stride - 1) send_header(memory, operation, own_header(args));
    if (common.has_weights) {
      Entries entries(shared + threadIdx.x / kWarpSize *
                                   Entries::bytes(memory.num_ranks(), common.num_topk),
                      common);
      send_weights(memory, operation, entries, stride - 1 - first, stride);
    }
    // Rows that travel first, the own ones last.
    UnitsOfRanks<Memory<kHidden, kRanks>> at(memory, units_of_row, 1, num_tokens);
    Parts next;
    if (at.find()) next.load(args, memory, operation.half, at.rank, at.t);
#pragma unroll 1
    while (at.is_there()) {
      const auto unit = at;
      Parts parts = next;
      at.advance();
      if (at.find()) next.load(args, memory, operation.half, at.rank, at.t);
      if (!send_unit(args, memory, operation, unit, parts)) break;
    }
  }
  if (common.phases & EP_LOW_LATENCY_RECEIVE) {
    check_headers(args, memory, operation);
    Units at(units_of_row);
    uint32_t next = ranks_of(args, at.t);
#pragma unroll 1
    while (at.t < common.num_tokens) {
      const Units unit = at;
      const uint32_t ranks = next & operation.alive;
      at.advance();
      next = ranks_of(args, at.t);
      const bool fine = receive_unit(args, memory, operation, unit, ranks);
      if (!__all_sync(kFullWarp, fine)) break;
    }
  }
  low_latency::end_operation(common);
}

template <int kHidden, int kRanks>
struct Kernel {
  static constexpr auto* function = low_latency_combine_kernel<kHidden, kRanks>;
};
const Kernels kernels =
    of_shapes<Kernel>("low-latency combine kernel", kMaxShared, CompiledShapes());

}  // namespace

int32_t ep_low_latency_combine(const ep_low_latency_combine_args* args, void* stream) {
  const ep_low_latency& common = args->common;
  const int32_t status = low_latency::check(common);
  if (status != EP_OK) return status;
  const int32_t bytes =
      common.has_weights ? kWarps * Entries::bytes(common.peers.num_ranks, common.num_topk) : 0;
  kernel_for<Kernel>(common, CompiledShapes())<<<common.num_blocks, kThreads, bytes,
                                                 static_cast<cudaStream_t>(stream)>>>(*args);
  return ep::check_cuda(cudaGetLastError(), "ep_low_latency_combine");
}
