// Low-latency combine: each rank adds up a token's weighted rows of its experts, and sends one
// partial row to the token's owner, which adds up those of the ranks. Sending and receiving are one
// kernel, or one each.

#include "common/launch.cuh"
#include "low_latency/combine/receive.cuh"
#include "low_latency/combine/send.cuh"
#include "low_latency/shapes.cuh"

namespace {

using namespace ep;
using namespace ep::low_latency;
using namespace ep::low_latency::combine;

template <int kHidden, int kRanks>
__global__ void __launch_bounds__(kThreads, 1)
    low_latency_combine_kernel(const __grid_constant__ ep_low_latency_combine_args args) {
  extern __shared__ __align__(16) uint8_t shared[];
  __shared__ uint32_t unused[kWarps];
  load_parameters(args, unused);
  ptx::wait_for_kernel_before();
  ptx::let_next_kernel_start();  // not before: those that wait would pile up
  const ep_low_latency& common = args.common;
  const Memory<kHidden, kRanks> memory(common, weight_words(common.num_topk));
  Operation operation;
  if (!begin_and_send(args, memory, shared, &operation)) return;
  if (common.phases & EP_LOW_LATENCY_RECEIVE) receive(args, memory, operation);
  low_latency::end_operation(common);
}

template <int kHidden, int kRanks>
struct Kernel {
  static constexpr auto* function = low_latency_combine_kernel<kHidden, kRanks>;
};
const Kernels kernels =
    of_shapes<Kernel>("low-latency combine kernel", kStageBytes, CompiledShapes());

}  // namespace

int32_t ep_low_latency_combine(const ep_low_latency_combine_args* args, void* stream) {
  const ep_low_latency& common = args->common;
  const int32_t status = low_latency::check(common);
  if (status != EP_OK) return status;
  const int32_t bytes = common.phases & EP_LOW_LATENCY_SEND ? kStageBytes : 0;
  low_latency::note_call(common);
  const cudaError_t error = ep::launch(kernel_for<Kernel>(common, CompiledShapes()),
                                       common.num_blocks, kThreads, bytes, stream, true, *args);
  return ep::check_cuda(error, "ep_low_latency_combine");
}
