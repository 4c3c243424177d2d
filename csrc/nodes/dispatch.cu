// Dispatch between nodes (PROTOCOL.md, "Between nodes"). One kernel with three kinds of blocks,
// which may also be launched apart: those that gather rows and put them to the rail
// (nodes/gather.cuh), those that push waves to the ranks of this node (nodes/push.cuh), and those
// that expand them (nodes/expand.cuh).

#include "common/calls.cuh"
#include "common/launch.cuh"
#include "dispatch/ring.cuh"
#include "nodes/end.cuh"
#include "nodes/expand.cuh"
#include "nodes/gather.cuh"
#include "nodes/push.cuh"

namespace {

using namespace ep;
using namespace ep::nodes;
using dispatch::kMaxShared;
using dispatch::kMaxWarps;

// A block of it and one of a plan have room on one SM together: each has half of its registers.
__global__ void __launch_bounds__(kMaxWarps* kWarpSize, 2)
    dispatch_kernel(const __grid_constant__ ep_nodes_dispatch_args args, const Ring ring) {
  extern __shared__ __align__(128) uint8_t shared[];
  const ep_dispatch_args& local = args.dispatch;
  const ep_peers& peers = local.peers;
  const int32_t warp = threadIdx.x / kWarpSize;
  const Stages stages(shared, ring, warp);
  const int32_t block = blockIdx.x, epoch = epoch_of(peers);
  if (block == 0 && threadIdx.x == 0 && !local.is_planned) begin_operation(peers);
  const int32_t push_block = block - args.num_gather_blocks;
  const int32_t expand_block = push_block - local.num_push_blocks;
  if (push_block < 0) {
    gather(args, stages, epoch, block, args.num_gather_blocks);
  } else if (expand_block < 0) {
    push_waves(args, stages, epoch, push_block * ring.num_warps + warp,
               local.num_push_blocks * ring.num_warps);
  } else {
    expand_waves(args, stages, epoch, expand_block * ring.num_warps + warp,
                 local.num_expand_blocks * ring.num_warps);
  }
  const auto rows_to = [&](int32_t p) {
    const int32_t k = p / peers.num_ranks, l = p % peers.num_ranks;
    if (k == 0) return args.nodes.num_pushed[l];
    const int32_t node = node_after(args.network, args.network.num_nodes - k);
    return l == peers.rank ? args.nodes.num_to_node[node] : 0;
  };
  end_operation(peers, args.network, local.counter, local.num_blocks, args.network_credit_offset,
                rows_to, local.row_bytes + local.scale_bytes);
}

const Kernels kernels("dispatch kernel between nodes", Setup::kShared, kMaxShared, dispatch_kernel);

}  // namespace

int32_t ep_nodes_dispatch(const ep_nodes_dispatch_args* args, void* stream) {
  Ring ring{};
  int32_t status = nodes::check_group(args->network.num_nodes, args->dispatch.peers.num_ranks);
  if (status == EP_OK) status = dispatch::make_ring(args->dispatch, &ring);
  if (status != EP_OK) return status;
  const int32_t blocks =
      args->num_gather_blocks + args->dispatch.num_push_blocks + args->dispatch.num_expand_blocks;
  if (blocks < 1) return ep::fail(EP_ERR_ARGUMENT, "no blocks to launch");
  const ep_dispatch_args& local = args->dispatch;
  if (!local.is_planned) ep::note_call(local.peers, local.row_bytes + local.scale_bytes);
  dispatch_kernel<<<blocks, ring.num_warps * kWarpSize, ring.shared_bytes(),
                    static_cast<cudaStream_t>(stream)>>>(*args, ring);
  return ep::check_cuda(cudaGetLastError(), "ep_nodes_dispatch");
}
