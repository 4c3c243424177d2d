// In the place of NVSHMEM's IBGDA transport: NVSHMEM's device code writes mlx5 work requests and
// rings doorbells, here in pinned host memory. The sending thread carries them out, and writes the
// completion queues that device code polls.
#include "plugin.h"

#include <endian.h>

#include <deque>

#include "device_host_transport/nvshmem_common_ibgda.h"

namespace softnic {
namespace {

using Qp = nvshmemi_ibgda_device_qp_t;
using Cq = nvshmemi_ibgda_device_cq_t;
using Shared = nvshmemi_ibgda_device_state_t;

constexpr uint32_t kPlaceBytes = 64;
constexpr uint32_t kInline = 0x80000000;
// mlx5's operations, as work requests have them.
enum WorkOp : uint32_t {
  kNop = 0x00,
  kWrite = 0x08,
  kCompareSwap = 0x11,
  kFetchAdd = 0x12,
  kMaskedCompareSwap = 0x14,
  kMaskedFetchAdd = 0x15,
  kDump = 0x23
};
constexpr uint32_t kFourBytes = 0x08;  // of a masked atomic: modifier of the operation

uint32_t word(const char* at) {
  uint32_t value;
  std::memcpy(&value, at, sizeof value);
  return be32toh(value);
}
uint64_t long_word(const char* at) {
  uint64_t value;
  std::memcpy(&value, at, sizeof value);
  return be64toh(value);
}

// One queue pair's memory: work requests, doorbells, one entry of the completion queue.
class QueuePair {
 public:
  QueuePair(char* memory, uint32_t depth) : memory_(memory), depth_(depth) {
    std::memset(completion(), 0xff, kPlaceBytes);
  }
  static size_t bytes(uint32_t depth) { return depth * kPlaceBytes + 256; }

  char* requests() const { return memory_; }
  char* doorbell_record() const { return memory_ + depth_ * kPlaceBytes; }
  char* doorbell() const { return doorbell_record() + 64; }
  char* completion() const { return doorbell_record() + 128; }
  // Byte `offset` of the request at `index`: requests go around the end.
  char* at(uint16_t index, uint32_t offset) const {
    const uint32_t bytes = depth_ * kPlaceBytes;
    return memory_ + (index % depth_ * kPlaceBytes + offset) % bytes;
  }
  uint16_t producer() const {
    return static_cast<uint16_t>(be32toh(*reinterpret_cast<volatile uint32_t*>(doorbell_record())));
  }
  void report(uint32_t request) const {
    completion()[63] = 0;  // no error
    std::atomic_thread_fence(std::memory_order_release);
    *reinterpret_cast<volatile uint16_t*>(completion() + 60) =
        htobe16(static_cast<uint16_t>(request));
  }

  uint16_t consumer = 0;
  // Requests that have left: complete when the receiver has come to that position of the ring.
  struct Left {
    uint64_t position;
    uint32_t request;
    bool is_signaled;
  };
  std::deque<Left> left;

 private:
  char* memory_;
  uint32_t depth_;
};

class IbgdaCard : public Card {
 public:
  void publish(Shared* shared, size_t log2_granularity);

 private:
  void make_queues() override;
  bool poll() override;
  void on_sent(int queue, const Message& message, uint64_t position) override;
  bool complete() override;
  uint16_t parse(Queue& queue, QueuePair& pair, uint16_t index);
  void push_atomic(Queue& queue, Message message, const char* request, uint32_t op,
                   uint32_t modifier);

  const int pairs_per_process_ = variable("NVSHMEM_IBGDA_NUM_RC_PER_PE", 2);
  const uint32_t depth_ = variable("NVSHMEM_QP_DEPTH", 1024);
  std::vector<QueuePair> pairs_;  // by process, then by number; a queue each
};

void IbgdaCard::make_queues() {
  if (depth_ & (depth_ - 1)) SOFTNIC_DIE("NVSHMEM_QP_DEPTH %u is no power of two", depth_);
  const int num_pairs = num_processes_ * pairs_per_process_;
  char* const memory = static_cast<char*>(pinned_memory(num_pairs * QueuePair::bytes(depth_)));
  for (int i = 0; i < num_pairs; ++i) {
    queues_.push_back(std::make_unique<Queue>(i / pairs_per_process_, true));
    pairs_.emplace_back(memory + i * QueuePair::bytes(depth_), depth_);
  }
}

// Tells NVSHMEM's device code where everything is.
void IbgdaCard::publish(Shared* shared, size_t log2_granularity) {
  using Management = nvshmemi_ibgda_device_qp_management_t;
  const size_t num_pairs = pairs_.size();
  const uint64_t device_qps = device_memory(num_pairs * sizeof(Qp));
  const uint64_t device_cqs = device_memory(num_pairs * sizeof(Cq));
  const uint64_t switches = device_memory(pairs_per_process_);
  const uint64_t buffers = device_memory(num_pairs * 2 * NVSHMEMI_IBGDA_IBUF_SLOT_SIZE);
  std::vector<Qp> qps(num_pairs);
  std::vector<Cq> cqs(num_pairs);
  std::memset(static_cast<void*>(qps.data()), 0, num_pairs * sizeof(Qp));
  std::memset(static_cast<void*>(cqs.data()), 0, num_pairs * sizeof(Cq));
  for (size_t i = 0; i < num_pairs; ++i) {
    const QueuePair& pair = pairs_[i];
    const uint64_t management = device_qps + i * sizeof(Qp) + offsetof(Qp, mvars);
    const auto at = [&](size_t offset) { return reinterpret_cast<uint64_t*>(management + offset); };
    Qp& qp = qps[i];
    qp.version = (1 << 16) + sizeof(Qp);
    qp.qp_type = NVSHMEMI_IBGDA_DEVICE_QP_TYPE_RC;
    qp.qpn = 100 + i;
    qp.ibuf.nslots = 1;
    qp.ibuf.buf = reinterpret_cast<void*>(buffers + i * 2 * NVSHMEMI_IBGDA_IBUF_SLOT_SIZE);
    qp.ibuf.lkey = qp.ibuf.rkey = htobe32(0x333);
    qp.tx_wq.nwqes = static_cast<uint16_t>(depth_);
    qp.tx_wq.wqe = pair.requests();
    qp.tx_wq.dbrec = reinterpret_cast<__be32*>(pair.doorbell_record());
    qp.tx_wq.bf = pair.doorbell();
    qp.tx_wq.cq = reinterpret_cast<Cq*>(device_cqs + i * sizeof(Cq));
    qp.tx_wq.prod_idx = at(offsetof(Management, tx_wq.prod_idx));
    Cq& cq = cqs[i];
    cq.version = (1 << 16) + sizeof(Cq);
    cq.qp_type = qp.qp_type;
    cq.cqe = pair.completion();
    cq.cqn = qp.qpn;
    cq.qpn = qp.qpn;
    cq.ncqes = depth_;
    cq.prod_idx = at(offsetof(Management, tx_wq.prod_idx));
    cq.cons_idx = at(offsetof(Management, tx_wq.cons_idx));
    cq.resv_head = at(offsetof(Management, tx_wq.resv_head));
    cq.ready_head = at(offsetof(Management, tx_wq.ready_head));
  }
  const std::vector<char> zero(pairs_per_process_, 0);
  Copies copies;
  copies.start(context_);
  copies.copy(device_qps, reinterpret_cast<uint64_t>(qps.data()), num_pairs * sizeof(Qp));
  copies.copy(device_cqs, reinterpret_cast<uint64_t>(cqs.data()), num_pairs * sizeof(Cq));
  copies.copy(switches, reinterpret_cast<uint64_t>(zero.data()), zero.size());
  copies.finish();

  const char* const map_by = std::getenv("NVSHMEM_IBGDA_RC_MAP_BY");
  const bool by_warp = map_by && !std::strcmp(map_by, "warp");
  std::memset(static_cast<void*>(shared), 0, sizeof *shared);
  shared->version = (1 << 16) + sizeof(Shared);
  shared->globalmem.rcs = reinterpret_cast<Qp*>(device_qps);
  shared->globalmem.cqs = reinterpret_cast<Cq*>(device_cqs);
  shared->globalmem.qp_group_switches = reinterpret_cast<uint8_t*>(switches);
  shared->num_rc_per_pe = shared->num_qp_groups = pairs_per_process_;
  shared->num_devices_initialized = 1;
  shared->ndcts_per_pe = shared->num_dct_groups = 1;
  shared->rc_map_type =
      by_warp ? NVSHMEMI_IBGDA_DEVICE_QP_MAP_TYPE_WARP : NVSHMEMI_IBGDA_DEVICE_QP_MAP_TYPE_CTA;
  shared->num_requests_in_batch = variable("NVSHMEM_IBGDA_NUM_REQUESTS_IN_BATCH", 32);
  shared->log2_cumem_granularity = log2_granularity;
  shared->support_half_av_seg = true;
  shared->may_skip_cst = true;  // copies are complete before the next one begins
}

bool IbgdaCard::poll() {
  bool did = false;
  for (size_t i = 0; i < pairs_.size(); ++i) {
    QueuePair& pair = pairs_[i];
    const uint16_t producer = pair.producer();
    if (producer == pair.consumer) continue;
    std::atomic_thread_fence(std::memory_order_acquire);
    while (pair.consumer != producer) pair.consumer += parse(*queues_[i], pair, pair.consumer);
    did = true;
  }
  return did;
}

// Queues what one work request asks for, and returns the places that it takes.
uint16_t IbgdaCard::parse(Queue& queue, QueuePair& pair, uint16_t index) {
  const char* const request = pair.at(index, 0);
  const uint32_t op = word(request) & 0xff, modifier = word(request) >> 24;
  const uint32_t written_index = word(request) >> 8 & 0xffff;
  const uint32_t num_places = ((word(request + 4) & 0x3f) * 16 + kPlaceBytes - 1) / kPlaceBytes;
  if (written_index != index || num_places == 0) {
    SOFTNIC_DIE("process %d, queue pair to %d: request %u of %u places where %u is due", me_,
                queue.dest, written_index, num_places, index);
  }
  Message message;
  message.request = index;
  message.is_signaled = request[11] & 8;
  message.ends_request = true;
  message.remote = long_word(request + 16);
  switch (op) {
    case kNop:
    case kDump:
      queue.push(std::move(message));
      break;
    case kWrite: {
      const uint32_t size = word(request + 32);
      if (!(size & kInline)) {
        queue.push_put(message.remote, long_word(request + 40), size, message);
        break;
      }
      message.kind = Kind::kPut;
      message.size = size & 0x3ff;
      for (uint32_t i = 0; i < message.size; ++i) {
        message.inlined.push_back(*pair.at(index, 36 + i));
      }
      queue.push(std::move(message));
      break;
    }
    case kCompareSwap:
    case kFetchAdd:
    case kMaskedCompareSwap:
    case kMaskedFetchAdd:
      push_atomic(queue, std::move(message), request, op, modifier);
      break;
    default:
      SOFTNIC_DIE("a work request with operation %#x", op);
  }
  return static_cast<uint16_t>(num_places);
}

// Additions, and masked swaps that set the whole word, which is what a signal is.
void IbgdaCard::push_atomic(Queue& queue, Message message, const char* request, uint32_t op,
                            uint32_t modifier) {
  const bool is_masked = op == kMaskedCompareSwap || op == kMaskedFetchAdd;
  const bool is_short = is_masked && modifier == kFourBytes;
  message.kind = Kind::kAtomic;
  message.width = is_short ? 4 : 8;
  message.value = is_short ? word(request + 32) : long_word(request + 32);
  if (op == kFetchAdd || op == kMaskedFetchAdd) {
    message.op = abi::kAdd;
  } else {
    const bool sets_all = is_short ? word(request + 40) == ~0u && word(request + 44) == 0
                                   : long_word(request + 48) == ~0ull && !long_word(request + 56);
    if (op != kMaskedCompareSwap || !sets_all) SOFTNIC_DIE("atomic %#x with a part of a word", op);
    message.op = abi::kSet;
  }
  queue.push(std::move(message));
}

void IbgdaCard::on_sent(int queue, const Message& message, uint64_t position) {
  if (!message.ends_request) return;
  pairs_[queue].left.push_back({position, message.request, message.is_signaled});
}

bool IbgdaCard::complete() {
  bool did = false;
  for (size_t i = 0; i < pairs_.size(); ++i) {
    QueuePair& pair = pairs_[i];
    const uint64_t received = out_[queues_[i]->dest].tail();
    int64_t newest = -1;
    while (!pair.left.empty() && pair.left.front().position <= received) {
      if (pair.left.front().is_signaled) newest = pair.left.front().request;
      pair.left.pop_front();
    }
    if (newest < 0) continue;
    pair.report(static_cast<uint32_t>(newest));
    did = true;
  }
  return did;
}

Shared* shared_of(abi::Transport* transport) { return static_cast<Shared*>(transport->shared); }

int can_reach(int* reach, void*, abi::Transport*) {
  *reach = abi::kGpuWrite | abi::kGpuRead | abi::kGpuAtomics;
  return 0;
}

int connect(abi::Transport* transport, int*, int) {
  auto& card = static_cast<IbgdaCard&>(card_of(transport));
  if (card.is_connected()) return 0;
  card.connect(transport->boot, transport->my_pe, transport->num_pes);
  card.publish(shared_of(transport), transport->log2_granularity);
  card.start();
  return 0;
}

// Device code looks keys up; any will do, for nobody checks them.
int get_mem_handle(abi::MemHandle* handle, void* memory, size_t bytes, abi::Transport* transport,
                   bool local_only) {
  if (local_only) return 1;
  const uint64_t begin = reinterpret_cast<uint64_t>(memory);
  const uint64_t offset = begin - reinterpret_cast<uint64_t>(transport->heap);
  const size_t first = offset >> transport->log2_granularity;
  const size_t end = first + (bytes >> transport->log2_granularity);
  if (end > NVSHMEMI_IBGDA_MAX_CONST_LKEYS) return 1;
  for (size_t i = first; i < end; ++i) {
    shared_of(transport)->constmem.lkeys[i] = {htobe32(0x111), begin + bytes};
  }
  return name_memory(handle, memory, bytes);
}

int add_remote(abi::Transport* transport, int, abi::MemHandle*, uint64_t offset, size_t bytes) {
  const size_t first = offset >> transport->log2_granularity;
  const size_t end = first + (bytes >> transport->log2_granularity);
  const size_t num_pes = transport->num_pes;
  if (end * num_pes > NVSHMEMI_IBGDA_MAX_CONST_RKEYS) return 1;
  for (size_t i = first * num_pes; i < end * num_pes; ++i) {
    shared_of(transport)->constmem.rkeys[i] = {htobe32(0x222), offset + bytes};
  }
  return 0;
}

}  // namespace
}  // namespace softnic

SOFTNIC_EXPORT int nvshmemt_init(softnic::abi::Transport** out, void*, int interface) {
  auto* const transport = softnic::new_transport(interface, new softnic::IbgdaCard);
  if (!transport) return 1;
  transport->type = 1;
  transport->no_proxy = true;
  auto& ops = transport->ops;
  ops.can_reach_peer = softnic::can_reach;
  ops.connect_endpoints = softnic::connect;
  ops.get_mem_handle = softnic::get_mem_handle;
  ops.add_device_remote_mem_handles = softnic::add_remote;
  *out = transport;
  return 0;
}
