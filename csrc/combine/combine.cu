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
//
// Where copy engines are the wire a kernel of its own adds up partial rows in local memory, a chunk
// of each owner's at a time, and in the other one all teams sum.

#include <algorithm>

#include "combine/rows.cuh"
#include "common/calls.cuh"
#include "common/launch.cuh"
#include "common/peers.cuh"
#include "common/warp.cuh"
#include "wire/wire.cuh"

namespace {

using namespace ep;

// ep_combine_args.counters; the first is end_operation's.
constexpr int kUnitsTaken = 1, kGroupsTaken = 2;

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
      if (args.weights != nullptr) send_weights(args, owner, owner, args.weight_offset, begin, end);
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

// ---- Partial rows for copy engines -------------------------------------------------------------

// True where the operation was given up: its plan may have left no entries, so no partial rows are
// made. Copies push what stands there all the same, so peers are told not to read it.
__device__ bool is_given_up(const ep_combine_args& args) {
  if (!__any_sync(kFullWarp, aborted(args.peers))) return false;
  wire::set_marks(args.peers, args.wire.mark_offset, epoch_of(args.peers) + 1);
  return true;
}

// Lists the partial rows of a chunk of each owner's; owners rotate.
__device__ void list_partials(const ep_combine_args& args, Team& team, int32_t num_teams,
                              int32_t vectors) {
  const ep_peers& peers = args.peers;
  const int32_t num_others = peers.num_ranks - 1, unit_rows = rows_of_unit(args);
  if (is_given_up(args)) return;
  const int32_t num_units = ceil_div(args.wire.chunk_rows, unit_rows) * num_others;
  for (int32_t unit = team.index(); unit < num_units; unit += num_teams) {
    const int32_t owner = (peers.rank + 1 + unit % num_others) % peers.num_ranks;
    const int32_t begin = args.first_row + unit / num_others * unit_rows;
    const int32_t end = min(min(begin + unit_rows, args.first_row + args.wire.chunk_rows),
                            args.routing.num_recv[owner]);
    if (begin >= end) continue;
    const int32_t num_rows = list_unit(args, owner, begin, end, team.rows());
    const int64_t region =
        static_cast<int64_t>(region_of(owner, peers.rank, peers.num_ranks)) * args.max_tokens;
    auto* const rows = reinterpret_cast<uint4*>(args.partial_rows);
    team.hand_over(rows + (region + begin) * vectors, num_rows);
  }
}

// Writes the gradients of the probabilities of all owners' rows.
__device__ void write_all_weights(const ep_combine_args& args, int32_t team, int32_t num_teams) {
  const ep_peers& peers = args.peers;
  if (is_given_up(args)) return;
  for (int32_t i = 0; i < peers.num_ranks - 1; ++i) {
    const int32_t owner = (peers.rank + 1 + i) % peers.num_ranks;
    const int32_t rows = args.routing.num_recv[owner];
    float* const weights =
        args.partial_weights + static_cast<int64_t>(i) * args.max_tokens * args.routing.num_topk;
    for (int32_t begin = team * kMaxUnitRows; begin < rows; begin += num_teams * kMaxUnitRows) {
      write_weights(args, owner, begin, min(begin + kMaxUnitRows, rows), weights);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kMaxTeamThreads, 1)
    partial_kernel(const __grid_constant__ ep_combine_args args, const Teams teams) {
  extern __shared__ __align__(16) uint8_t shared[];
  Team team(shared, teams);
  const int32_t vectors = args.row_bytes / 16, num_teams = gridDim.x * teams.num_teams;
  if (!team.is_lister()) {
    team.add_up<T, true>(vectors);
    return;
  }
  if (args.weights != nullptr && args.first_row == 0) {
    write_all_weights(args, team.index(), num_teams);
  }
  list_partials(args, team, num_teams, vectors);
  team.finish();
}

// ---- Summing -----------------------------------------------------------------------------------

// Waits for the chunks with the partial rows of a group. Lane r waits for those of rank r.
__device__ bool wait_for_partials(const ep_combine_args& args, const Token& token) {
  const ep_peers& peers = args.peers;
  const ChunkRange chunks = chunks_of_partials(
      token, [&](int32_t r) { return r != peers.rank; },
      [&](int32_t slot) { return slot / args.chunk_rows; });
  const int32_t epoch = epoch_of(peers), r = lane_id();
  const uint32_t stamp = chunk_stamp(wire::number_of(args.wire, epoch), args.tag);
  const auto is_of_this_epoch = [stamp](uint32_t value) { return value >> 8 == stamp >> 8; };
  bool fine = true;
  for (int32_t chunk = chunks.first; chunk <= chunks.last && fine; ++chunk) {
    const uint32_t* const flag = in_memory_of<uint32_t>(peers, peers.rank, args.flag_offset) +
                                 static_cast<int64_t>(r) * args.max_chunks + chunk;
    uint32_t seen;
    fine = wait_flag(peers, flag, is_of_this_epoch, &seen, EP_PHASE_ROWS, r, epoch) &&
           same_call(peers, stamp, seen, r);
  }
  __syncwarp();  // all lanes may read what one waited for
  return __all_sync(kFullWarp, fine);
}

__device__ void gather_weights(const ep_combine_args& args, int32_t begin, int32_t end) {
  const ep_peers& peers = args.peers;
  const int32_t num_topk = args.routing.num_topk;
  // Other GPUs wrote it while this kernel ran.
  const volatile float* const staged = in_memory_of<float>(peers, peers.rank, args.weight_offset);
  const auto from_rank = [&](int32_t r, int32_t slot, int32_t k) {
    return r == peers.rank
               ? weight_of(args, args.routing.first_of_source[r] + slot, k)
               : staged[(static_cast<int64_t>(r) * args.max_tokens + slot) * num_topk + k];
  };
  for (int32_t i = begin * num_topk + lane_id(); i < end * num_topk; i += kWarpSize) {
    const int32_t t = i / num_topk, k = i % num_topk, expert = args.routing.topk_idx[i];
    const int32_t* const slots = args.routing.send_slot + static_cast<int64_t>(t) * peers.num_ranks;
    WeightSum sum;
    if (args.adds_weights) {
#pragma unroll 1
      for (int32_t r = 0; r < peers.num_ranks; ++r) {
        if (r % args.ranks_per_node == 0) sum.end_node();
        if (slots[r] >= 0) sum.add(from_rank(r, slots[r], k));
      }
    } else if (expert >= 0) {
      const int32_t r = expert / args.num_local_experts;
      sum.add(from_rank(r, slots[r], k));
    }
    args.combined_weights[i] = sum.value();
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
    OtherPlaces none;
    const int32_t num_rows =
        list_group(args, token, peers.rank, args.row_offset, NoOtherNodes(), team.rows(), &none);
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
  const bool has_begun = args.wire.chunk_rows != 0;  // with its gate
  if (blockIdx.x == 0 && threadIdx.x == 0 && !has_begun) begin_operation(args.peers);
  Team team(shared, teams);
  const int32_t vectors = args.row_bytes / 16;
  const bool pushes = team.index() < num_push_teams;
  if (team.is_lister()) {
    if (pushes) list_pushes(args, team, vectors);
    list_sums(args, team, vectors);
  } else {
    team.add_up<T, kOneNode>(vectors);
  }
  const bool is_last =
      end_operation(args.peers, args.counters, gridDim.x, args.credit_offset, args.routing.num_recv,
                    args.row_bytes, args.wire, args.num_pushed);
  if (is_last && threadIdx.x == 0) args.counters[kUnitsTaken] = args.counters[kGroupsTaken] = 0;
}

using Kernel = void (*)(const ep_combine_args, const Teams, const int32_t);

// [dtype][all ranks are one node]
constexpr Kernel kKernels[3][2] = {
    {combine_kernel<__nv_bfloat16, false>, combine_kernel<__nv_bfloat16, true>},
    {combine_kernel<float, false>, combine_kernel<float, true>},
    {combine_kernel<__half, false>, combine_kernel<__half, true>},
};

const Kernels kernels("combine kernels", Setup::kShared, kMaxTeamShared, kKernels[0][0],
                      kKernels[0][1], kKernels[1][0], kKernels[1][1], kKernels[2][0],
                      kKernels[2][1]);

using PartialKernel = void (*)(const ep_combine_args, const Teams);

// [dtype]
constexpr PartialKernel kPartialKernels[3] = {partial_kernel<__nv_bfloat16>, partial_kernel<float>,
                                              partial_kernel<__half>};

const Kernels partial_kernels("partial sum kernels", Setup::kShared, kMaxTeamShared,
                              kPartialKernels[0], kPartialKernels[1], kPartialKernels[2]);

Teams teams_of(const ep_combine_args& args) {
  const int32_t num_topk4 = args.routing.num_topk4;
  return Teams::of_rows(
      args.row_bytes,
      std::max(rows_of_unit(args) * num_topk4, kGroupTokens * (num_topk4 + args.peers.num_ranks)));
}

}  // namespace

int32_t ep_combine(const ep_combine_args* args, void* stream) {
  const int32_t status = ep::check_combine(*args);
  if (status != EP_OK) return status;
  const Teams teams = teams_of(*args);
  const int32_t all_teams = args->num_blocks * teams.num_teams;
  const bool by_copy = args->wire.chunk_rows != 0;  // then no team pushes
  const int32_t push_teams = by_copy ? 0 : std::max(1, all_teams * args->push_percent / 100);
  const bool one_node = args->ranks_per_node >= args->peers.num_ranks;
  const Kernel combine = kKernels[args->dtype][one_node];
  if (!by_copy) ep::note_call(args->peers, args->row_bytes);  // else ep_gate begins it
  combine<<<args->num_blocks, teams.block_threads(), teams.shared_bytes(),
            static_cast<cudaStream_t>(stream)>>>(*args, teams, push_teams);
  return ep::check_cuda(cudaGetLastError(), "ep_combine");
}

int32_t ep_partial_sums(const ep_combine_args* args, void* stream) {
  const int32_t status = ep::check_combine(*args);
  if (status != EP_OK) return status;
  const Teams teams = teams_of(*args);
  const PartialKernel add_up = kPartialKernels[args->dtype];
  add_up<<<args->num_blocks, teams.block_threads(), teams.shared_bytes(),
           static_cast<cudaStream_t>(stream)>>>(*args, teams);
  return ep::check_cuda(cudaGetLastError(), "ep_partial_sums");
}
