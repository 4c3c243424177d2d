// The network at its worst, for tests: messages between virtual ranks of one GPU are carried out
// late and in random order. Of each, the flag comes after the data; nothing else is ordered. What
// is sent is read when the message is carried out.

#include <cstddef>

#include "common/launch.cuh"
#include "network/network.cuh"

namespace {

using namespace ep;

constexpr int kCarryThreads = 128;
constexpr unsigned long long kNone = ~0ull;

// A linear congruential generator: it need not be good, only differ from seed to seed.
struct Random {
  uint64_t state;
  __device__ uint32_t next() {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<uint32_t>(state >> 33);
  }
};

__device__ inline void pass_time(uint64_t nanoseconds) {
  const uint64_t start = ptx::global_timer_ns();
  while (ptx::global_timer_ns() - start < nanoseconds) {
  }
}

// All threads copy multiples of 4 bytes, past L1.
__device__ inline void copy(uint8_t* to, const uint8_t* from, int64_t num_bytes) {
  constexpr int kAhead = 4;
  const int64_t num_vectors = num_bytes / 16, step = kCarryThreads;
  const auto* const source = reinterpret_cast<const uint4*>(from);
  for (int64_t first = threadIdx.x; first < num_vectors; first += kAhead * step) {
    uint4 v[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      ptx::load_global_if(first + i * step < num_vectors, &v[i], source + first + i * step);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + i * step < num_vectors) {
        ptx::store_global(reinterpret_cast<uint4*>(to) + first + i * step, v[i]);
      }
    }
  }
  const auto* const words = reinterpret_cast<const volatile uint32_t*>(from);
  for (int64_t i = num_vectors * 4 + threadIdx.x; i < num_bytes / 4; i += step) {
    reinterpret_cast<uint32_t*>(to)[i] = words[i];
  }
}

// One thread waits until there are more messages than were taken. False where there are none and
// the host has said stop: what has been posted is carried out even then.
__device__ inline bool wait_for_message(const ep_network_queue& queue, int32_t num_taken) {
  static_assert(offsetof(ep_network_queue, num_posted) % 8 == 0 &&
                    offsetof(ep_network_queue, stop) - offsetof(ep_network_queue, num_posted) == 4,
                "both are read at once");
  const auto* const both = reinterpret_cast<const uint64_t*>(&queue.num_posted);
  uint64_t seen;
  do {
    seen = ptx::load_acquire_sys(both);
    if (static_cast<uint32_t>(seen) != static_cast<uint32_t>(num_taken)) return true;
  } while (seen >> 32 == 0);
  return false;
}

__global__ void __launch_bounds__(kCarryThreads)
    carry_kernel(const __grid_constant__ ep_network_carry_args args) {
  __shared__ unsigned long long best;
  __shared__ ep_network_message message;
  ep_network_queue& queue = *args.queue;
  Random random{static_cast<uint64_t>(args.seed) + 1};
  int32_t num_taken = 0;
  while (true) {
    // All threads draw the same numbers. Each message draws one of its own, and the lowest wins.
    const uint32_t draw = random.next();
    const uint64_t late_ns = args.delay_ns == 0 ? 0 : random.next() % args.delay_ns;
    if (threadIdx.x == 0) best = kNone;
    __syncthreads();
    for (int32_t i = threadIdx.x; i < EP_NETWORK_QUEUE_LENGTH; i += kCarryThreads) {
      if (ptx::load_acquire_sys(reinterpret_cast<const uint32_t*>(&queue.posted[i])) == 0) continue;
      const uint32_t drawn = (draw ^ (i * 2654435761u)) * 2246822519u;
      atomicMin(&best, static_cast<unsigned long long>(drawn) << 32 | static_cast<uint32_t>(i));
    }
    __syncthreads();
    const unsigned long long chosen = best;
    __syncthreads();
    if (chosen == kNone) {
      if (__syncthreads_or(threadIdx.x == 0 && !wait_for_message(queue, num_taken))) return;
      continue;
    }
    ++num_taken;
    const auto place = static_cast<int32_t>(chosen & 0xffffffffu);
    if (threadIdx.x == 0) {
      const volatile ep_network_message& posted = queue.messages[place];
      message = {posted.from, posted.to, posted.num_bytes, posted.value, posted.flag};
      ptx::store_release_sys(reinterpret_cast<uint32_t*>(&queue.posted[place]), 0);
    }
    __syncthreads();
    auto* const flag = reinterpret_cast<network::Flag*>(message.flag);
    const auto raise = [&] {
      if (threadIdx.x != 0) return;
      ptx::fence_acq_rel_sys();
      ptx::store_release_sys(flag, static_cast<network::Flag>(message.value));
    };
    // Only rows: their flags have a stamp. With wrong entries kernels would go astray.
    const bool is_early = queue.early_flags && message.value >> 32 != 0;
    if (is_early) raise();
    pass_time(late_ns);
    copy(message.to, message.from, message.num_bytes);
    __syncthreads();
    if (!is_early) raise();
    __syncthreads();
  }
}

const Kernels kernels("network kernel", Setup::kBesideDispatch, 0, carry_kernel);

}  // namespace

int32_t ep_network_carry(const ep_network_carry_args* args, void* stream) {
  carry_kernel<<<1, kCarryThreads, 0, static_cast<cudaStream_t>(stream)>>>(*args);
  return ep::check_cuda(cudaGetLastError(), "ep_network_carry");
}
