// The payload as its own flag. Data moves in words of 16 bytes, which arrive as a whole. A word
// that nothing has come into holds the waiting pattern, all ones; no word that is sent holds it. A
// reader waits until the pattern is gone, and puts it back. See PROTOCOL.md, "Low latency".
#pragma once

#include "common/peers.cuh"
#include "common/ptx.cuh"
#include "common/warp.cuh"

namespace ep::low_latency {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarpSize;
// Words that a lane has in flight, and those of a unit of work, which a warp takes.
constexpr int kWordsOfLane = 4;
constexpr int kWordsOfUnit = kWordsOfLane * kWarpSize;
constexpr int kSpinsBetweenChecks = 1024;

// Number of a token among those of all ranks and both halves, in memory that has room for each.
__device__ inline int64_t place_of(const ep_low_latency& common, int32_t half, int32_t rank,
                                   int32_t t) {
  return (static_cast<int64_t>(half) * common.peers.num_ranks + rank) * common.room + t;
}

// The slot, in `owner`'s memory, of a row that comes from `rank`: of its own token t in a dispatch,
// of the owner's in a combine.
__device__ inline uint4* slot_of(const ep_low_latency& common, int32_t owner, int32_t half,
                                 int32_t rank, int32_t t) {
  return in_memory_of<uint4>(
      common.peers, owner, common.row_offset + place_of(common, half, rank, t) * 2 * common.hidden);
}

__device__ inline uint4 waiting_word() {
  constexpr uint32_t kOnes = 0xffffffffu;
  return make_uint4(kOnes, kOnes, kOnes, kOnes);
}

__device__ inline bool is_waiting(const uint4& word) {
  return (word.x & word.y & word.z & word.w) == 0xffffffffu;
}

// The waits of one thread: those for one peer are together bounded by the operation's time limit.
class Waiter {
 public:
  __device__ explicit Waiter(const ep_peers& peers) : peers_(peers) {}

  // Called after each look that found nothing; false when there is no point in looking again.
  __device__ bool goes_on(int32_t phase, int32_t peer, uint32_t epoch) {
    if (has_failed_) return false;
    if (++spins_ % kSpinsBetweenChecks != 0) return true;
    const uint64_t now = ptx::global_timer_ns();
    if (start_ns_ == 0 || peer != peer_) start_ns_ = now;
    peer_ = peer;
    const uint64_t waited_ns = now - start_ns_;
    if (aborted(peers_)) {
      has_failed_ = true;
    } else if (waited_ns > static_cast<uint64_t>(peers_.timeout_ns)) {
      raise_fault(peers_, EP_FAULT_TIMEOUT, phase, peer, 0, epoch, 0);
      has_failed_ = true;
    } else if (waited_ns > kLongWaitNs && peer != peers_.rank) {
      volatile int64_t* const progress = peers_.progress + peer;
      *progress = static_cast<int64_t>(phase) << 32 | epoch;
      told_ = true;
    }
    return !has_failed_;
  }

  // Called when a wait for `peer` has ended well.
  __device__ void has_come(int32_t peer) {
    if (!told_) return;
    volatile int64_t* const progress = peers_.progress + peer;
    *progress = 0;
    told_ = false;
  }

 private:
  const ep_peers& peers_;
  uint64_t start_ns_ = 0;
  int32_t peer_ = -1;
  uint32_t spins_ = 0;
  bool has_failed_ = false;
  bool told_ = false;
};

// Adds the time since `start_ns` to what was waited for `peer`, where somebody wants to know it.
__device__ inline void add_wait(const ep_low_latency& common, int32_t peer, uint64_t start_ns) {
  if (common.wait_stats == nullptr) return;
  atomicAdd(reinterpret_cast<unsigned long long*>(common.wait_stats + peer),
            ptx::global_timer_ns() - start_ns);
}

// The words [first, end) of a row that are this lane's in a unit: `first` + 32 j + lane.
struct LaneWords {
  int32_t first, end;

  __device__ LaneWords(int32_t unit, int32_t num_words)
      : first(unit * kWordsOfUnit + lane_id()), end(num_words) {}
  __device__ int32_t at(int j) const { return first + j * kWarpSize; }
  __device__ bool has(int j) const { return at(j) < end; }
};

// Loads this lane's words of `row`, which a peer writes, whatever they hold.
__device__ inline void load_words(const uint4* row, const LaneWords& words,
                                  uint4 (&values)[kWordsOfLane]) {
#pragma unroll
  for (int j = 0; j < kWordsOfLane; ++j) {
    if (words.has(j)) values[j] = ptx::load_word(row + words.at(j));
  }
}

// Waits until none of the loaded words holds the waiting pattern. False after a fault.
__device__ inline bool wait_for_words(const uint4* row, const LaneWords& words,
                                      uint4 (&values)[kWordsOfLane], Waiter& waiter, int32_t peer,
                                      uint32_t epoch) {
  for (;;) {
    bool is_complete = true;
#pragma unroll
    for (int j = 0; j < kWordsOfLane; ++j) {
      if (words.has(j) && is_waiting(values[j])) {
        values[j] = ptx::load_word(row + words.at(j));
        is_complete &= !is_waiting(values[j]);
      }
    }
    if (is_complete) break;
    if (!waiter.goes_on(EP_PHASE_ROWS, peer, epoch)) return false;
  }
  waiter.has_come(peer);
  return true;
}

// Puts the waiting pattern back into what was read.
__device__ inline void restore_words(uint4* row, const LaneWords& words) {
#pragma unroll
  for (int j = 0; j < kWordsOfLane; ++j) {
    if (words.has(j)) ptx::store_word(row + words.at(j), waiting_word());
  }
}

// Waits until the last 32 bits of a loaded word are the epoch. Nobody puts anything back: many may
// read it. False after a fault.
__device__ inline bool wait_for_stamp(const uint4* word, uint4* value, Waiter& waiter, int32_t peer,
                                      uint32_t epoch) {
  while (value->w != epoch) {
    if (!waiter.goes_on(EP_PHASE_PLAN, peer, epoch)) return false;
    *value = ptx::load_word(word);
  }
  waiter.has_come(peer);
  return true;
}

// Stores to the ranks of `ranks`, beginning behind this one, so that not all write to the same.
template <typename Store>
__device__ inline void for_ranks(const ep_peers& peers, uint32_t ranks, const Store& store) {
  for (int32_t i = 1; i <= peers.num_ranks; ++i) {
    const int32_t r = (peers.rank + i) % peers.num_ranks;
    if (ranks >> r & 1) store(r);
  }
}

}  // namespace ep::low_latency
