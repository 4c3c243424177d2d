// What the library says about itself: interface, architectures, last error.

#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "common/launch.cuh"

#ifndef EP_CUDA_ARCHS
#error "EP_CUDA_ARCHS names the architectures that are compiled for, such as 90a+100a; see setup.py"
#endif
#ifndef EP_HEADER_DIGEST
#error "EP_HEADER_DIGEST says which ep_comm.h the library was built from; see setup.py"
#endif
#define EP_STRINGIFY(x) #x
#define EP_TO_STRING(x) EP_STRINGIFY(x)

namespace {

// A fixed buffer: reporting a failure must not be able to fail.
thread_local char last_error[512] = "";

// The name makes the list of architectures findable in the binary's bytes (setup.py looks for it).
constexpr char kArchs[] = "EP_CUDA_ARCHS=" EP_TO_STRING(EP_CUDA_ARCHS);

}  // namespace

namespace ep {

int32_t fail(int32_t status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(last_error, sizeof(last_error), format, arguments);
  va_end(arguments);
  return status;
}

int32_t check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return EP_OK;
  return fail(EP_ERR_CUDA, "%s: %s (%s)", what, cudaGetErrorString(error), cudaGetErrorName(error));
}

}  // namespace ep

const char* ep_header_digest(void) { return EP_TO_STRING(EP_HEADER_DIGEST); }

const char* ep_cuda_archs(void) { return std::strchr(kArchs, '=') + 1; }

const char* ep_last_error(void) { return last_error; }
