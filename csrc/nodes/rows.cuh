// The rows of a dispatch that the network brings: where they stand, and when they are there.
#pragma once

#include "dispatch/slots.cuh"
#include "nodes/nodes.cuh"

namespace ep::nodes {

// Rows of rank (k, own l), k > 0. All lanes of a warp call its functions together, except those
// that are lane 0's.
class Relayed {
 public:
  __device__ Relayed(const ep_nodes_dispatch_args& args, int32_t epoch, int32_t k)
      : args_(args),
        epoch_(epoch),
        k_(k),
        ints_(entry_ints(args.dispatch.peers.num_ranks, args.dispatch.routing.num_topk)) {}

  // Waits for the first chunk, which says how many rows there are; and, in a new dispatch, for
  // their entries. False after a fault.
  __device__ bool begin() {
    bool fine = true;
    network::Flag flag = 0;
    if (lane_id() == 0) {
      fine = !args_.dispatch.is_planned || wait_for_plan();
      fine = fine && open_chunk(0, true, &flag) && has_entries_of(rows_in_all(flag));
    }
    num_rows_ = min(rows_in_all(__shfl_sync(kFullWarp, flag, 0)), args_.dispatch.max_tokens);
    __syncwarp();  // all lanes may read the entries that one waited for
    return __shfl_sync(kFullWarp, fine, 0);
  }
  __device__ int32_t count() const { return num_rows_; }

  // True when all rows [first, end) are there. With `block` it waits until then, and false means a
  // fault.
  __device__ bool open(int32_t first, int32_t end, bool block) const {
    bool arrived = true;
    if (lane_id() == 0) {
      network::Flag flag;
      const int32_t last = (end - 1) / args_.network_chunk_rows;
      for (int32_t c = first / args_.network_chunk_rows; c <= last && arrived; ++c) {
        arrived = open_chunk(c, block, &flag);
      }
    }
    return __shfl_sync(kFullWarp, arrived, 0);
  }

  // Slot of a row at local rank l, or -1. Another kernel may be writing the entries of other rows.
  __device__ int32_t slot(int32_t row, int32_t l) const {
    return entries()[static_cast<int64_t>(row) * ints_ + l];
  }

  // Lane 0 starts to load a row into stage i, which announces `extra` bytes more.
  __device__ void load(const Stages& stages, int32_t i, int32_t row, int32_t extra) const {
    const int32_t bytes = dispatch::slot_bytes(args_.dispatch);
    const uint8_t* const rows =
        args_.network.memory + args_.network_receive_offset + (k_ - 1) * args_.network_region;
    stages.expect(i, bytes + extra);
    stages.load(i, 0, rows + static_cast<int64_t>(row) * bytes, bytes);
  }

  // The entries, as they came with the plan or as the routing keeps them.
  __device__ const volatile int32_t* entries() const {
    return args_.dispatch.is_planned
               ? planned_entries()
               : args_.nodes.relay + static_cast<int64_t>(args_.nodes.relay_first[k_]) * ints_;
  }
  __device__ const volatile int32_t* planned_entries() const {
    return reinterpret_cast<const volatile int32_t*>(args_.network.memory + args_.plan_offset +
                                                     (k_ - 1) * args_.plan_region) +
           kRelayHeaderInts;
  }
  __device__ int32_t ints() const { return ints_; }

 private:
  __device__ int32_t peer() const {
    return peer_number(args_.dispatch.peers, k_, args_.dispatch.peers.rank);
  }

  // Lane 0: false, and a fault, where the handle has entries for another number of rows than come.
  // Then it is the handle of another dispatch, whose tag is the same by chance.
  __device__ bool has_entries_of(int32_t num_rows) const {
    if (args_.dispatch.is_planned) return true;
    const int32_t entries = args_.nodes.num_relayed[k_];
    if (num_rows == entries) return true;
    raise_fault(args_.dispatch.peers, EP_FAULT_MISMATCH, EP_PHASE_ROWS, peer(), EP_FIELD_CALL,
                entries, num_rows);
    return false;
  }

  // Lane 0: waits for the message with the entries.
  __device__ bool wait_for_plan() const {
    return wait_for_message(args_.dispatch.peers, args_.network, args_.plan_flag_offset, epoch_,
                            k_);
  }

  // Lane 0: true when chunk c is there.
  __device__ bool open_chunk(int32_t c, bool block, network::Flag* flag) const {
    const ep_peers& peers = args_.dispatch.peers;
    const network::Flag* const where =
        own_flags(args_.network, args_.network_flag_offset) + (k_ - 1) * EP_MAX_NETWORK_CHUNKS + c;
    const uint32_t stamp = chunk_stamp(epoch_, args_.dispatch.tag);
    const auto is_of_this_epoch = [stamp](network::Flag value) {
      return dispatch::flag_stamp(value) >> 8 == stamp >> 8;
    };
    bool arrived = true;
    if (block) {
      arrived = wait_flag(peers, where, is_of_this_epoch, flag, EP_PHASE_ROWS, peer(), epoch_);
    } else {
      *flag = ptx::load_acquire_sys(where);
      arrived = is_of_this_epoch(*flag);
    }
    if (arrived && !same_call(peers, stamp, dispatch::flag_stamp(*flag), peer())) arrived = false;
    if (arrived) network::after_wait(where, *flag);
    fence_for_bulk();  // the rows are read by bulk loads
    return arrived;
  }

  const ep_nodes_dispatch_args& args_;
  int32_t epoch_;
  int32_t k_;
  int32_t ints_;
  int32_t num_rows_ = 0;
};

}  // namespace ep::nodes
