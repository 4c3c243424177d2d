// The instructions of csrc/common/ptx.cuh, on the CPU.
#pragma once

#include "emulation.h"

namespace ep::ptx {

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(pointer) - emulation::the_block->shared);
}

template <typename T>
T load_acquire_sys(const T* flag) {
  return emulation::look(flag);
}
inline void store_release_sys(uint32_t* flag, uint32_t value) {
  __atomic_store_n(flag, value, __ATOMIC_RELEASE);
}
inline void store_release_sys(uint64_t* flag, uint64_t value) {
  __atomic_store_n(flag, value, __ATOMIC_RELEASE);
}
template <typename T>
void store_relaxed_sys(T* flag, T value) {
  __atomic_store_n(flag, value, __ATOMIC_RELAXED);
}
inline uint64_t take_from_block(uint64_t* word) {
  const uint64_t value = emulation::look(word);
  if (value != 0) *word = 0;
  return value;
}
inline bool put_into_block(uint64_t* word, uint64_t value) {
  if (emulation::look(word) != 0) return false;
  *word = value;
  return true;
}
inline void fence_acq_rel_sys() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline void fence_acq_rel_gpu() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline uint64_t global_timer_ns() {
  emulation::read_time();
  return static_cast<uint64_t>(clock64());
}
inline void let_next_kernel_start() {}
inline void wait_for_kernel_before() {}
inline void fence_proxy_async_global() {}
inline void fence_proxy_async_shared() {}

// An mbarrier of one arrival: bytes still to come in the upper half, phases in the lower.
inline void barrier_init(uint64_t* barrier, uint32_t) { *barrier = 0; }
inline void fence_barrier_init() {}
inline void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  if (*barrier >> 32) std::abort();  // the phase before is not complete
  *barrier += static_cast<uint64_t>(bytes) << 32;
}
inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  while ((*barrier & 1) == parity) emulation::yield(emulation::Wait::kNothing);
}
inline void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  if (bytes % 16 || reinterpret_cast<uintptr_t>(shared) % 16 ||
      reinterpret_cast<uintptr_t>(global) % 16 || *barrier >> 32 < bytes) {
    std::abort();
  }
  std::memcpy(shared, global, bytes);
  *barrier -= static_cast<uint64_t>(bytes) << 32;
  if (*barrier >> 32 == 0) ++*barrier;
}

// Copies of which several are on their way are done where they are waited for: one that is waited
// for too late shows.
struct Copy {
  void* to;
  const void* from;
  uint32_t bytes;
  uint64_t group;
};
struct Copies {
  std::vector<Copy> pending;
  uint64_t open = 0;  // number of the open group

  void begin(void* to, const void* from, uint32_t bytes) {
    if (bytes % 16 || reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) {
      std::abort();
    }
    pending.push_back({to, from, bytes, open});
  }
  // All but the newest groups.
  void finish(uint64_t but_newest) {
    size_t kept = 0;
    for (const Copy& copy : pending) {
      if (copy.group + but_newest < open) {
        std::memcpy(copy.to, copy.from, copy.bytes);
      } else {
        pending[kept++] = copy;
      }
    }
    pending.resize(kept);
  }
};
enum class Of { kBulkStores, kWords };
template <Of kOf>
Copies& my_copies() {
  static thread_local std::map<emulation::Coroutine*, Copies> copies;
  static thread_local emulation::Block* block = nullptr;
  if (block != emulation::the_block) {
    copies.clear();
    block = emulation::the_block;
  }
  return copies[emulation::the_block->current];
}
inline void bulk_store(void* global, const void* shared, uint32_t bytes) {
  my_copies<Of::kBulkStores>().begin(global, shared, bytes);
}
inline void bulk_commit() { ++my_copies<Of::kBulkStores>().open; }
template <int kPending>
void bulk_wait_written() {
  my_copies<Of::kBulkStores>().finish(kPending);
}
template <int kPending>
void bulk_wait_read() {
  bulk_wait_written<kPending>();
}
inline void copy_word(uint4* shared, const uint4* global) {
  my_copies<Of::kWords>().begin(shared, global, sizeof *shared);
}
inline void copy_commit() { ++my_copies<Of::kWords>().open; }
template <int kPending>
void copy_wait() {
  my_copies<Of::kWords>().finish(kPending);
}

inline void load_global_if(bool condition, uint4* v, const uint4* pointer) {
  if (condition) std::memcpy(v, pointer, 16);
}
inline uint64_t load_shared_u64(uint32_t shared) {
  uint64_t value;
  std::memcpy(&value, emulation::the_block->shared + shared, 8);
  return value;
}
inline uint32_t load_shared_u32(uint32_t shared) {
  uint32_t value;
  std::memcpy(&value, emulation::the_block->shared + shared, 4);
  return value;
}
inline void store_global(uint4* pointer, const uint4& v) { std::memcpy(pointer, &v, 16); }

inline uint4 load_word(const uint4* pointer) { return emulation::look(pointer); }
inline void load_word_if(bool condition, uint4* v, const uint4* pointer) {
  if (condition) *v = load_word(pointer);
}
inline void store_word(uint4* pointer, const uint4& v) {
  if (!emulation::tears_words) return emulation::store_whole(pointer, v);
  static thread_local uint32_t count = 0;
  uint64_t halves[2];
  std::memcpy(halves, &v, sizeof halves);
  const uint32_t first = ++count % 2;
  auto* const to = reinterpret_cast<uint64_t*>(pointer);
  __atomic_store_n(to + first, halves[first], __ATOMIC_RELEASE);
  emulation::yield(emulation::Wait::kNothing);
  __atomic_store_n(to + 1 - first, halves[1 - first], __ATOMIC_RELEASE);
}
inline uint32_t load_global_now(const uint32_t* pointer) {
  return __atomic_load_n(pointer, __ATOMIC_RELAXED);
}

inline void named_barrier(int32_t number, int32_t threads) {
  emulation::arrive(emulation::the_block->named[number], threads, 1);
}
inline void named_arrive(int32_t number, int32_t threads) {
  emulation::count_in(emulation::the_block->named[number], threads, 1);
}

}  // namespace ep::ptx
