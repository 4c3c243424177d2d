// Streams, blocks and coroutines of emulation.h.

#include <sys/prctl.h>

#include <algorithm>
#include <cstdio>
#include <set>
#include <string>

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
std::atomic<bool> tears_words{false};

namespace {

constexpr size_t kStackBytes = 64 * 1024;

void enter() {
  Block& block = *the_block;
  block.body();
  block.current->done = true;
  --block.live;
  yield(Wait::kNothing);
  std::abort();
}

// Stacks of threads that are done, for others.
std::mutex stacks_mutex;
std::vector<char*> stacks;

void prepare(Coroutine& thread) {
  {
    const std::lock_guard<std::mutex> lock(stacks_mutex);
    if (!stacks.empty()) {
      thread.stack = stacks.back();
      stacks.pop_back();
    }
  }
  if (thread.stack == nullptr) thread.stack = static_cast<char*>(std::malloc(kStackBytes));
  auto top = reinterpret_cast<uintptr_t>(thread.stack + kStackBytes) & ~uintptr_t{15};
  auto* stack = reinterpret_cast<void**>(top);
  *--stack = nullptr;
  *--stack = reinterpret_cast<void*>(&enter);
  for (int i = 0; i < 6; ++i) *--stack = nullptr;
  thread.stack_pointer = stack;
}

// True where a thread has nothing to do before somebody else does something.
bool waits(const Coroutine& thread) {
  switch (thread.wait) {
    case Wait::kBarrier:
      return *thread.generation == thread.seen;
    case Wait::kWord:
      return thread.looks.are_same();
    default:
      return thread.wait == Wait::kTime;
  }
}

// How long a block sleeps that has found nothing to do `idle` times in a row.
void rest(int idle) {
  constexpr int kYields = 2, kStepUs = 10, kMostUs = 200;
  if (idle <= kYields) {
    sched_yield();
    return;
  }
  const int us = std::min(kStepUs * (idle - kYields), kMostUs);
  std::this_thread::sleep_for(std::chrono::microseconds(us));
}

std::atomic<int> longest_delay_us{0};
using Time = std::chrono::steady_clock::time_point;

uint64_t random_number() {
  static thread_local uint64_t state = reinterpret_cast<uintptr_t>(&state) ^ clock64();
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return state >> 33;
}

// Up to the longest, at random.
std::chrono::microseconds random_delay() {
  const int longest = longest_delay_us;
  return std::chrono::microseconds(longest == 0 ? 0 : random_number() % longest);
}

// Blocks that run, and what they waited for when a fault was raised.
std::mutex blocks_mutex;
std::set<Block*> blocks;
std::string noted;

void run_block(Block& block, int64_t shared_bytes) {
  // Whoever looks at a word gets a turn this often, for there may be a fault or a timeout: of rounds
  // in which nobody had work, and of all.
  constexpr int kTurn = 16, kTurnOfAll = 256;
  prctl(PR_SET_TIMERSLACK, 1000);
  the_block = &block;
  std::vector<uint8_t> shared(shared_bytes + 256);
  block.shared = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(shared.data()) + 255) / 256 * 256);
  // No thread may rely on what was in shared memory before.
  std::memset(block.shared, 0xa5, shared_bytes);
  for (Coroutine& thread : block.threads) prepare(thread);
  {
    const std::lock_guard<std::mutex> lock(blocks_mutex);
    blocks.insert(&block);
  }
  // Few warps are late, and by much: kernels have delays of their own, which the others stand in.
  constexpr int kOneIn = 8, kTimes = 8;
  const Time start = std::chrono::steady_clock::now();
  std::vector<Time> begins(block.warps.size(), start);
  for (Time& begin : begins) {
    if (random_number() % kOneIn == 0) begin += kTimes * random_delay();
  }
  int idle = 0, rounds = 0;
  while (block.live > 0) {
    bool has_work = false;
    const Time now = std::chrono::steady_clock::now();
    const bool all_look = idle % kTurn == kTurn - 1 || ++rounds % kTurnOfAll == 0;
    for (Coroutine& thread : block.threads) {
      if (thread.done || begins[thread.thread.x / kWarp] > now) continue;
      if (waits(thread)) {
        const bool has_turn = thread.wait == Wait::kTime || (thread.wait == Wait::kWord && all_look);
        if (!has_turn) continue;
      } else {
        has_work = true;
      }
      block.current = &thread;
      emulation_switch(&block.scheduler, thread.stack_pointer);
    }
    idle = has_work ? 0 : idle + 1;
    if (!has_work) rest(idle);
  }
  {
    const std::lock_guard<std::mutex> lock(blocks_mutex);
    blocks.erase(&block);
  }
  const std::lock_guard<std::mutex> lock(stacks_mutex);
  for (Coroutine& thread : block.threads) stacks.push_back(thread.stack);
}

// A line for each word that threads of a block look at, and one for those at barriers.
void describe(const Block& block, std::string* text) {
  std::map<std::pair<const void*, Bits>, int> looks;
  int at_barriers = 0, others = 0;
  for (const Coroutine& thread : block.threads) {
    if (thread.done) continue;
    if (thread.wait == Wait::kWord) {
      for (int i = 0; i < thread.looks.count; ++i) {
        ++looks[{thread.looks.words[i].word, thread.looks.words[i].seen}];
      }
    } else {
      ++(thread.wait == Wait::kBarrier ? at_barriers : others);
    }
  }
  const auto add = [&](int count, const char* what) {
    char line[256];
    std::snprintf(line, sizeof(line), "%s block %u: %d %s\n", block.kernel, block.block.x, count, what);
    if (count > 0) *text += line;
  };
  for (const auto& [look, count] : looks) {
    char what[96];
    const auto low = static_cast<unsigned long long>(look.second);
    const auto high = static_cast<unsigned long long>(look.second >> 64);  // of words of 16 bytes
    std::snprintf(what, sizeof(what), "look at %p, which is %#llx, %#llx", look.first, low, high);
    add(count, what);
  }
  add(at_barriers, "at barriers");
  add(others, "at work, or waiting for time to pass");
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

// Other blocks go on meanwhile: what is said of them is roughly so.
void note_fault() {
  const std::lock_guard<std::mutex> lock(blocks_mutex);
  if (!noted.empty()) return;
  for (const Block* block : blocks) describe(*block, &noted);
}

void launch(const char* kernel, uint32_t grid, uint32_t block_threads, int64_t shared, void* stream,
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
        block.kernel = kernel;
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

namespace {

int write_value(void* stream, unsigned long long address, uint32_t value, unsigned) {
  emulation::stream_of(stream).push([=] {
    __atomic_store_n(reinterpret_cast<uint32_t*>(address), value, __ATOMIC_RELEASE);
  });
  return 0;
}

}  // namespace

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t stream) {
  emulation::stream_of(stream).push([=] {
    std::this_thread::sleep_for(emulation::random_delay());
    std::memcpy(to, from, bytes);
  });
  return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  if (std::string(name) != "cuStreamWriteValue32") std::abort();
  *function = reinterpret_cast<void*>(&write_value);
  *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

extern "C" __attribute__((visibility("default"))) void emulation_delay(int up_to_us) {
  emulation::longest_delay_us = up_to_us;
}

extern "C" __attribute__((visibility("default"))) void emulation_tear_words(bool tears) {
  emulation::tears_words = tears;
}

extern "C" __attribute__((visibility("default"))) void emulation_synchronize(void* stream) {
  emulation::stream_of(stream).synchronize();
}

// What all threads waited for at the first fault since the last call; valid until the next.
extern "C" __attribute__((visibility("default"))) const char* emulation_waits() {
  static std::string text;
  const std::lock_guard<std::mutex> lock(emulation::blocks_mutex);
  text = std::move(emulation::noted);
  emulation::noted.clear();
  return text.c_str();
}
