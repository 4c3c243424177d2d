// Dispatch where copy engines are the wire: what is left for SMs is to expand what has come.

#include "common/launch.cuh"
#include "dispatch/dense.cuh"
#include "dispatch/ring.cuh"

namespace {

using namespace ep;
using namespace ep::dispatch;

__global__ void __launch_bounds__(kMaxWarps* kWarpSize)
    expand_kernel(const __grid_constant__ ep_dispatch_args args, const Ring ring) {
  extern __shared__ __align__(128) uint8_t shared[];
  const int32_t warp = threadIdx.x / kWarpSize, epoch = epoch_of(args.peers);
  const Stages stages(shared, ring, warp);
  expand_dense(args, stages, epoch, blockIdx.x * ring.num_warps + warp,
               args.num_expand_blocks * ring.num_warps);
  end_operation(args.peers, args.counter, args.num_blocks, args.credit_offset,
                args.routing.num_sent, args.row_bytes + args.scale_bytes, args.wire,
                args.routing.num_tokens);
}

const Kernels kernels("expand kernel", Setup::kShared, kMaxShared, expand_kernel);

int32_t check_chunks(const ep_dispatch_args& args) {
  const int32_t unit = args.chunk_tokens, chunk = args.wire.chunk_rows;
  if (unit < 1 || unit > kMaxChunkTokens || kMaxChunkTokens % unit != 0) {
    return fail(EP_ERR_ARGUMENT, "chunk_tokens = %d does not divide %d", unit, kMaxChunkTokens);
  }
  if (chunk < kMaxChunkTokens || chunk % kMaxChunkTokens != 0 ||
      args.first_token % kMaxChunkTokens != 0) {
    return fail(EP_ERR_ARGUMENT, "chunks of %d rows, from token %d: multiples of %d", chunk,
                args.first_token, kMaxChunkTokens);
  }
  return EP_OK;
}

}  // namespace

int32_t ep_expand(const ep_dispatch_args* args, void* stream) {
  int32_t status = check_chunks(*args);
  Ring ring{};
  if (status == EP_OK) status = make_ring(*args, &ring);
  if (status != EP_OK) return status;
  expand_kernel<<<args->num_expand_blocks, ring.num_warps * kWarpSize, ring.shared_bytes(),
                  static_cast<cudaStream_t>(stream)>>>(*args, ring);
  return ep::check_cuda(cudaGetLastError(), "ep_expand");
}
