// Combine: a token's rows are added up on each rank that has some, and the partial rows on the
// token's own rank. The order of every sum is fixed (docs/architecture.md, "Numerics").
//
// One kernel of teams (combine/teams.cuh), one block an SM. Their listers decide what is added:
//   pushing  takes (run of received rows, owner) units: each row's expert rows in ascending expert
//            order become a partial row, which goes to the owner's memory; a unit's chunks are
//            flagged there. Owners rotate. Rows of this rank's own tokens need no slot.
//   summing  takes groups of this rank's tokens, waits for the chunks that hold their partial rows,
//            and adds those in ascending rank order, rounding once a node and once over the nodes.
// Some teams push, and sum when there is nothing left to push; the others sum from the start. Each
// takes the next unit or group that nobody has: who takes it makes no difference to the sums.

#include <algorithm>

#include "combine/teams.cuh"
#include "common/launch.cuh"
#include "common/peers.cuh"
#include "common/warp.cuh"
#include "routing/entries.cuh"

namespace {

using namespace ep;

constexpr int kMaxUnitRows = 32;  // a lister's lane lists one
constexpr int kGroupTokens = 4;   // tokens that a team sums at a time
// ep_combine_args.counters; the first is end_operation's.
constexpr int kUnitsTaken = 1, kGroupsTaken = 2;

// Takes the next number of a counter, the same for all lanes.
__device__ inline int32_t take(int32_t* counter) {
  int32_t next = 0;
  if (lane_id() == 0) next = atomicAdd(counter, 1);
  return __shfl_sync(kFullWarp, next, 0);
}

// Output rows of received row n in ascending order of experts, [K4]; -1 behind the last.
__device__ inline const int4* output_rows(const ep_combine_args& args, int32_t n) {
  return reinterpret_cast<const int4*>(args.routing.entries +
                                       place_in_entries(args.routing, n, kRowsAscending));
}

// Returns how many output rows there are. Where none fitted into the output it is 1: a row of zeros
// is listed for them.
__device__ inline int32_t count_rows(const ep_combine_args& args, int32_t n) {
  const int4* const rows = output_rows(args, n);
  int32_t count = 0;
  for (int32_t i = 0; i < args.routing.num_topk4 / 4; ++i) {
    const int4 four = rows[i];
    count += (four.x >= 0) + (four.y >= 0) + (four.z >= 0) + (four.w >= 0);
  }
  return max(count, 1);
}

// Returns row `row` of this rank's input, or a row of zeros where `row` is negative.
__device__ inline const uint4* input_row(const ep_combine_args& args, int32_t row) {
  const uint8_t* const bytes =
      row < 0 ? in_memory_of<const uint8_t>(args.peers, args.peers.rank, args.zero_offset)
              : args.x + row * int64_t{args.row_bytes};
  return reinterpret_cast<const uint4*>(bytes);
}

// Lists the `count` output rows of received row n as one sum, or as part of one. The bit kFirst of
// `what` goes to the first of them, the other bits to the last.
__device__ inline void list_rows(const ep_combine_args& args, int32_t n, int32_t count,
                                 uint32_t what, ListedRow* list) {
  const auto* const rows = reinterpret_cast<const int32_t*>(output_rows(args, n));
  for (int32_t i = 0; i < count; ++i) {
    uint32_t of_row = i == 0 ? what & ListedRow::kFirst : 0;
    if (i == count - 1) of_row |= what & ~ListedRow::kFirst;
    list[i] = ListedRow{input_row(args, rows[i]), of_row};
  }
}

// Returns the gradient of the probability of entry k of received row n.
__device__ inline float weight_of(const ep_combine_args& args, int32_t n, int32_t k) {
  const ep_routing& routing = args.routing;
  if (routing.entries[place_in_entries(routing, n, kLocalExperts) + k] < 0) return 0.0f;
  const int32_t* const rows = routing.entries + place_in_entries(routing, n, kRowOfK);
  const int32_t row = rows[routing.expert_major ? k : 0];
  if (row < 0) return 0.0f;
  return args.weights[routing.expert_major ? row : int64_t{row} * routing.num_topk + k];
}

// ---- Pushing -----------------------------------------------------------------------------------

// The chunks that a unit fills, in one owner's memory.
struct Chunks {
  int32_t owner = 0;
  int32_t first = 0;
  int32_t count = 0;
};

__device__ inline void raise(const ep_combine_args& args, const Chunks& chunks) {
  const ep_peers& peers = args.peers;
  if (lane_id() >= chunks.count) return;
  uint32_t* const flags = in_memory_of<uint32_t>(peers, chunks.owner, args.flag_offset) +
                          static_cast<int64_t>(peers.rank) * args.max_chunks;
  signal(peers, &flags[chunks.first + lane_id()], chunk_stamp(epoch_of(peers), args.tag));
}

// True when every other rank has read what the last combine sent it.
__device__ inline bool may_push(const ep_peers& peers, int64_t credit_offset) {
  bool fine = !aborted(peers);  // after a fault elsewhere the input may be garbage
  if (fine && lane_id() < peers.num_ranks - 1) {
    const int32_t peer = (peers.rank + 1 + lane_id()) % peers.num_ranks;
    fine = wait_credit(peers, credit_offset, epoch_of(peers), peer);
  }
  __syncwarp();  // all lanes may write to where one waited
  return __all_sync(kFullWarp, fine);
}

// Lists the partial rows of received rows [begin, end) of an owner; returns how many rows that
// takes.
__device__ int32_t list_unit(const ep_combine_args& args, int32_t owner, int32_t begin, int32_t end,
                             ListedRow* list) {
  const int32_t slot = begin + lane_id();
  const int32_t n = args.routing.first_of_source[owner] + slot;
  const int32_t count = slot < end ? count_rows(args, n) : 0;
  int32_t total;
  const int32_t at = sum_before(count, &total);
  const uint32_t out = static_cast<uint32_t>(lane_id()) << ListedRow::kOutShift;
  list_rows(args, n, count, out | ListedRow::kFirst | ListedRow::kLast, list + at);
  return total;
}

__device__ void send_weights(const ep_combine_args& args, int32_t owner, int32_t begin,
                             int32_t end) {
  const ep_peers& peers = args.peers;
  const int32_t num_topk = args.routing.num_topk;
  const int32_t first_n = args.routing.first_of_source[owner] + begin;
  const int64_t to = (static_cast<int64_t>(peers.rank) * args.max_tokens + begin) * num_topk;
  float* const weights = in_memory_of<float>(peers, owner, args.weight_offset);
  for (int32_t i = lane_id(); i < (end - begin) * num_topk; i += kWarpSize) {
    weights[to + i] = weight_of(args, first_n + i / num_topk, i % num_topk);
  }
}

__device__ void list_pushes(const ep_combine_args& args, Team& team, int32_t vectors) {
  const ep_peers& peers = args.peers;
  const int32_t num_ranks = peers.num_ranks, num_others = num_ranks - 1;
  const int32_t unit_rows = args.chunk_rows * args.chunks_per_unit;
  Chunks pushed;
  if (may_push(peers, args.credit_offset)) {
    int32_t most = 0;  // rows of an owner
    for (int32_t r = 0; r < num_ranks; ++r) {
      if (r != peers.rank) most = max(most, args.routing.num_recv[r]);
    }
    const int32_t num_units = ceil_div(most, unit_rows) * num_others;
    int32_t unit;
    while ((unit = take(&args.counters[kUnitsTaken])) < num_units) {
      const int32_t owner = (peers.rank + 1 + unit % num_others) % num_ranks;
      const int32_t begin = unit / num_others * unit_rows;
      const int32_t end = min(begin + unit_rows, args.routing.num_recv[owner]);
      if (begin >= end) continue;  // and nobody waits for it
      const int32_t num_rows = list_unit(args, owner, begin, end, team.rows());
      if (args.weights != nullptr) send_weights(args, owner, begin, end);
      const int64_t region =
          static_cast<int64_t>(region_of(peers.rank, owner, num_ranks)) * args.max_tokens;
      team.hand_over(
          in_memory_of<uint4>(peers, owner, args.row_offset) + (region + begin) * vectors,
          num_rows);
      raise(args, pushed);
      const int32_t num_chunks = ceil_div(end - begin, args.chunk_rows);
      pushed = Chunks{owner, begin / args.chunk_rows, num_chunks};
    }
  }
  team.hand_over(nullptr, 0);  // the last unit has been written
  raise(args, pushed);
}

// ---- Summing -----------------------------------------------------------------------------------

// This lane's token of a group.
struct Token {
  int32_t slot[EP_MAX_PEERS];  // -1 where the token does not go
  bool exists;
};

// Waits for the chunks with the partial rows of a group. Lane r waits for those of rank r.
__device__ bool wait_for_partials(const ep_combine_args& args, const Token& token) {
  const ep_peers& peers = args.peers;
  int32_t first = 0, last = -1;
#pragma unroll
  for (int32_t r = 0; r < EP_MAX_PEERS; ++r) {
    // Slots of consecutive tokens are consecutive: every chunk in between has one of them.
    const int32_t slot = token.slot[r];
    const uint32_t lowest = __reduce_min_sync(kFullWarp, static_cast<uint32_t>(slot));
    const int32_t highest = __reduce_max_sync(kFullWarp, slot);
    if (r != lane_id() || r == peers.rank || highest < 0) continue;
    first = static_cast<int32_t>(lowest) / args.chunk_rows;
    last = highest / args.chunk_rows;
  }
  const int32_t epoch = epoch_of(peers), r = lane_id();
  const uint32_t stamp = chunk_stamp(epoch, args.tag);
  const auto is_of_this_epoch = [stamp](uint32_t value) { return value >> 8 == stamp >> 8; };
  bool fine = true;
  for (int32_t chunk = first; chunk <= last && fine; ++chunk) {
    const uint32_t* const flag = in_memory_of<uint32_t>(peers, peers.rank, args.flag_offset) +
                                 static_cast<int64_t>(r) * args.max_chunks + chunk;
    uint32_t seen;
    fine = wait_flag(peers, flag, is_of_this_epoch, &seen, EP_PHASE_ROWS, r, epoch) &&
           same_call(peers, stamp, seen, r);
  }
  __syncwarp();  // all lanes may read what one waited for
  return __all_sync(kFullWarp, fine);
}

// Returns the ranks of r's node as bits.
__device__ inline uint32_t node_of(const ep_combine_args& args, int32_t r) {
  const int32_t ranks_per_node = min(args.ranks_per_node, args.peers.num_ranks);
  return ((1u << ranks_per_node) - 1) << (r / ranks_per_node * ranks_per_node);
}

// `ranks` have a part of a token. Returns which of its sums begin with rank r's part, and which are
// complete with it.
__device__ inline uint32_t place_in_sums(const ep_combine_args& args, uint32_t ranks, int32_t r) {
  const uint32_t below = ranks & ((1u << r) - 1), above = ranks & (~1u << r);
  const uint32_t of_node = node_of(args, r);
  uint32_t what = 0;
  if (!(below & of_node)) what |= ListedRow::kFirst;
  if (!(below & ~of_node)) what |= ListedRow::kFirstNode;
  if (!(above & of_node)) what |= ListedRow::kLastOfNode;
  if (!above) what |= ListedRow::kLast;
  return what;
}

// Lists the rows of a group's tokens; returns how many that takes.
__device__ int32_t list_group(const ep_combine_args& args, const Token& token, ListedRow* list) {
  const ep_peers& peers = args.peers;
  uint32_t ranks = 0;  // that the token went to
  int32_t own_n = -1;  // its received row on this one
#pragma unroll
  for (int32_t r = 0; r < EP_MAX_PEERS; ++r) {
    if (token.slot[r] < 0) continue;
    ranks |= 1u << r;
    if (r == peers.rank) own_n = args.routing.first_of_source[r] + token.slot[r];
  }
  const int32_t own_rows = own_n < 0 ? 0 : count_rows(args, own_n);
  // Where another rank's part comes first, this rank's rows are added up before it and kept.
  const uint32_t before = ranks & node_of(args, peers.rank) & ((1u << peers.rank) - 1);
  const bool keeps = own_rows > 1 && before != 0;
  const bool is_nowhere = token.exists && ranks == 0;
  const int32_t count = is_nowhere ? 1 : __popc(ranks) + max(own_rows - 1, 0);
  int32_t total;
  list += sum_before(count, &total);
  const uint32_t out = static_cast<uint32_t>(lane_id()) << ListedRow::kOutShift;
  if (is_nowhere) *list = ListedRow{input_row(args, -1), out | place_in_sums(args, 0, 0)};
  if (keeps) {
    list_rows(args, own_n, own_rows, ListedRow::kFirst | ListedRow::kKeep, list);
    list += own_rows;
  }
#pragma unroll
  for (int32_t r = 0; r < EP_MAX_PEERS; ++r) {
    if (token.slot[r] < 0) continue;
    uint32_t what = place_in_sums(args, ranks, r);
    if (r == peers.rank && keeps) {
      list[-1].what |= ListedRow::kAddKept | what;
    } else if (r == peers.rank) {
      if (own_rows > 1 && !(what & ListedRow::kLastOfNode)) what |= ListedRow::kRound;
      list_rows(args, own_n, own_rows, out | what, list);
      list += own_rows;
    } else {
      const int64_t region = region_of(r, peers.rank, peers.num_ranks);
      const int64_t place = region * args.max_tokens + token.slot[r];
      const auto* const staged =
          in_memory_of<const uint8_t>(peers, peers.rank, args.row_offset) + place * args.row_bytes;
      *list++ = ListedRow{reinterpret_cast<const uint4*>(staged), out | what};
    }
  }
  return total;
}

__device__ void gather_weights(const ep_combine_args& args, int32_t begin, int32_t end) {
  const ep_peers& peers = args.peers;
  const int32_t num_topk = args.routing.num_topk;
  // Other GPUs wrote it while this kernel ran.
  const volatile float* const staged = in_memory_of<float>(peers, peers.rank, args.weight_offset);
  for (int32_t i = begin * num_topk + lane_id(); i < end * num_topk; i += kWarpSize) {
    const int32_t expert = args.routing.topk_idx[i];
    float weight = 0.0f;
    if (expert >= 0) {
      const int32_t t = i / num_topk, k = i % num_topk, r = expert / args.num_local_experts;
      const int32_t slot = args.routing.send_slot[static_cast<int64_t>(t) * peers.num_ranks + r];
      if (r == peers.rank) {
        weight = weight_of(args, args.routing.first_of_source[r] + slot, k);
      } else {
        weight = staged[(static_cast<int64_t>(r) * args.max_tokens + slot) * num_topk + k];
      }
    }
    args.combined_weights[i] = weight;
  }
}

__device__ void list_sums(const ep_combine_args& args, Team& team, int32_t vectors) {
  const ep_peers& peers = args.peers;
  const int32_t num_groups = ceil_div(args.routing.num_tokens, kGroupTokens);
  auto* const out = reinterpret_cast<uint4*>(args.combined_x);
  bool fine = __all_sync(kFullWarp, !aborted(peers));  // else the plan may have left no indices
  int32_t group;
  while (fine && (group = take(&args.counters[kGroupsTaken])) < num_groups) {
    const int32_t begin = group * kGroupTokens;
    const int32_t end = min(begin + kGroupTokens, args.routing.num_tokens);
    const int32_t t = begin + lane_id();
    Token token;
    token.exists = t < end;
#pragma unroll
    for (int32_t r = 0; r < EP_MAX_PEERS; ++r) {
      token.slot[r] = token.exists && r < peers.num_ranks
                          ? args.routing.send_slot[static_cast<int64_t>(t) * peers.num_ranks + r]
                          : -1;
    }
    const int32_t num_rows = list_group(args, token, team.rows());
    fine = wait_for_partials(args, token);
    if (!fine) break;
    if (args.combined_weights != nullptr) gather_weights(args, begin, end);
    team.hand_over(out + static_cast<int64_t>(begin) * vectors, num_rows);
  }
  team.finish();
}

// ---- The kernel --------------------------------------------------------------------------------

template <typename T, bool kOneNode>
__global__ void __launch_bounds__(kMaxTeamThreads, 1)
    combine_kernel(const __grid_constant__ ep_combine_args args, const Teams teams,
                   const int32_t num_push_teams) {
  extern __shared__ __align__(16) uint8_t shared[];
  if (blockIdx.x == 0 && threadIdx.x == 0) begin_operation(args.peers);
  Team team(shared, teams);
  const int32_t vectors = args.row_bytes / 16;
  const bool pushes = team.index() < num_push_teams;
  if (team.is_lister()) {
    if (pushes) list_pushes(args, team, vectors);
    list_sums(args, team, vectors);
  } else {
    team.add_up<T, kOneNode>(vectors);
  }
  const bool is_last = end_operation(args.peers, args.counters, gridDim.x, args.credit_offset,
                                     args.routing.num_recv, args.row_bytes);
  if (is_last && threadIdx.x == 0) args.counters[kUnitsTaken] = args.counters[kGroupsTaken] = 0;
}

using Kernel = void (*)(const ep_combine_args, const Teams, const int32_t);

// [dtype][all ranks are one node]
constexpr Kernel kKernels[2][2] = {
    {combine_kernel<__nv_bfloat16, false>, combine_kernel<__nv_bfloat16, true>},
    {combine_kernel<float, false>, combine_kernel<float, true>},
};

const Kernels kernels("combine kernels", Setup::kShared, kMaxTeamShared, kKernels[0][0],
                      kKernels[0][1], kKernels[1][0], kKernels[1][1]);

}  // namespace

int32_t ep_combine(const ep_combine_args* args, void* stream) {
  if (args->row_bytes < 16 || args->row_bytes % 16) {
    return ep::fail(EP_ERR_ARGUMENT, "rows of %d bytes are not a multiple of 16", args->row_bytes);
  }
  const int32_t unit_rows = args->chunk_rows * args->chunks_per_unit;
  const int32_t num_topk4 = args->routing.num_topk4;
  if (unit_rows < 1 || unit_rows > kMaxUnitRows || num_topk4 > EP_MAX_TOPK) {
    return ep::fail(EP_ERR_ARGUMENT, "%d rows a unit, num_topk4 = %d: at most %d and %d", unit_rows,
                    num_topk4, kMaxUnitRows, EP_MAX_TOPK);
  }
  if (args->num_blocks < 1 || args->push_percent < 0 || args->push_percent > 100) {
    return ep::fail(EP_ERR_ARGUMENT, "%d blocks, %d %% of the teams: at least 1, and 0 to 100",
                    args->num_blocks, args->push_percent);
  }
  if (args->dtype != EP_BF16 && args->dtype != EP_FP32) {
    return ep::fail(EP_ERR_ARGUMENT, "dtype = %d is not one of EP_BF16, EP_FP32", args->dtype);
  }
  const int32_t list_rows =
      std::max(unit_rows * num_topk4, kGroupTokens * (num_topk4 + args->peers.num_ranks));
  const ep::Teams teams = ep::Teams::of_rows(args->row_bytes, list_rows);
  const int32_t all_teams = args->num_blocks * teams.num_teams;
  const int32_t push_teams = std::max(1, all_teams * args->push_percent / 100);
  const bool one_node = args->ranks_per_node >= args->peers.num_ranks;
  kKernels[args->dtype][one_node]<<<args->num_blocks, teams.block_threads(), teams.shared_bytes(),
                                    static_cast<cudaStream_t>(stream)>>>(*args, teams, push_teams);
  return ep::check_cuda(cudaGetLastError(), "ep_combine");
}
