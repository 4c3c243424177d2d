// The host's clock, and what the host notes of an operation: when it was called, and how long its
// rows are. Done here and not in Python, where it would take a hundredth of a call.
#pragma once

#include <ctime>

#include "common/peers.cuh"

namespace ep {

inline int64_t host_now_ns() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return static_cast<int64_t>(time.tv_sec) * 1000000000 + time.tv_nsec;
}

// Called before the launch of the kernel that writes when an operation begins. Where row_bytes is
// not known yet it is 0, and Python fills it in behind the launch.
inline void note_call(const ep_peers& peers, int32_t row_bytes) {
  if (!kRecords || peers.call_offset == 0) return;
  auto* call = reinterpret_cast<ep_call*>(reinterpret_cast<intptr_t>(peers.record) +
                                          static_cast<intptr_t>(peers.call_offset));
  call->called_ns = host_now_ns();
  call->row_bytes = row_bytes;
}

}  // namespace ep
