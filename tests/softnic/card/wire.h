// The wire: rings of slots in memory that the processes of one machine share. A process has one
// ring for what each other process sends to it. The memory is a memfd, which others open through
// /proc: it needs no name, and no room in /dev/shm.
#pragma once
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdio>

#include "cuda.h"

namespace softnic {

constexpr size_t kSlots = 32;
constexpr size_t kChunkBytes = 256 << 10;  // a longer message takes several slots

enum class Kind : uint8_t { kNothing, kPut, kAtomic, kGet, kReply, kAtomicReply };

// A message on the wire; its bytes follow.
struct alignas(128) Slot {
  Kind kind;
  uint8_t op, width;
  uint32_t size;
  uint64_t to, from, value, compare, result, result_flag, cookie;

  char* bytes() { return reinterpret_cast<char*>(this + 1); }
};
constexpr size_t kSlotBytes = sizeof(Slot) + kChunkBytes;

// Positions count slots from the start on: [tail, head) are full.
struct RingHead {
  alignas(128) std::atomic<uint64_t> head;
  alignas(128) std::atomic<uint64_t> tail;
};
constexpr size_t kRingBytes = sizeof(RingHead) + kSlots * kSlotBytes;

class Ring {
 public:
  Ring() = default;
  explicit Ring(char* memory) : head_(reinterpret_cast<RingHead*>(memory)) {}

  Slot* slot(uint64_t position) const {
    char* const first = reinterpret_cast<char*>(head_ + 1);
    return reinterpret_cast<Slot*>(first + position % kSlots * kSlotBytes);
  }
  uint64_t head() const { return head_->head.load(std::memory_order_acquire); }
  uint64_t tail() const { return head_->tail.load(std::memory_order_acquire); }
  bool is_full() const { return head() - tail() >= kSlots; }
  void set_head(uint64_t head) const { head_->head.store(head, std::memory_order_release); }
  void set_tail(uint64_t tail) const { head_->tail.store(tail, std::memory_order_release); }

 private:
  RingHead* head_ = nullptr;
};

// A process's rings, or another one's as mapped here.
class SharedMemory {
 public:
  // A name that another process can map it by.
  struct Name {
    char path[64];
  };

  static SharedMemory create(size_t bytes, Name* name) {
    const int file = memfd_create("softnic", MFD_CLOEXEC);
    if (file < 0 || ftruncate(file, bytes)) SOFTNIC_DIE("no memory to share");
    std::snprintf(name->path, sizeof name->path, "/proc/%d/fd/%d", getpid(), file);
    return SharedMemory(file, bytes);
  }
  static SharedMemory open(const Name& name, size_t bytes) {
    const int file = ::open(name.path, O_RDWR | O_CLOEXEC);
    if (file < 0) SOFTNIC_DIE("cannot open %s: not root, or the process is gone", name.path);
    SharedMemory memory(file, bytes);
    close(file);
    return memory;
  }

  char* ring(int process) const { return memory_ + process * kRingBytes; }
  void unmap() {
    unpin(memory_);
    munmap(memory_, bytes_);
  }

 private:
  SharedMemory(int file, size_t bytes) : bytes_(bytes) {
    void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (memory == MAP_FAILED) SOFTNIC_DIE("cannot map memory");
    memory_ = static_cast<char*>(memory);
    pin(memory_, bytes_);
  }

  char* memory_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace softnic
