// Measures how long 16 bytes take from one GPU to another: what no low-latency operation can beat.
//
// One thread a GPU. A word says the number of its round trip, so nothing has to be put back. Stores
// and loads are those by which low-latency rows travel: relaxed, and nothing else is ordered by
// them.

#include "common/launch.cuh"
#include "common/peers.cuh"

namespace {

using namespace ep;

constexpr int kSpinsBetweenLooks = 1024;

// Spins until `word` says `number`. False after the timeout.
__device__ bool wait_for_word(const ep_ping_args& args, const uint4* word, uint32_t number) {
  const uint64_t start_ns = ptx::global_timer_ns();
  for (int spins = 1;; ++spins) {
    const uint4 value = ptx::load_word(word);
    if (value.x == number && value.w == number) return true;
    if (spins % kSpinsBetweenLooks != 0) continue;
    if (aborted(args.peers)) return false;
    if (ptx::global_timer_ns() - start_ns > static_cast<uint64_t>(args.peers.timeout_ns)) {
      raise_fault(args.peers, EP_FAULT_TIMEOUT, EP_PHASE_ROWS, args.partner, 0, number, value.x);
      return false;
    }
  }
}

__global__ void ping_kernel(const __grid_constant__ ep_ping_args args) {
  const ep_peers& peers = args.peers;
  const uint4* const mine = in_memory_of<uint4>(peers, peers.rank, 0);
  uint4* const theirs = in_memory_of<uint4>(peers, args.partner, 0);
  const bool begins = peers.rank < args.partner;
  *args.elapsed_ns = -1;
  uint64_t start_ns = 0;
#pragma unroll 1
  for (int32_t i = 0; i <= args.num_round_trips; ++i) {
    if (i == 1) start_ns = ptx::global_timer_ns();  // the first one waits for the other's launch
    const uint32_t number = static_cast<uint32_t>(args.first + i);
    const uint4 word = make_uint4(number, number, number, number);
    if (begins) ptx::store_word(theirs, word);
    if (!wait_for_word(args, mine, number)) return;
    if (!begins) ptx::store_word(theirs, word);
  }
  *args.elapsed_ns = static_cast<int64_t>(ptx::global_timer_ns() - start_ns);
}

const Kernels kernels("ping kernel", Setup::kPlain, 0, ping_kernel);

}  // namespace

int32_t ep_ping(const ep_ping_args* args, void* stream) {
  const ep_peers& peers = args->peers;
  if (args->partner < 0 || args->partner >= peers.num_ranks || args->partner == peers.rank) {
    return ep::fail(EP_ERR_ARGUMENT, "partner = %d is no other rank of %d", args->partner,
                    peers.num_ranks);
  }
  if (args->first < 1 || args->num_round_trips < 1) {
    return ep::fail(EP_ERR_ARGUMENT, "first = %d and num_round_trips = %d must be positive",
                    args->first, args->num_round_trips);
  }
  ping_kernel<<<1, 1, 0, static_cast<cudaStream_t>(stream)>>>(*args);
  return ep::check_cuda(cudaGetLastError(), "ep_ping");
}
