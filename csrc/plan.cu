// The routing of a dispatch, from the ranks that send to the ranks that receive. Two kernels, whose
// blocks wait for one another in the middle (grid_barrier):
//
//   send_kernel     finds which token goes where, and into which slot (layout.cuh); writes each
//                   token's local experts into the memory of the ranks it goes to, then a header
//                   with the counts, then a flag.
//   receive_kernel  waits for the flags and copies the routing out of the staging memory, which the
//                   next plan overwrites; counts the rows of each expert, tells the host, and says
//                   where every row stands in the output. It is the layout again, each local expert
//                   taken for a rank: the slot of a received row is its place in the expert's group.

#include <algorithm>
#include <climits>
#include <ctime>

#include "layout.cuh"
#include "node.cuh"
#include "status.cuh"

namespace {

using namespace ep;
using layout::kChunkTokens;
using layout::kThreads;

constexpr int kMaxPlanBlocks = 64;
constexpr int kHeaderInts = 16;         // rows sent, tokens, fields that must agree
constexpr int kMaxGroupWords = 4096;    // (chunk, expert) pairs that a block looks at at a time
constexpr int kMaxLocalExperts = 1024;  // as many as a mailbox has room for

enum Counter { kSendBarrier, kSendEnd, kReceiveBarrier, kReceiveEnd };

// Received rows in chunks of 32; each block owns a contiguous run of chunks. C = num_chunks.
struct Receive {
  int32_t* expert_count;  // [blocks, E_local]
  uint32_t* chunk_rows;   // [C, E_local] bit t: row t of the chunk goes to the expert
  int32_t num_chunks;
  int32_t chunks_per_block;
  int32_t chunks_per_group;  // at most so many in shared memory at a time

  __host__ __device__ int32_t shared_bytes(int32_t num_local_experts) const {
    return 4 * (2 * chunks_per_group * num_local_experts + 3 * num_local_experts);
  }
};

struct Scratch {
  int32_t* sent_error;  // [4] as ep_layout_args.error
  layout::Workspace layout;
  Receive receive;
};

__device__ inline int32_t field_of(const ep_plan_args& args, int32_t field) {
  switch (field) {
    case EP_FIELD_NUM_TOPK: return args.routing.num_topk;
    case EP_FIELD_HIDDEN: return args.hidden;
    case EP_FIELD_NUM_EXPERTS: return args.num_experts;
    case EP_FIELD_EXPERT_MAJOR: return args.routing.expert_major;
    default: return args.expert_alignment;
  }
}

// ---- Send ---------------------------------------------------------------------------------------

template <typename Input>
__global__ void __launch_bounds__(kThreads)
    send_kernel(const __grid_constant__ ep_plan_args args, const Input input,
                const layout::Shape shape, const Scratch scratch) {
  extern __shared__ int32_t shared[];
  const ep_node& node = args.node;
  const int32_t num_ranks = node.num_ranks, num_topk = args.routing.num_topk;
  const int32_t experts_per_rank = args.num_experts / num_ranks;
  const int32_t epoch = epoch_of(node);
  uint32_t* const counters = reinterpret_cast<uint32_t*>(args.counters);
  if (blockIdx.x == 0 && threadIdx.x == 0) begin_operation(node);

  layout::count_tokens(input, shape, scratch.layout, args.routing.topk_idx, shared);
  bool may_send = !aborted(node);
  if (may_send && static_cast<int32_t>(threadIdx.x) < num_ranks) {
    const uint32_t* const credit =
        in_memory_of<uint32_t>(node, node.rank, args.credit_offset) + threadIdx.x;
    may_send = wait_epoch(node, credit, epoch - 1, EP_PHASE_CREDIT, threadIdx.x);
  }
  // A block that may not send has set the fault, which ends the others' wait.
  if (!__syncthreads_and(may_send)) return;
  if (!grid_barrier(node, &counters[kSendBarrier], gridDim.x)) return;

  layout::place_tokens(shape, scratch.layout, args.routing.num_sent, nullptr, args.routing.send_slot);
  if (blockIdx.x == 0) {
    layout::pick_first_error(shape, scratch.layout.first_error, scratch.sent_error);
  }
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * shape.chunks_per_block * kChunkTokens;
  const int64_t end = min(begin + shape.chunks_per_block * kChunkTokens,
                          static_cast<int64_t>(args.routing.num_tokens));
  const int64_t row_entries = static_cast<int64_t>(num_ranks) * num_topk;
  for (int64_t i = begin * row_entries + threadIdx.x; i < end * row_entries; i += kThreads) {
    const int32_t k = i % num_topk;
    const int64_t t = i / row_entries;
    // Each rank begins with another one, so that not all write to the same one at a time.
    const int32_t r = (i / num_topk + node.rank + 1) % num_ranks;
    const int32_t slot = args.routing.send_slot[t * num_ranks + r];
    if (slot < 0) continue;
    const int32_t local = args.routing.topk_idx[t * num_topk + k] - r * experts_per_rank;
    int32_t* const idx = in_memory_of<int32_t>(node, r, args.idx_offset);
    idx[(static_cast<int64_t>(node.rank) * args.max_tokens + slot) * num_topk + k] =
        local >= 0 && local < experts_per_rank ? local : -1;
  }

  if (!is_last_block(&args.counters[kSendEnd], gridDim.x)) return;
  if (threadIdx.x == 0) counters[kSendBarrier] = 0;
  if (static_cast<int32_t>(threadIdx.x) < num_ranks) {
    const int32_t r = threadIdx.x;
    int32_t* const header =
        in_memory_of<int32_t>(node, r, args.header_offset) + node.rank * kHeaderInts;
    header[0] = args.routing.num_sent[r];
    header[1] = args.asked_tokens;
    for (int i = 0; i < EP_NUM_FIELDS; ++i) header[2 + i] = field_of(args, i);
    signal(node, in_memory_of<uint32_t>(node, r, args.flag_offset) + node.rank,
           static_cast<uint32_t>(epoch));
  }
}

// ---- Receive ------------------------------------------------------------------------------------

// Thread `source`: waits for that rank's routing and reads its header; 0 rows after a fault.
__device__ inline void wait_for_header(const ep_plan_args& args, int32_t source, int32_t epoch,
                                       int32_t* num_rows) {
  const ep_node& node = args.node;
  const uint32_t* const flag = in_memory_of<uint32_t>(node, node.rank, args.flag_offset) + source;
  int32_t rows = 0, tokens = 0;
  if (wait_epoch(node, flag, epoch, EP_PHASE_PLAN, source)) {
    const volatile int32_t* const header =
        in_memory_of<int32_t>(node, node.rank, args.header_offset) + source * kHeaderInts;
    rows = min(max(header[0], 0), args.max_tokens);
    tokens = min(max(header[1], 0), args.max_tokens);
    if (header[1] > args.max_tokens) {
      raise_fault(node, EP_FAULT_TOO_MANY, EP_PHASE_PLAN, source, 0, args.max_tokens, header[1]);
    }
    for (int i = 0; i < EP_NUM_FIELDS; ++i) {
      const int32_t ours = field_of(args, i), theirs = header[2 + i];
      if (theirs == ours) continue;
      raise_fault(node, EP_FAULT_MISMATCH, EP_PHASE_PLAN, source, i, ours, theirs);
      rows = 0;
      break;
    }
  }
  num_rows[source] = rows;
  if (blockIdx.x == 0) {
    args.routing.num_recv[source] = rows;
    args.routing.source_tokens[source] = tokens;
  }
}

// first[g] becomes the sum of the sizes before g, each rounded up to `alignment`; returns the sum of
// all, in every thread. first may be `size`.
__device__ inline int32_t prefix_of_groups(const int32_t* size, int32_t num_groups,
                                           int32_t alignment, int32_t* first) {
  __shared__ int32_t total;
  __syncthreads();
  if (threadIdx.x < layout::kWarpSize) {
    const int32_t lane = threadIdx.x;
    int32_t carry = 0;
    for (int32_t begin = 0; begin < num_groups; begin += layout::kWarpSize) {
      const int32_t g = begin + lane;
      const int32_t own =
          g < num_groups ? (size[g] + alignment - 1) / alignment * alignment : 0;
      int32_t sum = own;
      for (int32_t step = 1; step < layout::kWarpSize; step *= 2) {
        const int32_t before = __shfl_up_sync(layout::kFullWarp, sum, step);
        if (lane >= step) sum += before;
      }
      if (g < num_groups) first[g] = carry + sum - own;
      carry += __shfl_sync(layout::kFullWarp, sum, layout::kWarpSize - 1);
    }
    if (lane == 0) total = carry;
  }
  __syncthreads();
  return total;
}

// Counts, for the host and for the dispatch: one block. first_row and num_rows: of the groups.
__device__ void publish(const ep_plan_args& args, const int32_t* sent_error,
                        const int32_t* expert_tokens, const int32_t* first_row,
                        const int32_t* num_rows, int32_t end) {
  const int32_t num_ranks = args.node.num_ranks;
  const int32_t num_local_experts = args.num_experts / num_ranks;
  const int32_t capacity = args.capacity;
  for (int32_t e = threadIdx.x; e < num_local_experts; e += kThreads) {
    const int32_t tokens = expert_tokens[e];
    if (args.ticket != 0) args.mailbox->num_tokens_per_expert[e] = tokens;
    if (args.routing.expert_major) {
      const int32_t first = min(first_row[e], capacity);
      args.routing.expert_first_row[e] = first;
      args.routing.expert_tokens[e] = min(tokens, capacity - first);
    } else {
      args.routing.expert_tokens[e] = tokens;
    }
  }
  if (threadIdx.x == 0) args.routing.expert_first_row[num_local_experts] = min(end, capacity);
  if (args.ticket == 0) {
    volatile ep_notice* const notice = args.notice;
    if (threadIdx.x != 0 || notice->code != EP_NOTICE_NONE) return;
    if (sent_error[0] == EP_ROUTING_OK && end <= capacity) return;
    for (int i = 0; i < 4; ++i) notice->routing_error[i] = sent_error[i];
    notice->num_rows = end;
    notice->capacity = capacity;
    __threadfence_system();
    notice->code = sent_error[0] != EP_ROUTING_OK ? EP_NOTICE_ROUTING : EP_NOTICE_OVERFLOW;
    return;
  }
  if (threadIdx.x < EP_MAX_NODE_RANKS) {
    const int32_t r = threadIdx.x;
    args.mailbox->num_sent_tokens[r] = r < num_ranks ? args.routing.num_sent[r] : 0;
    args.mailbox->num_recv_tokens[r] = r < num_ranks ? num_rows[r] : 0;
  }
  if (threadIdx.x < 4) args.mailbox->routing_error[threadIdx.x] = sent_error[threadIdx.x];
  __threadfence_system();
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::store_release_sys(reinterpret_cast<uint32_t*>(&args.mailbox->ticket), args.ticket);
  }
}

__global__ void __launch_bounds__(kThreads)
    receive_kernel(const __grid_constant__ ep_plan_args args, const Scratch scratch) {
  extern __shared__ int32_t shared[];
  const ep_node& node = args.node;
  const Receive& receive = scratch.receive;
  const int32_t num_ranks = node.num_ranks, num_topk = args.routing.num_topk;
  const int32_t num_experts = args.num_experts / num_ranks;  // of this rank
  const int32_t max_tokens = args.max_tokens, num_rows_in_all = num_ranks * max_tokens;
  const int32_t group_words = receive.chunks_per_group * num_experts;
  auto* const mask = reinterpret_cast<uint32_t*>(shared);  // [group, E] rows of a chunk as bits
  int32_t* const chunk_first_row = shared + group_words;   // [group, E]
  int32_t* const next_row = chunk_first_row + group_words; // [E] of this block
  int32_t* const tokens = next_row + num_experts;          // [E] of all blocks
  int32_t* const first_row = tokens + num_experts;         // [E] of each expert's group
  __shared__ int32_t num_rows[EP_MAX_NODE_RANKS], first_of_source[EP_MAX_NODE_RANKS];
  const int32_t epoch = epoch_of(node);
  uint32_t* const counters = reinterpret_cast<uint32_t*>(args.counters);

  if (static_cast<int32_t>(threadIdx.x) < num_ranks) {
    wait_for_header(args, threadIdx.x, epoch, num_rows);
  }
  for (int32_t e = threadIdx.x; e < num_experts; e += kThreads) next_row[e] = tokens[e] = 0;
  __syncthreads();

  // What the other ranks wrote, copied and counted.
  const int32_t begin = blockIdx.x * receive.chunks_per_block;
  const int32_t end = min(begin + receive.chunks_per_block, receive.num_chunks);
  const auto* const staged = in_memory_of<const int32_t>(node, node.rank, args.idx_offset);
  for (int32_t chunk = begin; chunk < end; chunk += receive.chunks_per_group) {
    const int32_t num_chunks = min(receive.chunks_per_group, end - chunk);
    for (int32_t i = threadIdx.x; i < num_chunks * num_experts; i += kThreads) mask[i] = 0;
    __syncthreads();
    for (int32_t i = threadIdx.x; i < num_chunks * kChunkTokens * num_topk; i += kThreads) {
      const int32_t row = i / num_topk;
      const int32_t n = chunk * kChunkTokens + row;
      if (n >= num_rows_in_all) break;
      const bool sent = n % max_tokens < num_rows[n / max_tokens];
      const int64_t entry = static_cast<int64_t>(chunk) * kChunkTokens * num_topk + i;
      const int32_t expert = sent ? staged[entry] : -1;
      const bool is_expert = expert >= 0 && expert < num_experts;
      args.routing.recv_topk_idx[entry] = is_expert ? expert : -1;
      if (is_expert) {
        atomicOr(&mask[row / kChunkTokens * num_experts + expert], 1u << row % kChunkTokens);
      }
    }
    __syncthreads();
    for (int32_t e = threadIdx.x; e < num_experts; e += kThreads) {
      for (int32_t c = 0; c < num_chunks; ++c) {
        const uint32_t rows = mask[c * num_experts + e];
        receive.chunk_rows[static_cast<int64_t>(chunk + c) * num_experts + e] = rows;
        tokens[e] += __popc(rows);
      }
    }
    __syncthreads();
  }
  for (int32_t e = threadIdx.x; e < num_experts; e += kThreads) {
    receive.expert_count[blockIdx.x * num_experts + e] = tokens[e];
    tokens[e] = 0;
  }
  if (!grid_barrier(node, &counters[kReceiveBarrier], gridDim.x)) return;

  // Rows of each expert before this block's, and in all.
  const int32_t num_columns = min(num_experts, kThreads);
  const int32_t rows_at_a_time = kThreads / num_columns;
  if (static_cast<int32_t>(threadIdx.x) < rows_at_a_time * num_columns) {
    for (int32_t e = threadIdx.x % num_columns; e < num_experts; e += num_columns) {
      int32_t before = 0, all = 0;
      for (int32_t block = threadIdx.x / num_columns; block < static_cast<int32_t>(gridDim.x);
           block += rows_at_a_time) {
        const int32_t count = receive.expert_count[block * num_experts + e];
        all += count;
        if (block < static_cast<int32_t>(blockIdx.x)) before += count;
      }
      if (before) atomicAdd(&next_row[e], before);
      if (all) atomicAdd(&tokens[e], all);
    }
  }
  const int32_t end_of_groups =
      prefix_of_groups(tokens, num_experts, args.expert_alignment, first_row);
  const int32_t end_of_sources = prefix_of_groups(num_rows, num_ranks, 1, first_of_source);
  for (int32_t e = threadIdx.x; e < num_experts; e += kThreads) next_row[e] += first_row[e];
  if (blockIdx.x == 0) {
    publish(args, scratch.sent_error, tokens, first_row, num_rows,
            args.routing.expert_major ? end_of_groups : end_of_sources);
  }
  __syncthreads();

  for (int32_t chunk = begin; chunk < end; chunk += receive.chunks_per_group) {
    const int32_t num_chunks = min(receive.chunks_per_group, end - chunk);
    for (int32_t e = threadIdx.x; e < num_experts; e += kThreads) {
      int32_t row = next_row[e];
      for (int32_t c = 0; c < num_chunks; ++c) {
        const uint32_t rows =
            receive.chunk_rows[static_cast<int64_t>(chunk + c) * num_experts + e];
        mask[c * num_experts + e] = rows;
        chunk_first_row[c * num_experts + e] = row;
        row += __popc(rows);
      }
      next_row[e] = row;
    }
    __syncthreads();
    const int32_t num_topk4 = args.routing.num_topk4;
    for (int32_t i = threadIdx.x; i < num_chunks * kChunkTokens * num_topk4; i += kThreads) {
      const int32_t in_group = i / num_topk4, k = i % num_topk4;
      const int32_t n = chunk * kChunkTokens + in_group;
      if (n >= num_rows_in_all) break;
      const int64_t first_entry = static_cast<int64_t>(n) * num_topk4;
      int32_t row = -1, place = k;  // place among the row's ascending rows
      if (args.routing.expert_major) {
        const int32_t* const experts =
            args.routing.recv_topk_idx + static_cast<int64_t>(n) * num_topk;
        const int32_t expert = k < num_topk ? experts[k] : -1;
        int32_t smaller = 0, present = 0, absent_before = max(0, k - num_topk);
        for (int32_t other = 0; other < num_topk; ++other) {
          const int32_t value = experts[other];
          present += value >= 0;
          smaller += value >= 0 && value < expert;
          absent_before += value < 0 && other < k;
        }
        place = expert >= 0 ? smaller : present + absent_before;
        if (expert >= 0) {
          const int32_t word = in_group / kChunkTokens * num_experts + expert;
          row = chunk_first_row[word] +
                __popc(mask[word] & ((1u << in_group % kChunkTokens) - 1));
        }
      } else {
        const int32_t source = n / max_tokens, slot = n % max_tokens;
        if (k == 0 && slot < num_rows[source]) row = first_of_source[source] + slot;
      }
      if (row >= args.capacity) row = -1;
      args.routing.row_of_k[first_entry + k] = row;
      args.routing.rows_ascending[first_entry + place] = row;
    }
    __syncthreads();
  }
  if (is_last_block(&args.counters[kReceiveEnd], gridDim.x) && threadIdx.x == 0) {
    counters[kReceiveBarrier] = 0;
  }
}

// ---- Launch -------------------------------------------------------------------------------------

// Cuts the scratch at address `base` up for the largest sizes and returns the bytes that it takes.
int64_t cut_scratch(int64_t max_tokens, int32_t num_experts, int32_t num_ranks, uintptr_t base,
                    Scratch* scratch) {
  const int32_t num_local_experts = num_experts / num_ranks;
  layout::Shape largest = layout::make_shape(max_tokens, 1, num_experts, num_ranks, kMaxPlanBlocks);
  largest.num_blocks = kMaxPlanBlocks;  // fewer tokens may take more blocks
  scratch->receive.num_chunks =
      static_cast<int32_t>((max_tokens * num_ranks + kChunkTokens - 1) / kChunkTokens);
  uintptr_t next = base;
  const auto take = [&next](int64_t bytes) {
    const uintptr_t start = next;
    next += (bytes + 255) / 256 * 256;
    return start;
  };
  scratch->sent_error = reinterpret_cast<int32_t*>(take(16));
  scratch->receive.expert_count =
      reinterpret_cast<int32_t*>(take(4 * int64_t{kMaxPlanBlocks} * num_local_experts));
  scratch->receive.chunk_rows = reinterpret_cast<uint32_t*>(
      take(4 * static_cast<int64_t>(scratch->receive.num_chunks) * num_local_experts));
  const uintptr_t workspace = next;
  return static_cast<int64_t>(workspace - base) +
         layout::cut_workspace(largest, workspace, &scratch->layout);
}

template <typename Input>
int32_t launch_send(const ep_plan_args& args, const Input& input, const Scratch& scratch,
                    cudaStream_t stream) {
  const layout::Shape shape =
      layout::make_shape(args.routing.num_tokens, args.routing.num_topk, args.num_experts,
                         args.node.num_ranks, args.num_send_blocks);
  send_kernel<<<std::max(1, shape.num_blocks), kThreads, layout::count_shared_bytes(shape),
                stream>>>(args, input, shape, scratch);
  return check_cuda(cudaGetLastError(), "ep_plan: send_kernel");
}

int32_t launch_send(const ep_plan_args& args, const Scratch& scratch, cudaStream_t stream) {
  switch (args.input_kind) {
    case EP_INPUT_TOPK_INT32:
      return launch_send(args, layout::TopkInput<int32_t>{static_cast<const int32_t*>(args.input)},
                         scratch, stream);
    case EP_INPUT_TOPK_INT64:
      return launch_send(args, layout::TopkInput<int64_t>{static_cast<const int64_t*>(args.input)},
                         scratch, stream);
    case EP_INPUT_ROUTING_MAP:
      return launch_send(args, layout::RoutingMapInput{static_cast<const uint8_t*>(args.input)},
                         scratch, stream);
    default:
      return fail(EP_ERR_ARGUMENT, "input_kind = %d is not one of EP_INPUT_*", args.input_kind);
  }
}

int32_t launch_receive(const ep_plan_args& args, Scratch scratch, cudaStream_t stream) {
  const int32_t num_local_experts = args.num_experts / args.node.num_ranks;
  Receive& receive = scratch.receive;
  receive.chunks_per_block =
      std::max(1, layout::ceil_div(receive.num_chunks, args.num_receive_blocks));
  receive.chunks_per_group = std::clamp(kMaxGroupWords / num_local_experts, 1,
                                        receive.chunks_per_block);
  const int32_t blocks = layout::ceil_div(receive.num_chunks, receive.chunks_per_block);
  receive_kernel<<<blocks, kThreads, receive.shared_bytes(num_local_experts), stream>>>(args,
                                                                                       scratch);
  return check_cuda(cudaGetLastError(), "ep_plan: receive_kernel");
}

int64_t now_ns() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return static_cast<int64_t>(time.tv_sec) * 1000000000 + time.tv_nsec;
}

}  // namespace

namespace ep {

int32_t load_plan_kernels() {
  for (const void* kernel :
       {reinterpret_cast<const void*>(send_kernel<layout::TopkInput<int32_t>>),
        reinterpret_cast<const void*>(send_kernel<layout::TopkInput<int64_t>>),
        reinterpret_cast<const void*>(send_kernel<layout::RoutingMapInput>),
        reinterpret_cast<const void*>(receive_kernel)}) {
    const int32_t status = load_beside_dispatch(kernel, "plan kernels");
    if (status != EP_OK) return status;
  }
  return EP_OK;
}

}  // namespace ep

int64_t ep_plan_scratch_bytes(int64_t max_tokens, int32_t num_experts, int32_t num_ranks) {
  if (num_ranks < 1 || num_ranks > EP_MAX_NODE_RANKS || num_experts % num_ranks != 0) {
    ep::fail(EP_ERR_ARGUMENT, "num_experts = %d is no multiple of num_ranks = %d in [1, %d]",
             num_experts, num_ranks, EP_MAX_NODE_RANKS);
    return -1;
  }
  Scratch scratch;
  return cut_scratch(max_tokens, num_experts, num_ranks, 0, &scratch);
}

int32_t ep_plan(const ep_plan_args* args, void* stream, void* side_stream, void* event) {
  const int32_t num_local_experts = args->num_experts / args->node.num_ranks;
  if (num_local_experts < 1 || num_local_experts > kMaxLocalExperts) {
    return ep::fail(EP_ERR_ARGUMENT, "num_local_experts = %d is not in [1, %d]",
                    num_local_experts, kMaxLocalExperts);
  }
  for (const int32_t blocks : {args->num_send_blocks, args->num_receive_blocks}) {
    if (blocks < 1 || blocks > kMaxPlanBlocks) {
      return ep::fail(EP_ERR_ARGUMENT, "%d blocks of a plan's kernel are not in [1, %d]", blocks,
                      kMaxPlanBlocks);
    }
  }
  Scratch scratch;
  cut_scratch(args->max_tokens, args->num_experts, args->node.num_ranks,
              reinterpret_cast<uintptr_t>(args->scratch), &scratch);
  int32_t status = launch_send(*args, scratch, static_cast<cudaStream_t>(stream));
  if (status != EP_OK) return status;
  status = ep_stream_wait(side_stream, stream, event);
  if (status != EP_OK) return status;
  return launch_receive(*args, scratch, static_cast<cudaStream_t>(side_stream));
}

int32_t ep_stream_wait(void* waiting, void* other, void* event) {
  const auto done = static_cast<cudaEvent_t>(event);
  const int32_t status = ep::check_cuda(cudaEventRecord(done, static_cast<cudaStream_t>(other)),
                                        "ep_stream_wait: cudaEventRecord");
  if (status != EP_OK) return status;
  return ep::check_cuda(cudaStreamWaitEvent(static_cast<cudaStream_t>(waiting), done, 0),
                        "ep_stream_wait: cudaStreamWaitEvent");
}

int32_t ep_mailbox_wait(const ep_mailbox* mailbox, const ep_fault* fault, int32_t ticket,
                        int64_t timeout_ns, void* stream) {
  constexpr int kSpinsBetweenChecks = 4096;
  const int64_t deadline = now_ns() + timeout_ns;
  for (int spins = 1;; ++spins) {
    if (__atomic_load_n(&mailbox->ticket, __ATOMIC_ACQUIRE) == ticket) return 1;
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
