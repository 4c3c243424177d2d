// In the place of NVSHMEM's UCX transport: kernels hand their puts to NVSHMEM's proxy thread, which
// calls here.
#include "plugin.h"

namespace softnic {
namespace {

class ProxyCard : public Card {
  void make_queues() override {
    for (int i = 0; i < num_processes_; ++i) queues_.push_back(std::make_unique<Queue>(i, false));
  }
};

int can_reach(int* reach, void*, abi::Transport*) {
  *reach = abi::kCpuWrite | abi::kCpuRead | abi::kCpuAtomics;
  return 0;
}

int connect(abi::Transport* transport, int*, int) {
  Card& card = card_of(transport);
  if (card.is_connected()) return 0;
  card.connect(transport->boot, transport->my_pe, transport->num_pes);
  card.start();
  return 0;
}

int get_mem_handle(abi::MemHandle* handle, void* memory, size_t bytes, abi::Transport*, bool) {
  return name_memory(handle, memory, bytes);
}

int rma(abi::Transport* transport, int pe, abi::RmaVerb verb, abi::RmaMem* remote,
        abi::RmaMem* local, abi::RmaBytes bytes, int) {
  Card& card = card_of(transport);
  Queue& queue = card.queue(pe);
  const size_t size = bytes.num_elements * static_cast<size_t>(bytes.element_bytes);
  const uint64_t there = reinterpret_cast<uint64_t>(remote->address);
  const uint64_t here = reinterpret_cast<uint64_t>(local->address);
  switch (verb.op) {
    case abi::kP: {  // the value is the proxy's own, and gone when we return
      const char* const value = static_cast<const char*>(local->address);
      Message message;
      message.kind = Kind::kPut;
      message.size = static_cast<uint32_t>(size);
      message.remote = there;
      message.inlined.assign(value, value + size);
      queue.push(std::move(message));
      return 0;
    }
    case abi::kPut:
      queue.push_put(there, here, size);
      return 0;
    case abi::kGet:
    case abi::kG:
      card.push_get(queue, there, here, size);
      return 0;
    default:
      return 1;
  }
}

int amo(abi::Transport* transport, int pe, void*, abi::AtomicVerb verb, abi::AtomicMem* memory,
        abi::AtomicBytes bytes, int) {
  Message message;
  message.kind = Kind::kAtomic;
  message.op = static_cast<uint8_t>(verb.op);
  message.width = static_cast<uint8_t>(bytes.element_bytes);
  message.remote = reinterpret_cast<uint64_t>(memory->remote.address);
  message.value = memory->value;
  message.compare = memory->compare;
  message.result = reinterpret_cast<uint64_t>(memory->result);
  message.result_flag = memory->result_flag;
  card_of(transport).queue(pe).push(std::move(message));
  return 0;
}

int fence(abi::Transport* transport, int pe, int) {
  card_of(transport).queue(pe).fence();
  return 0;
}

int quiet(abi::Transport* transport, int pe, int) {
  card_of(transport).wait_until_done(pe);
  return 0;
}

}  // namespace
}  // namespace softnic

SOFTNIC_EXPORT int nvshmemt_init(softnic::abi::Transport** out, void*, int interface) {
  auto* const transport = softnic::new_transport(interface, new softnic::ProxyCard);
  if (!transport) return 1;
  auto& ops = transport->ops;
  ops.can_reach_peer = softnic::can_reach;
  ops.connect_endpoints = softnic::connect;
  ops.get_mem_handle = softnic::get_mem_handle;
  ops.rma = softnic::rma;
  ops.amo = softnic::amo;
  ops.fence = softnic::fence;
  ops.quiet = softnic::quiet;
  *out = transport;
  return 0;
}
