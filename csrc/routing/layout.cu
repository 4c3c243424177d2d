// ep_layout(): checks arguments, cuts up the workspace, launches the steps of routing/slots.cuh.

#include <algorithm>
#include <climits>

#include "common/launch.cuh"
#include "routing/slots.cuh"

namespace {

using namespace ep::layout;

template <typename Input>
__global__ void __launch_bounds__(kThreads)
    count_kernel(Input input, Shape shape, Workspace workspace, int32_t* topk_idx_out) {
  extern __shared__ int32_t shared[];
  count_tokens<true>(input, shape, workspace, topk_idx_out, shared);
}

__global__ void __launch_bounds__(kThreads)
    place_kernel(Shape shape, Workspace workspace, int32_t* num_tokens_per_rank,
                 int32_t* num_tokens_per_expert, uint8_t* is_token_in_rank, int32_t* error) {
  place_tokens(shape, workspace, num_tokens_per_rank, is_token_in_rank, nullptr);
  sum_expert_counts(shape, workspace.expert_count, num_tokens_per_expert);
  if (blockIdx.x == 0) pick_first_error(shape, workspace.first_error, error);
}

int32_t check_sizes(int64_t num_tokens, int32_t num_experts, int32_t num_ranks) {
  if (num_tokens < 0 || num_tokens > INT_MAX) {
    return ep::fail(EP_ERR_ARGUMENT, "num_tokens = %lld is not in [0, %d]",
                    static_cast<long long>(num_tokens), INT_MAX);
  }
  if (num_ranks < 1 || num_ranks > EP_MAX_RANKS) {
    return ep::fail(EP_ERR_ARGUMENT, "num_ranks = %d is not in [1, %d]", num_ranks, EP_MAX_RANKS);
  }
  if (num_experts < 1 || num_experts > EP_MAX_EXPERTS || num_experts % num_ranks != 0) {
    return ep::fail(EP_ERR_ARGUMENT,
                    "num_experts = %d is not in [1, %d] and a multiple of num_ranks = %d",
                    num_experts, EP_MAX_EXPERTS, num_ranks);
  }
  return EP_OK;
}

int32_t check_pointers(const ep_layout_args& args) {
  const bool any_token = args.num_tokens > 0;
  const struct {
    const char* name;
    const void* pointer;
    bool needed;
  } pointers[] = {
      {"input", args.input, any_token},
      {"topk_idx_out", args.topk_idx_out, any_token},
      {"num_tokens_per_rank", args.num_tokens_per_rank, true},
      {"num_tokens_per_expert", args.num_tokens_per_expert, true},
      {"is_token_in_rank", args.is_token_in_rank, any_token},
      {"error", args.error, true},
      {"workspace", args.workspace, any_token},
  };
  for (const auto& entry : pointers) {
    if (entry.needed && entry.pointer == nullptr) {
      return ep::fail(EP_ERR_ARGUMENT, "%s is NULL", entry.name);
    }
  }
  if (reinterpret_cast<uintptr_t>(args.workspace) % alignof(int4) != 0) {
    return ep::fail(EP_ERR_ARGUMENT, "workspace is not aligned to %zu bytes", alignof(int4));
  }
  return EP_OK;
}

template <typename Input>
int32_t launch_count(const Input& input, const Shape& shape, const Workspace& workspace,
                     int32_t* topk_idx_out, cudaStream_t stream) {
  count_kernel<<<shape.num_blocks, kThreads, count_shared_bytes(shape, true), stream>>>(
      input, shape, workspace, topk_idx_out);
  return ep::check_cuda(cudaGetLastError(), "ep_layout: count_kernel");
}

const ep::Kernels kernels("layout kernels", ep::Setup::kPlain, 0, count_kernel<TopkInput<int32_t>>,
                          count_kernel<TopkInput<int64_t>>, count_kernel<RoutingMapInput>,
                          place_kernel);

}  // namespace

int64_t ep_layout_workspace_bytes(int64_t num_tokens, int32_t num_experts, int32_t num_ranks) {
  if (check_sizes(num_tokens, num_experts, num_ranks) != EP_OK) return -1;
  Workspace workspace;
  const Shape shape = make_shape(num_tokens, 1, num_experts, num_ranks, kMaxBlocks);
  return cut_workspace(shape, true, 0, &workspace);
}

int32_t ep_layout(const ep_layout_args* args, void* stream_pointer) {
  int32_t status = check_sizes(args->num_tokens, args->num_experts, args->num_ranks);
  if (status != EP_OK) return status;
  if (args->num_topk < 1 || args->num_topk > EP_MAX_TOPK) {
    return ep::fail(EP_ERR_ARGUMENT, "num_topk = %d is not in [1, %d]", args->num_topk,
                    EP_MAX_TOPK);
  }
  status = check_input_kind(args->input_kind);
  if (status == EP_OK) status = check_pointers(*args);
  if (status != EP_OK) return status;

  const Shape shape =
      make_shape(args->num_tokens, args->num_topk, args->num_experts, args->num_ranks, kMaxBlocks);
  Workspace workspace;
  const int64_t needed =
      cut_workspace(shape, true, reinterpret_cast<uintptr_t>(args->workspace), &workspace);
  if (args->workspace_bytes < needed) {
    return ep::fail(EP_ERR_ARGUMENT, "workspace has %lld bytes, %lld are needed",
                    static_cast<long long>(args->workspace_bytes), static_cast<long long>(needed));
  }

  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  if (shape.num_blocks > 0) {
    status = with_input(args->input_kind, args->input, [&](const auto& input) {
      return launch_count(input, shape, workspace, args->topk_idx_out, stream);
    });
    if (status != EP_OK) return status;
  }
  place_kernel<<<std::max(1, shape.num_blocks), kThreads, 0, stream>>>(
      shape, workspace, args->num_tokens_per_rank, args->num_tokens_per_expert,
      args->is_token_in_rank, args->error);
  return ep::check_cuda(cudaGetLastError(), "ep_layout: place_kernel");
}
