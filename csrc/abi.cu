// What the ABI says about itself: version, architectures, struct layouts, last error.

#include <cstdarg>
#include <cstddef>
#include <cstdio>
#include <cstring>

#include "status.cuh"

#ifndef EP_CUDA_ARCHS
#error "EP_CUDA_ARCHS names the architectures that are compiled for, such as 90a+100a; see setup.py"
#endif
#define EP_STRINGIFY(x) #x
#define EP_TO_STRING(x) EP_STRINGIFY(x)

namespace {

// A fixed buffer: reporting a failure must not be able to fail.
thread_local char last_error[512] = "";

// The name makes the list of architectures findable in the binary's bytes (setup.py looks for it).
constexpr char kArchs[] = "EP_CUDA_ARCHS=" EP_TO_STRING(EP_CUDA_ARCHS);

#define EP_FIELD(name) static_cast<int32_t>(offsetof(ep_layout_args, name))
constexpr int32_t kLayoutArgs[] = {
    static_cast<int32_t>(sizeof(ep_layout_args)),
    EP_FIELD(input),
    EP_FIELD(topk_idx_out),
    EP_FIELD(num_tokens_per_rank),
    EP_FIELD(num_tokens_per_expert),
    EP_FIELD(is_token_in_rank),
    EP_FIELD(send_slot),
    EP_FIELD(error),
    EP_FIELD(workspace),
    EP_FIELD(workspace_bytes),
    EP_FIELD(num_tokens),
    EP_FIELD(num_topk),
    EP_FIELD(num_experts),
    EP_FIELD(num_ranks),
    EP_FIELD(input_kind),
};
#undef EP_FIELD

struct StructLayout {
  const char* name;
  const int32_t* values;
  int32_t count;
};

constexpr StructLayout kStructs[] = {
    {"ep_layout_args", kLayoutArgs, sizeof(kLayoutArgs) / sizeof(kLayoutArgs[0])},
};

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

int32_t ep_abi_version(void) { return EP_ABI_VERSION; }

const char* ep_cuda_archs(void) { return std::strchr(kArchs, '=') + 1; }

const char* ep_last_error(void) { return last_error; }

int32_t ep_struct_layout(const char* struct_name, int32_t* values, int32_t capacity) {
  for (const StructLayout& layout : kStructs) {
    if (std::strcmp(layout.name, struct_name) != 0) continue;
    for (int32_t i = 0; i < layout.count && i < capacity; ++i) values[i] = layout.values[i];
    return layout.count;
  }
  return -1;
}
