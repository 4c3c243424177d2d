// NVSHMEM's device functions. They are called here alone: their headers take long to compile.

#include <nvshmem.h>
#include <nvshmemx.h>

#include "network/network.cuh"

namespace ep::network::nvshmem {

__device__ __noinline__ void put(WarpGroup, uint8_t* to, const uint8_t* from, int64_t num_bytes,
                                 Flag* flag, Flag value, int pe) {
  nvshmemx_putmem_signal_nbi_warp(to, from, num_bytes, flag, value, NVSHMEM_SIGNAL_SET, pe);
}

__device__ __noinline__ void put(BlockGroup, uint8_t* to, const uint8_t* from, int64_t num_bytes,
                                 Flag* flag, Flag value, int pe) {
  nvshmemx_putmem_signal_nbi_block(to, from, num_bytes, flag, value, NVSHMEM_SIGNAL_SET, pe);
}

__device__ __noinline__ void raise(Flag* flag, Flag value, int pe) {
  nvshmemx_signal_op(flag, value, NVSHMEM_SIGNAL_SET, pe);
}

// Its test of a condition that is met flushes what the network has written. Its wait for a signal
// does not, and its other waits would spin on.
__device__ __noinline__ void flush(const Flag* flag, Flag seen) {
  nvshmem_uint64_test(const_cast<Flag*>(flag), NVSHMEM_CMP_EQ, seen);
}

}  // namespace ep::network::nvshmem
