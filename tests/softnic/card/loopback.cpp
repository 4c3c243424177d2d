// Two processes' cards in one process, with host memory: puts and their signals both ways, every
// byte checked when its signal is seen. For a machine without a GPU.
//   loopback MESSAGES LIMIT_S     prints "N wrong bytes, M messages missing, ..."
// The plug-in is linked in. `Requests` plays NVSHMEM's proxy thread, or IBGDA's device code.
#include <endian.h>
#include <pthread.h>

#include <chrono>
#include <string>
#include <thread>

#include "plugin.h"

#ifdef SOFTNIC_IBGDA
#include "device_host_transport/nvshmem_common_ibgda.h"
#endif

extern "C" int nvshmemt_init(softnic::abi::Transport**, void*, int);

namespace {

using softnic::abi::Transport;
using Clock = std::chrono::steady_clock;

constexpr int kPlaces = 4;               // messages in flight each way
constexpr size_t kMaxBytes = 600 << 10;  // three slots of the wire
constexpr size_t kHeapBytes = 8 << 20;

struct Heap {
  char received[kPlaces][kMaxBytes];
  char to_send[kPlaces][kMaxBytes];
  uint64_t signals[kPlaces], credits[kPlaces];
};
static_assert(sizeof(Heap) <= kHeapBytes);

// How the two meet: an allgather through common memory.
struct Meeting : softnic::abi::Boot {
  static pthread_barrier_t barrier_of_both;
  static char table[2 * 4096];

  explicit Meeting(int number) : Boot{} {
    rank = number;
    num_ranks = 2;
    allgather = [](const void* mine, void* all, int bytes, Boot* boot) {
      std::memcpy(table + boot->rank * bytes, mine, bytes);
      pthread_barrier_wait(&barrier_of_both);
      std::memcpy(all, table, 2 * bytes);
      pthread_barrier_wait(&barrier_of_both);
      return 0;
    };
    barrier = [](Boot*) {
      pthread_barrier_wait(&barrier_of_both);
      return 0;
    };
  }
};
pthread_barrier_t Meeting::barrier_of_both;
char Meeting::table[2 * 4096];

char byte_of(int sender, int message, size_t i) {
  return static_cast<char>((sender + 1) * 31 + message * 7 + i * 13 + i / 251);
}
size_t bytes_of(int sender, int message) {
  uint32_t x = (sender + 1) * 0x9E3779B1u ^ (message + 1) * 0x85EBCA6Bu;
  x ^= x >> 15;
  x *= 0x2C1B3C6Du;
  return 1 + (x >> 8) % (message % 5 ? 5000 : kMaxBytes);
}

#ifdef SOFTNIC_IBGDA

// Work requests as NVSHMEM's device code writes them: a put, then its signal, then the doorbell.
class Requests {
 public:
  Requests(Transport* transport, int pe) {
    auto* const shared = static_cast<nvshmemi_ibgda_device_state_t*>(transport->shared);
    for (uint32_t i = 0; i < shared->num_rc_per_pe; ++i) {
      pairs_.push_back({&shared->globalmem.rcs[pe * shared->num_rc_per_pe + i], 0});
    }
  }
  void put_and_signal(int number, char* to, char* from, size_t bytes, uint64_t* flag,
                      uint64_t value) {
    Pair& pair = pairs_[number % pairs_.size()];
    if (to) {
      char* const request = begin(pair, 0x08, 3, to);
      store(request + 32, static_cast<uint32_t>(bytes));
      store(request + 40, reinterpret_cast<uint64_t>(from));
    }
    char* const request = begin(pair, 0x14, 4, flag);
    store(request + 32, value);
    store(request + 48, ~uint64_t{0});  // swap all of it, compare nothing
    std::atomic_thread_fence(std::memory_order_release);
    *pair.qp->tx_wq.dbrec = htobe32(pair.next);
    last_ = &pair;
  }
  // Whether the last request has been reported as complete.
  bool is_complete() const {
    const auto* const entry = static_cast<const volatile char*>(last_->qp->tx_wq.cq->cqe);
    const uint16_t index = be16toh(*reinterpret_cast<const volatile uint16_t*>(entry + 60));
    return entry[63] == 0 && index == static_cast<uint16_t>(last_->next - 1);
  }

 private:
  struct Pair {
    nvshmemi_ibgda_device_qp_t* qp;
    uint32_t next;
  };
  static void store(char* at, uint32_t value) {
    value = htobe32(value);
    std::memcpy(at, &value, sizeof value);
  }
  static void store(char* at, uint64_t value) {
    value = htobe64(value);
    std::memcpy(at, &value, sizeof value);
  }
  static char* begin(Pair& pair, uint32_t op, uint32_t segments, void* remote) {
    char* const request =
        static_cast<char*>(pair.qp->tx_wq.wqe) + pair.next % pair.qp->tx_wq.nwqes * 64;
    std::memset(request, 0, 64);
    store(request, (pair.next & 0xffff) << 8 | op);
    store(request + 4, segments);
    request[11] = 8;  // signaled
    store(request + 16, reinterpret_cast<uint64_t>(remote));
    ++pair.next;
    return request;
  }
  std::vector<Pair> pairs_;
  const Pair* last_ = nullptr;
};

#else

// What NVSHMEM's proxy thread does.
class Requests {
 public:
  Requests(Transport* transport, int pe) : transport_(transport), pe_(pe) {}
  void put_and_signal(int, char* to, char* from, size_t bytes, uint64_t* flag, uint64_t value) {
    if (to) {
      softnic::abi::RmaMem there{to, 0, nullptr}, here{from, 0, nullptr};
      transport_->ops.rma(transport_, pe_, {softnic::abi::kPut, 1, 0, nullptr}, &there, &here,
                          {bytes, 1, 1, 1}, 1);
      transport_->ops.fence(transport_, pe_, 1);
    }
    softnic::abi::AtomicMem memory{};
    memory.remote.address = flag;
    memory.value = value;
    transport_->ops.amo(transport_, pe_, nullptr, {softnic::abi::kSignalSet, 0, 1, 0}, &memory,
                        {0, 8}, 1);
  }
  bool is_complete() const {
    transport_->ops.quiet(transport_, pe_, 1);
    return true;
  }

 private:
  Transport* transport_;
  int pe_;
};

#endif

struct Result {
  uint64_t wrong_bytes = 0;
  int missing = 0;
};

class Side {
 public:
  Side(int me, Heap* heaps, int messages, double limit_s)
      : me_(me), heaps_(heaps), messages_(messages), limit_s_(limit_s) {}

  Result run() {
    Meeting meeting(me_);
    Transport* transport = nullptr;
    if (nvshmemt_init(&transport, nullptr, 30000)) SOFTNIC_DIE("no transport");
    transport->boot = &meeting;
    transport->my_pe = me_;
    transport->num_pes = 2;
    transport->log2_granularity = 21;
    transport->heap = &heaps_[me_];
    std::vector<char> shared(1 << 16);
    transport->shared = shared.data();
    transport->ops.connect_endpoints(transport, nullptr, 0);
    Requests requests(transport, 1 - me_);
    std::thread receiver([&] { receive(); });
    send(requests);
    receiver.join();
    if (result_.missing == 0 && !within_limit([&] { return requests.is_complete(); })) {
      ++result_.missing;
    }
    meeting.barrier(&meeting);
    if (result_.missing == 0) transport->ops.finalize(transport);  // else it waits for the link
    return result_;
  }

 private:
  template <class Condition>
  bool within_limit(Condition condition) const {
    const auto end = Clock::now() + std::chrono::duration<double>(limit_s_);
    while (!condition()) {
      if (Clock::now() > end) return false;
      std::this_thread::yield();
    }
    return true;
  }
  bool arrives(uint64_t* flag, uint64_t value) const {
    return within_limit([=] { return __atomic_load_n(flag, __ATOMIC_ACQUIRE) >= value; });
  }

  // A place is filled again when its credit has come.
  void send(Requests& requests) {
    Heap &mine = heaps_[me_], &theirs = heaps_[1 - me_];
    for (int m = 0; m < messages_; ++m) {
      const int place = m % kPlaces;
      if (m >= kPlaces && !arrives(&mine.credits[place], m - kPlaces + 1)) return;
      const size_t bytes = bytes_of(me_, m);
      for (size_t i = 0; i < bytes; ++i) mine.to_send[place][i] = byte_of(me_, m, i);
      requests.put_and_signal(m, theirs.received[place], mine.to_send[place], bytes,
                              &theirs.signals[place], m + 1);
    }
  }
  void receive() {
    Heap &mine = heaps_[me_], &theirs = heaps_[1 - me_];
    for (int m = 0; m < messages_; ++m) {
      const int place = m % kPlaces, sender = 1 - me_;
      if (!arrives(&mine.signals[place], m + 1)) {
        result_.missing = messages_ - m;
        return;
      }
      for (size_t i = 0; i < bytes_of(sender, m); ++i) {
        result_.wrong_bytes += mine.received[place][i] != byte_of(sender, m, i);
      }
      // Straight into the other's memory: what is tested is the way there.
      __atomic_store_n(&theirs.credits[place], m + 1, __ATOMIC_RELEASE);
    }
  }
  const int me_;
  Heap* const heaps_;
  const int messages_;
  const double limit_s_;
  Result result_;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const int messages = std::atoi(argv[1]);
  const double limit_s = std::atof(argv[2]);
  auto* const heaps = static_cast<Heap*>(std::calloc(2, sizeof(Heap)));
  pthread_barrier_init(&Meeting::barrier_of_both, nullptr, 2);
  Result results[2];
  std::thread other([&] { results[1] = Side(1, heaps, messages, limit_s).run(); });
  results[0] = Side(0, heaps, messages, limit_s).run();
  other.join();
  std::printf("%lu wrong bytes, %d messages missing, %lu puts, %lu out of order\n",
              results[0].wrong_bytes + results[1].wrong_bytes,
              results[0].missing + results[1].missing, softnic::counts.puts.load(),
              softnic::counts.out_of_order.load());
  std::fflush(stdout);
  _exit(0);  // threads that wait for a dead link are left behind
}
