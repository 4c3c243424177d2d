// Low-latency dispatch, receiving: which rows come, and which experts want them.
#pragma once

#include "low_latency/bitmaps.cuh"
#include "low_latency/dispatch/roles.cuh"
#include "low_latency/route.cuh"

namespace ep::low_latency::dispatch {

constexpr int32_t kNotKnown = INT32_MAX;

// What came, in shared memory of a block. Bit n = source * M + token of an expert's bitmap: it
// gets that row. The place of a row among its expert's is the number of bits before it.
class Arrivals {
 public:
  int32_t* num_tokens;  // [R]; kNotKnown before the header is there
  int32_t* num_rows;    // [R] that came from each rank
  int32_t* rows;        // [kItemsAtOnce, K] of recv_x that an item becomes, or -1

  static __host__ __device__ int64_t bytes(const ep_low_latency& common) {
    return 8 * EP_MAX_PEERS + row_bytes(common.num_topk) + bitmap_bytes(common);
  }
  static __host__ __device__ int64_t entry_bytes(const ep_low_latency& common) {
    return 16ll * common.peers.num_ranks * common.max_tokens * expert_words(common.num_topk);
  }
  // shared: bytes(), then entry_bytes() where has_entries.
  __device__ Arrivals(uint8_t* shared, const ep_low_latency& common, bool has_entries)
      : num_tokens(reinterpret_cast<int32_t*>(shared)),
        num_rows(reinterpret_cast<int32_t*>(shared) + EP_MAX_PEERS),
        rows(num_rows + EP_MAX_PEERS),
        bitmaps_(shared + 8 * EP_MAX_PEERS + row_bytes(common.num_topk), places_of(common)),
        entries_(has_entries ? bitmaps_.end(common.num_local_experts) : nullptr) {}

  // By the entry warps, who need it: the others get there behind a later barrier.
  __device__ void clear(int32_t num_local_experts) const {
    const int32_t thread = static_cast<int32_t>(threadIdx.x) - kRowWarps * kWarpSize;
    if (thread < 0) return;
    bitmaps_.clear(num_local_experts, thread, kEntryThreads);
    if (thread < EP_MAX_PEERS) {
      num_rows[thread] = 0;
      num_tokens[thread] = kNotKnown;
    }
    ptx::named_barrier(kEntryBarrier, kEntryThreads);
  }

  __device__ void mark(uint32_t expert, int32_t n) const { bitmaps_.set(expert, n); }

  // Rows of `expert` before n.
  __device__ int32_t count_before(int32_t expert, int32_t n) const {
    return bitmaps_.count_before(expert, n);
  }

  // While entries are waited for the number is written and read by atomics alone.
  __device__ void set_num_tokens(int32_t source, int32_t count) const {
    atomicExch(num_tokens + source, count);
  }
  __device__ bool is_there(int32_t source, int32_t t) const {
    return t < atomicOr(num_tokens + source, 0);
  }

  // Once all headers are there. After a fault some may not be.
  __device__ int32_t most_tokens(int32_t num_ranks) const {
    int32_t most = 0;
    for (int32_t r = 0; r < num_ranks; ++r) {
      if (num_tokens[r] != kNotKnown) most = max(most, num_tokens[r]);
    }
    return most;
  }

  // The words with the experts of row n, where they are kept here; else nullptr.
  __device__ uint4* entry(int32_t n, int32_t words) const {
    return entries_ == nullptr ? nullptr : entries_ + n * words;
  }

 private:
  Bitmaps bitmaps_;  // of the experts
  uint4* entries_;   // [R, M, words]

  static constexpr __host__ __device__ int32_t row_bytes(int32_t num_topk) {
    return kItemsAtOnce * num_topk * static_cast<int32_t>(sizeof(int32_t));
  }
  static __host__ __device__ int32_t places_of(const ep_low_latency& common) {
    return common.peers.num_ranks * common.max_tokens;
  }
  static __host__ __device__ int64_t bitmap_bytes(const ep_low_latency& common) {
    return Bitmaps::bytes(common.num_local_experts, places_of(common));
  }
};

// Tokens of the ranks, rows, bitmaps of whole groups.
static_assert(8 * EP_MAX_PEERS + 4 * kItemsAtOnce * EP_MAX_TOPK + EP_LOW_LATENCY_MAX_PLACES / 8 +
                  16 * EP_MAX_LOCAL_EXPERTS <=
              kMaxShared);

// Waits for a word of the entry of a token, which is there or not: that is known when the header of
// its rank has come. Returns whether it is; *fine becomes false after a fault.
__device__ inline bool wait_for_entry(const ep_peers& peers, const uint4* from, uint4* word,
                                      const Arrivals& arrivals, int32_t t, int32_t source,
                                      uint32_t epoch, bool* fine) {
  if (word->w == epoch) return true;
  Wait wait;
  do {
    if (!arrivals.is_there(source, t)) return false;
    if (!wait.goes_on(peers, EP_PHASE_PLAN, source, epoch)) {
      *fine = false;
      return false;
    }
    *word = ptx::load_word(from);
  } while (word->w != epoch);
  wait.has_come(peers, source);
  return true;
}

// A word of an entry that came: which experts want row n.
__device__ inline bool mark_experts(const ep_low_latency& common, const Arrivals& arrivals,
                                    int32_t n, const uint4& word) {
  bool has_row = false;
#pragma unroll
  for (int i = 0; i < kExpertsOfWord; ++i) {
    const uint32_t expert = expert_of_word(word, i);
    if (expert >= static_cast<uint32_t>(common.num_local_experts)) continue;  // no expert
    arrivals.mark(expert, n);
    has_row = true;
  }
  return has_row;
}

// By the entry warps: waits for every rank's header and entries. False, for some of them, after a
// fault.
template <typename Memory>
__device__ inline bool collect(const ep_low_latency_dispatch_args& args, const Memory& memory,
                               const Operation& operation, const Arrivals& arrivals) {
  const ep_low_latency& common = args.common;
  const int32_t words = expert_words(common.num_topk), max_tokens = common.max_tokens;
  const int32_t num_rows = memory.num_ranks() * max_tokens;
  const int32_t thread = threadIdx.x - kRowWarps * kWarpSize;
  const auto entry_of = [&](int32_t source, int32_t t) {
    return memory.entry(memory.rank(), operation.half, source, t);
  };
  // The first words of two entries of a thread are on their way at once.
  constexpr int kAtOnce = 2;
  struct {
    int32_t source, t;
    uint4 word;
  } next[kAtOnce];
  const auto load = [&](int32_t first) {
#pragma unroll
    for (int a = 0; a < kAtOnce; ++a) {
      const int32_t n = first + a * kEntryThreads;
      next[a].source = quotient(min(n, num_rows), max_tokens);
      next[a].t = n - next[a].source * max_tokens;
      next[a].word = make_uint4(0, 0, 0, 0);
      // Whatever a masked rank may still write.
      const bool may_come = n < num_rows && operation.alive >> next[a].source & 1;
      ptx::load_word_if(may_come, &next[a].word, entry_of(next[a].source, next[a].t));
    }
  };
  load(thread);

  bool fine = true;
  // The last warp waits for the headers first: lane r for that of rank r.
  const int32_t r = threadIdx.x - (kThreads - kWarpSize);
  if (r >= 0 && r < memory.num_ranks()) {
    int32_t num_tokens = 0;
    if (operation.alive >> r & 1) {
      num_tokens = receive_header(memory, operation, own_header(args), r, blockIdx.x == 0);
    }
    fine = num_tokens >= 0;
    arrivals.set_num_tokens(r, max(num_tokens, 0));
  }
#pragma unroll 1
  for (int32_t first = thread; first < num_rows; first += kAtOnce * kEntryThreads) {
    if (first != thread) load(first);
#pragma unroll 1
    for (int a = 0; a < kAtOnce; ++a) {
      const int32_t n = first + a * kEntryThreads;
      const auto at = next[0];
      next[0] = next[1];  // not next[a]: registers have no index
      if (n >= num_rows || !(operation.alive >> at.source & 1)) continue;
      const uint4* const entry = entry_of(at.source, at.t);
      uint4 word = at.word;
      bool has_row = false;
#pragma unroll 1
      for (int32_t j = 0; j < words; ++j) {
        if (j != 0) word = ptx::load_word(entry + j);
        if (!wait_for_entry(common.peers, entry + j, &word, arrivals, at.t, at.source,
                            operation.epoch, &fine)) {
          break;
        }
        uint4* const copy = arrivals.entry(n, words);
        if (copy != nullptr) copy[j] = word;
        has_row |= mark_experts(common, arrivals, n, word);
      }
      if (has_row && blockIdx.x == 0) atomicAdd(arrivals.num_rows + at.source, 1);
    }
  }
  return fine;
}

// After a fault that a block has seen in time: nothing has come, for what reads the outputs.
__device__ inline void leave_nothing(const ep_low_latency_dispatch_args& args) {
  const ep_low_latency& common = args.common;
#pragma unroll 1
  for (int32_t e = threadIdx.x; e < common.num_local_experts; e += kThreads) args.recv_count[e] = 0;
  if (static_cast<int32_t>(threadIdx.x) < common.peers.num_ranks) {
    args.handle.num_tokens[threadIdx.x] = 0;
    args.handle.num_rows[threadIdx.x] = 0;
  }
}

// The counts of experts, shared out among the blocks, and those of ranks.
__device__ inline void write_counts(const ep_low_latency_dispatch_args& args, int32_t num_ranks,
                                    const Arrivals& arrivals) {
  const ep_low_latency& common = args.common;
  const int32_t num_places = num_ranks * common.max_tokens;
#pragma unroll 1
  for (int32_t e = (kThreads - 1 - threadIdx.x) * gridDim.x + blockIdx.x;
       e < common.num_local_experts; e += kThreads * gridDim.x) {
    const int32_t count = arrivals.count_before(e, num_places);
    args.recv_count[e] = count;
    if (args.recv_stats != nullptr) args.recv_stats[e] += count;
  }
  const int32_t r = kThreads - 1 - threadIdx.x;
  if (blockIdx.x != 0 || r >= num_ranks) return;
  args.handle.num_tokens[r] = arrivals.num_tokens[r];
  args.handle.num_rows[r] = common.peers.record->num_rows[r] = arrivals.num_rows[r];
}

}  // namespace ep::low_latency::dispatch
