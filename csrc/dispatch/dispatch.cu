// Dispatch: rows go once to every rank that owns one of their experts, and from there to the places
// where the experts want them. One kernel with two kinds of blocks, which may also be launched
// apart: those that push (dispatch/push.cuh) and those that expand (dispatch/expand.cuh).

#include <algorithm>

#include "common/launch.cuh"
#include "dispatch/expand.cuh"
#include "dispatch/push.cuh"

namespace {

using namespace ep;
using namespace ep::dispatch;

constexpr int kMaxWarps = 8;
constexpr int kMaxStages = 16;
// It leaves room for a block of a plan's second kernel. More brings nothing.
constexpr int kMaxShared = 184 * 1024;

__global__ void __launch_bounds__(kMaxWarps* kWarpSize)
    dispatch_kernel(const __grid_constant__ ep_dispatch_args args, const Ring ring) {
  extern __shared__ __align__(128) uint8_t shared[];
  const int32_t warp = threadIdx.x / kWarpSize;
  const Stages stages(shared, ring, warp);
  const int32_t block = blockIdx.x, epoch = epoch_of(args.peers);
  if (block == 0 && threadIdx.x == 0 && !args.is_planned) begin_operation(args.peers);
  if (block < args.num_push_blocks) {
    push(args, stages, epoch, block * ring.num_warps + warp, args.num_push_blocks * ring.num_warps);
  } else {
    expand(args, stages, epoch, (block - args.num_push_blocks) * ring.num_warps + warp,
           args.num_expand_blocks * ring.num_warps);
  }
  end_operation(args.peers, args.counter, args.num_blocks, args.credit_offset,
                args.routing.num_sent, args.row_bytes + args.scale_bytes);
}

Ring make_ring(const ep_dispatch_args& args) {
  Ring ring{};
  const int32_t wanted = slot_bytes(args) + 2 * args.routing.num_topk4 * 4;
  ring.stage_bytes = round_up(wanted, kStageAlignment);
  ring.converted_bytes = args.recv_kind == EP_RECV_BYTES || args.num_expand_blocks == 0
                             ? 0
                             : round_up(out_row_bytes(args), kStageAlignment);
  constexpr int32_t kRoom = kMaxShared - 1024;
  // Three stages a warp, or two where a row is so long that not even one warp has three.
  for (int32_t stages = 3; stages >= 2 && ring.num_warps == 0; --stages) {
    ring.num_warps =
        std::min(kMaxWarps, kRoom / (stages * ring.stage_bytes + ring.converted_bytes));
    if (stages == 2) ring.num_warps = std::min(ring.num_warps, 1);
  }
  if (ring.num_warps > 0) {
    ring.num_stages =
        std::min(kMaxStages, (kRoom / ring.num_warps - ring.converted_bytes) / ring.stage_bytes);
  }
  return ring;
}

const Kernels kernels("dispatch kernel", Setup::kShared, kMaxShared, dispatch_kernel);

}  // namespace

int32_t ep_dispatch(const ep_dispatch_args* args, void* stream) {
  if (args->row_bytes % 16 || args->scale_bytes % 16 || args->weight_bytes % 16) {
    return ep::fail(EP_ERR_ARGUMENT,
                    "rows of %d, scales of %d and weights of %d bytes: all must be "
                    "multiples of 16",
                    args->row_bytes, args->scale_bytes, args->weight_bytes);
  }
  if (args->chunk_tokens <= kFlagLag || args->chunk_tokens > kMaxChunkTokens) {
    return ep::fail(EP_ERR_ARGUMENT, "chunk_tokens = %d is not in [%d, %d]", args->chunk_tokens,
                    kFlagLag + 1, kMaxChunkTokens);
  }
  if (args->routing.num_topk > kWarpSize) {
    return ep::fail(EP_ERR_ARGUMENT, "num_topk = %d is more than %d", args->routing.num_topk,
                    kWarpSize);
  }
  const Ring ring = make_ring(*args);
  if (ring.num_warps == 0) {
    return ep::fail(EP_ERR_ARGUMENT, "a row of %d bytes does not fit the stages of shared memory",
                    args->row_bytes);
  }
  const int32_t blocks = args->num_push_blocks + args->num_expand_blocks;
  if (blocks < 1) return ep::fail(EP_ERR_ARGUMENT, "no blocks to launch");
  cudaLaunchAttribute early;
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = ring.num_warps * kWarpSize;
  config.dynamicSmemBytes = ring.shared_bytes();
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &early;
  config.numAttrs = args->is_behind_plan ? 1 : 0;
  return ep::check_cuda(cudaLaunchKernelEx(&config, dispatch_kernel, *args, ring), "ep_dispatch");
}
