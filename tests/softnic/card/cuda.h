// The few functions of the CUDA driver that a card needs, found when it starts: it is built and
// loaded without a driver. With SOFTNIC_NO_CUDA memory is the host's, for a test without a GPU.
#pragma once
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#ifndef SOFTNIC_NO_CUDA
#include <dlfcn.h>
#endif

#define SOFTNIC_DIE(...)               \
  do {                                 \
    std::fprintf(stderr, "softnic: "); \
    std::fprintf(stderr, __VA_ARGS__); \
    std::fputc('\n', stderr);          \
    _exit(97);                         \
  } while (0)

namespace softnic {

#ifndef SOFTNIC_NO_CUDA

struct Driver {
  void* library = dlopen("libcuda.so.1", RTLD_NOW);
  int (*get_context)(void**);
  int (*set_context)(void*);
  int (*create_stream)(void**, unsigned);
  int (*synchronize)(void*);
  int (*copy)(uint64_t, uint64_t, size_t, void*);
  int (*pin)(void*, size_t, unsigned);
  int (*unpin)(void*);
  int (*allocate_host)(void**, size_t, unsigned);
  int (*allocate)(uint64_t*, size_t);

  Driver() {
    find(&get_context, "cuCtxGetCurrent");
    find(&set_context, "cuCtxSetCurrent");
    find(&create_stream, "cuStreamCreate");
    find(&synchronize, "cuStreamSynchronize");
    find(&copy, "cuMemcpyAsync");
    find(&pin, "cuMemHostRegister_v2");
    find(&unpin, "cuMemHostUnregister");
    find(&allocate_host, "cuMemHostAlloc");
    find(&allocate, "cuMemAlloc_v2");
  }

 private:
  template <class Function>
  void find(Function* function, const char* name) {
    *function = library ? reinterpret_cast<Function>(dlsym(library, name)) : nullptr;
    if (!*function) SOFTNIC_DIE("the CUDA driver has no %s", name);
  }
};

inline Driver& driver() {
  static Driver* const found = new Driver;
  return *found;
}

inline void check(int status, const char* what) {
  if (status) SOFTNIC_DIE("%s: CUDA error %d", what, status);
}

inline void* current_context() {
  void* context = nullptr;
  check(driver().get_context(&context), "cuCtxGetCurrent");
  return context;
}

// Copies of one thread, in order.
class Copies {
 public:
  void start(void* context) {
    check(driver().set_context(context), "cuCtxSetCurrent");
    check(driver().create_stream(&stream_, 1), "cuStreamCreate");  // 1: waits for no other stream
  }
  void copy(uint64_t to, uint64_t from, size_t bytes) {
    check(driver().copy(to, from, bytes, stream_), "cuMemcpyAsync");
  }
  void finish() { check(driver().synchronize(stream_), "cuStreamSynchronize"); }

 private:
  void* stream_ = nullptr;
};

inline void pin(void* memory, size_t bytes) {
  const int status = driver().pin(memory, bytes, 1);
  if (status) std::fprintf(stderr, "softnic: pages are not pinned (CUDA error %d)\n", status);
}
inline void unpin(void* memory) { driver().unpin(memory); }
inline void* pinned_memory(size_t bytes) {
  void* memory = nullptr;
  check(driver().allocate_host(&memory, bytes, 3), "cuMemHostAlloc");  // 3: all GPUs reach it
  std::memset(memory, 0, bytes);
  return memory;
}
inline uint64_t device_memory(size_t bytes) {
  uint64_t memory = 0;
  check(driver().allocate(&memory, bytes), "cuMemAlloc");
  return memory;
}

#else

inline void* current_context() { return nullptr; }
class Copies {
 public:
  void start(void*) {}
  void copy(uint64_t to, uint64_t from, size_t bytes) {
    std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes);
  }
  void finish() {}
};
inline void pin(void*, size_t) {}
inline void unpin(void*) {}
inline void* pinned_memory(size_t bytes) { return std::calloc(1, bytes); }
inline uint64_t device_memory(size_t bytes) {
  return reinterpret_cast<uint64_t>(std::calloc(1, bytes));
}

#endif

}  // namespace softnic
