// How a failure gets from inside the library to ep_last_error(), how kernels are launched, and how
// they are loaded (load.cu).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "ep_comm.h"

namespace ep {

// Keeps the printf-formatted text for ep_last_error() and returns `status`.
int32_t fail(int32_t status, const char* format, ...) __attribute__((format(printf, 2, 3)));

// EP_OK, or EP_ERR_CUDA with a text that says what failed (`what`) and CUDA's reason.
int32_t check_cuda(cudaError_t error, const char* what);

// Launches a kernel. If it is `early` it may start before the one in front of it on the stream has
// ended: it runs ptx::wait_for_kernel_before() before it touches global memory that changes, and
// nothing that the one in front may write is read through the read-only path (`__ldg`).
template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), int32_t blocks, int32_t threads, int64_t shared_bytes,
                   void* stream, bool early, const Args&... args) {
  cudaLaunchAttribute may_start;
  may_start.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  may_start.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &may_start;
  config.numAttrs = early ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, Params(args)...);
}

// How a kernel is set up when it is loaded.
enum class Setup {
  kPlain,
  // Its blocks may have `shared_bytes` of dynamic shared memory.
  kShared,
  // Its blocks leave room on their SM for a dispatch's. An SM changes its share of shared memory
  // only when it is idle, so it must not be set up for little of it.
  kBesideDispatch
};

// Loads `kernel` on the current device.
int32_t load_kernel(const void* kernel, const char* what, Setup setup, int32_t shared_bytes = 0);

// Kernels that ep_load_kernels loads: each file has a static object of this class.
class Kernels {
 public:
  template <typename... Kernel>
  Kernels(const char* what, Setup setup, int32_t shared_bytes, Kernel... kernels)
      : kernels_{reinterpret_cast<const void*>(kernels)...},
        what_(what),
        setup_(setup),
        shared_bytes_(shared_bytes),
        next_(first_) {
    static_assert(sizeof...(kernels) <= kMax, "more kernels than there is room for");
    first_ = this;
  }

  static int32_t load_all();

 private:
  static constexpr int kMax = 10;
  static Kernels* first_;
  const void* kernels_[kMax];  // nullptr after the last
  const char* what_;
  Setup setup_;
  int32_t shared_bytes_;
  Kernels* next_;
};

}  // namespace ep
