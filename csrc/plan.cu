// The routing of a dispatch, from the ranks that send to the ranks that receive.
//
//   ep_layout       says which token goes where, and into which slot.
//   send_kernel     writes each token's local experts into the memory of the ranks it goes to, then a
//                   header with the counts, then a flag.
//   gather_kernel   waits for the flags and copies the routing out of the staging memory, which the
//                   next plan overwrites; rows that were not sent become -1.
//   ep_layout       again, each local expert taken for a rank: the slot of a received row is then
//                   its place in the expert's group.
//   rows_kernel     says where every row stands in the output, and tells the host the counts.

#include <algorithm>
#include <ctime>

#include "node.cuh"
#include "status.cuh"

namespace {

using namespace ep;

constexpr int kThreads = 256;
constexpr int kSendBlocks = 32;
constexpr int kGatherBlocks = 8;  // for each source
constexpr int kHeaderInts = 16;   // rows sent, tokens, fields that must agree

// What ep_layout leaves for the later kernels, and its own workspace.
struct Scratch {
  int32_t* sent_error;     // [4]
  int32_t* expert_slot;    // [N, E_local]
  int32_t* placed_error;   // [4]
  uint8_t* is_token_in_rank;
  int32_t* num_tokens_per_expert;
  void* workspace;
  int64_t workspace_bytes;
};

__device__ inline int32_t field_of(const ep_plan_args& args, int32_t field) {
  switch (field) {
    case EP_FIELD_NUM_TOPK: return args.num_topk;
    case EP_FIELD_HIDDEN: return args.hidden;
    case EP_FIELD_NUM_EXPERTS: return args.num_experts;
    case EP_FIELD_EXPERT_MAJOR: return args.expert_major;
    default: return args.expert_alignment;
  }
}

__global__ void __launch_bounds__(kThreads) send_kernel(const __grid_constant__ ep_plan_args args) {
  const ep_node& node = args.node;
  const int32_t num_ranks = node.num_ranks, num_topk = args.num_topk;
  const int32_t experts_per_rank = args.num_experts / num_ranks;
  bool may_send = !aborted(node);
  if (may_send && static_cast<int32_t>(threadIdx.x) < num_ranks) {
    const uint32_t* const credit =
        in_memory_of<uint32_t>(node, node.rank, args.credit_offset) + threadIdx.x;
    may_send = wait_epoch(node, credit, args.epoch - 1, EP_PHASE_CREDIT, threadIdx.x);
  }
  if (!__syncthreads_and(may_send)) return;

  const int64_t count = static_cast<int64_t>(args.num_tokens) * num_ranks * num_topk;
  for (int64_t i = blockIdx.x * kThreads + threadIdx.x; i < count; i += gridDim.x * kThreads) {
    const int32_t k = i % num_topk;
    const int64_t t = i / num_topk / num_ranks;
    // Each rank begins with another one, so that not all write to the same one at a time.
    const int32_t r = (i / num_topk + node.rank + 1) % num_ranks;
    const int32_t slot = args.send_slot[t * num_ranks + r];
    if (slot < 0) continue;
    const int32_t local = args.topk_idx[t * num_topk + k] - r * experts_per_rank;
    int32_t* const idx = in_memory_of<int32_t>(node, r, args.idx_offset);
    idx[(static_cast<int64_t>(node.rank) * args.max_tokens + slot) * num_topk + k] =
        local >= 0 && local < experts_per_rank ? local : -1;
  }

  const bool last = is_last_block(args.counter, gridDim.x);
  if (last && static_cast<int32_t>(threadIdx.x) < num_ranks) {
    const int32_t r = threadIdx.x;
    int32_t* const header =
        in_memory_of<int32_t>(node, r, args.header_offset) + node.rank * kHeaderInts;
    header[0] = args.num_sent[r];
    header[1] = args.num_tokens;
    for (int i = 0; i < EP_NUM_FIELDS; ++i) header[2 + i] = field_of(args, i);
    ptx::fence_acq_rel_sys();
    ptx::store_release_sys(in_memory_of<uint32_t>(node, r, args.flag_offset) + node.rank, args.epoch);
  }
}

// Block (part, source). Everything that other ranks wrote is read with ordinary loads.
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const __grid_constant__ ep_plan_args args) {
  const ep_node& node = args.node;
  const int32_t source = blockIdx.y, part = blockIdx.x;
  __shared__ int32_t num_rows;
  if (threadIdx.x == 0) {
    const uint32_t* const flag =
        in_memory_of<uint32_t>(node, node.rank, args.flag_offset) + source;
    num_rows = 0;
    int32_t num_tokens = 0;
    if (wait_epoch(node, flag, args.epoch, EP_PHASE_PLAN, source)) {
      const volatile int32_t* const header =
          in_memory_of<int32_t>(node, node.rank, args.header_offset) + source * kHeaderInts;
      num_rows = min(max(header[0], 0), args.max_tokens);
      num_tokens = min(max(header[1], 0), args.max_tokens);
      for (int i = 0; i < EP_NUM_FIELDS; ++i) {
        const int32_t ours = field_of(args, i), theirs = header[2 + i];
        if (theirs != ours) {
          raise_fault(node, EP_FAULT_MISMATCH, EP_PHASE_PLAN, source, i, ours, theirs);
          num_rows = 0;
          break;
        }
      }
    }
    if (part == 0) {
      args.num_recv[source] = num_rows;
      args.source_tokens[source] = num_tokens;
    }
  }
  __syncthreads();
  const int64_t first = static_cast<int64_t>(source) * args.max_tokens * args.num_topk;
  const int32_t* const staged =
      in_memory_of<int32_t>(node, node.rank, args.idx_offset) + first;
  const int32_t valid = num_rows * args.num_topk, total = args.max_tokens * args.num_topk;
  for (int32_t i = part * kThreads + threadIdx.x; i < total; i += gridDim.x * kThreads) {
    args.recv_topk_idx[first + i] = i < valid ? staged[i] : -1;
  }
}

// One thread a received row.
__global__ void __launch_bounds__(kThreads)
    rows_kernel(const __grid_constant__ ep_plan_args args, const Scratch scratch) {
  const int32_t num_ranks = args.node.num_ranks;
  const int32_t num_local_experts = args.num_experts / num_ranks;
  __shared__ int32_t first_row[1024 + 1];  // of each expert's group, or of each source rank
  const int32_t groups = args.expert_major ? num_local_experts : num_ranks;
  const int32_t* const sizes = args.expert_major ? args.expert_tokens : args.num_recv;
  const int32_t alignment = args.expert_major ? args.expert_alignment : 1;
  for (int32_t g = threadIdx.x; g < groups; g += kThreads) {
    first_row[g] = (sizes[g] + alignment - 1) / alignment * alignment;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    int32_t row = 0;
    for (int32_t g = 0; g < groups; ++g) {
      const int32_t size = first_row[g];
      first_row[g] = row;
      row += size;
    }
    first_row[groups] = row;
  }
  __syncthreads();

  const int32_t num_rows = num_ranks * args.max_tokens;
  for (int32_t n = blockIdx.x * kThreads + threadIdx.x; n < num_rows; n += gridDim.x * kThreads) {
    int32_t* const row_of_k = args.row_of_k + static_cast<int64_t>(n) * args.num_topk4;
    int32_t* const ascending = args.rows_ascending + static_cast<int64_t>(n) * args.num_topk4;
    for (int32_t k = 0; k < args.num_topk4; ++k) row_of_k[k] = ascending[k] = -1;
    if (!args.expert_major) {
      const int32_t source = n / args.max_tokens, slot = n % args.max_tokens;
      if (slot < args.num_recv[source]) row_of_k[0] = ascending[0] = first_row[source] + slot;
      continue;
    }
    const int32_t* const experts = args.recv_topk_idx + static_cast<int64_t>(n) * args.num_topk;
    const int32_t* const slots =
        scratch.expert_slot + static_cast<int64_t>(n) * num_local_experts;
    for (int32_t k = 0; k < args.num_topk; ++k) {
      const int32_t expert = experts[k];
      if (expert < 0) continue;
      const int32_t row = first_row[expert] + slots[expert];
      row_of_k[k] = row;
      // Groups stand in expert order: the number of smaller experts is the place among the rows.
      int32_t place = 0;
      for (int32_t other = 0; other < args.num_topk; ++other) {
        place += experts[other] >= 0 && experts[other] < expert;
      }
      ascending[place] = row;
    }
  }

  if (blockIdx.x != 0) return;
  for (int32_t e = threadIdx.x; e < num_local_experts; e += kThreads) {
    args.mailbox->num_tokens_per_expert[e] = args.expert_tokens[e];
    if (args.expert_major) args.expert_first_row[e] = first_row[e];
  }
  if (threadIdx.x < EP_MAX_NODE_RANKS) {
    const int32_t r = threadIdx.x;
    args.mailbox->num_sent_tokens[r] = r < num_ranks ? args.num_sent[r] : 0;
    args.mailbox->num_recv_tokens[r] = r < num_ranks ? args.num_recv[r] : 0;
  }
  if (threadIdx.x < 4) args.mailbox->routing_error[threadIdx.x] = scratch.sent_error[threadIdx.x];
  __threadfence_system();
  __syncthreads();
  if (threadIdx.x == 0) {
    if (args.expert_major) {
      args.expert_first_row[num_local_experts] = first_row[num_local_experts];
    }
    ptx::store_release_sys(reinterpret_cast<uint32_t*>(&args.mailbox->epoch), args.epoch);
  }
}

// Cuts the scratch at address `base` up and returns the bytes that it takes.
int64_t cut_scratch(int64_t max_tokens, int32_t num_experts, int32_t num_ranks, uintptr_t base,
                    Scratch* scratch) {
  const int64_t num_rows = max_tokens * num_ranks;
  const int32_t num_local_experts = num_experts / num_ranks;
  const int64_t own_workspace = ep_layout_workspace_bytes(max_tokens, num_experts, num_ranks);
  const int64_t placing_workspace =
      ep_layout_workspace_bytes(num_rows, num_local_experts, num_local_experts);
  uintptr_t next = base;
  const auto take = [&next](int64_t bytes) {
    const uintptr_t start = next;
    next += (bytes + 255) / 256 * 256;
    return start;
  };
  scratch->sent_error = reinterpret_cast<int32_t*>(take(16));
  scratch->placed_error = reinterpret_cast<int32_t*>(take(16));
  scratch->expert_slot = reinterpret_cast<int32_t*>(take(4 * num_rows * num_local_experts));
  scratch->num_tokens_per_expert = reinterpret_cast<int32_t*>(take(4 * num_experts));
  // Neither layout's bitmap nor its counts by expert are read.
  scratch->is_token_in_rank = reinterpret_cast<uint8_t*>(
      take(std::max(max_tokens * num_ranks, num_rows * num_local_experts)));
  scratch->workspace_bytes = std::max(own_workspace, placing_workspace);
  scratch->workspace = reinterpret_cast<void*>(take(scratch->workspace_bytes));
  return static_cast<int64_t>(next - base);
}

int64_t now_ns() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return static_cast<int64_t>(time.tv_sec) * 1000000000 + time.tv_nsec;
}

}  // namespace

namespace ep {

int32_t load_plan_kernels() {
  cudaFuncAttributes attributes;
  for (const void* kernel : {reinterpret_cast<const void*>(send_kernel),
                             reinterpret_cast<const void*>(gather_kernel),
                             reinterpret_cast<const void*>(rows_kernel)}) {
    const int32_t status = check_cuda(cudaFuncGetAttributes(&attributes, kernel), "plan kernels");
    if (status != EP_OK) return status;
  }
  return EP_OK;
}

}  // namespace ep

int64_t ep_plan_scratch_bytes(int64_t max_tokens, int32_t num_experts, int32_t num_ranks) {
  if (num_ranks < 1 || num_ranks > EP_MAX_NODE_RANKS || num_experts % num_ranks != 0) return -1;
  Scratch scratch;
  return cut_scratch(max_tokens, num_experts, num_ranks, 0, &scratch);
}

int32_t ep_plan(const ep_plan_args* args, void* main_stream, void* side_stream, void* event) {
  const auto stream = static_cast<cudaStream_t>(side_stream);
  const int32_t num_ranks = args->node.num_ranks;
  const int32_t num_local_experts = args->num_experts / num_ranks;
  if (num_local_experts < 1 || num_local_experts > 1024) {
    return ep::fail(EP_ERR_ARGUMENT, "num_local_experts = %d is not in [1, 1024]",
                    num_local_experts);
  }
  Scratch scratch;
  cut_scratch(args->max_tokens, args->num_experts, num_ranks,
              reinterpret_cast<uintptr_t>(args->scratch), &scratch);

  ep_layout_args sent{};
  sent.input = args->input;
  sent.topk_idx_out = args->topk_idx;
  sent.num_tokens_per_rank = args->num_sent;
  sent.num_tokens_per_expert = scratch.num_tokens_per_expert;
  sent.is_token_in_rank = scratch.is_token_in_rank;
  sent.send_slot = args->send_slot;
  sent.error = scratch.sent_error;
  sent.workspace = scratch.workspace;
  sent.workspace_bytes = scratch.workspace_bytes;
  sent.num_tokens = args->num_tokens;
  sent.num_topk = args->num_topk;
  sent.num_experts = args->num_experts;
  sent.num_ranks = num_ranks;
  sent.input_kind = args->input_kind;
  int32_t status = ep_layout(&sent, main_stream);
  if (status != EP_OK) return status;
  status = ep_stream_wait(side_stream, main_stream, event);
  if (status != EP_OK) return status;

  send_kernel<<<kSendBlocks, kThreads, 0, stream>>>(*args);
  status = ep::check_cuda(cudaGetLastError(), "ep_plan: send_kernel");
  if (status != EP_OK) return status;
  // What follows on the main stream fills the links: the routing goes first, it is waited for.
  status = ep_stream_wait(main_stream, side_stream, event);
  if (status != EP_OK) return status;
  gather_kernel<<<dim3(kGatherBlocks, num_ranks), kThreads, 0, stream>>>(*args);
  status = ep::check_cuda(cudaGetLastError(), "ep_plan: gather_kernel");
  if (status != EP_OK) return status;

  ep_layout_args placed = sent;
  placed.input = args->recv_topk_idx;
  placed.topk_idx_out = args->recv_topk_idx;  // the same values
  placed.num_tokens_per_rank = args->expert_tokens;
  placed.send_slot = scratch.expert_slot;
  placed.error = scratch.placed_error;
  placed.num_tokens = static_cast<int64_t>(num_ranks) * args->max_tokens;
  placed.num_experts = num_local_experts;
  placed.num_ranks = num_local_experts;
  placed.input_kind = EP_INPUT_TOPK_INT32;
  status = ep_layout(&placed, side_stream);
  if (status != EP_OK) return status;

  const int32_t num_rows = num_ranks * args->max_tokens;
  const int32_t blocks = (num_rows + kThreads - 1) / kThreads;
  rows_kernel<<<blocks < 64 ? blocks : 64, kThreads, 0, stream>>>(*args, scratch);
  return ep::check_cuda(cudaGetLastError(), "ep_plan: rows_kernel");
}

int32_t ep_stream_wait(void* waiting, void* other, void* event) {
  const auto done = static_cast<cudaEvent_t>(event);
  const int32_t status = ep::check_cuda(cudaEventRecord(done, static_cast<cudaStream_t>(other)),
                                        "ep_stream_wait: cudaEventRecord");
  if (status != EP_OK) return status;
  return ep::check_cuda(cudaStreamWaitEvent(static_cast<cudaStream_t>(waiting), done, 0),
                        "ep_stream_wait: cudaStreamWaitEvent");
}

int32_t ep_mailbox_wait(const ep_mailbox* mailbox, const ep_fault* fault, int32_t epoch,
                        int64_t timeout_ns, void* stream) {
  constexpr int kSpinsBetweenChecks = 4096;
  const int64_t deadline = now_ns() + timeout_ns;
  for (int spins = 1;; ++spins) {
    if (__atomic_load_n(&mailbox->epoch, __ATOMIC_ACQUIRE) == epoch) return 1;
    if (__atomic_load_n(&fault->code, __ATOMIC_ACQUIRE) != EP_FAULT_NONE) return 2;
    if (spins % kSpinsBetweenChecks != 0) continue;
    const cudaError_t error = cudaStreamQuery(static_cast<cudaStream_t>(stream));
    if (error != cudaSuccess && error != cudaErrorNotReady) {
      ep::check_cuda(error, "ep_mailbox_wait");
      return 3;
    }
    if (now_ns() > deadline) return 0;
  }
}
