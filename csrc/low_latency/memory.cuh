// Where the words of low-latency operations stand, and which warp takes which of them.
#pragma once

#include "low_latency/words.cuh"

namespace ep::low_latency {

constexpr int kExpertsOfWord = 8;  // 12 bits each, then the epoch
constexpr int kWeightsOfWord = 3;  // FP32, then the epoch
constexpr int kRowBits = 24;       // of a row in the handle; above them stands which top-k it is
static_assert(EP_LOW_LATENCY_MAX_PLACES <= 1 << kRowBits && EP_MAX_TOPK <= 1 << (31 - kRowBits));

__host__ __device__ inline int32_t expert_words(int32_t num_topk) {
  return ceil_div(num_topk, kExpertsOfWord);
}
__host__ __device__ inline int32_t weight_words(int32_t num_topk) {
  return ceil_div(num_topk, kWeightsOfWord);
}

// The symmetric memory of all ranks. Hidden size and number of ranks are known when this is
// compiled, or 0: then they are the arguments'.
template <int kHidden, int kRanks>
class Memory {
 public:
  const ep_low_latency& common;

  // entry_words: of a token's entry.
  __device__ Memory(const ep_low_latency& arguments, int32_t entry_words)
      : common(arguments), entry_words_(entry_words) {}

  __device__ int32_t hidden() const { return kHidden != 0 ? kHidden : common.hidden; }
  __device__ int32_t num_ranks() const { return kRanks != 0 ? kRanks : common.peers.num_ranks; }
  __device__ int32_t rank() const { return common.peers.rank; }

  // For tests, see ep_peers.delay_ns: in the kernels for any sizes alone, since even a call that is
  // not made costs instructions.
  __device__ void delay() const {
    if constexpr (kHidden == 0) ep::delay(common.peers);
  }

  // The i-th rank after this one, for i up to their number.
  __device__ int32_t rank_after(int32_t i) const {
    const int32_t r = rank() + i;
    return r < num_ranks() ? r : r - num_ranks();
  }

  // The slot of a row that comes from `rank`: of its own token t in a dispatch, of the owner's in a
  // combine.
  __device__ uint4* row(int32_t owner, int32_t half, int32_t rank, int32_t t) const {
    return words(owner, common.row_offset) + place(half, rank, t) * (hidden() / 8);
  }
  __device__ uint4* header(int32_t owner, int32_t kind, int32_t half, int32_t rank) const {
    return words(owner, common.header_offset) + ((kind * 2 + half) * num_ranks() + rank);
  }
  // Experts of a token of `rank`, then its weights; or, of a combine, weights alone.
  __device__ uint4* entry(int32_t owner, int32_t half, int32_t rank, int32_t t) const {
    return words(owner, common.entry_offset) + place(half, rank, t) * entry_words_;
  }
  __device__ uint32_t* credit(int32_t owner, int32_t kind, int32_t half, int32_t rank) const {
    return in_memory_of<uint32_t>(common.peers, owner, common.credit_offset) +
           ((kind * 2 + half) * num_ranks() + rank);
  }

 private:
  int32_t entry_words_;

  __device__ uint4* words(int32_t owner, int64_t offset) const {
    return in_memory_of<uint4>(common.peers, owner, offset);
  }
  // Number of a token among those of all ranks and both halves.
  __device__ int64_t place(int32_t half, int32_t rank, int32_t t) const {
    return static_cast<int64_t>(half * num_ranks() + rank) * common.room + t;
  }
};

// One word of an entry: the j-th of token t, on its way to rank `to`. They are numbered
// as [words of an entry, ranks after this one, tokens]: a thread takes one at a time.
struct EntryWord {
  int32_t j, to, t;

  template <typename Memory>
  __device__ EntryWord(const Memory& memory, int32_t num_tokens, int32_t i) {
    const int32_t column = quotient(i, num_tokens);
    t = i - column * num_tokens;
    j = quotient(column, memory.num_ranks());
    to = memory.rank_after(column - j * memory.num_ranks() + 1);
  }
};
static_assert((EP_MAX_TOPK / kExpertsOfWord + EP_MAX_TOPK / kWeightsOfWord + 1) * EP_MAX_PEERS *
                  EP_LOW_LATENCY_MAX_TOKENS <=
              kMostToDivide);

// Calls store(r) for each rank of the set, beginning after this one, so that ranks do not all write
// to the same one.
template <int kHidden, int kRanks, typename Store>
__device__ inline void for_ranks(const Memory<kHidden, kRanks>& memory, uint32_t ranks,
                                 const Store& store) {
  constexpr int kUnroll = kRanks != 0 ? kRanks : 1;
#pragma unroll kUnroll
  for (int32_t i = 1; i <= memory.num_ranks(); ++i) {
    const int32_t r = memory.rank_after(i);
    if (ranks >> r & 1) store(r);
  }
}

// Blocks that share some work, and the number of this one among them. An SM whose stores wait for
// the links can load nothing: so where much travels, some blocks do that and the others the rest.
struct Part {
  int32_t num_blocks, block;
};

__device__ inline Part all_blocks() {
  return {static_cast<int32_t>(gridDim.x), static_cast<int32_t>(blockIdx.x)};
}

// The units of work of a warp, one after the other: a word for each lane. A token has a row of each
// of some sources. Units of a row are neighbours, and neighbours go to different SMs.
class Units {
 public:
  int32_t t, source, unit;

  // By `num_warps` of each block of a part; `warp` is the number of one among them.
  __device__ Units(const Part& part, int32_t num_warps, int32_t warp, int32_t units_of_row,
                   int32_t num_sources)
      : units_of_row_(units_of_row), num_sources_(num_sources) {
    split(warp * part.num_blocks + part.block, &t, &source, &unit);
    split(num_warps * part.num_blocks, &step_t_, &step_source_, &step_unit_);
  }

  __device__ void advance() {
    unit += step_unit_;
    const bool next_row = unit >= units_of_row_;
    if (next_row) unit -= units_of_row_;
    source += step_source_ + next_row;
    const bool next_token = source >= num_sources_;
    if (next_token) source -= num_sources_;
    t += step_t_ + next_token;
  }

  // This lane's word in the row.
  __device__ int32_t word() const { return unit * kWarpSize + lane_id(); }

 private:
  int32_t units_of_row_, num_sources_;
  int32_t step_t_, step_source_, step_unit_;

  __device__ void split(int32_t n, int32_t* tokens, int32_t* sources, int32_t* units) const {
    const int32_t rows = n / units_of_row_;
    *units = n - rows * units_of_row_;
    *tokens = rows / num_sources_;
    *sources = rows - *tokens * num_sources_;
  }
};

}  // namespace ep::low_latency
