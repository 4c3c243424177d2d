// Combine between nodes (PROTOCOL.md, "Between nodes"): as on one node (combine/combine.cu), but in
// waves, and with the sums of a node as parts of a sum over nodes.
//
// Teams take items of one sequence. Wave j has
//   units   as on one node: partial rows of tokens that node j + 1 after this one owns, or in the
//   last
//           wave this one, go to the rank with their owner's number.
//   groups  of tokens of the owner with this rank's number: the partial rows of this node are added
//           up. In the last wave the token is our own, and the sums of other nodes are added too.
//           In the others the sum goes to the network memory, and a chunk of them to the owner.
//           Chunk 0 is always sent, empty or not.
// What a team has done is told when its next list is handed over, or before its lister waits.

#include <algorithm>
#include <type_traits>

#include "combine/rows.cuh"
#include "common/launch.cuh"
#include "nodes/end.cuh"

namespace {

using namespace ep;
using namespace ep::nodes;

// ep_combine_args.counters, behind end_operation's.
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

  // Goes on to wave j, whose first item has that number. Behind the last wave there is nothing.
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

  // ---- What is done ----------------------------------------------------------------------------

  // A list that was handed over.
  struct Done {
    enum Kind { kNothing, kUnit, kGroup } kind = kNothing;
    Wave wave;
    int32_t owner;  // kUnit: local rank, and its chunks
    int32_t first_chunk;
    int32_t num_chunks;
    int32_t group;  // kGroup
  };

  // Hands the next list over. The one before has been written then, and that is told.
  __device__ void hand_over(uint4* out, int32_t num_rows, const Done& next) {
    team_.hand_over(out, num_rows);
    const Done done = done_;
    done_ = next;
    if (done.kind == Done::kUnit) raise(done);
    if (done.kind == Done::kGroup) end_group_of(done.wave, done.group);
  }

  // Has the team finish, and tells what it has done. Before every wait.
  __device__ void flush() {
    if (done_.kind != Done::kNothing) hand_over(nullptr, 0, Done());
  }

  __device__ uint32_t* partial_flags(int32_t owner, int32_t half, int32_t source) const {
    return in_memory_of<uint32_t>(peers_, owner, local_.flag_offset) +
           (static_cast<int64_t>(half) * peers_.num_ranks + source) * local_.max_chunks;
  }

  __device__ void raise(const Done& unit) const {
    if (lane_id() >= unit.num_chunks) return;
    uint32_t* const flags = partial_flags(unit.owner, unit.wave.half(), peers_.rank);
    signal(peers_, &flags[unit.first_chunk + lane_id()], chunk_stamp(unit.wave.number, local_.tag));
  }

  // Adds one to a counter; true in all lanes where that makes it `all`. Leaves it zero then.
  __device__ bool is_last(int32_t* counter, int32_t all) const {
    bool last = false;
    __syncwarp();
    if (lane_id() == 0) {
      ptx::fence_acq_rel_sys();
      last = atomicAdd(counter, 1) == all - 1;
      if (last) *counter = 0;
      ptx::fence_acq_rel_sys();
    }
    __syncwarp();  // what one lane has seen, all have: they send and give credits
    return __shfl_sync(kFullWarp, last, 0);
  }

  // A group's sums have been written. The last of a chunk sends it. The last of the wave gives the
  // credit: all that the ranks of this node have sent in it, and before it, has been read. A wave
  // may be done before an earlier one: it waits for that one's credit as for a group more.
  __device__ __noinline__ void end_group_of(const Wave& wave, int32_t group) const {
    if (wave.j < num_nodes_ - 1) {
      const int32_t chunk_rows = args_.network_chunk_rows;
      const int32_t c = group * kGroupTokens / chunk_rows;
      const int32_t rows = min(chunk_rows, wave.num_tokens - c * chunk_rows);
      const int32_t num_groups = max(1, ceil_div(rows, kGroupTokens));
      int32_t* const counters = local_.counters + kGroupsDone + num_nodes_;
      if (is_last(&counters[wave.j * EP_MAX_NETWORK_CHUNKS + c], num_groups)) {
        send_chunk(wave.j, c, rows);
      }
    }
    int32_t* const waves = local_.counters + kGroupsDone;
    int32_t* const credits = waves + num_nodes_ * (1 + EP_MAX_NETWORK_CHUNKS);
    if (!is_last(&waves[wave.j], wave.num_groups)) return;
    for (int32_t j = wave.j; j < num_nodes_ && is_last(&credits[j], j == 0 ? 1 : 2); ++j) {
      credit_wave(peers_, local_.credit_offset, wave_number(epoch_, num_nodes_, j), lane_id());
    }
  }

  __device__ void send_chunk(int32_t j, int32_t c, int32_t rows) const {
    const int64_t first = static_cast<int64_t>(c) * args_.network_chunk_rows;
    const int64_t flag = (j * EP_MAX_NETWORK_CHUNKS + c) * int64_t{sizeof(network::Flag)};
    const network::Flag stamp = pack_chunk(chunk_stamp(epoch_, local_.tag), rows);
    const auto put = [&](int64_t from, int64_t to, int64_t region, int64_t row_bytes,
                         int64_t flags) {
      const int64_t place = j * region + first * row_bytes;
      network::put(peers_, args_.network, j + 1, from + place, to + place, rows * row_bytes,
                   flags + flag, stamp, network::WarpGroup());
    };
    if (args_.has_weights) {
      put(args_.weight_send_offset, args_.weight_receive_offset, args_.weight_region,
          local_.routing.num_topk * int64_t{sizeof(float)}, args_.weight_flag_offset);
    }
    put(args_.network_send_offset, args_.network_receive_offset, args_.network_region,
        local_.row_bytes, args_.network_flag_offset);
  }

  // Where the sums of this wave are written, or their weights.
  __device__ uint8_t* place_to_send(int64_t from, int64_t to, int64_t region) const {
    const int64_t place = wave_.j * region;
    return network::place_to_write(args_.network, wave_.j + 1, from + place, to + place);
  }

  // ---- Units -----------------------------------------------------------------------------------

  __device__ __noinline__ bool list_unit_of_wave(int32_t unit) {
    const int32_t num_ranks = peers_.num_ranks, num_others = num_ranks - 1;
    const int32_t owner = (peers_.rank + 1 + unit % num_others) % num_ranks;
    const int32_t source = wave_.first_source + owner;
    const int32_t begin = unit / num_others * unit_rows();
    const int32_t end = min(begin + unit_rows(), local_.routing.num_recv[source]);
    if (begin >= end) return true;  // and nobody waits for it
    if (!may_push_ && !wait_for_credits()) return false;
    may_push_ = true;
    const int32_t num_rows = list_unit(local_, source, begin, end, team_.rows());
    if (local_.weights != nullptr) {
      send_weights(local_, source, owner, weights_of_half(), begin, end);
    }
    const int64_t region = region_of(peers_.rank, owner, num_ranks);
    auto* const rows =
        in_memory_of<uint4>(peers_, owner, local_.row_offset + wave_.half() * args_.row_half);
    Done done;
    done.kind = Done::kUnit;
    done.wave = wave_;
    done.owner = owner;
    done.first_chunk = begin / local_.chunk_rows;
    done.num_chunks = ceil_div(end - begin, local_.chunk_rows);
    hand_over(rows + (region * local_.max_tokens + begin) * vectors_, num_rows, done);
    return true;
  }

  // Where weights stand in the memory of a rank.
  __device__ int64_t weights_of_half() const {
    const int64_t half = static_cast<int64_t>(peers_.num_ranks) * local_.max_tokens *
                         local_.routing.num_topk * int64_t{sizeof(float)};
    return local_.weight_offset + wave_.half() * half;
  }

  // Waits until the ranks of this node have read the wave that used this half before.
  __device__ bool wait_for_credits() {
    flush();
    bool fine = true;
    if (lane_id() < peers_.num_ranks - 1) {
      const int32_t l = (peers_.rank + 1 + lane_id()) % peers_.num_ranks;
      fine = wait_for_wave(peers_, local_.credit_offset, wave_.number - 2, epoch_, l);
    }
    __syncwarp();  // all lanes may write to where one waited
    return __all_sync(kFullWarp, fine);
  }

  // ---- Groups ----------------------------------------------------------------------------------

  __device__ __noinline__ bool list_group_of_wave(int32_t group) {
    const int32_t begin = group * kGroupTokens;
    const int32_t end = min(begin + kGroupTokens, wave_.num_tokens);
    if (begin >= end) {  // the wave has no tokens: its owner is sent a chunk of none
      if (!(is_last_wave() ? wait_for_sums(begin, end) : wait_to_send())) return false;
      end_group_of(wave_, group);
      return true;
    }
    Token token;
    token.exists = begin + lane_id() < end;
#pragma unroll
    for (int32_t l = 0; l < EP_MAX_PEERS; ++l) {
      token.slot[l] = token.exists && l < peers_.num_ranks ? slot_of(begin + lane_id(), l) : -1;
    }
    if (!wait_for_partials(token)) return false;
    if (!(is_last_wave() ? wait_for_sums(begin, end) : wait_to_send())) return false;
    Done done;
    done.kind = Done::kGroup;
    done.wave = wave_;
    done.group = group;
    if (is_last_wave()) {
      if (local_.combined_weights != nullptr) gather_weights(begin, end);
      auto* const out = reinterpret_cast<uint4*>(local_.combined_x);
      const int32_t num_rows = list_own_group(token, begin + lane_id());
      hand_over(out + static_cast<int64_t>(begin) * vectors_, num_rows, done);
    } else {
      if (args_.has_weights) relay_weights(begin, end);
      auto* const out = reinterpret_cast<uint4*>(place_to_send(
          args_.network_send_offset, args_.network_receive_offset, args_.network_region));
      OtherPlaces none;
      const int32_t num_rows = list_group(local_, token, wave_.first_source + peers_.rank,
                                          local_.row_offset + wave_.half() * args_.row_half,
                                          NoOtherNodes(), team_.rows(), &none);
      hand_over(out + static_cast<int64_t>(begin) * vectors_, num_rows, done);
    }
    return true;
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

  // Waits for the chunks with the partial rows of a group. Lane l waits for those of local rank l.
  __device__ __noinline__ bool wait_for_partials(const Token& token) {
    int32_t first = 0, last = -1;
#pragma unroll
    for (int32_t l = 0; l < EP_MAX_PEERS; ++l) {
      // Slots of consecutive tokens are consecutive: every chunk in between has one of them.
      const int32_t slot = token.slot[l];
      const uint32_t lowest = __reduce_min_sync(kFullWarp, static_cast<uint32_t>(slot));
      const int32_t highest = __reduce_max_sync(kFullWarp, slot);
      if (l != lane_id() || l == peers_.rank || highest < 0) continue;
      first = static_cast<int32_t>(lowest) / local_.chunk_rows;
      last = highest / local_.chunk_rows;
    }
    const uint32_t* const flags = partial_flags(peers_.rank, wave_.half(), lane_id());
    const uint32_t stamp = chunk_stamp(wave_.number, local_.tag);
    return wait_for_chunks(flags, first, last, stamp, lane_id());
  }

  // Waits for this lane's chunks [first, last], whose flags carry the stamp in their upper bits;
  // `peer` raises them. The team finishes before anybody waits.
  template <typename Flag>
  __device__ bool wait_for_chunks(const Flag* flags, int32_t first, int32_t last, uint32_t stamp,
                                  int32_t peer) {
    const auto stamp_of = [](Flag flag) {
      return static_cast<uint32_t>(flag >> (8 * (sizeof(Flag) - sizeof(uint32_t))));
    };
    const auto is_of_this_epoch = [&](Flag flag) { return stamp_of(flag) >> 8 == stamp >> 8; };
    bool arrived = true;
    for (int32_t chunk = first; chunk <= last && arrived; ++chunk) {
      arrived = is_of_this_epoch(ptx::load_acquire_sys(&flags[chunk]));
    }
    if (__any_sync(kFullWarp, !arrived)) flush();
    bool fine = true;
    for (int32_t chunk = first; chunk <= last && fine; ++chunk) {
      Flag seen;
      fine =
          wait_flag(peers_, &flags[chunk], is_of_this_epoch, &seen, EP_PHASE_ROWS, peer, epoch_) &&
          same_call(peers_, stamp, stamp_of(seen), peer);
      if constexpr (std::is_same_v<Flag, network::Flag>) {
        if (fine) network::after_wait(&flags[chunk], seen);
      }
    }
    __syncwarp();  // all lanes may read what one waited for
    return __all_sync(kFullWarp, fine);
  }

  // Waits until the owner has read what the combine before sent it.
  __device__ bool wait_to_send() {
    if (may_send_) return true;
    flush();
    const bool fine =
        lane_id() != 0 ||
        wait_for_rail(peers_, args_.network, args_.network_credit_offset, epoch_ - 1, wave_.j + 1);
    __syncwarp();
    may_send_ = __all_sync(kFullWarp, fine);
    return may_send_;
  }

  // Waits for the sums of other nodes of tokens [begin, end). A lane takes a node. The first group
  // waits for everybody's first chunk, for that comes even where it is empty.
  __device__ __noinline__ bool wait_for_sums(int32_t begin, int32_t end) {
    const uint32_t stamp = chunk_stamp(epoch_, local_.tag);
    for (int32_t from = 1; from < num_nodes_; from += kWarpSize) {
      const int32_t k = from + lane_id();
      int32_t lowest = INT32_MAX, highest = -1;
      if (k < num_nodes_) {
        const int32_t node = node_after(args_.network, num_nodes_ - k);
        if (begin == 0) lowest = highest = 0;
        for (int32_t t = begin; t < end; ++t) {
          const int32_t slot = args_.nodes.node_slot[static_cast<int64_t>(t) * num_nodes_ + node];
          if (slot < 0) continue;
          lowest = min(lowest, slot);
          highest = max(highest, slot);
        }
      }
      const int32_t rows = args_.network_chunk_rows;
      const int32_t first = highest < 0 ? 0 : lowest / rows;
      const int32_t last = highest < 0 ? -1 : highest / rows;
      const int64_t place =
          static_cast<int64_t>(min(k, num_nodes_ - 1) - 1) * EP_MAX_NETWORK_CHUNKS;
      const int32_t peer = peer_number(peers_, k, peers_.rank);
      const auto wait = [&](int64_t offset) {
        return wait_for_chunks(own_flags(args_.network, offset) + place, first, last, stamp, peer);
      };
      if (!wait(args_.network_flag_offset)) return false;
      if (args_.has_weights && !wait(args_.weight_flag_offset)) return false;
    }
    return true;
  }

  // Lists the rows of a group of own tokens: those of this node, and the sums of the others.
  __device__ __noinline__ int32_t list_own_group(const Token& token, int32_t t) const {
    const int32_t own_node = args_.network.node;
    const int32_t* const slots = args_.nodes.node_slot + static_cast<int64_t>(t) * num_nodes_;
    OtherNodes others{0, 0};
    for (int32_t node = 0; node < num_nodes_ && token.exists; ++node) {
      if (node == own_node || slots[node] < 0) continue;
      (node < own_node ? others.before : others.after) += 1;
    }
    OtherPlaces places;
    const int32_t total = list_group(local_, token, wave_.first_source + peers_.rank,
                                     local_.row_offset + wave_.half() * args_.row_half, others,
                                     team_.rows(), &places);
    bool is_here = false;
#pragma unroll
    for (int32_t l = 0; l < EP_MAX_PEERS; ++l) is_here |= token.slot[l] >= 0;
    const uint32_t out = static_cast<uint32_t>(lane_id()) << ListedRow::kOutShift;
    int32_t listed = 0;
    for (int32_t node = 0; node < num_nodes_ && token.exists; ++node) {
      if (node == own_node || slots[node] < 0) continue;
      const bool is_before = node < own_node;
      uint32_t what = ListedRow::kFirst | ListedRow::kLastOfNode;
      if (listed == 0 && (is_before || !is_here)) what |= ListedRow::kFirstNode;
      ++listed;
      if (listed == others.before + others.after && !(is_before && is_here)) {
        what |= ListedRow::kLast;
      }
      const int32_t k = distance_before(args_.network, node);
      const uint8_t* const row = args_.network.memory + args_.network_receive_offset +
                                 (k - 1) * args_.network_region +
                                 static_cast<int64_t>(slots[node]) * local_.row_bytes;
      ListedRow*& place = is_before ? places.before : places.after;
      *place++ = ListedRow{reinterpret_cast<const uint4*>(row), out | what};
    }
    return total;
  }

  // ---- Gradients of probabilities --------------------------------------------------------------

  // That of entry `which` of a row with slot `slot` at local rank l, of the owner with our number.
  __device__ float weight_on_node(int32_t l, int32_t slot, int32_t which) const {
    if (l == peers_.rank) {
      const int32_t first = local_.routing.first_of_source[wave_.first_source + peers_.rank];
      return weight_of(local_, first + slot, which);
    }
    // Other GPUs wrote it while this kernel ran.
    const volatile float* const staged =
        in_memory_of<float>(peers_, peers_.rank, weights_of_half());
    return staged[(static_cast<int64_t>(l) * local_.max_tokens + slot) * local_.routing.num_topk +
                  which];
  }

  // Adds entry `which` of the rows of a token that the ranks of this node have.
  template <typename SlotOf>
  __device__ void add_on_node(WeightSum* sum, const SlotOf& slot_at, int32_t which) const {
#pragma unroll 1
    for (int32_t l = 0; l < peers_.num_ranks; ++l) {
      const int32_t slot = slot_at(l);
      if (slot >= 0) sum->add(weight_on_node(l, slot, which));
    }
    sum->end_node();
  }

  __device__ void relay_weights(int32_t begin, int32_t end) const {
    const int32_t num_topk = local_.routing.num_topk;
    auto* const out = reinterpret_cast<float*>(
        place_to_send(args_.weight_send_offset, args_.weight_receive_offset, args_.weight_region));
    for (int32_t i = begin * num_topk + lane_id(); i < end * num_topk; i += kWarpSize) {
      const int32_t* const entry = relay_entry(i / num_topk);
      const int32_t expert = entry[peers_.num_ranks + i % num_topk];
      WeightSum sum;
      if (local_.adds_weights) {
        add_on_node(&sum, [&](int32_t l) { return entry[l]; }, i % num_topk);
      } else if (expert >= 0) {
        const int32_t l = expert / local_.num_local_experts;
        sum.add(weight_on_node(l, entry[l], i % num_topk));
      }
      out[i] = sum.value();
    }
  }

  // What another node has sent of a token.
  __device__ float weight_from_node(int32_t node, int32_t t, int32_t which) const {
    const int32_t k = distance_before(args_.network, node);
    const auto* const received = reinterpret_cast<const volatile float*>(
        args_.network.memory + args_.weight_receive_offset + (k - 1) * args_.weight_region);
    const int32_t slot = args_.nodes.node_slot[static_cast<int64_t>(t) * num_nodes_ + node];
    return received[static_cast<int64_t>(slot) * local_.routing.num_topk + which];
  }

  __device__ void add_all(WeightSum* sum, int32_t t, int32_t which) const {
#pragma unroll 1
    for (int32_t node = 0; node < num_nodes_; ++node) {
      if (node == args_.network.node) {
        add_on_node(sum, [&](int32_t l) { return slot_of(t, l); }, which);
      } else if (args_.nodes.node_slot[static_cast<int64_t>(t) * num_nodes_ + node] >= 0) {
        sum->add(weight_from_node(node, t, which));
        sum->end_node();
      }
    }
  }

  __device__ void gather_weights(int32_t begin, int32_t end) const {
    const int32_t num_topk = local_.routing.num_topk, num_ranks = peers_.num_ranks;
    for (int32_t i = begin * num_topk + lane_id(); i < end * num_topk; i += kWarpSize) {
      const int32_t expert = local_.routing.topk_idx[i];
      const int32_t t = i / num_topk, which = i % num_topk;
      WeightSum sum;
      if (local_.adds_weights) {
        add_all(&sum, t, which);
      } else if (expert >= 0) {
        const int32_t rank = expert / local_.num_local_experts;
        const int32_t node = rank / num_ranks, l = rank % num_ranks;
        const bool is_here = node == args_.network.node;
        sum.add(is_here ? weight_on_node(l, slot_of(t, l), which)
                        : weight_from_node(node, t, which));
      }
      local_.combined_weights[i] = sum.value();
    }
  }

  const ep_nodes_combine_args& args_;
  const ep_combine_args& local_;
  const ep_peers& peers_;
  Team& team_;
  const int32_t num_nodes_, vectors_, epoch_;
  Wave wave_;
  bool may_push_ = false, may_send_ = false;  // in this wave
  Done done_;
};

// ---- The kernel --------------------------------------------------------------------------------

template <typename T>
__global__ void __launch_bounds__(kMaxTeamThreads, 1)
    combine_kernel(const __grid_constant__ ep_nodes_combine_args args, const Teams teams) {
  extern __shared__ __align__(16) uint8_t shared[];
  const ep_combine_args& local = args.combine;
  const ep_peers& peers = local.peers;
  if (blockIdx.x == 0 && threadIdx.x == 0) begin_operation(peers);
  Team team(shared, teams);
  if (team.is_lister()) {
    Lister(args, team).run();
  } else {
    team.add_up<T, false>(local.row_bytes / 16);
  }
  const auto rows_to = [&](int32_t p) {
    const int32_t k = p / peers.num_ranks, l = p % peers.num_ranks;
    if (k > 0) return l == peers.rank ? args.nodes.num_relayed[k] : 0;
    int32_t rows = 0;
    for (int32_t node = 0; node < args.network.num_nodes; ++node) {
      rows += local.routing.num_recv[node * peers.num_ranks + l];
    }
    return rows;
  };
  const bool is_last = nodes::end_operation(peers, args.network, local.counters, gridDim.x,
                                            args.network_credit_offset, rows_to, local.row_bytes);
  if (is_last && threadIdx.x == 0) local.counters[kTaken] = 0;
}

using Kernel = void (*)(const ep_nodes_combine_args, const Teams);
constexpr Kernel kKernels[3] = {combine_kernel<__nv_bfloat16>, combine_kernel<float>,
                                combine_kernel<__half>};

const Kernels kernels("combine kernels between nodes", Setup::kShared, kMaxTeamShared, kKernels[0],
                      kKernels[1], kKernels[2]);

}  // namespace

int32_t ep_nodes_combine(const ep_nodes_combine_args* args, void* stream) {
  const ep_combine_args& local = args->combine;
  const int32_t num_nodes = args->network.num_nodes, num_topk4 = local.routing.num_topk4;
  int32_t status = nodes::check_group(num_nodes, local.peers.num_ranks);
  if (status == EP_OK) status = check_combine(local);
  if (status != EP_OK) return status;
  const int32_t others = std::min(num_nodes - 1, local.routing.num_topk);
  const int32_t list_rows = std::max(local.chunk_rows * local.chunks_per_unit * num_topk4,
                                     kGroupTokens * (num_topk4 + local.peers.num_ranks + others));
  const Teams teams = Teams::of_rows(local.row_bytes, list_rows);
  kKernels[local.dtype]<<<local.num_blocks, teams.block_threads(), teams.shared_bytes(),
                          static_cast<cudaStream_t>(stream)>>>(*args, teams);
  return ep::check_cuda(cudaGetLastError(), "ep_nodes_combine");
}
