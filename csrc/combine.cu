// Combine: a token's rows are added up on each rank that has some, and the partial rows on the
// token's own rank. The order of every sum is fixed (docs/architecture.md, "Numerics").
//
// One kernel with two kinds of blocks, one row a block at a time, each thread 16 bytes of it.
//   push blocks  take (run of received rows, owner) units: add each row's expert rows in ascending
//                expert order, round, store the partial row in the owner's memory; then flag the
//                unit's chunks there. Owners rotate. Rows of this rank's own tokens need no slot.
//   sum blocks   take groups of this rank's tokens, wait for the chunks that hold their partial rows,
//                and add those in ascending rank order, rounding once a node and once over the nodes.

#include <algorithm>
#include <cuda_bf16.h>

#include "node.cuh"
#include "status.cuh"

namespace {

using namespace ep;

constexpr int kMaxThreads = 448;
constexpr int kBlocksPerSm = 4;  // of the largest blocks
constexpr int kMaxBlocksPerSm = 8;
constexpr int kGroupTokens = 2;  // tokens that a sum block takes at a time
constexpr int kMaxUnitRows = 32;
constexpr int kLoadsInFlight = 2;

// 16 bytes of a row as FP32 numbers.
template <typename T>
struct Vector;

template <>
struct Vector<__nv_bfloat16> {
  float value[8];
  __device__ explicit Vector(const uint4& bits) { unpack(bits, value); }
  __device__ void add(const uint4& bits) {
    float other[8];
    unpack(bits, other);
#pragma unroll
    for (int i = 0; i < 8; ++i) value[i] += other[i];
  }
  __device__ uint4 rounded() const {
    uint4 bits;
    auto* const pairs = reinterpret_cast<__nv_bfloat162*>(&bits);
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = __floats2bfloat162_rn(value[2 * i], value[2 * i + 1]);
    return bits;
  }
  __device__ static void unpack(const uint4& bits, float* out) {
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      out[2 * i] = __uint_as_float(words[i] << 16);
      out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  }
};

template <>
struct Vector<float> {
  float4 value;
  __device__ explicit Vector(const uint4& bits) {
    value = make_float4(__uint_as_float(bits.x), __uint_as_float(bits.y), __uint_as_float(bits.z),
                        __uint_as_float(bits.w));
  }
  __device__ void add(const uint4& bits) {
    value.x += __uint_as_float(bits.x);
    value.y += __uint_as_float(bits.y);
    value.z += __uint_as_float(bits.z);
    value.w += __uint_as_float(bits.w);
  }
  __device__ uint4 rounded() const {
    return make_uint4(__float_as_uint(value.x), __float_as_uint(value.y),
                      __float_as_uint(value.z), __float_as_uint(value.w));
  }
};

// A sum that starts from its first number, not from zero, so that -0 survives; +0 without any.
template <typename T>
struct RunningSum {
  Vector<T> sum{make_uint4(0, 0, 0, 0)};
  bool any = false;
  __device__ void add(const uint4& bits) {
    if (any) {
      sum.add(bits);
    } else {
      sum = Vector<T>(bits);
    }
    any = true;
  }
};

// Level 1: 16 bytes of a token's partial row, from its rows in ascending order; +0 where none of them
// fitted into the output. Several loads before the first addition: what takes time is memory's
// latency.
template <typename T>
__device__ inline uint4 sum_expert_rows(const uint4* x, const int32_t* rows, int32_t num_topk4,
                                        int32_t vectors_per_row, int32_t column) {
  const uint4* const at_column = x + column;
  const auto load = [&](int32_t row) {
    return ptx::load_read_only(at_column + static_cast<int64_t>(row) * vectors_per_row);
  };
  const int32_t first = rows[0], second = rows[1], third = rows[2];
  if (first < 0) return make_uint4(0, 0, 0, 0);
  const uint4 a = load(first);
  uint4 b, c;
  if (second >= 0) b = load(second);
  if (third >= 0) c = load(third);
  Vector<T> sum(a);
  if (second >= 0) sum.add(b);
  if (third >= 0) sum.add(c);
  for (int32_t k = 3; k < num_topk4 && rows[k] >= 0; ++k) sum.add(load(rows[k]));
  return sum.rounded();
}

// Probability gradient of entry k of received row n.
__device__ inline float weight_of(const ep_combine_args& args, int64_t n, int32_t k) {
  const ep_routing& routing = args.routing;
  if (routing.recv_topk_idx[n * routing.num_topk + k] < 0) return 0.0f;
  const int32_t row = routing.row_of_k[n * routing.num_topk4 + (routing.expert_major ? k : 0)];
  if (row < 0) return 0.0f;
  return args.weights[routing.expert_major ? row : int64_t{row} * routing.num_topk + k];
}

template <typename T>
__device__ void push(const ep_combine_args& args) {
  const ep_node& node = args.node;
  const int32_t num_ranks = node.num_ranks, num_peers = num_ranks - 1;
  const int32_t vectors = args.row_bytes / 16;
  const auto* const x = reinterpret_cast<const uint4*>(args.x);

  bool may_send = !aborted(node);  // after a fault elsewhere the input may be garbage
  if (may_send && static_cast<int32_t>(threadIdx.x) < num_peers) {
    const int32_t peer = (node.rank + 1 + threadIdx.x) % num_ranks;
    const uint32_t* const credit =
        in_memory_of<uint32_t>(node, node.rank, args.credit_offset) + peer;
    may_send = wait_epoch(node, credit, epoch_of(node) - 1, EP_PHASE_CREDIT, peer);
  }
  if (!__syncthreads_and(may_send)) return;

  // Output rows of the unit's received rows: read once, not once a row and thread.
  extern __shared__ int32_t rows_of_unit[];
  const int32_t unit_rows = args.chunk_rows * args.chunks_per_unit;
  const int32_t num_units = (args.max_tokens + unit_rows - 1) / unit_rows * num_peers;
  for (int32_t unit = blockIdx.x; unit < num_units; unit += args.num_push_blocks) {
    const int32_t owner = (node.rank + 1 + unit % num_peers) % num_ranks;
    const int32_t begin = unit / num_peers * unit_rows;
    const int32_t end = min(begin + unit_rows, args.routing.num_recv[owner]);
    if (begin >= end) continue;  // and nobody waits for it
    const int64_t region =
        static_cast<int64_t>(region_of(node.rank, owner, num_ranks)) * args.max_tokens;
    auto* const partials = in_memory_of<uint4>(node, owner, args.row_offset);
    auto* const partial_weights = in_memory_of<float>(node, owner, args.weight_offset);
    const int64_t first_n = static_cast<int64_t>(owner) * args.max_tokens + begin;
    for (int32_t i = threadIdx.x; i < (end - begin) * args.routing.num_topk4; i += blockDim.x) {
      rows_of_unit[i] = args.routing.rows_ascending[first_n * args.routing.num_topk4 + i];
    }
    __syncthreads();
    for (int32_t slot = begin; slot < end; ++slot) {
      const int32_t* const rows = rows_of_unit + (slot - begin) * args.routing.num_topk4;
      for (int32_t i = threadIdx.x; i < vectors; i += blockDim.x) {
        partials[(region + slot) * vectors + i] =
            sum_expert_rows<T>(x, rows, args.routing.num_topk4, vectors, i);
      }
      const int32_t k = threadIdx.x;
      if (args.weights != nullptr && k < args.routing.num_topk) {
        const int64_t place = static_cast<int64_t>(node.rank) * args.max_tokens + slot;
        partial_weights[place * args.routing.num_topk + k] =
            weight_of(args, first_n + slot - begin, k);
      }
    }
    __syncthreads();
    const int32_t chunk = begin / args.chunk_rows + threadIdx.x;
    if (chunk * args.chunk_rows < end) {
      signal(node,
             in_memory_of<uint32_t>(node, owner, args.flag_offset) +
                 static_cast<int64_t>(node.rank) * args.max_chunks + chunk,
             chunk_stamp(epoch_of(node), args.tag));
    }
  }
}

// Waits until the partial rows of tokens [begin, end) are there, from every other rank.
__device__ bool partials_are_there(const ep_combine_args& args, int32_t begin, int32_t end) {
  const ep_node& node = args.node;
  const int32_t num_ranks = node.num_ranks;
  bool fine = true;
  const int32_t r = threadIdx.x;
  if (r < num_ranks && r != node.rank) {
    const uint32_t* const flags = in_memory_of<uint32_t>(node, node.rank, args.flag_offset) +
                                  static_cast<int64_t>(r) * args.max_chunks;
    int32_t known = -1;  // slots ascend with tokens, so chunks come in order
    for (int32_t t = begin; t < end && fine; ++t) {
      const int32_t slot = args.routing.send_slot[static_cast<int64_t>(t) * num_ranks + r];
      const int32_t chunk = slot < 0 ? -1 : slot / args.chunk_rows;
      if (chunk <= known) continue;
      const int32_t epoch = epoch_of(node);
      const uint32_t stamp = chunk_stamp(epoch, args.tag);
      const auto is_of_this_epoch = [stamp](uint32_t value) { return value >> 8 == stamp >> 8; };
      uint32_t seen;
      fine = wait_flag(node, &flags[chunk], is_of_this_epoch, &seen, EP_PHASE_ROWS, r,
                       epoch) &&
             same_call(node, stamp, seen, r);
      known = chunk;
    }
  }
  return __syncthreads_and(fine);
}

// The slots of one token at every rank, and the output rows of its own rank's slot.
struct Places {
  int32_t slot[EP_MAX_NODE_RANKS];
  int32_t own_rows[EP_MAX_TOPK];
};

// Levels 2 and 3 for 16 bytes of a token's row. Partial rows were written by other GPUs while this
// kernel ran: ordinary loads only. The usual single node needs no sum of its own for level 3.
template <typename T, bool kOneNode>
__device__ inline uint4 sum_partials(const ep_combine_args& args, const Places& places,
                                     int32_t vectors, int32_t column) {
  const ep_node& node = args.node;
  const int32_t num_ranks = node.num_ranks;
  const auto* const x = reinterpret_cast<const uint4*>(args.x);
  const auto* const partials = in_memory_of<const uint4>(node, node.rank, args.row_offset);
  uint4 own;
  if (places.slot[node.rank] >= 0) {
    own = sum_expert_rows<T>(x, places.own_rows, args.routing.num_topk4, vectors, column);
  }
  RunningSum<T> node_sum, overall;
  for (int32_t first = 0; first < num_ranks; first += kLoadsInFlight) {
    uint4 bits[kLoadsInFlight];
#pragma unroll
    for (int i = 0; i < kLoadsInFlight; ++i) {
      const int32_t r = first + i;
      if (r >= num_ranks || places.slot[r] < 0) continue;
      const int64_t region = region_of(r, node.rank, num_ranks);
      bits[i] = r == node.rank
                    ? own
                    : partials[(region * args.max_tokens + places.slot[r]) * vectors + column];
    }
#pragma unroll
    for (int i = 0; i < kLoadsInFlight; ++i) {
      const int32_t r = first + i;
      if (r >= num_ranks) continue;
      if (places.slot[r] >= 0) node_sum.add(bits[i]);
      if (!kOneNode && (r + 1) % args.ranks_per_node == 0 && node_sum.any) {
        overall.add(node_sum.sum.rounded());
        node_sum.any = false;
      }
    }
  }
  return kOneNode ? node_sum.sum.rounded() : overall.sum.rounded();
}

template <typename T, bool kOneNode>
__device__ void sum(const ep_combine_args& args) {
  const ep_node& node = args.node;
  const int32_t num_ranks = node.num_ranks;
  const int32_t vectors = args.row_bytes / 16;
  const int32_t experts_per_rank = args.num_local_experts;
  const int32_t num_groups = (args.routing.num_tokens + kGroupTokens - 1) / kGroupTokens;
  auto* const out = reinterpret_cast<uint4*>(args.combined_x);
  __shared__ Places places[kGroupTokens];
  if (__syncthreads_or(aborted(node))) return;  // the plan may have left no indices
  for (int32_t group = blockIdx.x - args.num_push_blocks; group < num_groups;
       group += args.num_sum_blocks) {
    const int32_t begin = group * kGroupTokens;
    const int32_t end = min(begin + kGroupTokens, args.routing.num_tokens);
    if (!partials_are_there(args, begin, end)) return;
    if (static_cast<int32_t>(threadIdx.x) < (end - begin) * num_ranks) {
      const int32_t t = begin + threadIdx.x / num_ranks, r = threadIdx.x % num_ranks;
      places[t - begin].slot[r] = args.routing.send_slot[static_cast<int64_t>(t) * num_ranks + r];
    }
    __syncthreads();
    for (int32_t i = threadIdx.x; i < (end - begin) * args.routing.num_topk4; i += blockDim.x) {
      Places& place = places[i / args.routing.num_topk4];
      const int32_t slot = place.slot[node.rank], k = i % args.routing.num_topk4;
      const int64_t n = static_cast<int64_t>(node.rank) * args.max_tokens + max(slot, 0);
      place.own_rows[k] = args.routing.rows_ascending[n * args.routing.num_topk4 + k];
    }
    __syncthreads();
    for (int32_t t = begin; t < end; ++t) {
      const Places& place = places[t - begin];
      for (int32_t i = threadIdx.x; i < vectors; i += blockDim.x) {
        out[static_cast<int64_t>(t) * vectors + i] = sum_partials<T, kOneNode>(args, place, vectors, i);
      }
      const int32_t k = threadIdx.x;
      if (args.combined_weights != nullptr && k < args.routing.num_topk) {
        const int32_t expert =
            args.routing.topk_idx[static_cast<int64_t>(t) * args.routing.num_topk + k];
        float weight = 0.0f;
        if (expert >= 0) {
          const int32_t r = expert / experts_per_rank;
          const int64_t n = static_cast<int64_t>(r) * args.max_tokens + place.slot[r];
          const volatile float* const staged =
              in_memory_of<float>(node, node.rank, args.weight_offset);
          weight = r == node.rank ? weight_of(args, n, k) : staged[n * args.routing.num_topk + k];
        }
        args.combined_weights[static_cast<int64_t>(t) * args.routing.num_topk + k] = weight;
      }
    }
  }
}

template <typename T, bool kOneNode>
__global__ void __launch_bounds__(kMaxThreads, kBlocksPerSm)
    combine_kernel(const __grid_constant__ ep_combine_args args) {
  if (blockIdx.x == 0 && threadIdx.x == 0) begin_operation(args.node);
  if (static_cast<int32_t>(blockIdx.x) < args.num_push_blocks) {
    push<T>(args);
  } else {
    sum<T, kOneNode>(args);
  }
  end_operation(args.node, args.counter, args.num_push_blocks + args.num_sum_blocks,
                args.credit_offset, args.routing.num_recv, args.row_bytes);
}

int32_t threads_for(int32_t row_bytes) {
  const int32_t vectors = row_bytes / 16;
  const int32_t passes = std::max(1, (vectors + kMaxThreads - 1) / kMaxThreads);
  const int32_t threads = (vectors + passes - 1) / passes;
  return std::max(64, (threads + 31) / 32 * 32);  // at least one for each entry of a token
}

using Kernel = void (*)(const ep_combine_args);

// [dtype][whether all ranks are one node]
constexpr Kernel kKernels[2][2] = {
    {combine_kernel<__nv_bfloat16, false>, combine_kernel<__nv_bfloat16, true>},
    {combine_kernel<float, false>, combine_kernel<float, true>},
};

}  // namespace

namespace ep {

int32_t load_combine_kernels() {
  for (const auto& of_dtype : kKernels) {
    for (const Kernel kernel : of_dtype) {
      const int32_t status =
          load_beside_dispatch(reinterpret_cast<const void*>(kernel), "combine kernels");
      if (status != EP_OK) return status;
    }
  }
  return EP_OK;
}

int32_t load_layout_kernels();
int32_t load_plan_kernels();
int32_t load_dispatch_kernels();
int32_t load_quantize_kernels();
int32_t load_probability_kernels();

}  // namespace ep

int32_t ep_load_kernels(void) {
  int32_t status = ep::load_layout_kernels();
  if (status == EP_OK) status = ep::load_plan_kernels();
  if (status == EP_OK) status = ep::load_dispatch_kernels();
  if (status == EP_OK) status = ep::load_combine_kernels();
  if (status == EP_OK) status = ep::load_quantize_kernels();
  if (status == EP_OK) status = ep::load_probability_kernels();
  return status;
}

int32_t ep_combine_blocks_per_sm(int32_t row_bytes) {
  return std::min<int32_t>(kMaxBlocksPerSm,
                           kBlocksPerSm * kMaxThreads / threads_for(row_bytes));
}

int32_t ep_combine(const ep_combine_args* args, void* stream) {
  if (args->row_bytes % 16) {
    return ep::fail(EP_ERR_ARGUMENT, "rows of %d bytes are not a multiple of 16", args->row_bytes);
  }
  const int32_t blocks = args->num_push_blocks + args->num_sum_blocks;
  const int32_t unit_rows = args->chunk_rows * args->chunks_per_unit;
  if (unit_rows < 1 || unit_rows > kMaxUnitRows || args->routing.num_topk4 > EP_MAX_TOPK) {
    return ep::fail(EP_ERR_ARGUMENT, "%d rows a unit, num_topk4 = %d: at most %d and %d",
                    unit_rows, args->routing.num_topk4, kMaxUnitRows, EP_MAX_TOPK);
  }
  if (args->num_push_blocks < 1 || args->num_sum_blocks < 1) {
    return ep::fail(EP_ERR_ARGUMENT, "%d push and %d sum blocks: both are needed",
                    args->num_push_blocks, args->num_sum_blocks);
  }
  const int32_t threads = threads_for(args->row_bytes);
  const auto on = static_cast<cudaStream_t>(stream);
  if (args->dtype != EP_BF16 && args->dtype != EP_FP32) {
    return ep::fail(EP_ERR_ARGUMENT, "dtype = %d is not one of EP_BF16, EP_FP32", args->dtype);
  }
  const bool one_node = args->ranks_per_node >= args->node.num_ranks;
  const int32_t shared_bytes =
      unit_rows * args->routing.num_topk4 * static_cast<int32_t>(sizeof(int32_t));
  kKernels[args->dtype][one_node]<<<blocks, threads, shared_bytes, on>>>(*args);
  return ep::check_cuda(cudaGetLastError(), "ep_combine");
}
