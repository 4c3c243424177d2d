// The network between nodes, as kernels see it. Which one it is, is chosen when a library is
// compiled: stores.cuh, or nvshmem.cuh where EP_NETWORK_NVSHMEM is defined. Each of them has
//
//   place_to_write  where to write what put() will send
//   put             sends memory to a rank of the rail, and then raises a flag there
//   raise_far       raises a flag alone
//   after_wait      called after a wait for a flag, before what it stands for is read
//
// Only a put and its own flag are ordered (PROTOCOL.md, "What the network must do"). Nothing here
// waits for another rank.
#pragma once

#include "common/peers.cuh"
#include "common/warp.cuh"

namespace ep::network {

// Threads that put something together.
struct WarpGroup {
  __device__ int32_t index() const { return lane_id(); }
  __device__ int32_t size() const { return kWarpSize; }
  __device__ void sync() const { __syncwarp(); }
};
struct BlockGroup {
  __device__ int32_t index() const { return threadIdx.x; }
  __device__ int32_t size() const { return blockDim.x; }
  __device__ void sync() const { __syncthreads(); }
};

// Flags hold 64 bits, as those of NVSHMEM do.
using Flag = uint64_t;

}  // namespace ep::network

#ifdef EP_NETWORK_NVSHMEM
#include "network/nvshmem.cuh"
#else
#include "network/stores.cuh"
#endif
