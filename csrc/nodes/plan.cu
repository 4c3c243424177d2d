// The routing of a dispatch between nodes, in three kernels: it is sent to the ranks of this node
// and to the rail, what the rail sent is relayed to the ranks of this node, and all of it is
// received as on one node (plan/receive.cuh).

#include "common/calls.cuh"
#include "common/launch.cuh"
#include "nodes/plan.cuh"
#include "plan/receive.cuh"
#include "plan/scratch.cuh"

namespace {

using namespace ep;
using namespace ep::nodes;
using ep::layout::kChunkTokens;
using ep::layout::kThreads;
using ep::layout::kWarps;

constexpr int kRelayEnd = 4;  // ep_nodes_plan_args.counters, after those of plan::Counter

struct NodesScratch {
  plan::Scratch common;  // its layout is that by rank
  layout::Workspace by_node;
  int32_t* send_slot;  // [T, R]
};

// ---- Sending -----------------------------------------------------------------------------------

// True when all that the dispatch before has sent was read, here and along the rail. The first warp
// waits for the ranks of this node, those after it for the rail: a thread for each.
__device__ __noinline__ bool may_send(const Plan& args, int32_t epoch) {
  const ep_peers& peers = args.peers;
  const int32_t num_nodes = args.network.num_nodes, thread = threadIdx.x;
  if (aborted(peers)) return false;
  if (thread < peers.num_ranks) {
    const int32_t last_wave = wave_number(epoch, num_nodes, 0) - 1;
    return wait_for_wave(peers, args.credit_offset, last_wave, epoch, thread);
  }
  const int32_t k = thread - kWarpSize + 1;
  if (k < 1 || k >= num_nodes) return true;
  return wait_for_rail(peers, args.network, args.network_credit_offset, epoch - 1, k);
}

// The message to the node k after.
__device__ inline int32_t* message_to(const Plan& args, int32_t k) {
  const int64_t region = (k - 1) * args.network_region;
  return reinterpret_cast<int32_t*>(network::place_to_write(
      args.network, k, args.network_send_offset + region, args.network_receive_offset + region));
}

// Writes the experts of tokens [begin, end) into the memory of this node's ranks.
__device__ __noinline__ void write_local(const Plan& args, const NodesScratch& scratch,
                                         int64_t begin, int64_t end) {
  const ep_peers& peers = args.peers;
  const int32_t num_local = peers.num_ranks, num_ranks = num_sources(args);
  const int32_t num_topk = args.routing.num_topk, experts_per_rank = args.num_experts / num_ranks;
  const int32_t first_rank = args.network.node * num_local, source = first_rank + peers.rank;
  const int64_t row_entries = static_cast<int64_t>(num_local) * num_topk;
  for (int64_t i = begin * row_entries + threadIdx.x; i < end * row_entries; i += kThreads) {
    const int32_t k = i % num_topk;
    const int64_t t = i / row_entries;
    // Each rank begins with another one, so that not all write to the same one at a time.
    const int32_t r = (i / num_topk + peers.rank + 1) % num_local;
    const int32_t slot = scratch.send_slot[t * num_ranks + first_rank + r];
    if (k == 0) args.routing.send_slot[t * num_local + r] = slot;
    if (slot < 0) continue;
    const int32_t local =
        args.routing.topk_idx[t * num_topk + k] - (first_rank + r) * experts_per_rank;
    int32_t* const idx = in_memory_of<int32_t>(peers, r, args.idx_offset);
    idx[(static_cast<int64_t>(source) * args.max_tokens + slot) * num_topk + k] =
        local >= 0 && local < experts_per_rank ? local : -1;
  }
}

// Writes the relay entries of tokens [begin, end), and lists the tokens of each node.
__device__ __noinline__ void write_relayed(const Plan& args, const NodesScratch& scratch,
                                           int64_t begin, int64_t end) {
  const int32_t num_local = args.peers.num_ranks, num_nodes = args.network.num_nodes;
  const int32_t num_topk = args.routing.num_topk, ints = entry_ints(num_local, num_topk);
  const int32_t experts_per_node = args.num_experts / num_nodes;
  const int64_t row_ints = static_cast<int64_t>(num_nodes) * ints;
  for (int64_t j = begin * row_ints + threadIdx.x; j < end * row_ints; j += kThreads) {
    const int32_t i = j % ints;
    const int64_t t = j / row_ints;
    const int32_t node = j / ints % num_nodes;
    const int32_t slot = args.nodes.node_slot[t * num_nodes + node];
    if (node == args.network.node || slot < 0) continue;
    const int32_t k = num_nodes - distance_before(args.network, node);
    int32_t value;
    if (i < num_local) {
      value = scratch.send_slot[(t * num_nodes + node) * num_local + i];
    } else {
      const int32_t expert =
          args.routing.topk_idx[t * num_topk + i - num_local] - node * experts_per_node;
      value = expert >= 0 && expert < experts_per_node ? expert : -1;
    }
    message_to(args, k)[kRelayHeaderInts + static_cast<int64_t>(slot) * ints + i] = value;
    if (i == 0) args.nodes.node_tokens[static_cast<int64_t>(k) * args.max_tokens + slot] = t;
  }
}

__device__ inline void write_header(const Plan& args, int32_t num_rows, volatile int32_t* header) {
  header[0] = num_rows;
  header[1] = args.asked_tokens;
  for (int i = 0; i < EP_NUM_FIELDS; ++i) header[2 + i] = plan::field_of(args, i);
}

// One block tells the ranks of this node what it has written there.
__device__ __noinline__ void tell_local(const Plan& args, int32_t epoch) {
  const ep_peers& peers = args.peers;
  const int32_t r = threadIdx.x;
  if (r >= peers.num_ranks) return;
  const int32_t first_rank = args.network.node * peers.num_ranks, source = first_rank + peers.rank;
  int32_t* const header =
      in_memory_of<int32_t>(peers, r, args.header_offset) + source * plan::kHeaderInts;
  write_header(args, args.routing.num_sent[first_rank + r], header);
  header[kRowsPushed] = args.routing.num_tokens;
  signal(peers, in_memory_of<uint32_t>(peers, r, args.flag_offset) + source,
         static_cast<uint32_t>(epoch));
}

// One block sends the messages, a warp each.
__device__ __noinline__ void send_messages(const Plan& args, int32_t epoch) {
  const ep_peers& peers = args.peers;
  const int32_t num_local = peers.num_ranks, lane = lane_id();
  const int32_t ints = entry_ints(num_local, args.routing.num_topk);
  const int32_t warp = threadIdx.x / kWarpSize;
  for (int32_t k = 1 + warp; k < args.network.num_nodes; k += kWarps) {
    const int32_t node = node_after(args.network, k);
    const int32_t num_rows = args.nodes.num_to_node[node];
    int32_t* const message = message_to(args, k);
    if (lane == 0) write_header(args, num_rows, message);
    if (lane < num_local) {
      message[kRowsOfRank + lane] = args.routing.num_sent[node * num_local + lane];
    }
    __syncwarp();
    const int64_t place = (k - 1) * args.network_region;
    const int64_t bytes = (kRelayHeaderInts + static_cast<int64_t>(num_rows) * ints) * 4;
    network::put(peers, args.network, k, args.network_send_offset + place,
                 args.network_receive_offset + place, bytes,
                 args.network_flag_offset + (k - 1) * int64_t{sizeof(network::Flag)},
                 static_cast<uint32_t>(epoch), network::WarpGroup());
  }
}

// Its parts are functions of their own: it needs few enough registers to have a place beside a
// dispatch's block.
template <typename Input>
__global__ void __launch_bounds__(kThreads, 2)
    send_kernel(const __grid_constant__ Plan args, const Input input, const layout::Shape by_rank,
                const layout::Shape by_node, const NodesScratch scratch) {
  extern __shared__ int32_t shared[];
  const ep_peers& peers = args.peers;
  const int32_t epoch = epoch_of(peers);
  uint32_t* const counters = reinterpret_cast<uint32_t*>(args.counters);
  if (blockIdx.x == 0 && threadIdx.x == 0) begin_operation(peers);

  layout::count_tokens<false>(input, by_rank, scratch.common.layout, args.routing.topk_idx, shared);
  __syncthreads();
  layout::count_tokens<false>(input, by_node, scratch.by_node, args.routing.topk_idx, shared);
  // A block that may not send has set the fault, which ends the others' wait.
  if (!__syncthreads_and(may_send(args, epoch))) return;
  if (!grid_barrier(peers, &counters[plan::kSendBarrier], gridDim.x)) return;

  layout::place_tokens(by_rank, scratch.common.layout, args.routing.num_sent, nullptr,
                       scratch.send_slot);
  layout::place_tokens(by_node, scratch.by_node, args.nodes.num_to_node, nullptr,
                       args.nodes.node_slot);
  if (blockIdx.x == 0) {
    layout::pick_first_error(by_rank, scratch.common.layout.first_error, scratch.common.sent_error);
  }
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * by_rank.chunks_per_block * kChunkTokens;
  const int64_t end = min(begin + by_rank.chunks_per_block * kChunkTokens,
                          static_cast<int64_t>(args.routing.num_tokens));
  write_local(args, scratch, begin, end);
  write_relayed(args, scratch, begin, end);
  if (!is_last_block(&args.counters[plan::kSendEnd], gridDim.x)) return;
  if (threadIdx.x == 0) counters[plan::kSendBarrier] = 0;
  send_messages(args, epoch);
  tell_local(args, epoch);
}

// ---- Relaying ----------------------------------------------------------------------------------

// The message of the node k before.
__device__ inline const volatile int32_t* message_of(const Plan& args, int32_t k) {
  return reinterpret_cast<const volatile int32_t*>(
      args.network.memory + args.network_receive_offset + (k - 1) * args.network_region);
}

__device__ inline int32_t rows_of(const Plan& args, const volatile int32_t* message) {
  return min(max(message[0], 0), args.max_tokens);
}

// Writes the experts of the rows of the node k before into the memory of this node's ranks.
__device__ inline void relay_experts(const Plan& args, int32_t k) {
  const ep_peers& peers = args.peers;
  const int32_t num_local = peers.num_ranks, num_topk = args.routing.num_topk;
  const int32_t experts_per_rank = args.num_experts / num_sources(args);
  const int32_t node = node_after(args.network, args.network.num_nodes - k);
  const int32_t source = node * num_local + peers.rank, ints = entry_ints(num_local, num_topk);
  const volatile int32_t* const message = message_of(args, k);
  const int64_t count = static_cast<int64_t>(rows_of(args, message)) * num_local * num_topk;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int32_t which = i % num_topk;
    const int32_t r = (i / num_topk + peers.rank + 1) % num_local;
    const volatile int32_t* const entry =
        message + kRelayHeaderInts + i / (num_local * num_topk) * ints;
    const int32_t slot = entry[r];
    if (slot < 0 || slot >= args.max_tokens) continue;
    const int32_t expert = entry[num_local + which];
    const int32_t local = expert - r * experts_per_rank;
    int32_t* const idx = in_memory_of<int32_t>(peers, r, args.idx_offset);
    idx[(static_cast<int64_t>(source) * args.max_tokens + slot) * num_topk + which] =
        expert >= 0 && local >= 0 && local < experts_per_rank ? local : -1;
  }
}

__global__ void __launch_bounds__(kThreads, network::kMinBlocks)
    relay_kernel(const __grid_constant__ Plan args) {
  const ep_peers& peers = args.peers;
  const int32_t num_local = peers.num_ranks, num_nodes = args.network.num_nodes;
  const int32_t epoch = epoch_of(peers);
  // After a fault the send kernel may not have waited until this node's ranks have read the plan
  // before.
  if (__syncthreads_or(aborted(peers))) return;
  for (int32_t k = 1; k < num_nodes; ++k) {
    bool fine = true;
    if (threadIdx.x == 0) {
      fine = wait_for_message(peers, args.network, args.network_flag_offset, epoch, k);
    }
    if (!__syncthreads_and(fine)) return;
    relay_experts(args, k);
  }
  if (!is_last_block(&args.counters[kRelayEnd], gridDim.x)) return;
  for (int32_t i = threadIdx.x; i < (num_nodes - 1) * num_local; i += kThreads) {
    const int32_t k = 1 + i / num_local, r = i % num_local;
    const int32_t source = node_after(args.network, num_nodes - k) * num_local + peers.rank;
    const volatile int32_t* const message = message_of(args, k);
    volatile int32_t* const header =
        in_memory_of<int32_t>(peers, r, args.header_offset) + source * plan::kHeaderInts;
    header[0] = message[kRowsOfRank + r];
    for (int j = 1; j < 2 + EP_NUM_FIELDS; ++j) header[j] = message[j];
    header[kRowsPushed] = message[0];
    signal(peers, in_memory_of<uint32_t>(peers, r, args.flag_offset) + source,
           static_cast<uint32_t>(epoch));
  }
  if (threadIdx.x != 0) return;
  int32_t first = 0;
  for (int32_t k = 0; k < num_nodes; ++k) {
    const int32_t rows = k == 0 ? 0 : rows_of(args, message_of(args, k));
    args.nodes.num_relayed[k] = rows;
    args.nodes.relay_first[k] = first;
    first += rows;
  }
  for (int32_t r = 0; r < num_local; ++r) {
    int32_t pushed = args.routing.num_sent[args.network.node * num_local + r];
    for (int32_t k = 1; k < num_nodes; ++k) pushed += message_of(args, k)[kRowsOfRank + r];
    args.nodes.num_pushed[r] = pushed;
  }
}

__global__ void __launch_bounds__(kThreads, network::kMinBlocks)
    receive_kernel(const __grid_constant__ Plan args, const plan::Scratch scratch) {
  extern __shared__ int32_t shared[];
  plan::receive_all<EP_MAX_NODE_RANKS>(args, scratch, shared);
}

// ---- Launching ---------------------------------------------------------------------------------

int64_t cut_scratch(int64_t max_tokens, int32_t num_experts, int32_t num_nodes, int32_t num_local,
                    uintptr_t base, NodesScratch* scratch) {
  const auto round = [](int64_t bytes) {
    return round_up<int64_t>(bytes, plan::kScratchAlignment);
  };
  const int32_t num_ranks = num_nodes * num_local;
  int64_t bytes =
      round(plan::cut_scratch(max_tokens, num_experts, num_ranks, base, &scratch->common));
  layout::Shape largest =
      layout::make_shape(max_tokens, 1, num_experts, num_nodes, plan::kMaxPlanBlocks);
  largest.num_blocks = plan::kMaxPlanBlocks;
  bytes += round(layout::cut_workspace(largest, false, base + bytes, &scratch->by_node));
  scratch->send_slot = reinterpret_cast<int32_t*>(base + bytes);
  return bytes + round(4 * max_tokens * num_ranks);
}

template <typename Input>
int32_t launch_send(const Plan& args, const Input& input, const NodesScratch& scratch,
                    cudaStream_t stream) {
  const int32_t num_nodes = args.network.num_nodes, num_ranks = args.peers.num_ranks * num_nodes;
  const auto shape_of = [&args](int32_t num_targets) {
    return layout::make_shape(args.routing.num_tokens, args.routing.num_topk, args.num_experts,
                              num_targets, args.num_send_blocks);
  };
  const layout::Shape by_rank = shape_of(num_ranks), by_node = shape_of(num_nodes);
  const int32_t blocks = std::max(1, by_rank.num_blocks);
  const int32_t shared_bytes = layout::count_shared_bytes(by_rank, false);
  send_kernel<<<blocks, kThreads, shared_bytes, stream>>>(args, input, by_rank, by_node, scratch);
  return check_cuda(cudaGetLastError(), "ep_nodes_plan: send_kernel");
}

int32_t launch_receive(const Plan& args, NodesScratch scratch, cudaStream_t stream) {
  relay_kernel<<<args.num_receive_blocks, kThreads, 0, stream>>>(args);
  int32_t status = check_cuda(cudaGetLastError(), "ep_nodes_plan: relay_kernel");
  if (status != EP_OK) return status;
  const int32_t num_ranks = args.peers.num_ranks * args.network.num_nodes;
  const int32_t num_local_experts = args.num_experts / num_ranks;
  plan::Scratch& common = scratch.common;
  const int32_t blocks = plan::divide_receive<EP_MAX_NODE_RANKS>(
      args.num_receive_blocks, num_local_experts, &common.receive);
  const int32_t shared_bytes = common.receive.shared_bytes(num_local_experts);
  receive_kernel<<<blocks, kThreads, shared_bytes, stream>>>(args, common);
  return check_cuda(cudaGetLastError(), "ep_nodes_plan: receive_kernel");
}

const Kernels send_kernels("plan kernels between nodes", Setup::kBesideDispatch, 0,
                           send_kernel<layout::TopkInput<int32_t>>,
                           send_kernel<layout::TopkInput<int64_t>>,
                           send_kernel<layout::RoutingMapInput>);
const Kernels receive_kernels("plan kernels between nodes", Setup::kBesideDispatch, 0, relay_kernel,
                              receive_kernel);

}  // namespace

int64_t ep_nodes_plan_scratch_bytes(int64_t max_tokens, int32_t num_experts, int32_t num_nodes,
                                    int32_t ranks_per_node) {
  if (nodes::check_group(num_nodes, ranks_per_node) != EP_OK) return -1;
  const int32_t num_ranks = num_nodes * ranks_per_node;
  if (num_experts < num_ranks || num_experts % num_ranks != 0) {
    ep::fail(EP_ERR_ARGUMENT, "num_experts = %d is no multiple of %d ranks", num_experts,
             num_ranks);
    return -1;
  }
  NodesScratch scratch;
  return cut_scratch(max_tokens, num_experts, num_nodes, ranks_per_node, 0, &scratch);
}

int32_t ep_nodes_plan(const ep_nodes_plan_args* args, void* stream, void* side_stream,
                      void* event) {
  const Plan plan{*args};
  const int32_t num_nodes = args->network.num_nodes, num_local = args->peers.num_ranks;
  int32_t status = nodes::check_group(num_nodes, num_local);
  if (status == EP_OK) status = plan::check_plan(*args, num_nodes * num_local);
  if (status != EP_OK) return status;
  NodesScratch scratch;
  cut_scratch(args->max_tokens, args->num_experts, num_nodes, num_local,
              reinterpret_cast<uintptr_t>(args->scratch), &scratch);
  note_call(args->peers, 0);
  status = layout::with_input(args->input_kind, args->input, [&](const auto& input) {
    return launch_send(plan, input, scratch, static_cast<cudaStream_t>(stream));
  });
  if (status != EP_OK) return status;
  if (side_stream != stream) status = ep_stream_wait(side_stream, stream, event);
  if (status != EP_OK) return status;
  return launch_receive(plan, scratch, static_cast<cudaStream_t>(side_stream));
}
