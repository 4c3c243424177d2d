// The payload as its own flag. Data moves in words of 16 bytes, which arrive as a whole. A word
// that nothing has come into holds the waiting pattern, all ones; no word that is sent holds it. A
// reader waits until the pattern is gone, and puts it back. See PROTOCOL.md, "Low latency".
#pragma once

#include "common/peers.cuh"
#include "common/ptx.cuh"
#include "common/warp.cuh"

namespace ep::low_latency {

__device__ inline uint4 waiting_word() {
  constexpr uint32_t kOnes = 0xffffffffu;
  return make_uint4(kOnes, kOnes, kOnes, kOnes);
}

__device__ inline bool is_waiting(const uint4& word) {
  return (word.x & word.y & word.z & word.w) == 0xffffffffu;
}

// ---- Waits -------------------------------------------------------------------------------------

constexpr int kSpinsBetweenChecks = 1024;
constexpr uint64_t kGivenUp = 0;
constexpr uint64_t kTold = 1;  // bit of the time at which a wait began: the host was told of it

// Called now and then in a wait that began at `start_ns`; where that is 0, its time begins now.
// Returns when it began, or kGivenUp where there is no point in looking again.
__device__ __noinline__ inline uint64_t check_wait(const ep_peers& peers, uint64_t start_ns,
                                                   int32_t phase, int32_t peer, uint32_t epoch) {
  if (aborted(peers)) return kGivenUp;
  const uint64_t now_ns = ptx::global_timer_ns() & ~kTold;
  if (start_ns == 0) return now_ns;
  const uint64_t waited_ns = now_ns - start_ns;
  if (waited_ns > static_cast<uint64_t>(peers.timeout_ns)) {
    raise_fault(peers, EP_FAULT_TIMEOUT, phase, peer, 0, epoch, 0);
    return kGivenUp;
  }
  if (waited_ns < kLongWaitNs || peer == peers.rank) return start_ns;
  volatile int64_t* const progress = peers.progress + peer;
  *progress = static_cast<int64_t>(phase) << 32 | epoch;
  return start_ns | kTold;
}

// One wait of one thread, for words of a peer; bounded. See ep_fault for phase and epoch.
class Wait {
 public:
  // Called after each look that found nothing; false when there is no point in looking again.
  __device__ bool goes_on(const ep_peers& peers, int32_t phase, int32_t peer, uint32_t epoch) {
    if (++spins_ % kSpinsBetweenChecks != 0) return true;
    start_ns_ = check_wait(peers, start_ns_, phase, peer, epoch);
    return start_ns_ != kGivenUp;
  }

  // Called when it has ended well.
  __device__ void has_come(const ep_peers& peers, int32_t peer) const {
    if (!(start_ns_ & kTold)) return;
    volatile int64_t* const progress = peers.progress + peer;
    *progress = 0;
  }

 private:
  uint64_t start_ns_ = 0;
  uint32_t spins_ = 0;
};

// Waits until the last 32 bits of a loaded word are the epoch. Nobody puts anything back: many may
// read it. False after a fault.
__device__ inline bool wait_for_stamp(const ep_peers& peers, const uint4* from, uint4* word,
                                      int32_t peer, uint32_t epoch) {
  if (word->w == epoch) return true;
  Wait wait;
  do {
    if (!wait.goes_on(peers, EP_PHASE_PLAN, peer, epoch)) return false;
    *word = ptx::load_word(from);
  } while (word->w != epoch);
  wait.has_come(peers, peer);
  return true;
}

// Waits until a loaded word does not hold the waiting pattern. False after a fault.
__device__ inline bool wait_for_word(const ep_peers& peers, const uint4* from, uint4* word,
                                     int32_t peer, uint32_t epoch) {
  if (!is_waiting(*word)) return true;
  Wait wait;
  do {
    if (!wait.goes_on(peers, EP_PHASE_ROWS, peer, epoch)) return false;
    *word = ptx::load_word(from);
  } while (is_waiting(*word));
  wait.has_come(peers, peer);
  return true;
}

}  // namespace ep::low_latency
