// Dispatch: rows go once to every rank that owns one of their experts, and from there to the places
// where the experts want them. One kernel with two kinds of blocks, which may also be launched
// apart: those that push (dispatch/push.cuh) and those that expand (dispatch/expand.cuh).

#include "common/calls.cuh"
#include "common/launch.cuh"
#include "dispatch/expand.cuh"
#include "dispatch/push.cuh"
#include "dispatch/ring.cuh"

namespace {

using namespace ep;
using namespace ep::dispatch;

__global__ void __launch_bounds__((kMaxWarps + 1) * kWarpSize)
    dispatch_kernel(const __grid_constant__ ep_dispatch_args args, const Ring ring) {
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ LandedChunks landed;
  const int32_t warp = threadIdx.x / kWarpSize, num_warps = ring.num_warps;
  const int32_t block = blockIdx.x, epoch = epoch_of(args.peers);
  // By the warp that moves no rows.
  if (block == 0 && threadIdx.x == num_warps * kWarpSize && !args.is_planned) {
    begin_operation(args.peers);
  }
  if (block < args.num_push_blocks) {
    landed.clear();
    const int32_t first_warp = block * num_warps, all_warps = args.num_push_blocks * num_warps;
    if (warp < num_warps) {
      const Stages stages(shared, ring, warp);
      push(args, stages, epoch, first_warp + warp, all_warps, landed.flags[warp][0]);
    } else {
      raise_flags(args, &landed, first_warp, num_warps, all_warps);
    }
  } else if (warp < num_warps) {
    const Stages stages(shared, ring, warp);
    expand(args, stages, epoch, (block - args.num_push_blocks) * num_warps + warp,
           args.num_expand_blocks * num_warps);
  }
  end_operation(args.peers, args.counter, args.num_blocks, args.credit_offset,
                args.routing.num_sent, args.row_bytes + args.scale_bytes);
}

const Kernels kernels("dispatch kernel", Setup::kShared, kMaxShared, dispatch_kernel);

}  // namespace

int32_t ep_dispatch(const ep_dispatch_args* args, void* stream) {
  Ring ring{};
  const int32_t status = make_ring(*args, &ring);
  if (status != EP_OK) return status;
  const int32_t blocks = args->num_push_blocks + args->num_expand_blocks;
  if (blocks < 1) return ep::fail(EP_ERR_ARGUMENT, "no blocks to launch");
  if (!args->is_planned) ep::note_call(args->peers, args->row_bytes + args->scale_bytes);
  const cudaError_t error =
      ep::launch(dispatch_kernel, blocks, (ring.num_warps + 1) * kWarpSize, ring.shared_bytes(),
                 stream, args->is_behind_plan, *args, ring);
  return ep::check_cuda(error, "ep_dispatch");
}
