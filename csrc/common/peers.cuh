// Waiting for peers (the ranks of one host), with a bound, and saying whose fault it was.
#pragma once

#include "common/ptx.cuh"
#include "ep_comm.h"

namespace ep {

// A library that is built with EP_WITHOUT_RECORDS writes no records over NVLink: it is what
// scripts/recorder_cost.py measures them against, and for nothing else.
#ifdef EP_WITHOUT_RECORDS
constexpr bool kRecords = false;
#else
constexpr bool kRecords = true;
#endif

// True after a fault of this rank. Read anew each time, for another thread sets it.
__device__ inline bool aborted(const ep_peers& peers) {
  return *static_cast<volatile const int32_t*>(peers.abort) != 0;
}

constexpr int32_t kAborted = 1;

// Keeps the first fault of this rank, and ends all its other waits. abort: not zero.
__device__ inline void raise_fault(const ep_peers& peers, int32_t code, int32_t phase, int32_t peer,
                                   int32_t field, int64_t expected, int64_t seen,
                                   int32_t abort = kAborted) {
  if (atomicCAS(peers.abort, 0, abort) != 0) return;
  volatile ep_fault* const fault = peers.fault;
  fault->op = peers.op;
  fault->phase = phase;
  fault->peer = peer;
  fault->field = field;
  fault->expected = expected;
  fault->seen = seen;
  __threadfence_system();
  fault->code = code;
}

// The epoch of the operation that the kernel is part of. All of its blocks read it before the last
// one ends the operation.
__device__ inline int32_t epoch_of(const ep_peers& peers) {
  return static_cast<int32_t>(*static_cast<volatile const uint32_t*>(peers.epoch) + 1);
}

// Called at the start of an operation by one thread.
__device__ inline void begin_operation(const ep_peers& peers) {
  if (kRecords) peers.record->begin_ns = static_cast<int64_t>(ptx::global_timer_ns());
}

// Records a wait of one thread for a peer, which began at `start` and has ended.
__device__ inline void note_wait(const ep_peers& peers, int32_t peer, uint64_t start) {
  if (!kRecords) return;
  atomicMax(reinterpret_cast<long long*>(&peers.longest_wait_ns[peer]),
            static_cast<long long>(ptx::global_timer_ns() - start));
}

// For tests, see ep_peers.delay_ns.
__device__ __noinline__ inline void delay_for_up_to(int64_t max_ns) {
  const uint64_t start = ptx::global_timer_ns();
  uint64_t random = start ^ (static_cast<uint64_t>(blockIdx.x) << 40) ^
                    (static_cast<uint64_t>(threadIdx.x) << 24) ^ clock64();
  random *= 0x9e3779b97f4a7c15ull;
  random ^= random >> 29;
  const uint64_t nanoseconds = random % static_cast<uint64_t>(max_ns);
  while (ptx::global_timer_ns() - start < nanoseconds) {
  }
}

__device__ inline void delay(const ep_peers& peers) {
  if (peers.delay_ns != 0) delay_for_up_to(peers.delay_ns);
}

// Raises a flag of another rank.
template <typename Flag>
__device__ inline void signal(const ep_peers& peers, Flag* flag, Flag value) {
  delay(peers);
  ptx::fence_acq_rel_sys();
  ptx::store_relaxed_sys(flag, value);
}

constexpr int kSpinsBetweenChecks = 256;
constexpr uint64_t kLongWaitNs = 1000000000;

// The rest of a wait that has lasted for kLongWaitNs since `start`. The host is told of it
// (ep_progress), and again each second: another thread whose wait for the same peer ends clears the
// word. Blocks that wait for one another tell nothing: the one that they wait for waits for another
// rank, and tells.
template <typename Flag, typename Arrived>
__device__ inline bool wait_for_long(const ep_peers& peers, const Flag* flag,
                                     const Arrived& arrived, Flag* value, int32_t phase,
                                     int32_t peer, int64_t expected, uint64_t start) {
  volatile int64_t* const progress = peers.progress + peer;
  const bool tells = peer != peers.rank;
  const int64_t what = static_cast<int64_t>(phase) << 32 | static_cast<uint32_t>(expected);
  uint64_t told_ns = 0;
  for (int spins = 1;; ++spins) {
    *value = ptx::load_acquire_sys(flag);
    if (arrived(*value)) {
      if (told_ns != 0) *progress = 0;
      note_wait(peers, peer, start);
      return true;
    }
    if (spins % kSpinsBetweenChecks != 0) continue;
    if (aborted(peers)) return false;
    const uint64_t waited_ns = ptx::global_timer_ns() - start;
    if (waited_ns > static_cast<uint64_t>(peers.timeout_ns)) {
      raise_fault(peers, EP_FAULT_TIMEOUT, phase, peer, 0, expected, static_cast<int64_t>(*value));
      return false;
    }
    if (tells && waited_ns - told_ns > kLongWaitNs) {
      *progress = what;
      told_ns = waited_ns;
    }
  }
}

// Spins until arrived(*value), with *value what the flag holds. False after the timeout, or after a
// fault elsewhere.
template <typename Flag, typename Arrived>
__device__ inline bool wait_flag(const ep_peers& peers, const Flag* flag, const Arrived& arrived,
                                 Flag* value, int32_t phase, int32_t peer, int64_t expected) {
  delay(peers);
  *value = ptx::load_acquire_sys(flag);
  if (arrived(*value)) return true;
  const uint64_t start = ptx::global_timer_ns();
  for (int spins = 1;; ++spins) {
    *value = ptx::load_acquire_sys(flag);
    if (arrived(*value)) {
      note_wait(peers, peer, start);
      return true;
    }
    if (spins % kSpinsBetweenChecks != 0) continue;
    if (aborted(peers)) return false;
    const uint64_t waited_ns = ptx::global_timer_ns() - start;
    if (waited_ns > static_cast<uint64_t>(peers.timeout_ns)) {
      raise_fault(peers, EP_FAULT_TIMEOUT, phase, peer, 0, expected, static_cast<int64_t>(*value));
      return false;
    }
    if (waited_ns > kLongWaitNs) {
      return wait_for_long(peers, flag, arrived, value, phase, peer, expected, start);
    }
  }
}

// Waits for an epoch or a later one. The difference is right even where 32 bits wrap around.
__device__ inline bool wait_epoch(const ep_peers& peers, const uint32_t* flag, int32_t epoch,
                                  int32_t phase, int32_t peer) {
  uint32_t seen;
  return wait_flag(
      peers, flag,
      [epoch](uint32_t value) {
        return static_cast<int32_t>(value - static_cast<uint32_t>(epoch)) >= 0;
      },
      &seen, phase, peer, epoch);
}

// What the flag of a chunk of rows says: 24 bits of the epoch, never all zero, then the tag of the
// call. Credits keep ranks within one epoch of each other, so 24 bits tell epochs apart.
__host__ __device__ inline uint32_t chunk_stamp(int32_t epoch, int32_t tag) {
  return (static_cast<uint32_t>(epoch) % 0xffffffu + 1) << 8 | static_cast<uint32_t>(tag & 0xff);
}

// True when the peer made the same call in this epoch. Otherwise it is a fault.
__device__ inline bool same_call(const ep_peers& peers, uint32_t expected, uint32_t seen,
                                 int32_t peer) {
  if (expected == seen) return true;
  raise_fault(peers, EP_FAULT_MISMATCH, EP_PHASE_ROWS, peer, EP_FIELD_CALL, expected, seen);
  return false;
}

template <typename T>
__device__ inline T* in_memory_of(const ep_peers& peers, int32_t rank, int64_t offset) {
  return reinterpret_cast<T*>(peers.memory[rank] + offset);
}

// Waits until `peer` has read what the operation before this one sent it. True: its memory may be
// written.
__device__ inline bool wait_credit(const ep_peers& peers, int64_t credit_offset, int32_t epoch,
                                   int32_t peer) {
  const uint32_t* const credit = in_memory_of<uint32_t>(peers, peers.rank, credit_offset) + peer;
  return wait_epoch(peers, credit, epoch - 1, EP_PHASE_CREDIT, peer);
}

// Index of `source`'s region among the R - 1 that `owner` keeps for the others.
__host__ __device__ inline int32_t region_of(int32_t source, int32_t owner, int32_t num_ranks) {
  return (source - owner - 1 + num_ranks) % num_ranks;
}

// True in all threads of the last of `num_blocks` blocks to come here. That block sees everything
// that the others did before. Leaves the counter zero.
__device__ inline bool is_last_block(int32_t* counter, int32_t num_blocks) {
  __syncthreads();
  bool last = false;
  if (threadIdx.x == 0) {
    ptx::fence_acq_rel_sys();
    last = atomicAdd(counter, 1) == num_blocks - 1;
    if (last) *counter = 0;
    ptx::fence_acq_rel_sys();
  }
  return __syncthreads_or(last);
}

// All threads of all `num_blocks` blocks wait here for one another; false on a fault. The blocks
// are all on the GPU or on their way to it: see ep_plan_args. The caller resets `count` afterwards.
__device__ inline bool grid_barrier(const ep_peers& peers, uint32_t* count, int32_t num_blocks) {
  __syncthreads();
  bool fine = true;
  if (threadIdx.x == 0) {
    ptx::fence_acq_rel_sys();
    atomicAdd(count, 1);
    const auto are_all_here = [num_blocks](uint32_t value) {
      return value >= static_cast<uint32_t>(num_blocks);
    };
    uint32_t seen;
    fine = wait_flag(peers, count, are_all_here, &seen, EP_PHASE_PLAN, peers.rank, num_blocks);
    ptx::fence_acq_rel_sys();
  }
  return __syncthreads_and(fine);
}

// Called by the last block. A peer that has marked a later epoch gave this operation up. Its copies
// run all the same, and may have overwritten rows that this operation read: a fault.
__device__ inline void check_mark(const ep_peers& peers, int64_t mark_offset, int32_t epoch,
                                  int32_t peer) {
  const uint32_t* const mark = in_memory_of<uint32_t>(peers, peers.rank, mark_offset) + peer;
  const uint32_t seen = ptx::load_acquire_sys(mark);
  if (static_cast<int32_t>(seen - static_cast<uint32_t>(epoch)) <= 0) return;
  raise_fault(peers, EP_FAULT_OVERWRITTEN, EP_PHASE_ROWS, peer, 0, epoch, seen);
}

// Records what went to a rank, and the longest wait for it. Called by one thread.
__device__ inline void record_peer(const ep_peers& peers, int32_t r, int32_t num_rows,
                                   int32_t row_bytes) {
  const int64_t wait_ns = peers.longest_wait_ns[r];  // here, to be on its way with the rows
  peers.record->num_rows[r] = num_rows;
  if (r != peers.rank) {
    atomicAdd(reinterpret_cast<unsigned long long*>(peers.wire_bytes),
              static_cast<unsigned long long>(num_rows) * row_bytes);
  }
  peers.record->longest_wait_ns[r] = wait_ns;
  peers.longest_wait_ns[r] = 0;
}

// Called by all of an operation's blocks. The last one tells every rank that this one has read what
// it sent, writes the record, and counts the operation. rows_to: [R] rows that were sent, of
// row_bytes each; where num_rows is not negative, as many to each of the others. True in the last
// block.
__device__ inline bool end_operation(const ep_peers& peers, int32_t* counter, int32_t num_blocks,
                                     int64_t credit_offset, const int32_t* rows_to,
                                     int32_t row_bytes, const ep_wire& wire = ep_wire{},
                                     int32_t num_rows = -1) {
  const int32_t epoch = epoch_of(peers);
  const bool last = is_last_block(counter, num_blocks);
  if (last && wire.chunk_rows != 0) {
    const int32_t peer = threadIdx.x;
    if (peer < peers.num_ranks && peer != peers.rank) {
      check_mark(peers, wire.mark_offset, epoch, peer);
    }
    __syncthreads();
  }
  if (!last || aborted(peers)) return last;
  const int32_t r = threadIdx.x;
  if (r < peers.num_ranks) {
    signal(peers, in_memory_of<uint32_t>(peers, r, credit_offset) + peers.rank,
           static_cast<uint32_t>(epoch));
  }
  // By the last threads meanwhile: the first ones wait for their fence.
  const int32_t to = blockDim.x - 1 - threadIdx.x;
  if (kRecords && to < peers.num_ranks) {
    record_peer(peers, to, num_rows >= 0 && to != peers.rank ? num_rows : rows_to[to], row_bytes);
  }
  if (r == 0) {
    if (kRecords) {
      peers.record->epoch = epoch;
      peers.record->end_ns = static_cast<int64_t>(ptx::global_timer_ns());
    }
    *peers.epoch = static_cast<uint32_t>(epoch);
  }
  return true;
}

}  // namespace ep
