// Combine between nodes: the waves, and the warp of each team that lists what the team adds up. Its
// functions stand in the headers beside this one, by what they do.
//
// Teams take items of one sequence. Wave j has
//   units   as on one node: partial rows of tokens that node j + 1 after this one owns, or in the
//           last wave this one, go to the rank with their owner's number.
//   groups  of tokens of the owner with this rank's number: the partial rows of this node are added
//           up. In the last wave the token is our own, and the sums of other nodes are added too.
//           In the others the sum goes to the network memory, and a chunk of them to the owner.
//           Chunk 0 is always sent, empty or not.
// What a team has done is told when its next list is handed over, or before its lister waits.
#pragma once

#include "combine/rows.cuh"
#include "nodes/nodes.cuh"

namespace ep::nodes {
// Unnamed, for combine.cu alone: of a function that other files might call the compiler has to keep
// to the ABI, which costs instructions in the library over NVSHMEM.
namespace {

// ep_combine_args.counters, after end_operation's: items taken; then the groups done of each wave
// [N], those of each chunk [N, EP_MAX_NETWORK_CHUNKS], and how far each wave's credit has come [N].
constexpr int kTaken = 1, kGroupsDone = EP_NODES_COMBINE_COUNTERS;
static_assert(EP_NODES_COMBINE_WAVE_COUNTERS == EP_MAX_NETWORK_CHUNKS + 2,
              "groups of a wave and of each chunk, and a credit");

// A wave's place in the sequence, and what there is to do.
struct Wave {
  int32_t j;
  int32_t number;
  int32_t first_source;  // rank 0 of the node that owns the tokens
  int32_t num_tokens;    // of the owner with this rank's number
  int32_t first_item;
  int32_t num_units;
  int32_t num_groups;  // at least 1, so that somebody gives the credit

  __device__ int32_t half() const { return half_of(number); }
  __device__ int32_t end_item() const { return first_item + num_units + num_groups; }
};

// A list that was handed over: when it has been written, what is to be told of it.
struct Done {
  enum Kind { kNothing, kUnit, kGroup } kind = kNothing;
  Wave wave;
  int32_t owner;  // kUnit: local rank, and its chunks
  int32_t first_chunk;
  int32_t num_chunks;
  int32_t group;  // kGroup
};

class Lister {
 public:
  __device__ Lister(const ep_nodes_combine_args& args, Team& team)
      : args_(args),
        local_(args.combine),
        peers_(args.combine.peers),
        team_(team),
        num_nodes_(args.network.num_nodes),
        vectors_(args.combine.row_bytes / 16),
        epoch_(epoch_of(args.combine.peers)) {}

  // Lists all that this lister takes.
  __device__ void run() {
    bool fine = __all_sync(kFullWarp, !aborted(peers_));  // else there may be no indices
    if (fine) enter(0, 0);
    while (fine) {
      const int32_t item = take(&local_.counters[kTaken]);
      while (item >= wave_.end_item() && wave_.j < num_nodes_) enter(wave_.j + 1, wave_.end_item());
      if (wave_.j == num_nodes_) break;
      const int32_t i = item - wave_.first_item;
      fine = i < wave_.num_units ? list_unit_of_wave(i) : list_group_of_wave(i - wave_.num_units);
    }
    if (fine) flush();
    team_.finish();
  }

 private:
  __device__ bool is_last_wave() const { return wave_.j == num_nodes_ - 1; }
  __device__ int32_t unit_rows() const { return local_.chunk_rows * local_.chunks_per_unit; }
  // The owners' node is this far before.
  __device__ int32_t distance() const { return num_nodes_ - 1 - wave_.j; }

  // Goes on to wave j, whose first item has that number. After the last wave there is nothing.
  __device__ void enter(int32_t j, int32_t first_item) {
    wave_ = Wave{};
    wave_.j = j;
    wave_.first_item = first_item;
    may_push_ = may_send_ = false;
    if (j == num_nodes_) return;
    const int32_t num_ranks = peers_.num_ranks;
    wave_.number = wave_number(epoch_, num_nodes_, j);
    wave_.first_source = node_after(args_.network, j + 1) * num_ranks;
    wave_.num_tokens =
        is_last_wave() ? local_.routing.num_tokens : args_.nodes.num_relayed[distance()];
    int32_t most = 0;  // rows of an owner
    for (int32_t l = 0; l < num_ranks; ++l) {
      if (l != peers_.rank) most = max(most, local_.routing.num_recv[wave_.first_source + l]);
    }
    wave_.num_units = ceil_div(most, unit_rows()) * (num_ranks - 1);
    wave_.num_groups = max(1, ceil_div(wave_.num_tokens, kGroupTokens));
  }

  // ---- Where things stand ----

  // Flags of the chunks of partial rows that `source` pushes to `owner`.
  __device__ uint32_t* partial_flags(int32_t owner, int32_t half, int32_t source) const {
    return in_memory_of<uint32_t>(peers_, owner, local_.flag_offset) +
           (static_cast<int64_t>(half) * peers_.num_ranks + source) * local_.max_chunks;
  }

  // The offset of the wave's weights in the memory of a rank.
  __device__ int64_t weights_of_half() const {
    const int64_t half = static_cast<int64_t>(peers_.num_ranks) * local_.max_tokens *
                         local_.routing.num_topk * int64_t{sizeof(float)};
    return local_.weight_offset + wave_.half() * half;
  }

  // Where sums of the wave are written that go to another node, or their weights.
  __device__ uint8_t* place_to_send(int64_t from, int64_t to, int64_t region) const {
    const int64_t place = wave_.j * region;
    return network::place_to_write(args_.network, wave_.j + 1, from + place, to + place);
  }

  // The relay entry of a row of this wave.
  __device__ const int32_t* relay_entry(int32_t row) const {
    const int32_t ints = entry_ints(peers_.num_ranks, local_.routing.num_topk);
    return args_.nodes.relay +
           (static_cast<int64_t>(args_.nodes.relay_first[distance()]) + row) * ints;
  }

  // Slot, at local rank l, of token t of the wave.
  __device__ int32_t slot_of(int32_t t, int32_t l) const {
    if (!is_last_wave()) return relay_entry(t)[l];
    return local_.routing.send_slot[static_cast<int64_t>(t) * peers_.num_ranks + l];
  }

  // ---- Telling what the team has done: tell.cuh ----

  __device__ void hand_over(uint4* out, int32_t num_rows, const Done& next);
  __device__ void flush();
  __device__ void raise(const Done& unit) const;
  __device__ __noinline__ void end_group_of(const Wave& wave, int32_t group) const;
  __device__ void send_chunk(int32_t j, int32_t c, int32_t rows) const;

  // ---- Waiting: waits.cuh ----

  __device__ bool wait_for_credits();
  __device__ bool wait_to_send();
  template <typename Flag>
  __device__ bool wait_for_chunks(const Flag* flags, int32_t first, int32_t last, uint32_t stamp,
                                  int32_t peer);
  __device__ __noinline__ bool wait_for_partials(const Token& token);
  __device__ __noinline__ bool wait_for_sums(int32_t begin, int32_t end);

  // ---- Listing: units.cuh, groups.cuh ----

  __device__ __noinline__ bool list_unit_of_wave(int32_t unit);
  __device__ __noinline__ bool list_group_of_wave(int32_t group);
  __device__ __noinline__ int32_t list_own_group(const Token& token, int32_t t) const;

  // ---- Gradients of probabilities: weights.cuh ----

  __device__ float weight_on_node(int32_t l, int32_t slot, int32_t which) const;
  __device__ float weight_from_node(int32_t node, int32_t t, int32_t which) const;
  template <typename SlotOf>
  __device__ void add_on_node(WeightSum* sum, const SlotOf& slot_at, int32_t which) const;
  __device__ void add_on_all_nodes(WeightSum* sum, int32_t t, int32_t which) const;
  __device__ void relay_weights(int32_t begin, int32_t end) const;
  __device__ void gather_weights(int32_t begin, int32_t end) const;

  const ep_nodes_combine_args& args_;
  const ep_combine_args& local_;
  const ep_peers& peers_;
  Team& team_;
  const int32_t num_nodes_, vectors_, epoch_;
  Wave wave_;
  bool may_push_ = false, may_send_ = false;  // in this wave
  Done done_;
};

}  // namespace
}  // namespace ep::nodes
