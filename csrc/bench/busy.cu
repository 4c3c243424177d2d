// Other work for a given time, between operations that are measured. What ran between two of these
// kernels took from the end of the one to the begin of the other.

#include "common/launch.cuh"
#include "common/ptx.cuh"

namespace {

using namespace ep;

__global__ void busy_kernel(const __grid_constant__ ep_busy_args args) {
  const uint64_t begin_ns = ptx::global_timer_ns();
  uint64_t now_ns = begin_ns;
  while (now_ns - begin_ns < static_cast<uint64_t>(args.duration_ns)) {
    now_ns = ptx::global_timer_ns();
  }
  if (args.stamps_ns == nullptr) return;
  args.stamps_ns[0] = static_cast<int64_t>(begin_ns);
  args.stamps_ns[1] = static_cast<int64_t>(now_ns);
}

const Kernels kernels("busy kernel", Setup::kPlain, 0, busy_kernel);

}  // namespace

int32_t ep_busy(const ep_busy_args* args, void* stream) {
  if (args->duration_ns < 0) {
    return ep::fail(EP_ERR_ARGUMENT, "duration_ns = %lld is negative",
                    static_cast<long long>(args->duration_ns));
  }
  busy_kernel<<<1, 1, 0, static_cast<cudaStream_t>(stream)>>>(*args);
  return ep::check_cuda(cudaGetLastError(), "ep_busy");
}
