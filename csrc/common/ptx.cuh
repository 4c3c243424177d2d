// Every PTX instruction that the kernels use, wrapped once.
#pragma once

#include <cstdint>

namespace ep::ptx {

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- Flags between GPUs ------------------------------------------------------------------------

__device__ inline uint32_t load_acquire_sys(const uint32_t* flag) {
  uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}

__device__ inline uint64_t load_acquire_sys(const uint64_t* flag) {
  uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(flag) : "memory");
  return value;
}

__device__ inline void store_release_sys(uint32_t* flag, uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

__device__ inline void store_release_sys(uint64_t* flag, uint64_t value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(flag), "l"(value) : "memory");
}

// Behind a fence: the two together release, as store_release_sys does, which would fence again.
__device__ inline void store_relaxed_sys(uint32_t* flag, uint32_t value) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

__device__ inline void store_relaxed_sys(uint64_t* flag, uint64_t value) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(flag), "l"(value) : "memory");
}

// Followed by a relaxed store it is a release, and a cumulative one: what other threads wrote
// before they met this one at a barrier is ordered too.
__device__ inline void fence_acq_rel_sys() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

// The same between the blocks of one GPU.
__device__ inline void fence_acq_rel_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

__device__ inline uint64_t global_timer_ns() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

// ---- Words between the warps of a block, in shared memory ---------------------------------------

// By atomics: racecheck takes other accesses without a barrier for races. Zero is an empty word.

// Takes what another thread has put there, and all that it wrote before.
__device__ inline uint64_t take_from_block(uint64_t* word) {
  uint64_t value;
  asm volatile("atom.acquire.cta.shared::cta.exch.b64 %0, [%1], 0;"
               : "=l"(value)
               : "r"(shared_address(word))
               : "memory");
  return value;
}

// Puts a value there for another thread; false where the one before was not taken yet.
__device__ inline bool put_into_block(uint64_t* word, uint64_t value) {
  uint64_t before;
  asm volatile("atom.release.cta.shared::cta.cas.b64 %0, [%1], 0, %2;"
               : "=l"(before)
               : "r"(shared_address(word)), "l"(value)
               : "memory");
  return before == 0;
}

// ---- Kernels that follow one another -----------------------------------------------------------

// When all blocks have said this, the next kernel of the stream may start, if it was launched to
// start early.
__device__ inline void let_next_kernel_start() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// In a kernel that was launched to start early: waits until the one before it is complete and what
// it wrote is visible.
__device__ inline void wait_for_kernel_before() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

// ---- Bulk copies between global and shared memory ----------------------------------------------
//
// Addresses and sizes are multiples of 16 bytes. They belong to the asynchronous proxy: ordinary
// accesses of the same memory need the proxy fences below.

__device__ inline void fence_proxy_async_global() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

__device__ inline void fence_proxy_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ inline void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

// Orders barrier_init before what other threads and bulk loads do with the barrier.
__device__ inline void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives, and makes the phase wait for `bytes` of bulk loads too.
__device__ inline void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// Waits for loads that were issued before. They are of this GPU's own memory and end, so this needs
// no bound.
__device__ inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t done = 0;
  do {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!done);
}

__device__ inline void bulk_load(void* shared, const void* global, uint32_t bytes,
                                 uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

__device__ inline void bulk_store(void* global, const void* shared, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
               "r"(shared_address(shared)), "r"(bytes)
               : "memory");
}

// Bulk stores are waited for by groups, and by the thread that issued them.
__device__ inline void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// All but the newest kPending groups have read their shared memory: it may be written again.
template <int kPending>
__device__ inline void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// All but the newest kPending groups have written global memory.
template <int kPending>
__device__ inline void bulk_wait_written() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- 16 bytes at a time ------------------------------------------------------------------------
//
// Addresses `shared` are those of shared_address().

// Loads past L1, so it sees what other GPUs have written. Where the condition is false nothing is
// loaded, and *v means nothing.
__device__ inline void load_global_if(bool condition, uint4* v, const uint4* pointer) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.u32 p, %5, 0;\n"
      "@p ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];\n"
      "}"
      : "=r"(v->x), "=r"(v->y), "=r"(v->z), "=r"(v->w)
      : "l"(pointer), "r"(static_cast<uint32_t>(condition))
      : "memory");
}

// A load that stays where it stands in the program: so it can be on its way early.
__device__ inline uint32_t load_global_now(const uint32_t* pointer) {
  uint32_t value;
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(value) : "l"(pointer) : "memory");
  return value;
}

__device__ inline uint64_t load_shared_u64(uint32_t shared) {
  uint64_t value;
  asm volatile("ld.shared.u64 %0, [%1];" : "=l"(value) : "r"(shared) : "memory");
  return value;
}

__device__ inline uint32_t load_shared_u32(uint32_t shared) {
  uint32_t value;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(shared) : "memory");
  return value;
}

// A store to global memory through a pointer that the compiler does not know to be global.
__device__ inline void store_global(uint4* pointer, const uint4& v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(pointer), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}

// 16 bytes that go to, or come from, another GPU as a whole: .b128 is single-copy atomic (PTX 8.3).
// Nothing else is ordered by it. Where the condition is false nothing is loaded, and *v is what it
// was: after a branch around a load the compiler would wait for all that are on their way.
__device__ inline void load_word_if(bool condition, uint4* v, const uint4* pointer) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      ".reg .b128 word;\n"
      ".reg .b64 low, high;\n"
      "setp.ne.u32 p, %5, 0;\n"
      "mov.b64 low, {%0, %1};\n"
      "mov.b64 high, {%2, %3};\n"
      "mov.b128 word, {low, high};\n"
      "@p ld.relaxed.sys.global.b128 word, [%4];\n"
      "mov.b128 {low, high}, word;\n"
      "mov.b64 {%0, %1}, low;\n"
      "mov.b64 {%2, %3}, high;\n"
      "}"
      : "+r"(v->x), "+r"(v->y), "+r"(v->z), "+r"(v->w)
      : "l"(pointer), "r"(static_cast<uint32_t>(condition))
      : "memory");
}

__device__ inline uint4 load_word(const uint4* pointer) {
  uint4 v;
  asm volatile(
      "{\n"
      ".reg .b128 word;\n"
      ".reg .b64 low, high;\n"
      "ld.relaxed.sys.global.b128 word, [%4];\n"
      "mov.b128 {low, high}, word;\n"
      "mov.b64 {%0, %1}, low;\n"
      "mov.b64 {%2, %3}, high;\n"
      "}"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(pointer)
      : "memory");
  return v;
}

__device__ inline void store_word(uint4* pointer, const uint4& v) {
  asm volatile(
      "{\n"
      ".reg .b128 word;\n"
      ".reg .b64 low, high;\n"
      "mov.b64 low, {%1, %2};\n"
      "mov.b64 high, {%3, %4};\n"
      "mov.b128 word, {low, high};\n"
      "st.relaxed.sys.global.b128 [%0], word;\n"
      "}" ::"l"(pointer),
      "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
      : "memory");
}

// ---- Copies of single words into shared memory -------------------------------------------------
//
// By each thread for itself: what it has copied, it may read when it has waited for it.

__device__ inline void copy_word(uint4* shared, const uint4* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)),
               "l"(global)
               : "memory");
}

__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// All but the newest kPending groups are there.
template <int kPending>
__device__ inline void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- Barriers of some warps of a block ---------------------------------------------------------

// Waits for `threads` threads of whole warps. Number 0 is that of __syncthreads.
__device__ inline void named_barrier(int32_t number, int32_t threads) {
  asm volatile("barrier.cta.sync.aligned %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// Counts as having come to it, and waits for nobody.
__device__ inline void named_arrive(int32_t number, int32_t threads) {
  asm volatile("barrier.cta.arrive.aligned %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

}  // namespace ep::ptx
