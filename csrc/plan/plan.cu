// The routing of a dispatch, from the ranks that send (plan/send.cuh) to the ranks that receive
// (plan/receive.cuh): two kernels, whose blocks wait for one another in the middle (grid_barrier).

#include <algorithm>

#include "common/calls.cuh"
#include "common/launch.cuh"
#include "plan/receive.cuh"
#include "plan/scratch.cuh"
#include "plan/send.cuh"

namespace ep::plan {

__global__ void __launch_bounds__(kThreads)
    receive_kernel(const __grid_constant__ ep_plan_args args, const Scratch scratch) {
  extern __shared__ int32_t shared[];
  ptx::let_next_kernel_start();  // all blocks have their places: a dispatch will not take them
  receive_all<EP_MAX_PEERS>(args, scratch, shared);
}

}  // namespace ep::plan

namespace {

using namespace ep;
using namespace ep::plan;

template <typename Input>
int32_t launch_send(const ep_plan_args& args, const Input& input, const Scratch& scratch,
                    cudaStream_t stream) {
  const layout::Shape shape =
      layout::make_shape(args.routing.num_tokens, args.routing.num_topk, args.num_experts,
                         args.peers.num_ranks, args.num_send_blocks);
  const auto send =
      args.routing.token_bits != nullptr ? send_kernel<Input, true> : send_kernel<Input, false>;
  send<<<std::max(1, shape.num_blocks), kThreads, layout::count_shared_bytes(shape, false),
         stream>>>(args, input, shape, scratch);
  return check_cuda(cudaGetLastError(), "ep_plan: send_kernel");
}

int32_t launch_receive(const ep_plan_args& args, Scratch scratch, cudaStream_t stream) {
  const int32_t num_local_experts = args.num_experts / args.peers.num_ranks;
  const int32_t blocks =
      divide_receive<EP_MAX_PEERS>(args.num_receive_blocks, num_local_experts, &scratch.receive);
  const int32_t shared_bytes = scratch.receive.shared_bytes(num_local_experts);
  receive_kernel<<<blocks, kThreads, shared_bytes, stream>>>(args, scratch);
  return check_cuda(cudaGetLastError(), "ep_plan: receive_kernel");
}

const Kernels kernels("plan kernels", Setup::kBesideDispatch, 0,
                      send_kernel<layout::TopkInput<int32_t>, false>,
                      send_kernel<layout::TopkInput<int64_t>, false>,
                      send_kernel<layout::RoutingMapInput, false>,
                      send_kernel<layout::TopkInput<int32_t>, true>,
                      send_kernel<layout::TopkInput<int64_t>, true>,
                      send_kernel<layout::RoutingMapInput, true>, receive_kernel);

}  // namespace

int64_t ep_plan_scratch_bytes(int64_t max_tokens, int32_t num_experts, int32_t num_ranks) {
  if (num_ranks < 1 || num_ranks > EP_MAX_PEERS || num_experts % num_ranks != 0) {
    ep::fail(EP_ERR_ARGUMENT, "num_experts = %d is no multiple of num_ranks = %d in [1, %d]",
             num_experts, num_ranks, EP_MAX_PEERS);
    return -1;
  }
  Scratch scratch;
  return cut_scratch(max_tokens, num_experts, num_ranks, 0, &scratch);
}

int32_t ep_plan(const ep_plan_args* args, void* stream, void* side_stream, void* event) {
  int32_t status = check_plan(*args, args->peers.num_ranks);
  if (status != EP_OK) return status;
  Scratch scratch;
  cut_scratch(args->max_tokens, args->num_experts, args->peers.num_ranks,
              reinterpret_cast<uintptr_t>(args->scratch), &scratch);
  if (!args->is_begun) ep::note_call(args->peers, 0);
  status = layout::with_input(args->input_kind, args->input, [&](const auto& input) {
    return launch_send(*args, input, scratch, static_cast<cudaStream_t>(stream));
  });
  if (status != EP_OK) return status;
  if (side_stream != stream) status = ep_stream_wait(side_stream, stream, event);
  if (status != EP_OK) return status;
  return launch_receive(*args, scratch, static_cast<cudaStream_t>(side_stream));
}
