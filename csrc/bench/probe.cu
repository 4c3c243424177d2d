// Measures what the links between the GPUs of a host carry: plain bulk pushes, with nothing to wait
// for.
//
// Every figure of `ep-comm bench` is compared with this rate. Each warp has a ring of stages in
// shared memory. Its first lane fills them from this GPU's memory and stores each row into every
// other rank's. Destinations rotate (rank r begins with r + 1), so that ranks do not all push to
// the same one.

#include "common/launch.cuh"
#include "common/peers.cuh"
#include "common/warp.cuh"

namespace {

using namespace ep;

constexpr int kWarps = 4;
constexpr int kStages = 3;  // of a warp
constexpr int kRowBytes = EP_PROBE_ROW_BYTES;
constexpr int kBarrierBytes = 128;  // keeps the stages after it on whole lines
constexpr int kSharedBytes = kBarrierBytes + kWarps * kStages * kRowBytes;
static_assert(kWarps * kStages * sizeof(uint64_t) <= kBarrierBytes, "barriers overlap the stages");

__global__ void __launch_bounds__(kWarps* kWarpSize)
    probe_kernel(const __grid_constant__ ep_probe_args args) {
  extern __shared__ __align__(128) uint8_t shared[];
  if (lane_id() != 0) return;

  const ep_peers& peers = args.peers;
  const int32_t warp = threadIdx.x / kWarpSize;
  uint64_t* const barriers = reinterpret_cast<uint64_t*>(shared) + warp * kStages;
  uint8_t* const stages = shared + kBarrierBytes + warp * kStages * kRowBytes;
  for (int s = 0; s < kStages; ++s) ptx::barrier_init(&barriers[s], 1);
  ptx::fence_barrier_init();
  ptx::fence_proxy_async_shared();

  const auto row_of = [&](int64_t i) {
    return i * gridDim.x * kWarps + blockIdx.x * kWarps + warp;
  };
  const auto load = [&](int64_t i) {
    if (row_of(i) >= args.num_rows) return;
    const int32_t s = i % kStages;
    ptx::barrier_expect(&barriers[s], kRowBytes);
    ptx::bulk_load(stages + s * kRowBytes, args.source + row_of(i) * kRowBytes, kRowBytes,
                   &barriers[s]);
  };

  for (int i = 0; i < kStages - 1; ++i) load(i);
  for (int64_t i = 0; row_of(i) < args.num_rows; ++i) {
    const int32_t s = i % kStages;
    ptx::barrier_wait(&barriers[s], i / kStages & 1);
    for (int32_t r = 1; r < peers.num_ranks; ++r) {
      const int32_t peer = (peers.rank + r) % peers.num_ranks;
      const int64_t region = region_of(peers.rank, peer, peers.num_ranks);
      ptx::bulk_store(peers.memory[peer] + (region * args.num_rows + row_of(i)) * kRowBytes,
                      stages + s * kRowBytes, kRowBytes);
    }
    ptx::bulk_commit();
    ptx::bulk_wait_read<1>();  // the stage of row i - 1 is the next to be filled
    load(i + kStages - 1);
  }
  ptx::bulk_wait_written<0>();
}

}  // namespace

int32_t ep_probe(const ep_probe_args* args, void* stream) {
  if (args->num_blocks < 1) return ep::fail(EP_ERR_ARGUMENT, "no blocks to launch");
  // Loaded here and not in ep_load_kernels: others need not pay for it, and nothing spins beside
  // it.
  const int32_t status = ep::load_kernel(reinterpret_cast<const void*>(probe_kernel),
                                         "probe kernel", ep::Setup::kShared, kSharedBytes);
  if (status != EP_OK) return status;
  probe_kernel<<<args->num_blocks, kWarps * kWarpSize, kSharedBytes,
                 static_cast<cudaStream_t>(stream)>>>(*args);
  return ep::check_cuda(cudaGetLastError(), "ep_probe");
}
