// A warp's ring of stages in shared memory, filled by bulk loads and emptied by bulk stores, with
// the fences that these need (PROTOCOL.md, "Bulk copies"). Kernels that copy rows use nothing else.
#pragma once

#include "common/ptx.cuh"
#include "common/warp.cuh"

namespace ep {

constexpr int32_t kStageAlignment = 128;

// How a block's shared memory is cut up: barriers, then each warp's stages and one more row.
struct Ring {
  int32_t num_warps;
  int32_t num_stages;
  int32_t stage_bytes;
  int32_t converted_bytes;  // one row in the output's type, where that is another

  __host__ __device__ int32_t warp_bytes() const {
    return num_stages * stage_bytes + converted_bytes;
  }
  __host__ __device__ int32_t barrier_bytes() const {
    return round_up(num_warps * num_stages * 8, kStageAlignment);
  }
  __host__ __device__ int32_t shared_bytes() const {
    return num_warps * warp_bytes() + barrier_bytes();
  }
};

// One warp's part of the ring. Rows take turns: stage i is that of the warp's i-th row.
struct Stages {
  uint8_t* memory;
  uint64_t* barriers;
  int32_t num_stages;
  int32_t stage_bytes;

  __device__ Stages(uint8_t* shared, const Ring& ring, int32_t warp)
      : memory(shared + ring.barrier_bytes() + warp * ring.warp_bytes()),
        barriers(reinterpret_cast<uint64_t*>(shared) + warp * ring.num_stages),
        num_stages(ring.num_stages),
        stage_bytes(ring.stage_bytes) {
    const int32_t lane = lane_id();
    if (lane < num_stages) ptx::barrier_init(&barriers[lane], 1);
    ptx::fence_barrier_init();
    ptx::fence_proxy_async_shared();
    __syncwarp();
  }
  __device__ uint8_t* stage(int32_t i) const { return memory + i % num_stages * stage_bytes; }
  __device__ uint8_t* converted() const { return memory + num_stages * stage_bytes; }

  // ---- One thread: filling stage i ----

  // Announces how many bytes will be loaded. Called before the loads.
  __device__ void expect(int32_t i, int32_t bytes) const { ptx::barrier_expect(barrier(i), bytes); }
  __device__ void load(int32_t i, int32_t offset, const void* from, int32_t bytes) const {
    ptx::bulk_load(stage(i) + offset, from, bytes, barrier(i));
  }

  // ---- All threads of the warp ----

  // Waits until stage i is full.
  __device__ void wait(int32_t i) const { ptx::barrier_wait(barrier(i), i / num_stages & 1); }

  // Waits until all stores but those of the newest group have read their stages, which may then be
  // filled again.
  __device__ void wait_for_room() const {
    ptx::bulk_wait_read<1>();
    __syncwarp();
  }

  // Called before ordinary writes to converted(): stores may still read the row before from there.
  __device__ void begin_conversion() const {
    ptx::bulk_wait_read<0>();
    __syncwarp();
  }
  // Called after them, before bulk stores of the row.
  __device__ void end_conversion() const {
    ptx::fence_proxy_async_shared();
    __syncwarp();
  }

 private:
  __device__ uint64_t* barrier(int32_t i) const { return &barriers[i % num_stages]; }
};

// A bulk store of the calling thread, part of its open group.
__device__ inline void store_bulk(void* to, const void* shared, int32_t bytes) {
  ptx::bulk_store(to, shared, bytes);
}
// Ends the thread's open group, which may be empty.
__device__ inline void end_group() { ptx::bulk_commit(); }

// Waits until all groups of the calling thread but the newest kPending have been written, wherever
// they went. Then this thread may raise their flag.
template <int kPending>
__device__ inline void wait_until_written() {
  ptx::bulk_wait_written<kPending>();
}

// Called between the acquire of a flag and bulk copies, by the thread that does both. The copies
// are loads of what the peer wrote, or stores over what it has read. Also called after an earlier
// kernel's ordinary stores.
__device__ inline void fence_for_bulk() { ptx::fence_proxy_async_global(); }

}  // namespace ep
