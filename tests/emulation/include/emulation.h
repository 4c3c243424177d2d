// CUDA on the CPU, as far as the kernels of csrc need it, to run them where no GPU is.
//
// A block is a thread of the system; its CUDA threads are coroutines on it, which take turns where
// they wait: at barriers, in collectives of a warp, in loops that spin. Whoever looks at a word in
// vain is left alone until it changes, and a block sleeps when all its threads wait: so a few cores
// run hundreds of waiting warps. A stream is a thread that runs its kernels one after the other.
// Bulk loads are done at once, other copies where they are waited for. Words of 16 bytes are whole
// where they are so on a GPU (looks.h). Memory is that of the CPU, so order is stronger than on a GPU:
// what is tested is the protocol, not the fences.
#pragma once

#include <sched.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <queue>
#include <thread>
#include <tuple>
#include <type_traits>
#include <vector>

#include "looks.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#undef __noinline__
#define __noinline__
#define __align__(n) alignas(n)
#define __launch_bounds__(...)

struct int4 {
  int32_t x, y, z, w;
};
struct float2 {
  float x, y;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline int4 make_int4(int32_t x, int32_t y, int32_t z, int32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

// ---- Coroutines of a block ---------------------------------------------------------------------

namespace emulation {

constexpr int kWarp = 32;

struct Dim {
  uint32_t x = 1;
};

struct Barrier {
  uint64_t generation = 0;
  uint32_t arrived = 0;
  uint32_t votes_or = 0;
  uint32_t votes_and = 1;
  uint32_t result_or = 0;
  uint32_t result_and = 0;
  uint32_t count = 0;
  uint32_t result_count = 0;
};

struct Warp {
  Barrier barrier;
  uint64_t values[2][kWarp];
};

// What a thread waits for until it gets its next turn.
enum class Wait { kNothing, kBarrier, kWord, kTime };

struct Coroutine {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  Dim thread;
  Wait wait = Wait::kNothing;
  const uint64_t* generation = nullptr;  // kBarrier: until it is no longer `seen`
  uint64_t seen = 0;
  Looks looks;             // kWord: until one of them changes
  bool read_time = false;  // and has done nothing since that could be waited for
  bool done = false;
};

struct Block {
  Dim block, grid, block_dim;
  std::vector<Coroutine> threads;
  std::vector<Warp> warps;
  Barrier all;
  Barrier named[16];
  uint32_t live = 0;
  const char* kernel = nullptr;
  Coroutine* current = nullptr;
  void* scheduler = nullptr;
  uint8_t* shared = nullptr;
  std::function<void()> body;
};

extern thread_local Block* the_block;

extern "C" void emulation_switch(void** from, void* to);

// Gives the other threads of the block their turns.
inline void yield(Wait wait) {
  Block& block = *the_block;
  block.current->wait = wait;
  emulation_switch(&block.current->stack_pointer, block.scheduler);
}

inline void wait_for(const uint64_t& generation, uint64_t seen) {
  Coroutine& me = *the_block->current;
  me.generation = &generation;
  me.seen = seen;
  yield(Wait::kBarrier);
}

// Reads a word that others write. Whoever finds the same again and again waits for a change, or for
// a turn now and then.
template <typename T>
T look(const T* word) {
  Coroutine& me = *the_block->current;
  me.read_time = false;
  T value = load(word);
  const Look before(word, value);
  if (!me.looks.is_in_vain(before)) return value;
  yield(Wait::kWord);
  value = load(word);
  // Other words of the wait are looked at next. Those that are no part of it are forgotten.
  const Look now(word, value);
  me.looks.begin(now, now.seen == before.seen);
  return value;
}

// Called where the time is read: whoever reads it again lets it pass.
inline void read_time() {
  Coroutine& me = *the_block->current;
  if (me.read_time) yield(Wait::kTime);
  me.read_time = true;
}

// The first fault of a rank: keeps what all threads wait for, see emulation_waits().
void note_fault();

// Counts a thread in. True where it is the last one, which opens the barrier for the others.
inline bool count_in(Barrier& barrier, uint32_t expected, uint32_t vote) {
  barrier.votes_or |= vote != 0;
  barrier.votes_and &= vote != 0;
  barrier.count += vote != 0;
  if (++barrier.arrived < expected) return false;
  barrier.result_or = barrier.votes_or;
  barrier.result_and = barrier.votes_and;
  barrier.result_count = barrier.count;
  barrier.votes_or = barrier.arrived = barrier.count = 0;
  barrier.votes_and = 1;
  ++barrier.generation;
  return true;
}

inline void arrive(Barrier& barrier, uint32_t expected, uint32_t vote) {
  the_block->current->looks.meet();
  const uint64_t generation = barrier.generation;
  if (!count_in(barrier, expected, vote)) wait_for(barrier.generation, generation);
}

inline uint32_t thread_index() { return the_block->current->thread.x; }
inline Warp& my_warp() { return the_block->warps[thread_index() / kWarp]; }

// All lanes show a value; f sees all 32.
template <typename T, typename F>
auto collective(T value, const F& f) {
  static_assert(sizeof(T) <= 8);
  Warp& warp = my_warp();
  uint64_t* const values = warp.values[warp.barrier.generation & 1];
  std::memcpy(&values[thread_index() % kWarp], &value, sizeof(T));
  arrive(warp.barrier, kWarp, 1);
  return f([values](int lane) {
    T v;
    std::memcpy(&v, &values[lane], sizeof(T));
    return v;
  });
}

void launch(const char* kernel, uint32_t grid, uint32_t block, int64_t shared, void* stream,
            std::function<void()> body);

}  // namespace emulation

namespace emulation {

inline uint32_t block_index() { return the_block->block.x; }
inline uint32_t num_blocks() { return the_block->grid.x; }
inline uint32_t num_threads() { return the_block->block_dim.x; }

template <uint32_t (*kGet)()>
struct Number {
  operator uint32_t() const { return kGet(); }
};
template <uint32_t (*kGet)()>
struct Index {
  Number<kGet> x;
};

}  // namespace emulation

inline const emulation::Index<emulation::thread_index> threadIdx{};
inline const emulation::Index<emulation::block_index> blockIdx{};
inline const emulation::Index<emulation::num_blocks> gridDim{};
inline const emulation::Index<emulation::num_threads> blockDim{};

inline void __syncthreads() { emulation::arrive(emulation::the_block->all, emulation::the_block->live, 1); }
inline int __syncthreads_and(int vote) {
  emulation::arrive(emulation::the_block->all, emulation::the_block->live, vote);
  return emulation::the_block->all.result_and;
}
inline int __syncthreads_or(int vote) {
  emulation::arrive(emulation::the_block->all, emulation::the_block->live, vote);
  return emulation::the_block->all.result_or;
}
inline int __syncthreads_count(int vote) {
  emulation::arrive(emulation::the_block->all, emulation::the_block->live, vote);
  return emulation::the_block->all.result_count;
}
inline void __syncwarp() { emulation::collective(0, [](auto) { return 0; }); }
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulation::collective(value, [lane](auto at) { return at(lane % 32); });
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int delta) {
  const int lane = emulation::thread_index() % 32;
  return emulation::collective(value, [=](auto at) { return at(lane >= delta ? lane - delta : lane); });
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  const int lane = emulation::thread_index() % 32;
  return emulation::collective(value, [=](auto at) { return at(lane ^ mask); });
}
template <typename T>
uint32_t __match_any_sync(unsigned, T value) {
  return emulation::collective(value, [value](auto at) {
    uint32_t same = 0;
    for (int i = 0; i < 32; ++i) same |= static_cast<uint32_t>(at(i) == value) << i;
    return same;
  });
}
inline uint32_t __reduce_or_sync(unsigned, uint32_t value) {
  return emulation::collective(value, [](auto at) {
    uint32_t all = 0;
    for (int i = 0; i < 32; ++i) all |= at(i);
    return all;
  });
}
inline uint32_t __ballot_sync(unsigned, bool vote) {
  return emulation::collective(vote, [](auto at) {
    uint32_t votes = 0;
    for (int i = 0; i < 32; ++i) votes |= static_cast<uint32_t>(at(i)) << i;
    return votes;
  });
}
inline bool __all_sync(unsigned m, bool vote) { return __ballot_sync(m, vote) == 0xffffffffu; }
inline bool __any_sync(unsigned m, bool vote) { return __ballot_sync(m, vote) != 0; }
template <typename T>
T __reduce_min_sync(unsigned, T value) {
  return emulation::collective(value, [](auto at) {
    T least = at(0);
    for (int i = 1; i < 32; ++i) least = at(i) < least ? at(i) : least;
    return least;
  });
}
template <typename T>
T __reduce_max_sync(unsigned, T value) {
  return emulation::collective(value, [](auto at) {
    T most = at(0);
    for (int i = 1; i < 32; ++i) most = at(i) > most ? at(i) : most;
    return most;
  });
}

inline float __fdividef(float a, float b) { return a / b; }
// Passes over every NaN; that of the C library makes one of a signalling one.
inline float emulation_fmaxf(float a, float b) { return std::isnan(a) || b > a ? b : a; }
#define fmaxf emulation_fmaxf
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline int __popcll(uint64_t v) { return __builtin_popcountll(v); }
inline int __popc(uint32_t v) { return __builtin_popcount(v); }
inline int __ffs(uint32_t v) { return __builtin_ffs(static_cast<int>(v)); }
inline float __uint_as_float(uint32_t v) {
  float f;
  std::memcpy(&f, &v, 4);
  return f;
}
inline uint32_t __float_as_uint(float f) {
  uint32_t v;
  std::memcpy(&v, &f, 4);
  return v;
}
inline void __threadfence_system() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline int64_t clock64() { return std::chrono::steady_clock::now().time_since_epoch().count(); }

template <typename T, typename V>
T atomicAdd(T* p, V v) {
  return __atomic_fetch_add(p, static_cast<T>(v), __ATOMIC_SEQ_CST);
}
template <typename T, typename V>
T atomicOr(T* p, V v) {
  return __atomic_fetch_or(p, static_cast<T>(v), __ATOMIC_SEQ_CST);
}
template <typename T, typename V>
T atomicExch(T* p, V v) {
  return __atomic_exchange_n(p, static_cast<T>(v), __ATOMIC_SEQ_CST);
}
// Faults alone are raised by it.
inline int32_t atomicCAS(int32_t* p, int32_t old, int32_t value) {
  if (__atomic_compare_exchange_n(p, &old, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
    emulation::note_fault();
  }
  return old;
}
template <typename T, typename V>
T atomicMin(T* p, V value) {
  const T v = static_cast<T>(value);
  T old = __atomic_load_n(p, __ATOMIC_SEQ_CST);
  while (v < old && !__atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
  }
  return old;
}
template <typename T, typename V>
T atomicMax(T* p, V value) {
  const T v = static_cast<T>(value);
  T old = __atomic_load_n(p, __ATOMIC_SEQ_CST);
  while (v > old && !__atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
  }
  return old;
}

template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}

// ---- The runtime, as far as the host code uses it ----------------------------------------------

using cudaStream_t = void*;
using cudaEvent_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorNotReady = 600 };
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributePreferredSharedMemoryCarveout
};
constexpr int cudaSharedmemCarveoutMaxShared = 100;
struct cudaFuncAttributes {
  size_t localSizeBytes = 0;
};
enum cudaLimit { cudaLimitStackSize };
inline cudaError_t cudaDeviceGetLimit(size_t*, cudaLimit) { return cudaSuccess; }
inline cudaError_t cudaDeviceSetLimit(cudaLimit, size_t) { return cudaSuccess; }
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "?"; }
inline const char* cudaGetErrorName(cudaError_t) { return "?"; }
// Asked now and then by a host thread that waits: the cores are for those that it waits for.
inline cudaError_t cudaStreamQuery(cudaStream_t) {
  std::this_thread::sleep_for(std::chrono::microseconds(100));
  return cudaErrorNotReady;
}
// Copies are done in their turn on the stream, late at random where a test says so, as warps begin. Flags of the
// stream itself are cuStreamWriteValue32's.
enum cudaMemcpyKind { cudaMemcpyDeviceToDevice };
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream);
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
constexpr unsigned long long cudaEnableDefault = 0;
#define CUDART_VERSION 13000
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version,
                                             unsigned long long flags,
                                             cudaDriverEntryPointQueryResult* found);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned);

struct cudaLaunchAttributeValue {
  int programmaticStreamSerializationAllowed;
};
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  uint32_t gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
// Kernels that may start early start in their turn.
template <typename... Params>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Params... params) {
  emulation::launch("early", config->gridDim, config->blockDim, config->dynamicSmemBytes, config->stream,
                    [=] { kernel(params...); });
  return cudaSuccess;
}
