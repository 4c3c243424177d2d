// Dispatch: rows go once to every rank that owns one of their experts, and from there to the places
// where the experts want them.
//
// One kernel with two kinds of blocks, which may also be launched apart. Each warp has a ring of
// stages in shared memory, filled by bulk loads and emptied by bulk stores.
//   push warps    take this rank's tokens in chunks, store each row into a slot at every other rank
//                 it goes to, and flag each chunk there once its rows have landed. Lane l issues
//                 the stores to rank (own + 1 + l): destinations rotate, and each lane can wait for
//                 its own stores and raise its own flags.
//   expand warps  take (chunk, source) units, wait for the unit's flag, and copy each row from its
//                 slot to its output rows; lane k issues the store for the token's k-th expert. Rows
//                 that stay on this rank are read from the input, without a slot. FP8 rows that are
//                 to be BF16 or FP32 are converted once, into shared memory, and copied from there.
// A push waits for nothing but the ranks' having read what the last dispatch sent them.

#include <algorithm>
#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include "node.cuh"
#include "status.cuh"

namespace {

using namespace ep;

constexpr int kWarpSize = 32;
constexpr int kMaxWarps = 8;
constexpr int kMaxStages = 16;
// Those of a plan's second kernel find room beside it; more than this brings nothing.
constexpr int kMaxShared = 184 * 1024;
constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kMaxChunkTokens = 32;  // a unit's rows are bits of one word
// Tokens pushed after a chunk before its flag is raised: by then its stores have mostly landed.
constexpr int kFlagLag = 2;

// How a block's shared memory is cut up.
struct Ring {
  int32_t num_warps;
  int32_t num_stages;
  int32_t stage_bytes;      // slot, then the row's K4 output rows
  int32_t converted_bytes;  // one row as it is given out, where that is not as it came

  __host__ __device__ int32_t warp_bytes() const {
    return num_stages * stage_bytes + converted_bytes;
  }
  __host__ __device__ int32_t shared_bytes() const {
    return num_warps * warp_bytes() + barrier_bytes();
  }
  __host__ __device__ int32_t barrier_bytes() const {
    return (num_warps * num_stages * 8 + 127) / 128 * 128;
  }
};

__host__ __device__ inline int32_t slot_bytes(const ep_dispatch_args& args) {
  return args.row_bytes + args.scale_bytes + args.weight_bytes;
}

__host__ __device__ inline int32_t out_row_bytes(const ep_dispatch_args& args) {
  return args.recv_kind == EP_RECV_BF16   ? args.row_bytes * 2
         : args.recv_kind == EP_RECV_FP32 ? args.row_bytes * 4
                                          : args.row_bytes;
}

// Slots begin on whole 128-byte lines: a row across lines that others share costs NVLink 8 %.
__device__ inline int64_t slot_stride(const ep_dispatch_args& args) {
  return (slot_bytes(args) + 127) / 128 * 128;
}

// A flag says for which dispatch it is, and which slots the chunk fills: stamp | first | count.
__device__ inline uint64_t pack_flag(uint32_t stamp, int32_t first, int32_t count) {
  return static_cast<uint64_t>(stamp) << 32 |
         static_cast<uint64_t>(static_cast<uint32_t>(first)) << 6 |
         static_cast<uint64_t>(static_cast<uint32_t>(count));
}
__device__ inline uint32_t flag_stamp(uint64_t flag) { return static_cast<uint32_t>(flag >> 32); }
__device__ inline int32_t flag_first(uint64_t flag) {
  return static_cast<int32_t>(flag >> 6) & 0x3ffffff;
}
__device__ inline int32_t flag_count(uint64_t flag) { return static_cast<int32_t>(flag) & 0x3f; }

// One warp's part of the ring.
struct Stages {
  uint8_t* memory;
  uint64_t* barriers;
  int32_t num_stages;
  int32_t stage_bytes;

  __device__ Stages(uint8_t* shared, const Ring& ring, int32_t warp)
      : memory(shared + ring.barrier_bytes() + warp * ring.warp_bytes()),
        barriers(reinterpret_cast<uint64_t*>(shared) + warp * ring.num_stages),
        num_stages(ring.num_stages),
        stage_bytes(ring.stage_bytes) {
    const int32_t lane = threadIdx.x % kWarpSize;
    if (lane < num_stages) ptx::barrier_init(&barriers[lane], 1);
    ptx::fence_barrier_init();
    ptx::fence_proxy_async_shared();
    __syncwarp();
  }
  __device__ uint8_t* stage(int32_t i) const { return memory + i % num_stages * stage_bytes; }
  __device__ uint8_t* converted() const { return memory + num_stages * stage_bytes; }
  __device__ uint64_t* barrier(int32_t i) const { return &barriers[i % num_stages]; }
  __device__ void wait(int32_t i) const { ptx::barrier_wait(barrier(i), i / num_stages & 1); }
};

// Lane 0: start to load token t of the input as a slot; `extra` bytes more are announced.
__device__ inline void load_own_token(const ep_dispatch_args& args, const Stages& stages, int32_t i,
                                      int32_t t, int32_t extra) {
  uint8_t* const stage = stages.stage(i);
  uint64_t* const barrier = stages.barrier(i);
  ptx::barrier_expect(barrier, slot_bytes(args) + extra);
  ptx::bulk_load(stage, args.x + static_cast<int64_t>(t) * args.row_bytes, args.row_bytes, barrier);
  if (args.scale_bytes) {
    const auto* const scales = reinterpret_cast<const uint8_t*>(args.scales);
    ptx::bulk_load(stage + args.row_bytes, scales + static_cast<int64_t>(t) * args.scale_bytes,
                   args.scale_bytes, barrier);
  }
  if (args.weight_bytes) {
    const auto* const weights = reinterpret_cast<const uint8_t*>(args.weights);
    ptx::bulk_load(stage + args.row_bytes + args.scale_bytes,
                   weights + static_cast<int64_t>(t) * args.weight_bytes, args.weight_bytes,
                   barrier);
  }
}

// ---- Push ---------------------------------------------------------------------------------------

struct PushedChunk {
  int32_t chunk = -1;  // -1: none
  int32_t first = 0;
  int32_t count = 0;
};

__device__ void push(const ep_dispatch_args& args, const Stages& stages, int32_t epoch,
                     int32_t warp, int32_t num_warps) {
  const ep_node& node = args.node;
  const int32_t num_ranks = node.num_ranks, chunk_tokens = args.chunk_tokens;
  const int32_t lane = threadIdx.x % kWarpSize;
  const bool sends = lane < num_ranks - 1;  // this lane serves a destination
  const int32_t peer = (node.rank + 1 + (sends ? lane : 0)) % num_ranks;
  const int32_t num_chunks = (args.routing.num_tokens + chunk_tokens - 1) / chunk_tokens;
  const int32_t my_chunks = warp < num_chunks ? (num_chunks - warp + num_warps - 1) / num_warps : 0;
  const int32_t my_tokens = my_chunks * chunk_tokens;
  const int32_t bytes = slot_bytes(args);
  const int64_t stride = slot_stride(args);

  bool may_send = !aborted(node);  // after a fault elsewhere the input may be garbage
  if (may_send && sends) {
    const uint32_t* const credit =
        in_memory_of<uint32_t>(node, node.rank, args.credit_offset) + peer;
    may_send = wait_epoch(node, credit, epoch - 1, EP_PHASE_CREDIT, peer);
    ptx::fence_proxy_async_global();  // the slots are written by bulk stores
  }
  if (!__all_sync(kFullWarp, may_send)) return;

  uint8_t* const slots =
      node.memory[peer] + args.slot_offset +
      static_cast<int64_t>(region_of(node.rank, peer, num_ranks)) * args.max_tokens * stride;
  uint64_t* const flags = in_memory_of<uint64_t>(node, peer, args.flag_offset) +
                          static_cast<int64_t>(node.rank) * args.max_chunks;
  const auto token = [&](int32_t i) {
    return (warp + i / chunk_tokens * num_warps) * chunk_tokens + i % chunk_tokens;
  };
  const auto load = [&](int32_t i) {
    if (lane == 0 && i < my_tokens && token(i) < args.routing.num_tokens) {
      load_own_token(args, stages, i, token(i), 0);
    }
  };
  const auto raise = [&](const PushedChunk& pushed) {
    if (!sends || pushed.chunk < 0) return;
    const uint32_t stamp = chunk_stamp(epoch, args.tag);
    signal(node, &flags[pushed.chunk], pack_flag(stamp, pushed.first, pushed.count));
  };

  const int32_t ahead = stages.num_stages - 1;
  for (int32_t i = 0; i < ahead; ++i) load(i);
  PushedChunk current, landing;
  for (int32_t i = 0; i < my_tokens; ++i) {
    const int32_t t = token(i);
    if (i % chunk_tokens == 0) {
      landing = current;
      current = PushedChunk{t / chunk_tokens, 0, 0};
    }
    if (t < args.routing.num_tokens) {
      const int32_t slot =
          sends ? args.routing.send_slot[static_cast<int64_t>(t) * num_ranks + peer] : -1;
      stages.wait(i);
      if (slot >= 0) {
        if (current.count++ == 0) current.first = slot;
        ptx::bulk_store(slots + slot * stride, stages.stage(i), bytes);
      }
    }
    ptx::bulk_commit();  // every lane, every token: one group each
    if (i % chunk_tokens == kFlagLag && landing.chunk >= 0) {
      ptx::bulk_wait_written<kFlagLag + 1>();
      raise(landing);
      landing.chunk = -1;
    }
    // The stage of token i - 1 is the next to be filled.
    ptx::bulk_wait_read<1>();
    __syncwarp();
    load(i + ahead);
  }
  ptx::bulk_wait_written<0>();
  raise(landing);
  raise(current);
}

// ---- Expand -------------------------------------------------------------------------------------

// Scale b of an expert-major row stands at first + b * step.
struct ScalePlace {
  int64_t first = 0;
  int64_t step = 0;
};

// Of output row `row` of local expert e.
__device__ inline ScalePlace place_of_scales(const ep_dispatch_args& args, int32_t e, int32_t row) {
  const int32_t begin = args.routing.expert_first_row[e];
  const int32_t end = args.routing.expert_first_row[e + 1];
  return {static_cast<int64_t>(begin) * (args.scale_bytes / 4) + (row - begin), end - begin};
}

// Entry k of an output row's local experts.
__device__ inline void write_expert(const ep_dispatch_args& args, int32_t row, int32_t k,
                                    int32_t expert) {
  const int64_t place = static_cast<int64_t>(row) * args.routing.num_topk + k;
  if (args.recv_idx_bytes == 8) {
    static_cast<int64_t*>(args.recv_topk_idx)[place] = expert;
  } else {
    static_cast<int32_t*>(args.recv_topk_idx)[place] = expert;
  }
}

// One row of zeros, with probability 0 and no expert.
__device__ inline void write_zero_row(const ep_dispatch_args& args, int32_t row) {
  const int32_t lane = threadIdx.x % kWarpSize, row_bytes = out_row_bytes(args);
  auto* const out = reinterpret_cast<uint4*>(args.recv_x + static_cast<int64_t>(row) * row_bytes);
  for (int32_t i = lane; i < row_bytes / 16; i += kWarpSize) out[i] = make_uint4(0, 0, 0, 0);
  const int32_t width = args.routing.expert_major ? 1 : args.routing.num_topk;
  if (lane >= width) return;
  if (args.recv_topk_idx != nullptr) write_expert(args, row, lane, -1);
  if (args.recv_weights != nullptr) {
    args.recv_weights[static_cast<int64_t>(row) * width + lane] = 0.0f;
  }
}

// Rows between the end of an expert's group and the next group, and those behind all groups where
// the output has more: zeros, with scale 1.
__device__ void write_padding(const ep_dispatch_args& args, int32_t warp, int32_t num_warps) {
  const int32_t lane = threadIdx.x % kWarpSize, num_scales = args.scale_bytes / 4;
  if (args.routing.expert_major) {
    for (int32_t e = warp; e < args.num_local_experts; e += num_warps) {
      const int32_t begin = args.routing.expert_first_row[e] + args.routing.expert_tokens[e];
      const int32_t end = args.routing.expert_first_row[e + 1];
      for (int32_t row = begin; row < end; ++row) {
        write_zero_row(args, row);
        if (args.recv_scales == nullptr) continue;
        const ScalePlace place = place_of_scales(args, e, row);
        for (int32_t b = lane; b < num_scales; b += kWarpSize) {
          args.recv_scales[place.first + b * place.step] = 1.0f;
        }
      }
    }
  }
  const int32_t end = args.routing.expert_first_row[args.num_local_experts];
  for (int32_t row = end + warp; row < args.num_rows; row += num_warps) {
    write_zero_row(args, row);
    if (args.recv_scales == nullptr) continue;
    float* const scales = args.recv_scales + static_cast<int64_t>(row) * num_scales;
    for (int32_t b = lane; b < num_scales; b += kWarpSize) scales[b] = 1.0f;
  }
}

__device__ inline float2 fp8x2_to_float2(uint16_t pair) {
  const __half2_raw raw = __nv_cvt_fp8x2_to_halfraw2(pair, __NV_E4M3);
  return __half22float2(__half2(raw));
}

// The row in `stage` times its scales, into shared memory: one product and one rounding an element.
template <typename Out>
__device__ void convert(const ep_dispatch_args& args, const uint8_t* stage, Out* out) {
  constexpr int kElements = 16 / sizeof(Out);  // of one 16-byte store
  const auto* const scales = reinterpret_cast<const float*>(stage + args.row_bytes);
  for (int32_t i = threadIdx.x % kWarpSize; i < args.row_bytes / kElements; i += kWarpSize) {
    const float scale = scales[i * kElements / 128];
    union {
      uint4 bits;
      Out values[kElements];
    } packed;
    const auto* const pairs = reinterpret_cast<const uint16_t*>(stage) + i * kElements / 2;
#pragma unroll
    for (int j = 0; j < kElements / 2; ++j) {
      const float2 pair = fp8x2_to_float2(pairs[j]);
      packed.values[2 * j] = static_cast<Out>(pair.x * scale);
      packed.values[2 * j + 1] = static_cast<Out>(pair.y * scale);
    }
    reinterpret_cast<uint4*>(out)[i] = packed.bits;
  }
}

// A run of received rows: bit j of `rows` says that there is a row j. Rows from other ranks stand in
// slots first_slot + j; rows of this rank are tokens first_token + j.
struct Unit {
  int32_t source = 0;
  int32_t first = 0;
  uint32_t rows = 0;
};

__device__ void expand(const ep_dispatch_args& args, const Stages& stages, int32_t epoch,
                       int32_t warp, int32_t num_warps) {
  const ep_node& node = args.node;
  const int32_t num_ranks = node.num_ranks, chunk_tokens = args.chunk_tokens;
  const int32_t lane = threadIdx.x % kWarpSize;
  const int32_t bytes = slot_bytes(args);
  const int64_t stride = slot_stride(args);
  const int32_t pos_bytes = args.routing.num_topk4 * 4;
  const int32_t pos_offset = bytes;
  const int32_t out_bytes = out_row_bytes(args);
  // After a fault in the plan there are no indices: with a given number of rows nobody stopped this.
  if (__any_sync(kFullWarp, aborted(node))) return;
  write_padding(args, warp, num_warps);

  int32_t num_chunks = 0;
  for (int32_t r = 0; r < num_ranks; ++r) {
    num_chunks = max(num_chunks, (args.routing.source_tokens[r] + chunk_tokens - 1) / chunk_tokens);
  }
  const int32_t num_units = num_chunks * num_ranks;
  const uint64_t* const flags = in_memory_of<uint64_t>(node, node.rank, args.flag_offset);

  // True when the unit can be read; with `block`, waits for that, and false is a fault.
  const auto open = [&](int32_t index, bool block, Unit* unit) {
    const int32_t chunk = index / num_ranks;
    const int32_t source = (node.rank + index) % num_ranks;
    unit->source = source;
    unit->rows = 0;
    unit->first = chunk * chunk_tokens;
    if (chunk * chunk_tokens >= args.routing.source_tokens[source]) return true;
    if (source == node.rank) {
      const int32_t t = unit->first + lane;
      const bool stays = lane < chunk_tokens && t < args.routing.num_tokens &&
                         args.routing.send_slot[static_cast<int64_t>(t) * num_ranks + node.rank] >= 0;
      unit->rows = __ballot_sync(kFullWarp, stays);
      return true;
    }
    uint64_t flag = 0;
    bool arrived = true;
    if (lane == 0) {
      const uint64_t* const mine = &flags[static_cast<int64_t>(source) * args.max_chunks + chunk];
      const uint32_t stamp = chunk_stamp(epoch, args.tag);
      const auto is_of_this_epoch = [stamp](uint64_t value) {
        return flag_stamp(value) >> 8 == stamp >> 8;
      };
      if (block) {
        arrived = wait_flag(node, mine, is_of_this_epoch, &flag, EP_PHASE_ROWS, source, epoch);
      } else {
        flag = ptx::load_acquire_sys(mine);
        arrived = is_of_this_epoch(flag);
      }
      if (arrived && !same_call(node, stamp, flag_stamp(flag), source)) arrived = false;
      ptx::fence_proxy_async_global();  // the rows are read by bulk loads
    }
    if (!__shfl_sync(kFullWarp, arrived, 0)) return false;
    flag = __shfl_sync(kFullWarp, flag, 0);
    unit->first = flag_first(flag);
    const int32_t count = flag_count(flag);
    unit->rows = count == 0 ? 0 : 0xffffffffu >> (32 - count);
    return true;
  };

  const auto load = [&](int32_t i, const Unit& unit, int32_t j) {
    const bool own = unit.source == node.rank;
    int32_t slot = unit.first + j;
    if (own) slot = args.routing.send_slot[static_cast<int64_t>(slot) * num_ranks + node.rank];
    const int64_t n = static_cast<int64_t>(unit.source) * args.max_tokens + slot;
    if (own) {
      load_own_token(args, stages, i, unit.first + j, pos_bytes);
    } else {
      const int64_t region = region_of(unit.source, node.rank, num_ranks);
      ptx::barrier_expect(stages.barrier(i), bytes + pos_bytes);
      ptx::bulk_load(stages.stage(i),
                     node.memory[node.rank] + args.slot_offset +
                         (region * args.max_tokens + slot) * stride,
                     bytes, stages.barrier(i));
    }
    ptx::bulk_load(stages.stage(i) + pos_offset,
                   args.routing.row_of_k + n * args.routing.num_topk4, pos_bytes,
                   stages.barrier(i));
    // Behind the output rows: which received row this is.
    *reinterpret_cast<int64_t*>(stages.stage(i) + pos_offset + pos_bytes) = n;
  };
  const auto received_row = [&](const uint8_t* stage) {
    return *reinterpret_cast<const int64_t*>(stage + pos_offset + pos_bytes);
  };

  // Scales of the row in `stage`, for lane k's output row.
  const auto store_scales = [&](const uint8_t* stage, int32_t row) {
    const uint8_t* const scales = stage + args.row_bytes;
    if (!args.routing.expert_major) {
      if (row >= 0) {
        ptx::bulk_store(reinterpret_cast<uint8_t*>(args.recv_scales) +
                            static_cast<int64_t>(row) * args.scale_bytes,
                        scales, args.scale_bytes);
      }
      return;
    }
    // All lanes look their experts up at once: what takes time is memory's latency.
    ScalePlace place;
    if (row >= 0) {
      const int64_t n = received_row(stage);
      place = place_of_scales(args, args.routing.recv_topk_idx[n * args.routing.num_topk + lane], row);
    }
    for (int32_t k = 0; k < args.routing.num_topk; ++k) {
      if (__shfl_sync(kFullWarp, row, k) < 0) continue;
      const int64_t first = __shfl_sync(kFullWarp, place.first, k);
      const int64_t step = __shfl_sync(kFullWarp, place.step, k);
      for (int32_t b = lane; b < args.scale_bytes / 4; b += kWarpSize) {
        args.recv_scales[first + b * step] = reinterpret_cast<const float*>(scales)[b];
      }
    }
  };

  const auto store = [&](int32_t i) {
    const uint8_t* const stage = stages.stage(i);
    const auto* const rows = reinterpret_cast<const int32_t*>(stage + pos_offset);
    const auto* const weights =
        reinterpret_cast<const float*>(stage + args.row_bytes + args.scale_bytes);
    __syncwarp();  // the row's index was written by lane 0
    stages.wait(i);
    const int32_t row = lane < args.routing.num_topk ? rows[lane] : -1;
    const uint8_t* out = stage;
    if (args.recv_kind != EP_RECV_BYTES) {
      out = stages.converted();
      ptx::bulk_wait_read<0>();  // the row before may still be read from there
      __syncwarp();
      if (args.recv_kind == EP_RECV_BF16) {
        convert(args, stage, reinterpret_cast<__nv_bfloat16*>(stages.converted()));
      } else {
        convert(args, stage, reinterpret_cast<float*>(stages.converted()));
      }
      ptx::fence_proxy_async_shared();
      __syncwarp();
    }
    if (row >= 0) {
      ptx::bulk_store(args.recv_x + static_cast<int64_t>(row) * out_bytes, out, out_bytes);
    }
    if (args.recv_scales != nullptr) store_scales(stage, row);
    ptx::bulk_commit();
    if (args.routing.expert_major) {
      if (args.recv_weights != nullptr && row >= 0) args.recv_weights[row] = weights[lane];
      return;
    }
    const int32_t num_topk = args.routing.num_topk;
    if (lane >= num_topk || rows[0] < 0) return;
    if (args.recv_topk_idx == nullptr && args.recv_weights == nullptr) return;
    const int32_t expert = args.routing.recv_topk_idx[received_row(stage) * num_topk + lane];
    if (args.recv_topk_idx != nullptr) write_expert(args, rows[0], lane, expert);
    if (args.recv_weights != nullptr) {
      args.recv_weights[static_cast<int64_t>(rows[0]) * num_topk + lane] =
          expert >= 0 ? weights[lane] : 0.0f;
    }
  };

  Unit unit;
  int32_t next_unit = warp, loaded = 0, stored = 0;
  bool fine = true;
  while (true) {
    // One stage stays free: the one whose stores may still be reading.
    while (loaded - stored < stages.num_stages - 1) {
      if (unit.rows == 0) {
        if (next_unit >= num_units || !fine) break;
        const bool nothing_else_to_do = loaded == stored;
        if (!open(next_unit, nothing_else_to_do, &unit)) {
          unit.rows = 0;
          fine = !nothing_else_to_do;
          break;
        }
        next_unit += num_warps;
        continue;
      }
      const int32_t j = __ffs(unit.rows) - 1;
      unit.rows &= unit.rows - 1;
      ptx::bulk_wait_read<1>();
      __syncwarp();
      if (lane == 0) load(loaded, unit, j);
      ++loaded;
    }
    if (loaded == stored) break;  // nothing left, or a fault
    store(stored++);
  }
  ptx::bulk_wait_written<0>();
}

__global__ void __launch_bounds__(kMaxWarps * kWarpSize)
    dispatch_kernel(const __grid_constant__ ep_dispatch_args args, const Ring ring) {
  extern __shared__ __align__(128) uint8_t shared[];
  const int32_t warp = threadIdx.x / kWarpSize;
  const Stages stages(shared, ring, warp);
  const int32_t block = blockIdx.x, epoch = epoch_of(args.node);
  if (block == 0 && threadIdx.x == 0 && !args.is_planned) begin_operation(args.node);
  if (block < args.num_push_blocks) {
    push(args, stages, epoch, block * ring.num_warps + warp, args.num_push_blocks * ring.num_warps);
  } else {
    expand(args, stages, epoch, (block - args.num_push_blocks) * ring.num_warps + warp,
           args.num_expand_blocks * ring.num_warps);
  }
  end_operation(args.node, args.counter, args.num_blocks, args.credit_offset, args.routing.num_sent,
                args.row_bytes + args.scale_bytes);
}

Ring make_ring(const ep_dispatch_args& args) {
  Ring ring{};
  // The output rows, and the row's index behind them.
  const int32_t wanted = slot_bytes(args) + args.routing.num_topk4 * 4 + 16;
  ring.stage_bytes = (wanted + 127) / 128 * 128;
  ring.converted_bytes = args.recv_kind == EP_RECV_BYTES || args.num_expand_blocks == 0
                             ? 0
                             : (out_row_bytes(args) + 127) / 128 * 128;
  constexpr int32_t kRoom = kMaxShared - 1024;
  // Three stages a warp, or two where a row is so long that not even one warp has three.
  for (int32_t stages = 3; stages >= 2 && ring.num_warps == 0; --stages) {
    ring.num_warps = std::min(kMaxWarps, kRoom / (stages * ring.stage_bytes + ring.converted_bytes));
    if (stages == 2) ring.num_warps = std::min(ring.num_warps, 1);
  }
  if (ring.num_warps > 0) {
    ring.num_stages = std::min(
        kMaxStages, (kRoom / ring.num_warps - ring.converted_bytes) / ring.stage_bytes);
  }
  return ring;
}

}  // namespace

namespace ep {

int32_t load_dispatch_kernels() {
  return check_cuda(cudaFuncSetAttribute(dispatch_kernel,
                                         cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxShared),
                    "dispatch kernel");
}

}  // namespace ep

int32_t ep_dispatch(const ep_dispatch_args* args, void* stream) {
  if (args->row_bytes % 16 || args->scale_bytes % 16 || args->weight_bytes % 16) {
    return ep::fail(EP_ERR_ARGUMENT, "rows of %d, scales of %d and weights of %d bytes: all must be "
                    "multiples of 16", args->row_bytes, args->scale_bytes, args->weight_bytes);
  }
  if (args->chunk_tokens <= kFlagLag || args->chunk_tokens > kMaxChunkTokens) {
    return ep::fail(EP_ERR_ARGUMENT, "chunk_tokens = %d is not in [%d, %d]", args->chunk_tokens,
                    kFlagLag + 1, kMaxChunkTokens);
  }
  if (args->routing.num_topk > kWarpSize) {
    return ep::fail(EP_ERR_ARGUMENT, "num_topk = %d is more than %d", args->routing.num_topk,
                    kWarpSize);
  }
  const Ring ring = make_ring(*args);
  if (ring.num_warps == 0) {
    return ep::fail(EP_ERR_ARGUMENT, "a row of %d bytes does not fit the stages of shared memory",
                    args->row_bytes);
  }
  const int32_t blocks = args->num_push_blocks + args->num_expand_blocks;
  if (blocks < 1) return ep::fail(EP_ERR_ARGUMENT, "no blocks to launch");
  dispatch_kernel<<<blocks, ring.num_warps * kWarpSize, ring.shared_bytes(),
                    static_cast<cudaStream_t>(stream)>>>(*args, ring);
  return ep::check_cuda(cudaGetLastError(), "ep_dispatch");
}
