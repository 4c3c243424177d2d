// What the ABI says about itself: version, architectures, struct layouts, last error.

#include <cstdarg>
#include <cstddef>
#include <cstdio>
#include <cstring>

#include "common/launch.cuh"

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

// Size and field offsets of each struct of the ABI, in order of declaration.
#define EP_SIZE(type) static_cast<int32_t>(sizeof(type))
#define EP_OFFSET(type, field) static_cast<int32_t>(offsetof(type, field))

#define F(field) EP_OFFSET(ep_layout_args, field)
constexpr int32_t kLayoutArgs[] = {
    EP_SIZE(ep_layout_args),
    F(input), F(topk_idx_out), F(num_tokens_per_rank), F(num_tokens_per_expert),
    F(is_token_in_rank), F(send_slot), F(error), F(workspace), F(workspace_bytes),
    F(num_tokens), F(num_topk), F(num_experts), F(num_ranks), F(input_kind),
};
#undef F

#define F(field) EP_OFFSET(ep_fault, field)
constexpr int32_t kFault[] = {
    EP_SIZE(ep_fault),
    F(code), F(op), F(phase), F(peer), F(field), F(expected), F(seen),
};
#undef F

#define F(field) EP_OFFSET(ep_progress, field)
constexpr int32_t kProgress[] = {
    EP_SIZE(ep_progress),
    F(dispatch), F(combine),
};
#undef F

#define F(field) EP_OFFSET(ep_record, field)
constexpr int32_t kRecord[] = {
    EP_SIZE(ep_record),
    F(begin_ns), F(end_ns), F(longest_wait_ns), F(num_rows),
};
#undef F

#define F(field) EP_OFFSET(ep_node, field)
constexpr int32_t kNode[] = {
    EP_SIZE(ep_node),
    F(memory), F(fault), F(progress), F(abort), F(epoch), F(longest_wait_ns), F(record),
    F(wire_bytes), F(timeout_ns), F(delay_ns), F(op), F(rank), F(num_ranks),
};
#undef F

#define F(field) EP_OFFSET(ep_mailbox, field)
constexpr int32_t kMailbox[] = {
    EP_SIZE(ep_mailbox),
    F(ticket), F(routing_error), F(asked_tokens), F(num_sent_tokens), F(num_recv_tokens),
    F(num_tokens_per_expert),
};
#undef F

#define F(field) EP_OFFSET(ep_notice, field)
constexpr int32_t kNotice[] = {
    EP_SIZE(ep_notice),
    F(code), F(routing_error), F(asked_tokens), F(num_rows), F(capacity),
};
#undef F

#define F(field) EP_OFFSET(ep_routing, field)
constexpr int32_t kRouting[] = {
    EP_SIZE(ep_routing),
    F(topk_idx), F(send_slot), F(entries), F(num_sent), F(num_recv), F(first_of_source),
    F(source_tokens), F(expert_tokens), F(expert_first_row), F(num_tokens), F(num_topk),
    F(num_topk4), F(expert_major), F(last_entry),
};
#undef F

#define F(field) EP_OFFSET(ep_plan_args, field)
constexpr int32_t kPlanArgs[] = {
    EP_SIZE(ep_plan_args),
    F(node), F(routing), F(input), F(scratch), F(mailbox), F(notice), F(counters),
    F(flag_offset), F(credit_offset), F(header_offset), F(idx_offset), F(ticket), F(capacity),
    F(input_kind), F(num_experts), F(max_tokens), F(asked_tokens), F(hidden),
    F(expert_alignment), F(num_send_blocks), F(num_receive_blocks),
};
#undef F

#define F(field) EP_OFFSET(ep_quantize_args, field)
constexpr int32_t kQuantizeArgs[] = {
    EP_SIZE(ep_quantize_args),
    F(x), F(data), F(scales), F(num_blocks), F(dtype),
};
#undef F

#define F(field) EP_OFFSET(ep_probabilities_args, field)
constexpr int32_t kProbabilitiesArgs[] = {
    EP_SIZE(ep_probabilities_args),
    F(input), F(topk_idx), F(output), F(num_tokens), F(num_topk), F(num_experts),
};
#undef F

#define F(field) EP_OFFSET(ep_dispatch_args, field)
constexpr int32_t kDispatchArgs[] = {
    EP_SIZE(ep_dispatch_args),
    F(node), F(routing), F(x), F(scales), F(weights), F(recv_x), F(recv_scales),
    F(recv_weights), F(recv_topk_idx), F(planned_entries), F(counter), F(flag_offset),
    F(credit_offset), F(slot_offset), F(tag), F(max_tokens), F(max_chunks), F(chunk_tokens), F(row_bytes),
    F(scale_bytes), F(weight_bytes), F(num_local_experts), F(recv_kind), F(recv_idx_bytes),
    F(num_received), F(num_rows), F(is_planned), F(is_behind_plan), F(num_push_blocks), F(num_expand_blocks),
    F(num_blocks),
};
#undef F

#define F(field) EP_OFFSET(ep_combine_args, field)
constexpr int32_t kCombineArgs[] = {
    EP_SIZE(ep_combine_args),
    F(node), F(routing), F(x), F(weights), F(combined_x), F(combined_weights), F(counters),
    F(flag_offset), F(credit_offset), F(row_offset), F(weight_offset), F(zero_offset), F(tag),
    F(max_tokens), F(max_chunks), F(chunk_rows), F(chunks_per_unit), F(row_bytes), F(dtype),
    F(num_local_experts), F(ranks_per_node), F(num_blocks), F(push_percent),
};
#undef F

#define F(field) EP_OFFSET(ep_probe_args, field)
constexpr int32_t kProbeArgs[] = {
    EP_SIZE(ep_probe_args),
    F(node), F(source), F(num_rows), F(num_blocks),
};
#undef F

struct StructLayout {
  const char* name;
  const int32_t* values;
  int32_t count;
};

#define EP_STRUCT(name, values) {name, values, sizeof(values) / sizeof(values[0])}
constexpr StructLayout kStructs[] = {
    EP_STRUCT("ep_layout_args", kLayoutArgs),
    EP_STRUCT("ep_fault", kFault),
    EP_STRUCT("ep_progress", kProgress),
    EP_STRUCT("ep_record", kRecord),
    EP_STRUCT("ep_node", kNode),
    EP_STRUCT("ep_mailbox", kMailbox),
    EP_STRUCT("ep_notice", kNotice),
    EP_STRUCT("ep_routing", kRouting),
    EP_STRUCT("ep_plan_args", kPlanArgs),
    EP_STRUCT("ep_quantize_args", kQuantizeArgs),
    EP_STRUCT("ep_probabilities_args", kProbabilitiesArgs),
    EP_STRUCT("ep_dispatch_args", kDispatchArgs),
    EP_STRUCT("ep_combine_args", kCombineArgs),
    EP_STRUCT("ep_probe_args", kProbeArgs),
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
