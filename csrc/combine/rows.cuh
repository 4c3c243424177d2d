// What a combine lists for its teams: the rows of a token on this rank, and its partial rows of all
// ranks of a node.
#pragma once

#include "combine/teams.cuh"
#include "common/launch.cuh"
#include "common/peers.cuh"
#include "common/warp.cuh"
#include "routing/entries.cuh"

namespace ep {

constexpr int kMaxUnitRows = 32;  // a lister's lane lists one
constexpr int kGroupTokens = 4;   // tokens that a team sums at a time
constexpr int kPartialUnitRows = 4;

// Takes the next number of a counter, the same for all lanes.
__device__ inline int32_t take(int32_t* counter) {
  int32_t next = 0;
  if (lane_id() == 0) next = atomicAdd(counter, 1);
  return __shfl_sync(kFullWarp, next, 0);
}

// Output rows of received row n in ascending order of experts, [K4]; -1 after the last.
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

// Returns the gradient of the probability of entry k of received row n. Where those of all ranks
// are added up, what another rank's expert has here counts too.
__device__ inline float weight_of(const ep_combine_args& args, int32_t n, int32_t k) {
  const ep_routing& routing = args.routing;
  const bool is_own = routing.entries[place_in_entries(routing, n, kLocalExperts) + k] >= 0;
  if (!is_own && !args.adds_weights) return 0.0f;
  const int32_t* const rows = routing.entries + place_in_entries(routing, n, kRowOfK);
  const int32_t row = rows[routing.expert_major ? k : 0];
  if (row < 0) return 0.0f;
  return args.weights[routing.expert_major ? row : int64_t{row} * routing.num_topk + k];
}

// Lists the partial rows of slots [begin, end) of a source, whose received rows begin with number
// first_of_source[source]; returns how many rows that takes.
__device__ inline int32_t list_unit(const ep_combine_args& args, int32_t source, int32_t begin,
                                    int32_t end, ListedRow* list) {
  const int32_t slot = begin + lane_id();
  const int32_t n = args.routing.first_of_source[source] + slot;
  const int32_t count = slot < end ? count_rows(args, n) : 0;
  int32_t total;
  const int32_t at = sum_before(count, &total);
  const uint32_t out = static_cast<uint32_t>(lane_id()) << ListedRow::kOutShift;
  list_rows(args, n, count, out | ListedRow::kFirst | ListedRow::kLast, list + at);
  return total;
}

// Writes the gradients of the probabilities of these rows to `weights`, where those of slot 0
// begin.
__device__ inline void write_weights(const ep_combine_args& args, int32_t source, int32_t begin,
                                     int32_t end, float* weights) {
  const int32_t num_topk = args.routing.num_topk;
  const int32_t first_n = args.routing.first_of_source[source] + begin;
  for (int32_t i = lane_id(); i < (end - begin) * num_topk; i += kWarpSize) {
    weights[static_cast<int64_t>(begin) * num_topk + i] =
        weight_of(args, first_n + i / num_topk, i % num_topk);
  }
}

// The same, into the memory of rank `owner`.
__device__ inline void send_weights(const ep_combine_args& args, int32_t source, int32_t owner,
                                    int64_t weight_offset, int32_t begin, int32_t end) {
  const int64_t of_this_rank =
      static_cast<int64_t>(args.peers.rank) * args.max_tokens * args.routing.num_topk;
  write_weights(args, source, begin, end,
                in_memory_of<float>(args.peers, owner, weight_offset) + of_this_rank);
}

// Adds up weights in the order in which combine adds rows: those of a node first, then the nodes'
// sums. It begins at -0, because -0 + x is x for every x, -0 too.
struct WeightSum {
  float total = -0.0f, of_node = -0.0f;
  bool is_empty = true;

  __device__ void add(float weight) {
    of_node += weight;
    is_empty = false;
  }
  __device__ void end_node() {
    total += of_node;
    of_node = -0.0f;
  }
  __device__ float value() {
    end_node();
    return is_empty ? 0.0f : total;
  }
};

// This lane's token of a group.
struct Token {
  int32_t slot[EP_MAX_PEERS];  // -1 where the token does not go
  bool exists;
};

// The chunks [first, last] of a rank's partial rows; none where `last` is less than `first`.
struct ChunkRange {
  int32_t first, last;
};

// Returns the chunks with the partial rows of a group: lane r has those of rank r, if pushes(r)
// says that it pushes its rows here. chunk_of(slot): the chunk that a slot is in.
template <typename Pushes, typename ChunkOf>
__device__ inline ChunkRange chunks_of_partials(const Token& token, const Pushes& pushes,
                                                const ChunkOf& chunk_of) {
  int32_t first = 0, last = -1;
#pragma unroll
  for (int32_t r = 0; r < EP_MAX_PEERS; ++r) {
    // Slots of consecutive tokens are consecutive: every chunk in between has one of them.
    const int32_t slot = token.slot[r];
    const uint32_t lowest = __reduce_min_sync(kFullWarp, static_cast<uint32_t>(slot));
    const int32_t highest = __reduce_max_sync(kFullWarp, slot);
    if (r != lane_id() || !pushes(r) || highest < 0) continue;
    first = chunk_of(static_cast<int32_t>(lowest));
    last = chunk_of(highest);
  }
  return ChunkRange{first, last};
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

// Rows that a token has besides those of the ranks here: sums of other nodes.
struct NoOtherNodes {
  static constexpr int32_t before = 0, after = 0;  // this node
};
struct OtherNodes {
  int32_t before, after;
};
// Where they are listed, of this lane's token.
struct OtherPlaces {
  ListedRow *before, *after;
};

// Lists the rows of a group's tokens; returns how many that takes. `own_source` is the source of
// this rank's received rows of them; partial rows stand at row_offset. There is room left for the
// rows of `others`, and *places says where.
template <typename Others>
__device__ inline int32_t list_group(const ep_combine_args& args, const Token& token,
                                     int32_t own_source, int64_t row_offset, const Others& others,
                                     ListedRow* list, OtherPlaces* places) {
  const ep_peers& peers = args.peers;
  uint32_t ranks = 0;  // that the token went to
  int32_t own_n = -1;  // its received row on this one
#pragma unroll
  for (int32_t r = 0; r < EP_MAX_PEERS; ++r) {
    if (token.slot[r] < 0) continue;
    ranks |= 1u << r;
    if (r == peers.rank) own_n = args.routing.first_of_source[own_source] + token.slot[r];
  }
  const int32_t own_rows = own_n < 0 ? 0 : count_rows(args, own_n);
  // Where another rank's part comes first, this rank's rows are added up before it and kept.
  const uint32_t before = ranks & node_of(args, peers.rank) & ((1u << peers.rank) - 1);
  const bool keeps = own_rows > 1 && before != 0;
  const bool is_nowhere = token.exists && ranks == 0 && others.before + others.after == 0;
  const int32_t here = is_nowhere ? 1 : __popc(ranks) + max(own_rows - 1, 0);
  const int32_t count = others.before + here + others.after;
  int32_t total;
  list += sum_before(count, &total);
  places->before = list;
  list += others.before;
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
    if (others.before != 0) what &= ~ListedRow::kFirstNode;
    if (others.after != 0) what &= ~ListedRow::kLast;
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
          in_memory_of<const uint8_t>(peers, peers.rank, row_offset) + place * args.row_bytes;
      *list++ = ListedRow{reinterpret_cast<const uint4*>(staged), out | what};
    }
  }
  places->after = list;
  return total;
}

// Rows that a team adds up at a time for one owner. By copy engines a chunk is much more.
__host__ __device__ inline int32_t rows_of_unit(const ep_combine_args& args) {
  return args.wire.chunk_rows != 0 ? kPartialUnitRows : args.chunk_rows * args.chunks_per_unit;
}

// Refuses what the kernels cannot add up. Host code.
inline int32_t check_combine(const ep_combine_args& args) {
  if (args.row_bytes < 16 || args.row_bytes % 16) {
    return fail(EP_ERR_ARGUMENT, "rows of %d bytes are not a multiple of 16", args.row_bytes);
  }
  const int32_t unit_rows = rows_of_unit(args);
  const int32_t num_topk4 = args.routing.num_topk4;
  if (unit_rows < 1 || unit_rows > kMaxUnitRows || num_topk4 > EP_MAX_TOPK) {
    return fail(EP_ERR_ARGUMENT, "%d rows a unit, num_topk4 = %d: at most %d and %d", unit_rows,
                num_topk4, kMaxUnitRows, EP_MAX_TOPK);
  }
  if (args.num_blocks < 1 || args.push_percent < 0 || args.push_percent > 100) {
    return fail(EP_ERR_ARGUMENT, "%d blocks, %d %% of the teams: at least 1, and 0 to 100",
                args.num_blocks, args.push_percent);
  }
  if (args.dtype < EP_BF16 || args.dtype > EP_FP16) {
    return fail(EP_ERR_ARGUMENT, "dtype = %d is not one of EP_BF16, EP_FP32, EP_FP16", args.dtype);
  }
  return EP_OK;
}

}  // namespace ep
