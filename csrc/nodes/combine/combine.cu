// Combine between nodes (PROTOCOL.md, "Between nodes"): as on one node (combine/combine.cu), but in
// waves, and with the sums of a node as parts of a sum over nodes. What listers do is in lister.cuh
// and the headers that it names.

#include <algorithm>

#include "common/calls.cuh"
#include "common/launch.cuh"
#include "nodes/combine/groups.cuh"
#include "nodes/combine/lister.cuh"
#include "nodes/combine/tell.cuh"
#include "nodes/combine/units.cuh"
#include "nodes/combine/waits.cuh"
#include "nodes/combine/weights.cuh"
#include "nodes/end.cuh"

namespace ep::nodes {
namespace {  // see lister.cuh

template <typename T>
__global__ void __launch_bounds__(kMaxTeamThreads, 1)
    combine_kernel(const __grid_constant__ ep_nodes_combine_args args, const Teams teams) {
  extern __shared__ __align__(16) uint8_t shared[];
  const ep_combine_args& local = args.combine;
  const ep_peers& peers = local.peers;
  if (blockIdx.x == 0 && threadIdx.x == 0) begin_operation(peers);
  Team team(shared, teams);
  if (team.is_lister()) {
    Lister(args, team).run();
  } else {
    team.add_up<T, false>(local.row_bytes / 16);
  }
  const auto rows_to = [&](int32_t p) {
    const int32_t k = p / peers.num_ranks, l = p % peers.num_ranks;
    if (k > 0) return l == peers.rank ? args.nodes.num_relayed[k] : 0;
    int32_t rows = 0;
    for (int32_t node = 0; node < args.network.num_nodes; ++node) {
      rows += local.routing.num_recv[node * peers.num_ranks + l];
    }
    return rows;
  };
  const bool is_last = nodes::end_operation(peers, args.network, local.counters, gridDim.x,
                                            args.network_credit_offset, rows_to, local.row_bytes);
  if (is_last && threadIdx.x == 0) local.counters[kTaken] = 0;
}

using Kernel = void (*)(const ep_nodes_combine_args, const Teams);
constexpr Kernel kKernels[3] = {combine_kernel<__nv_bfloat16>, combine_kernel<float>,
                                combine_kernel<__half>};

const Kernels kernels("combine kernels between nodes", Setup::kShared, kMaxTeamShared, kKernels[0],
                      kKernels[1], kKernels[2]);

}  // namespace
}  // namespace ep::nodes

using namespace ep;
using namespace ep::nodes;

int32_t ep_nodes_combine(const ep_nodes_combine_args* args, void* stream) {
  const ep_combine_args& local = args->combine;
  const int32_t num_nodes = args->network.num_nodes, num_topk4 = local.routing.num_topk4;
  int32_t status = nodes::check_group(num_nodes, local.peers.num_ranks);
  if (status == EP_OK) status = check_combine(local);
  if (status != EP_OK) return status;
  const int32_t others = std::min(num_nodes - 1, local.routing.num_topk);
  const int32_t list_rows = std::max(local.chunk_rows * local.chunks_per_unit * num_topk4,
                                     kGroupTokens * (num_topk4 + local.peers.num_ranks + others));
  const Teams teams = Teams::of_rows(local.row_bytes, list_rows);
  note_call(local.peers, local.row_bytes);
  kKernels[local.dtype]<<<local.num_blocks, teams.block_threads(), teams.shared_bytes(),
                          static_cast<cudaStream_t>(stream)>>>(*args, teams);
  return ep::check_cuda(cudaGetLastError(), "ep_nodes_combine");
}
