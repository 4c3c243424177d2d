// The version over NVSHMEM: put with signal, and signal alone, of its public interface. Its quiet,
// fence, barriers, and blocking puts are not called: they wait without a bound.
//
// NVSHMEM's world is the buffer's group: a rank's number in it is its number among the PEs. All
// have allocated network memory together: a place in this rank's stands for that of any.
#pragma once

#include "network/network.cuh"

namespace ep::network {

// For __launch_bounds__: a dispatch's block and a plan's have room on one SM together, so each has
// half of its registers. With calls of another file's functions the compiler would take more.
constexpr int kMinBlocks = 2;

namespace nvshmem {  // nvshmem/calls.cu

// All threads of the group.
__device__ void put(WarpGroup, uint8_t* to, const uint8_t* from, int64_t num_bytes, Flag* flag,
                    Flag value, int pe);
__device__ void put(BlockGroup, uint8_t* to, const uint8_t* from, int64_t num_bytes, Flag* flag,
                    Flag value, int pe);
// One thread.
__device__ void raise(Flag* flag, Flag value, int pe);
__device__ void flush(const Flag* flag, Flag seen);

}  // namespace nvshmem

// Whether waits end with a flush (after_wait). Set for the GPU when it joins the world
// (nvshmem/world.cu).
extern __device__ int32_t flushes_after_wait;

// The PE of the rail's rank on the node k after.
__device__ inline int pe_of(const ep_network& network, int32_t k) {
  return (network.node + k) % network.num_nodes * network.pe_stride + network.pe_first;
}

// Where to write what put() is to send from `from` to `to`, both places in network memory, to the
// node k after: the place to send from.
__device__ inline uint8_t* place_to_write(const ep_network& network, int32_t, int64_t from,
                                          int64_t) {
  return network.memory + from;
}

// One thread raises the flag at `flag` of the node k after.
__device__ inline void raise_far(const ep_peers& peers, const ep_network& network, int32_t k,
                                 int64_t flag, Flag value) {
  delay(peers);
  ptx::fence_acq_rel_sys();  // what it stands for comes before it, whoever carries it
  nvshmem::raise(reinterpret_cast<Flag*>(network.memory + flag), value, pe_of(network, k));
}

// Sends num_bytes, which may be 0, from `from` in this rank's network memory to `to` in that of the
// node k after, and then raises the flag at `flag` there. They stand at place_to_write(). All
// threads of the group call it, and have met after the writes.
template <typename Group>
__device__ inline void put(const ep_peers& peers, const ep_network& network, int32_t k,
                           int64_t from, int64_t to, int64_t num_bytes, int64_t flag, Flag value,
                           Group group) {
  if (num_bytes == 0) {
    if (group.index() == 0) raise_far(peers, network, k, flag, value);
    group.sync();
    return;
  }
  // Other threads wrote the data, in a combine those of other blocks too. Their writes happen
  // before this: the threads have met, or one has acquired what the others released. But a network
  // card reads the data, from outside of the GPU, and NVSHMEM promises an order only with what its
  // caller itself has written. So all of it is made visible to the whole system here, before the
  // message is handed over. Which thread of the first warp hands it over is NVSHMEM's affair: each
  // has the fence.
  if (group.index() < kWarpSize) {
    delay(peers);
    ptx::fence_acq_rel_sys();
  }
  uint8_t* const memory = network.memory;
  nvshmem::put(group, memory + to, memory + from, num_bytes, reinterpret_cast<Flag*>(memory + flag),
               value, pe_of(network, k));
}

// Called by the thread that has seen `seen` at `flag`, a flag of this rank's network memory, before
// it meets those that read what the flag stands for. On a GPU that takes in a network's writes in
// order the acquire of that look is enough. On another one the flag may have passed the data.
__device__ inline void after_wait(const Flag* flag, Flag seen) {
  if (flushes_after_wait != 0) nvshmem::flush(flag, seen);
}

}  // namespace ep::network
