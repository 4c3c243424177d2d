// Rows on copy engines: what waits before the copies of an operation, the copies themselves, and
// the flags after them.

#include <algorithm>

#include "common/calls.cuh"
#include "common/launch.cuh"
#include "common/warp.cuh"
#include "wire/wire.cuh"

namespace {

using namespace ep;

// One warp; lane r is for rank r. The copies that follow run whatever happens here. So each peer is
// told before which epoch they are of: the next one, if they are not to be read. An epoch has one
// gate: a second one is that of a graph, replayed while an operation was begun and not ended.
__global__ void __launch_bounds__(kWarpSize)
    gate_kernel(const __grid_constant__ ep_gate_args args) {
  const ep_peers& peers = args.peers;
  const int32_t epoch = epoch_of(peers), r = lane_id();
  const bool is_peer = r < peers.num_ranks && r != peers.rank;
  if (args.begins && r == 0) begin_operation(peers);
  bool fine = !aborted(peers);
  uint32_t before = 0;  // on its way while credits are looked at
  if (r == peers.rank) before = atomicExch(args.epoch, static_cast<uint32_t>(epoch));
  if (fine && is_peer) fine = wait_credit(peers, args.credit_offset, epoch, r);
  if (before == static_cast<uint32_t>(epoch) && fine) {
    raise_fault(peers, EP_FAULT_UNFINISHED, EP_PHASE_CREDIT, peers.rank, 0, epoch, epoch);
    fine = false;
  }
  fine = __all_sync(kFullWarp, fine);
  wire::set_marks(peers, args.mark_offset, fine ? epoch : epoch + 1);
}

// One warp, after the copies of a chunk in a graph, where the host knows no epoch.
__global__ void __launch_bounds__(kWarpSize)
    flag_kernel(const __grid_constant__ ep_push_args args) {
  const ep_peers& peers = args.peers;
  const int32_t r = lane_id();
  if (r >= peers.num_ranks || r == peers.rank) return;
  const int32_t epoch = static_cast<int32_t>(*static_cast<volatile const uint32_t*>(args.epoch));
  signal(peers, wire::flags_at(peers, args.flag_offset, r, peers.rank) + args.flag,
         chunk_stamp(epoch, args.tag));
}

const Kernels kernels("wire kernels", Setup::kBesideDispatch, 0, gate_kernel, flag_kernel);

// cuStreamWriteValue32 of the driver, which the library is not linked to.
using WriteValue = int (*)(void* stream, unsigned long long address, uint32_t value,
                           unsigned flags);

WriteValue find_write_value() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  constexpr unsigned kVersion = 12000;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuStreamWriteValue32", &function,
                                                             kVersion, cudaEnableDefault, &found);
#else
  const cudaError_t error =
      cudaGetDriverEntryPoint("cuStreamWriteValue32", &function, cudaEnableDefault, &found);
#endif
  const bool is_there = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
  return is_there ? reinterpret_cast<WriteValue>(function) : nullptr;
}

WriteValue write_value() {
  static const WriteValue found = find_write_value();
  return found;
}

// Raises the flag at all peers by the stream itself, which fences before each.
int32_t write_flags(const ep_push_args& args, void* stream) {
  const ep_peers& peers = args.peers;
  const uint32_t stamp = chunk_stamp(args.number, args.tag);
  for (int32_t i = 1; i < peers.num_ranks; ++i) {
    const int32_t r = (peers.rank + i) % peers.num_ranks;
    uint32_t* const flag = wire::flags_at(peers, args.flag_offset, r, peers.rank) + args.flag;
    const int result = write_value()(stream, reinterpret_cast<uintptr_t>(flag), stamp, 0);
    if (result != 0) {
      return fail(EP_ERR_CUDA, "ep_push: cuStreamWriteValue32 failed with %d", result);
    }
  }
  return EP_OK;
}

int32_t copy_rows(const ep_push_args& args, cudaStream_t stream) {
  const ep_peers& peers = args.peers;
  const int64_t first = args.first_row * static_cast<int64_t>(args.row_bytes);
  for (int32_t i = 1; i < peers.num_ranks; ++i) {
    const int32_t r = (peers.rank + i) % peers.num_ranks;
    const int32_t rows = std::min(args.chunk_rows, args.num_rows[r] - args.first_row);
    if (rows <= 0) continue;
    const uint8_t* const from =
        args.source + region_of(r, peers.rank, peers.num_ranks) * args.source_stride + first;
    uint8_t* const to = peers.memory[r] + args.target_offset +
                        region_of(peers.rank, r, peers.num_ranks) * args.target_stride + first;
    const int32_t status =
        check_cuda(cudaMemcpyAsync(to, from, rows * static_cast<size_t>(args.row_bytes),
                                   cudaMemcpyDeviceToDevice, stream),
                   "ep_push: cudaMemcpyAsync");
    if (status != EP_OK) return status;
  }
  return EP_OK;
}

}  // namespace

int32_t ep_gate(const ep_gate_args* args, void* stream) {
  if (args->begins) ep::note_call(args->peers, 0);
  gate_kernel<<<1, kWarpSize, 0, static_cast<cudaStream_t>(stream)>>>(*args);
  return ep::check_cuda(cudaGetLastError(), "ep_gate");
}

int32_t ep_check_copies(void) {
  if (write_value() != nullptr) return EP_OK;
  return ep::fail(EP_ERR_CUDA, "the driver has no cuStreamWriteValue32");
}

int32_t ep_push(const ep_push_args* args, void* stream) {
  if (args->flag >= EP_COPY_FLAGS) {
    return ep::fail(EP_ERR_ARGUMENT, "flag %d of %d", args->flag, EP_COPY_FLAGS);
  }
  const auto on_stream = static_cast<cudaStream_t>(stream);
  int32_t status = copy_rows(*args, on_stream);
  if (status != EP_OK) return status;
  if (args->flag >= 0 && args->number != 0) {
    status = write_flags(*args, stream);
  } else if (args->flag >= 0) {
    flag_kernel<<<1, kWarpSize, 0, on_stream>>>(*args);
    status = ep::check_cuda(cudaGetLastError(), "ep_push: flag_kernel");
  }
  if (status != EP_OK || args->event == nullptr) return status;
  return ep::check_cuda(cudaEventRecord(static_cast<cudaEvent_t>(args->event), on_stream),
                        "ep_push: cudaEventRecord");
}
