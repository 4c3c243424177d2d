// Low-latency dispatch between nodes: one copy of a token for each rank that owns one of its
// experts, packed with the others that go there, and sent over the network. Sending and receiving
// are one kernel, or one each. The bits are those of one host.

#include <algorithm>

#include "nodes/low_latency/dispatch_receive.cuh"

namespace {

using namespace ep;
using namespace ep::low_latency;
using namespace ep::low_latency::far;

__global__ void __launch_bounds__(far::kThreads, 1)
    low_latency_dispatch_kernel(const __grid_constant__ ep_nodes_low_latency_dispatch_args args) {
  extern __shared__ __align__(16) uint8_t shared[];
  const ep_low_latency_dispatch_args& local = args.dispatch;
  const ep_low_latency& common = local.common;
  const far::Memory memory(common, args.nodes);
  const RowWords row(common.hidden, local.format);
  const FarOperation operation = begin_operation(common, local.handle.epochs);
  bool fine = operation.can_begin;
  if (fine && common.phases & EP_LOW_LATENCY_SEND) {
    fine = far::send(local, memory, operation, row, shared);
    __syncthreads();  // shared memory is used anew
  }
  if (common.phases & EP_LOW_LATENCY_RECEIVE) {
    fine = fine && far::receive(local, memory, operation, row, shared);
    if (!fine) leave_nothing(local, memory.num_ranks());
  }
  far::end_operation(memory, operation, local.handle.num_rows);
}

const Kernels kernels("low-latency dispatch kernel between nodes", Setup::kShared, far::kMaxShared,
                      low_latency_dispatch_kernel);

}  // namespace

int32_t ep_nodes_low_latency_dispatch(const ep_nodes_low_latency_dispatch_args* args,
                                      void* stream) {
  const ep_low_latency& common = args->dispatch.common;
  int32_t status = far::check(common, args->nodes);
  if (status == EP_OK) status = dispatch::check_hidden(common.hidden, args->dispatch.format);
  if (status != EP_OK) return status;
  const int32_t num_ranks = args->nodes.network.num_nodes;
  const int64_t bytes =
      std::max(Sends::bytes(num_ranks, common.max_tokens), far::Arrivals::bytes(common, num_ranks));
  if (bytes > far::kMaxShared) {
    return ep::fail(EP_ERR_ARGUMENT, "%d local experts, %d ranks, %d tokens: too many for an SM",
                    common.num_local_experts, num_ranks, common.max_tokens);
  }
  low_latency::note_call(common);
  low_latency_dispatch_kernel<<<common.num_blocks, far::kThreads, bytes,
                                static_cast<cudaStream_t>(stream)>>>(*args);
  return ep::check_cuda(cudaGetLastError(), "ep_nodes_low_latency_dispatch");
}
