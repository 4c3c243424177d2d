// Low-latency dispatch, receiving: from the slots to the rows of the experts.
#pragma once

#include "low_latency/dispatch/arrivals.cuh"
#include "low_latency/dispatch/scales.cuh"

namespace ep::low_latency::dispatch {

// The row of recv_x that lane k's expert of a row has it in; -1 where there is none.
template <typename Memory>
__device__ inline int32_t find_row(const ep_low_latency& common, const Memory& memory,
                                   const Operation& operation, const Arrivals& arrivals,
                                   int32_t source, int32_t t) {
  const int32_t words = expert_words(common.num_topk),
                num_places = memory.num_ranks() * common.max_tokens;
  const int32_t n = source * common.max_tokens + t, j = lane_id() / kExpertsOfWord;
  if (lane_id() >= common.num_topk) return -1;
  const uint4* const copy = arrivals.entry(n, words);
  const uint4 word =
      copy != nullptr ? copy[j]
                      : ptx::load_word(memory.entry(memory.rank(), operation.half, source, t) + j);
  const uint32_t expert = expert_of_word(word, lane_id() % kExpertsOfWord);
  if (expert >= static_cast<uint32_t>(common.num_local_experts)) return -1;
  return expert * num_places + arrivals.count_before(expert, n);
}

// The receiver's work of a block, cut into items: a part of a row each, so many that every SM has
// one. Own rows are the first of each token's: they are there.
class Items {
 public:
  struct Item {
    int32_t t, source, first_word, end_word;
  };

  // num_tokens: what the other ranks may have too. There may be room for many more.
  __device__ Items(int32_t num_ranks, int32_t num_tokens, int32_t max_tokens, int32_t words_of_row)
      : num_ranks_(num_ranks), words_of_row_(words_of_row) {
    const int32_t rows = num_ranks * max(num_tokens, 1);
    const int32_t units = ceil_div<int32_t>(words_of_row, kWarpSize);
    parts_ = max(1, min(quotient(gridDim.x, rows), units));
    units_of_item_ = quotient(units + parts_ - 1, parts_);
    end_at(max_tokens);
  }

  // No rank has more tokens.
  __device__ void end_at(int32_t most_tokens) {
    const int32_t left = num_ranks_ * most_tokens * parts_ - static_cast<int32_t>(blockIdx.x);
    count_ = left <= 0 ? 0 : quotient(left + gridDim.x - 1, gridDim.x);
  }

  __device__ int32_t count() const { return count_; }
  __device__ int32_t units_of_item() const { return units_of_item_; }

  // The i-th of this block. `source` counts from the own rank on.
  __device__ Item at(int32_t i) const {
    const int32_t item = i * gridDim.x + blockIdx.x;
    const int32_t row = quotient(item, parts_), part = item - row * parts_;
    const int32_t t = row / num_ranks_, first = part * units_of_item_ * kWarpSize;
    return {t, row - t * num_ranks_, first, min(first + units_of_item_ * kWarpSize, words_of_row_)};
  }

 private:
  int32_t num_ranks_, words_of_row_, parts_, units_of_item_, count_;
};

// By the entry warps: finds the rows of recv_x that become of the items from `first` on.
template <typename Memory>
__device__ inline void find_rows(const ep_low_latency& common, const Memory& memory,
                                 const Operation& operation, const Arrivals& arrivals,
                                 const Items& items, int32_t first) {
  const int32_t entry_warp = threadIdx.x / kWarpSize - kRowWarps;
  const int32_t count = min(items.count() - first, kItemsAtOnce);
#pragma unroll 1
  for (int32_t i = entry_warp; i < count; i += kEntryWarps) {
    const Items::Item item = items.at(first + i);
    const int32_t source = memory.rank_after(item.source);
    int32_t row = -1;
    if (item.t < arrivals.num_tokens[source]) {
      row = find_row(common, memory, operation, arrivals, source, item.t);
    }
    // Those that there are, then as many -1 as there are none.
    const uint32_t lanes = __ballot_sync(kFullWarp, row >= 0), below = (1u << lane_id()) - 1;
    const int32_t place = row >= 0 ? __popc(lanes & below) : __popc(lanes) + __popc(~lanes & below);
    if (lane_id() < common.num_topk) arrivals.rows[i * common.num_topk + place] = row;
  }
}

// By the entry warps: keeps for combine where the experts of the items' rows have them, and the
// weights. False after a fault.
template <typename Memory>
__device__ inline bool keep_rows(const ep_low_latency_dispatch_args& args, const Memory& memory,
                                 const Operation& operation, const Arrivals& arrivals,
                                 const Items& items, int32_t first) {
  const ep_low_latency& common = args.common;
  const int32_t lane = lane_id(), entry_warp = threadIdx.x / kWarpSize - kRowWarps;
  const int32_t count = min(items.count() - first, kItemsAtOnce);
  bool fine = true;
#pragma unroll 1
  for (int32_t i = entry_warp; i < count; i += kEntryWarps) {
    const Items::Item item = items.at(first + i);
    const int32_t source = memory.rank_after(item.source);
    if (item.first_word != 0 || item.t >= arrivals.num_tokens[source]) continue;
    const int32_t row = find_row(common, memory, operation, arrivals, source, item.t);
    const uint32_t order = row;  // none is the largest
    int32_t place = 0;
#pragma unroll 1
    for (int32_t k = 0; k < common.num_topk; ++k) {
      const uint32_t other = __shfl_sync(kFullWarp, order, k);
      place += other < order || (other == order && k < lane);
    }
    if (lane >= common.num_topk) continue;
    const int32_t n = source * common.max_tokens + item.t;
    const int64_t at = static_cast<int64_t>(n) * common.num_topk + place;
    args.handle.rows[at] = row < 0 ? -1 : row | lane << kRowBits;
    if (row >= 0) args.recv_src_info[row] = n;
    if (!common.has_weights) continue;
    const uint4* const from = memory.entry(memory.rank(), operation.half, source, item.t) +
                              expert_words(common.num_topk) + lane / kWeightsOfWord;
    uint4 word = ptx::load_word(from);
    fine = fine && wait_for_stamp(common.peers, from, &word, source, operation.epoch);
    if (!fine) continue;
    args.handle.weights[at] = __uint_as_float(weight_of_word(word, lane % kWeightsOfWord));
  }
  return __all_sync(kFullWarp, fine);
}

// What a warp receives: units of items, one after the other, this lane's word of each.
template <typename Memory>
class Receiver {
 public:
  __device__ Receiver(const ep_low_latency_dispatch_args& args, const Memory& memory,
                      const Operation& operation, const RowWords& row, const Items& items)
      : args_(args), memory_(memory), operation_(operation), row_(row), items_(items) {
    const int32_t warp = threadIdx.x / kWarpSize;
    const bool is_entry_warp = warp >= kRowWarps;
    const auto split = [&](int32_t n, int32_t* i, int32_t* unit) {
      *i = quotient(n, items.units_of_item());
      *unit = n - *i * items.units_of_item();
    };
    split(is_entry_warp ? 2 * kRowWarps + kWarps - 1 - warp : warp, &i_, &unit_);
    split(is_entry_warp ? kUnitsOfTurn : kRowWarps, &step_i_, &step_unit_);
    split(is_entry_warp ? kUnitsOfTurn : kUnitsOfTurn - kRowWarps, &next_step_i_, &next_step_unit_);
    load();
  }

  // Those of the items before `end`, whose rows are known. False after a fault.
  __device__ bool receive(const Arrivals& arrivals, int32_t first, int32_t end) {
    const int32_t num_topk = args_.common.num_topk;
#pragma unroll 1
    while (i_ < end) {
      const int32_t t = item_.t, source = memory_.rank_after(item_.source), at = word_;
      const bool is_in_item = at < item_.end_word;
      const int32_t* const rows = arrivals.rows + (i_ - first) * num_topk;
      uint4 word = incoming_;
      advance();
      load();  // on its way meanwhile

      const int32_t to = lane_id() < num_topk ? rows[lane_id()] : -1;
      const int32_t num_experts = __popc(__ballot_sync(kFullWarp, to >= 0));
      const bool has_word = num_experts != 0 && is_in_item;
      uint4* const from = slot(source, t) + at;
      bool fine = true;
      if (has_word) {
        fine = wait_for_word(args_.common.peers, from, &word, source, operation_.epoch);
      }
      if (!__all_sync(kFullWarp, fine)) return false;
      if (has_word) ptx::store_word(from, waiting_word());
      store(to, num_experts, has_word, at, word);
    }
    return true;
  }

 private:
  const ep_low_latency_dispatch_args& args_;
  const Memory& memory_;
  const Operation& operation_;
  const RowWords& row_;
  const Items& items_;
  // Units are dealt out in turns: two to each row warp, and then one to each entry warp, which has
  // other work to do. So the steps from one unit of a warp to its next take turns. The last entry
  // warps come first: they have the fewest rows to keep.
  static constexpr int kUnitsOfTurn = 2 * kRowWarps + kEntryWarps;
  int32_t i_, unit_, step_i_, step_unit_, next_step_i_, next_step_unit_;
  Items::Item item_;
  int32_t word_;
  uint4 incoming_;  // whatever is there by now

  // Stores this lane's word of a row, the `at`-th, if it has one, for each of the rows that lanes
  // have.
  __device__ void store(int32_t to, int32_t num_rows, bool has_word, int32_t at,
                        const uint4& word) const {
    const bool is_data = has_word && at < row_.data, is_scales = has_word && !is_data;
    if (__any_sync(kFullWarp, is_data)) {
      auto* const out = static_cast<uint4*>(args_.recv_x) + at;
#pragma unroll 1
      for (int32_t k = 0; k < num_rows; ++k) {
        const int64_t row = __shfl_sync(kFullWarp, to, k);
        if (is_data) ptx::store_global(out + row * row_.data, word);
      }
    }
    if (!__any_sync(kFullWarp, is_scales)) return;
    const ScaleRow own(to, memory_.num_ranks() * args_.common.max_tokens);
#pragma unroll 1
    for (int32_t k = 0; k < num_rows; ++k) {
      const ScaleRow row = own.of_lane(k);
      if (is_scales) store_scales(args_, memory_.hidden(), row, at - row_.data, word);
    }
  }

  __device__ uint4* slot(int32_t source, int32_t t) const {
    return memory_.row(memory_.rank(), operation_.half, source, t);
  }
  __device__ void load() {
    if (i_ >= items_.count()) return;
    item_ = items_.at(i_);
    word_ = item_.first_word + unit_ * kWarpSize + lane_id();
    memory_.delay();
    ptx::load_word_if(word_ < item_.end_word, &incoming_,
                      slot(memory_.rank_after(item_.source), item_.t) + word_);
  }
  __device__ void advance() {
    i_ += step_i_, unit_ += step_unit_;
    if (unit_ >= items_.units_of_item()) unit_ -= items_.units_of_item(), ++i_;
    swap(step_i_, next_step_i_);
    swap(step_unit_, next_step_unit_);
  }
  __device__ static void swap(int32_t& a, int32_t& b) {
    const int32_t old = a;
    a = b, b = old;
  }
};

// By all warps of a block. is_fine: for this one, so far.
template <typename Memory>
__device__ inline void receive(const ep_low_latency_dispatch_args& args, const Memory& memory,
                               const Operation& operation, const Arrivals& arrivals,
                               const RowWords& row, bool is_fine) {
  const ep_low_latency& common = args.common;
  const bool is_entry_warp = threadIdx.x >= kRowWarps * kWarpSize;
  Items items(memory.num_ranks(), common.num_tokens, common.max_tokens, row.all);
  Receiver<Memory> receiver(args, memory, operation, row, items);
  if (is_entry_warp) {
    if (is_fine) is_fine = collect(args, memory, operation, arrivals);
    __syncwarp();
    ptx::named_barrier(kEntryBarrier, kEntryThreads);
    items.end_at(arrivals.most_tokens(memory.num_ranks()));
  }
#pragma unroll 1
  for (int32_t first = 0;; first += kItemsAtOnce) {
    if (is_entry_warp) find_rows(common, memory, operation, arrivals, items, first);
    if (!__syncthreads_and(is_fine)) {
      leave_nothing(args);
      return;
    }
    if (!is_entry_warp) items.end_at(arrivals.most_tokens(memory.num_ranks()));
    const int32_t end = min(first + kItemsAtOnce, items.count());
    if (is_entry_warp) {
      is_fine = keep_rows(args, memory, operation, arrivals, items, first);
    }
    is_fine = is_fine && receiver.receive(arrivals, first, end);
    if (first + kItemsAtOnce >= items.count()) break;
    __syncthreads();  // all have read the rows
  }
  write_counts(args, memory.num_ranks(), arrivals);
}

}  // namespace ep::low_latency::dispatch
