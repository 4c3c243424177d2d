// Streams, blocks and coroutines of emulation.h.

#include "emulation.h"

asm(R"(
.text
.globl emulation_switch
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace emulation {

thread_local Block* the_block = nullptr;

namespace {

constexpr size_t kStackBytes = 64 * 1024;

void enter() {
  Block& block = *the_block;
  block.body();
  block.current->done = true;
  --block.live;
  yield();
  std::abort();
}

void prepare(Coroutine& thread) {
  thread.stack = static_cast<char*>(std::malloc(kStackBytes));
  auto top = reinterpret_cast<uintptr_t>(thread.stack + kStackBytes) & ~uintptr_t{15};
  auto* stack = reinterpret_cast<void**>(top);
  *--stack = nullptr;
  *--stack = reinterpret_cast<void*>(&enter);
  for (int i = 0; i < 6; ++i) *--stack = nullptr;
  thread.stack_pointer = stack;
}

void run_block(Block& block, int64_t shared_bytes) {
  the_block = &block;
  std::vector<uint8_t> shared(shared_bytes + 256);
  block.shared = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(shared.data()) + 255) / 256 * 256);
  // No thread may rely on what was in shared memory before.
  std::memset(block.shared, 0xa5, shared_bytes);
  for (Coroutine& thread : block.threads) prepare(thread);
  while (block.live > 0) {
    block.spun = false;
    for (Coroutine& thread : block.threads) {
      if (thread.done) continue;
      if (thread.waits_for != nullptr && *thread.waits_for == thread.seen) continue;
      thread.waits_for = nullptr;
      block.current = &thread;
      emulation_switch(&block.scheduler, thread.stack_pointer);
    }
    if (block.spun) sched_yield();
  }
  for (Coroutine& thread : block.threads) std::free(thread.stack);
}

struct Stream {
  std::mutex mutex;
  std::condition_variable changed;
  std::queue<std::function<void()>> tasks;
  bool busy = false;
  std::thread worker;

  Stream() : worker([this] { work(); }) { worker.detach(); }
  void work() {
    std::unique_lock<std::mutex> lock(mutex);
    while (true) {
      changed.wait(lock, [this] { return !tasks.empty(); });
      auto task = std::move(tasks.front());
      tasks.pop();
      busy = true;
      lock.unlock();
      task();
      lock.lock();
      busy = false;
      changed.notify_all();
    }
  }
  void push(std::function<void()> task) {
    const std::lock_guard<std::mutex> lock(mutex);
    tasks.push(std::move(task));
    changed.notify_all();
  }
  void synchronize() {
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [this] { return tasks.empty() && !busy; });
  }
};

struct Event {
  std::mutex mutex;
  std::condition_variable changed;
  bool happened = false;
};

std::mutex registry_mutex;
std::map<void*, Stream*> streams;
std::map<void*, std::shared_ptr<Event>> events;

Stream& stream_of(void* id) {
  const std::lock_guard<std::mutex> lock(registry_mutex);
  Stream*& stream = streams[id];
  if (stream == nullptr) stream = new Stream();
  return *stream;
}

}  // namespace

void launch(uint32_t grid, uint32_t block_threads, int64_t shared, void* stream,
            std::function<void()> body) {
  if (block_threads % kWarp) std::abort();
  stream_of(stream).push([=] {
    std::vector<std::thread> blocks;
    for (uint32_t b = 0; b < grid; ++b) {
      blocks.emplace_back([=] {
        Block block;
        block.block.x = b;
        block.grid.x = grid;
        block.block_dim.x = block_threads;
        block.threads.resize(block_threads);
        block.warps.resize(block_threads / kWarp);
        for (uint32_t t = 0; t < block_threads; ++t) block.threads[t].thread.x = t;
        block.live = block_threads;
        block.body = body;
        run_block(block, shared);
      });
    }
    for (std::thread& thread : blocks) thread.join();
  });
}

}  // namespace emulation

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  auto state = std::make_shared<emulation::Event>();
  {
    const std::lock_guard<std::mutex> lock(emulation::registry_mutex);
    emulation::events[event] = state;
  }
  emulation::stream_of(stream).push([state] {
    const std::lock_guard<std::mutex> lock(state->mutex);
    state->happened = true;
    state->changed.notify_all();
  });
  return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  std::shared_ptr<emulation::Event> state;
  {
    const std::lock_guard<std::mutex> lock(emulation::registry_mutex);
    state = emulation::events[event];
  }
  emulation::stream_of(stream).push([state] {
    std::unique_lock<std::mutex> lock(state->mutex);
    state->changed.wait(lock, [&] { return state->happened; });
  });
  return cudaSuccess;
}

extern "C" __attribute__((visibility("default"))) void emulation_synchronize(void* stream) {
  emulation::stream_of(stream).synchronize();
}
