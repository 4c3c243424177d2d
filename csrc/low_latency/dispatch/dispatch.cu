// Low-latency dispatch: one copy of a token for each rank that owns one of its experts, into a slot
// of [source, token]; from there to the rows of its experts, by source and then by token. Sending
// and receiving are one kernel, or one each.

#include "low_latency/dispatch/entries.cuh"
#include "low_latency/dispatch/receive.cuh"
#include "low_latency/dispatch/rows.cuh"
#include "low_latency/shapes.cuh"

namespace {

using namespace ep;
using namespace ep::low_latency;
using namespace ep::low_latency::dispatch;

template <int kHidden, int kRanks>
__global__ void __launch_bounds__(kThreads, 1)
    low_latency_dispatch_kernel(const __grid_constant__ ep_low_latency_dispatch_args args,
                                bool has_entries) {
  extern __shared__ __align__(16) uint8_t shared[];
  __shared__ uint32_t unused[kWarps];
  const ep_low_latency& common = args.common;
  const Arrivals arrivals(shared, common, has_entries);
  // What needs nothing of the kernel before is done while that one ends.
  if (common.phases & EP_LOW_LATENCY_RECEIVE) arrivals.clear(common.num_local_experts);
  load_parameters(args, unused);
  ptx::wait_for_kernel_before();
  ptx::let_next_kernel_start();  // not before: those that wait would pile up
  const Begin begin(common, args.handle.epochs);
  const Memory<kHidden, kRanks> memory(
      common, expert_words(common.num_topk) + weight_words(common.num_topk));
  const RowWords row(memory.hidden(), args.format);
  Operation operation;
  bool is_fine;
  if (threadIdx.x < kRowWarps * kWarpSize) {
    is_fine = begin_and_send_rows(args, memory, begin, row, &operation);
  } else {
    is_fine = begin_and_send_entries(args, memory, begin, &operation);
  }
  if (common.phases & EP_LOW_LATENCY_RECEIVE) {
    receive(args, memory, operation, arrivals, row, is_fine);
  }
  low_latency::end_operation(common);
}

template <int kHidden, int kRanks>
struct Kernel {
  static constexpr auto* function = low_latency_dispatch_kernel<kHidden, kRanks>;
};
const Kernels kernels =
    of_shapes<Kernel>("low-latency dispatch kernel", kMaxShared, CompiledShapes());

}  // namespace

int32_t ep_low_latency_dispatch(const ep_low_latency_dispatch_args* args, void* stream) {
  const ep_low_latency& common = args->common;
  int32_t status = low_latency::check(common);
  if (status == EP_OK) status = dispatch::check_hidden(common.hidden, args->format);
  if (status == EP_OK) status = low_latency::check_places(common, common.peers.num_ranks);
  if (status != EP_OK) return status;
  int64_t bytes = Arrivals::bytes(common);
  const bool has_entries = bytes + Arrivals::entry_bytes(common) <= kMaxShared;
  if (has_entries) bytes += Arrivals::entry_bytes(common);
  low_latency::note_call(common);
  const cudaError_t error =
      ep::launch(kernel_for<Kernel>(common, CompiledShapes()), common.num_blocks, kThreads, bytes,
                 stream, true, *args, has_entries);
  return ep::check_cuda(error, "ep_low_latency_dispatch");
}
