// The version without a network: several nodes on one host, whose memory is mapped. Messages are
// stores; or, for tests, they wait in a queue for ep_network_carry, which carries them out late.
#pragma once

#include "network/network.cuh"

namespace ep::network {

// Kernels need few enough registers without a bound (see nvshmem.cuh).
constexpr int kMinBlocks = 0;

// A place in the network memory of the rank on the node k after.
__device__ inline uint8_t* memory_of(const ep_network& network, int32_t k) {
  return network.memory_of[k];
}

// Where to write what put() is to send from `from` to `to`, both places in network memory, to the
// node k after. It is the place to send from; but where messages are stores it is the receiver's
// memory itself, and all that is left to put() is the flag.
__device__ inline uint8_t* place_to_write(const ep_network& network, int32_t k, int64_t from,
                                          int64_t to) {
  return network.queue != nullptr ? network.memory + from : memory_of(network, k) + to;
}

// One thread leaves a message for ep_network_carry.
__device__ inline void post(ep_network_queue& queue, const ep_network_message& message) {
  const int32_t place =
      (static_cast<uint32_t>(atomicAdd(&queue.num_posted, 1)) % EP_NETWORK_QUEUE_LENGTH);
  queue.messages[place] = message;
  ptx::fence_acq_rel_sys();
  ptx::store_release_sys(reinterpret_cast<uint32_t*>(&queue.posted[place]), 1);
}

// One thread waits until a line of the given rate could have sent num_bytes, after all that was
// sent before.
__device__ inline void wait_for_line(const ep_network& network, int64_t num_bytes) {
  auto* const free_at = reinterpret_cast<unsigned long long*>(network.free_at_ns);
  const auto takes = static_cast<unsigned long long>(num_bytes * 1000 / network.bytes_per_us);
  atomicMax(free_at, static_cast<unsigned long long>(ptx::global_timer_ns()));
  const unsigned long long before = atomicAdd(free_at, takes);
  while (ptx::global_timer_ns() < before + takes) {
  }
}

// Sends num_bytes, which may be 0, from `from` in this rank's network memory to `to` in that of the
// node k after, and then raises the flag at `flag` there. They stand at place_to_write(). All
// threads of the group call it, and have met after the writes.
template <typename Group>
__device__ inline void put(const ep_peers& peers, const ep_network& network, int32_t k,
                           int64_t from, int64_t to, int64_t num_bytes, int64_t flag, Flag value,
                           Group group) {
  uint8_t* const memory = memory_of(network, k);
  if (network.queue != nullptr) {
    if (group.index() == 0) {
      ptx::fence_acq_rel_sys();
      post(*network.queue,
           {network.memory + from, memory + to, num_bytes, static_cast<int64_t>(value),
            reinterpret_cast<int64_t*>(memory + flag)});
    }
    group.sync();
    return;
  }
  if (group.index() == 0) {
    if (network.bytes_per_us != 0) wait_for_line(network, num_bytes);
    signal(peers, reinterpret_cast<Flag*>(memory + flag), value);
  }
  group.sync();
}

// One thread raises the flag at `flag` of the node k after.
__device__ inline void raise_far(const ep_peers& peers, const ep_network& network, int32_t k,
                                 int64_t flag, Flag value) {
  uint8_t* const memory = memory_of(network, k);
  if (network.queue != nullptr) {
    post(*network.queue, {nullptr, nullptr, 0, static_cast<int64_t>(value),
                          reinterpret_cast<int64_t*>(memory + flag)});
    return;
  }
  signal(peers, reinterpret_cast<Flag*>(memory + flag), value);
}

// Data and flag have come by stores in this order: the acquire of the flag is enough.
__device__ inline void after_wait(const Flag*, Flag) {}

}  // namespace ep::network
