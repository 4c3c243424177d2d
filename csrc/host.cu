// What the host orders and waits for. No kernel is here, so every library can have it.

#include "common/calls.cuh"
#include "common/launch.cuh"

namespace {

void add_up(ep_mailbox_args* args) {
  args->num_received = args->num_expert_rows = 0;
  for (int r = 0; r < args->num_ranks; ++r) args->num_received += args->received[r];
  const int64_t alignment = args->alignment;
  for (int e = 0; e < args->num_experts; ++e) {
    args->num_expert_rows += (args->expert_rows[e] + alignment - 1) / alignment * alignment;
  }
}

}  // namespace

int32_t ep_stream_wait(void* waiting, void* other, void* event) {
  const auto done = static_cast<cudaEvent_t>(event);
  const int32_t status = ep::check_cuda(cudaEventRecord(done, static_cast<cudaStream_t>(other)),
                                        "ep_stream_wait: cudaEventRecord");
  if (status != EP_OK) return status;
  return ep::check_cuda(cudaStreamWaitEvent(static_cast<cudaStream_t>(waiting), done, 0),
                        "ep_stream_wait: cudaStreamWaitEvent");
}

int32_t ep_event_wait(void* waiting, void* event) {
  return ep::check_cuda(
      cudaStreamWaitEvent(static_cast<cudaStream_t>(waiting), static_cast<cudaEvent_t>(event), 0),
      "ep_event_wait");
}

int32_t ep_mailbox_wait(ep_mailbox_args* args) {
  constexpr int kSpinsBetweenChecks = 4096;
  const int64_t deadline = ep::host_now_ns() + args->timeout_ns;
  for (int spins = 1;; ++spins) {
    if (__atomic_load_n(args->mailbox, __ATOMIC_ACQUIRE) == args->ticket) {
      add_up(args);
      return 1;
    }
    if (__atomic_load_n(&args->fault->code, __ATOMIC_ACQUIRE) != EP_FAULT_NONE) return 2;
    if (spins % kSpinsBetweenChecks != 0) continue;
    const cudaError_t error = cudaStreamQuery(static_cast<cudaStream_t>(args->stream));
    if (error != cudaSuccess && error != cudaErrorNotReady) {
      ep::check_cuda(error, "ep_mailbox_wait");
      return 3;
    }
    if (ep::host_now_ns() > deadline) return 0;
  }
}
