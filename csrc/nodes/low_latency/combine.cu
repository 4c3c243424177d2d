// Low-latency combine between nodes: each rank adds up a token's weighted rows of its experts, and
// sends these sums, packed by the rank that owns the tokens, over the network. That adds up those
// of all ranks. Sending and receiving are one kernel, or one each. The bits are those of one host.

#include "low_latency/combine/roles.cuh"
#include "low_latency/route.cuh"
#include "low_latency/sums.cuh"
#include "nodes/low_latency/pack.cuh"

namespace {

using namespace ep;
using namespace ep::low_latency;
using namespace ep::low_latency::far;
using Args = ep_low_latency_combine_args;

// ---- Sending -----------------------------------------------------------------------------------

// The header, and after it the weights that are given to combine, in the order in which the
// dispatch has sent the rows. They go to the ranks that multiply with them.
__device__ inline void send_heads(const Args& args, const far::Memory& memory,
                                  const FarOperation& operation) {
  const ep_low_latency& common = args.common;
  const int32_t num_topk = common.num_topk, words = weight_words(num_topk);
  const int32_t count = common.has_weights ? common.num_tokens * num_topk : 0;
#pragma unroll 1
  for (int32_t k = blockIdx.x; k < memory.num_ranks(); k += gridDim.x) {
    const int32_t r = memory.rank_after(k);
    if (!is_alive(common, r)) continue;
    uint4* const head = memory.head_to_write(operation.half, k);
    const Header own = combine::own_header(args);
    int32_t num_rows = 0;
#pragma unroll 1
    for (int32_t i = threadIdx.x; i - static_cast<int32_t>(threadIdx.x) < count; i += kThreads) {
      const int32_t back = i < count ? args.handle.ranks[i] : -1;
      const bool goes = back >= 0 && back / common.max_tokens == r;
      num_rows += __syncthreads_count(goes);
      if (!goes) continue;
      const int64_t at = static_cast<int64_t>(i / num_topk) * num_topk;
      uint4* const to = head + 1 + back % common.max_tokens * words;
#pragma unroll 1
      for (int32_t j = 0; j < words; ++j) {
        const int32_t first = j * kWeightsOfWord;
        ptx::store_global(to + j, weight_word(common.weights + at + first, num_topk - first));
      }
    }
    if (threadIdx.x == 0) {
      ptx::store_global(head, make_uint4(num_rows, own.call, own.of, own.num_tokens));
    }
    __syncthreads();
    memory.send_head(operation.half, k, 16 * (1 + static_cast<int64_t>(num_rows) * words),
                     operation.head_value(), network::BlockGroup());
  }
}

// The rows whose weighted sum is a partial row: lane k has the k-th, or -1, and its weight.
struct Terms {
  int32_t row = -1;
  float weight = 0.0f;

  __device__ Terms(const Args& args, const far::Memory& memory, const FarOperation& operation,
                   int32_t source, int32_t place) {
    const ep_low_latency& common = args.common;
    if (lane_id() >= common.num_topk) return;
    const int64_t slot = static_cast<int64_t>(source) * common.max_tokens + place;
    const int64_t i = slot * common.num_topk + lane_id();
    const int32_t found = args.handle.rows[i];
    if (found < 0) return;
    row = found & ((1 << kRowBits) - 1);
    if (!common.has_weights) {
      weight = args.handle.weights[i];
      return;
    }
    const int32_t k = found >> kRowBits;
    uint4 word;
    ptx::load_global_if(true, &word,
                        memory.head(operation.half, source) + 1 +
                            place * weight_words(common.num_topk) + k / kWeightsOfWord);
    weight = __uint_as_float(weight_of_word(word, k % kWeightsOfWord));
  }
};

constexpr int kWordsAtOnce = 4;  // of a row, by a lane
constexpr int kPartWords = kWordsAtOnce * kWarpSize;

// Sums a part of a partial row, by a warp.
__device__ inline void pack_part(const Args& args, int32_t words_of_row, const Terms& terms,
                                 int32_t part, uint4* to) {
  const int32_t num_rows = __popc(__ballot_sync(kFullWarp, terms.row >= 0));
  const int32_t first = part * kPartWords + lane_id();
  float sums[kWordsAtOnce][kPer];
#pragma unroll
  for (int q = 0; q < kWordsAtOnce; ++q) {
#pragma unroll
    for (int i = 0; i < kPer; ++i) sums[q][i] = -0.0f;
  }
#pragma unroll 1
  for (int32_t k = 0; k < num_rows; ++k) {
    const int64_t row = __shfl_sync(kFullWarp, terms.row, k);
    const float weight = __shfl_sync(kFullWarp, terms.weight, k);
    const auto* const x = static_cast<const uint4*>(args.x) + row * words_of_row;
    uint4 words[kWordsAtOnce];
#pragma unroll
    for (int q = 0; q < kWordsAtOnce; ++q) {
      const int32_t at = first + q * kWarpSize;
      words[q] = make_uint4(0, 0, 0, 0);
      ptx::load_global_if(at < words_of_row, &words[q], x + at);
    }
#pragma unroll
    for (int q = 0; q < kWordsAtOnce; ++q) add(sums[q], words[q], weight);
  }
#pragma unroll
  for (int q = 0; q < kWordsAtOnce; ++q) {
    const int32_t at = first + q * kWarpSize;
    if (at < words_of_row) ptx::store_global(to + at, pack<__nv_bfloat16>(sums[q]));
  }
}

// By all threads of a block. False after a fault.
__device__ inline bool send(const Args& args, const far::Memory& memory,
                            const FarOperation& operation, int32_t* first) {
  const ep_low_latency& common = args.common;
  const int32_t words_of_row = common.hidden / kPer, parts = ceil_div(words_of_row, kPartWords);
  if (threadIdx.x < kWarpSize) {
    prefix_sums(first, memory.num_ranks(), [&](int32_t k) {
      const int32_t r = memory.rank_after(k);
      return is_alive(common, r) ? args.handle.num_rows[r] : 0;
    });
  }
  if (!wait_credits(memory, operation)) return false;
  send_heads(args, memory, operation);
  const Header own = combine::own_header(args);
  return send_rows(memory, operation, first, words_of_row,
                   [&](int32_t k, int32_t begin, int32_t end, uint4* to) {
                     const int32_t source = memory.rank_after(k);
                     const bool waits = common.has_weights && threadIdx.x == 0;
                     const bool fine = !waits || wait_head(memory, operation, own, source) >= 0;
                     if (!__syncthreads_and(fine)) return false;
#pragma unroll 1
                     for (int32_t u = threadIdx.x / kWarpSize; u < (end - begin) * parts;
                          u += kWarps) {
                       const int32_t i = u / parts;
                       const Terms terms(args, memory, operation, source, begin + i);
                       pack_part(args, words_of_row, terms, u - i * parts,
                                 to + static_cast<int64_t>(i) * words_of_row);
                     }
                     return true;
                   });
}

// ---- Receiving ---------------------------------------------------------------------------------

constexpr int kRowsAtOnce = 8;  // of which a lane loads a word

// A unit of a combined row, a word a lane, by a warp. False after a fault.
__device__ inline bool receive_unit(const Args& args, const far::Memory& memory,
                                    const FarOperation& operation, int32_t t, int32_t unit) {
  const ep_low_latency& common = args.common;
  const int32_t lane = lane_id(), num_topk = common.num_topk;
  const int32_t words_of_row = common.hidden / kPer, at = unit * kWarpSize + lane;
  const int64_t entry = static_cast<int64_t>(t) * num_topk;
  const int32_t back = lane < num_topk ? args.handle.ranks[entry + lane] : -1;
  const int32_t source = back / common.max_tokens, place = back % common.max_tokens;
  const bool fine = back < 0 || wait_rows(memory, operation, source, place / memory.chunk_rows());
  const int32_t num_rows = __popc(__ballot_sync(kFullWarp, back >= 0));
  if (!__all_sync(kFullWarp, fine)) return false;
  __syncwarp();
  float sums[kPer];
#pragma unroll
  for (int i = 0; i < kPer; ++i) sums[i] = num_rows == 0 ? 0.0f : -0.0f;
#pragma unroll 1
  for (int32_t first = 0; first < num_rows; first += kRowsAtOnce) {
    uint4 words[kRowsAtOnce];
#pragma unroll
    for (int j = 0; j < kRowsAtOnce; ++j) {
      const int32_t from = __shfl_sync(kFullWarp, source, (first + j) % kWarpSize);
      const int32_t row = __shfl_sync(kFullWarp, place, (first + j) % kWarpSize);
      const bool is_there = first + j < num_rows && at < words_of_row;
      words[j] = make_uint4(0, 0, 0, 0);
      const uint4* const rows = memory.rows(operation.half, is_there ? from : 0);
      ptx::load_global_if(is_there, &words[j],
                          rows + static_cast<int64_t>(is_there ? row : 0) * words_of_row + at);
    }
#pragma unroll
    for (int j = 0; j < kRowsAtOnce; ++j) {
      if (first + j < num_rows) add(sums, words[j]);
    }
  }
  if (at < words_of_row) {
    ptx::store_global(
        static_cast<uint4*>(args.combined_x) + static_cast<int64_t>(t) * words_of_row + at,
        pack<__nv_bfloat16>(sums));
  }
  return true;
}

// By all threads of a block. False after a fault.
__device__ inline bool receive(const Args& args, const far::Memory& memory,
                               const FarOperation& operation) {
  const ep_low_latency& common = args.common;
  bool fine = true;
  if (blockIdx.x == gridDim.x - 1) {
    // Headers say whether all combine the same dispatch. The last block has the least to receive.
    const Header own = combine::own_header(args);
#pragma unroll 1
    for (int32_t k = threadIdx.x; k < memory.num_ranks(); k += kThreads) {
      const int32_t source = memory.rank_before(k);
      if (!is_alive(common, source)) continue;
      fine = fine && time_head(memory, operation, own, source) >= 0;
    }
    __syncwarp();
  }
  const int32_t units = ceil_div<int32_t>(common.hidden / kPer, kWarpSize);
  fine = __all_sync(kFullWarp, fine);
#pragma unroll 1
  for (int32_t u = threadIdx.x / kWarpSize * gridDim.x + blockIdx.x;
       fine && u < common.num_tokens * units; u += kWarps * gridDim.x) {
    const int32_t t = u / units;
    fine = receive_unit(args, memory, operation, t, u - t * units);
  }
  return fine;
}

// ---- The kernel --------------------------------------------------------------------------------

__global__ void __launch_bounds__(far::kThreads, 1)
    low_latency_combine_kernel(const __grid_constant__ ep_nodes_low_latency_combine_args args) {
  extern __shared__ __align__(16) int32_t shared[];
  const Args& local = args.combine;
  const ep_low_latency& common = local.common;
  const far::Memory memory(common, args.nodes);
  const FarOperation operation = begin_operation(common, local.handle.epochs);
  bool fine = operation.can_begin;
  if (fine && common.phases & EP_LOW_LATENCY_SEND) fine = send(local, memory, operation, shared);
  if (fine && common.phases & EP_LOW_LATENCY_RECEIVE) receive(local, memory, operation);
  far::end_operation(memory, operation, local.handle.num_rows);
}

const Kernels kernels("low-latency combine kernel between nodes", Setup::kPlain, 0,
                      low_latency_combine_kernel);

}  // namespace

int32_t ep_nodes_low_latency_combine(const ep_nodes_low_latency_combine_args* args, void* stream) {
  const ep_low_latency& common = args->combine.common;
  const int32_t status = far::check(common, args->nodes);
  if (status != EP_OK) return status;
  const int64_t bytes = 4 * (args->nodes.network.num_nodes + 1ll);
  low_latency::note_call(common);
  low_latency_combine_kernel<<<common.num_blocks, far::kThreads, bytes,
                               static_cast<cudaStream_t>(stream)>>>(*args);
  return ep::check_cuda(cudaGetLastError(), "ep_nodes_low_latency_combine");
}
