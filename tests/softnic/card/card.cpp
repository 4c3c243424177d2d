#include "card.h"

#include <sched.h>
#include <unistd.h>

namespace softnic {

Counts counts;

namespace {

// Between two looks at something that another thread changes: often at first, then seldom.
class Patience {
 public:
  void found_something() { idle_ = 0; }
  void wait() {
    if (++idle_ > 2000) {
      usleep(5);
    } else if (idle_ > 50) {
      sched_yield();
    }
  }

 private:
  int idle_ = 0;
};

uint64_t mask_of(int width) { return width >= 8 ? ~0ull : (1ull << (8 * width)) - 1; }

uint64_t address(const void* pointer) { return reinterpret_cast<uint64_t>(pointer); }

}  // namespace

void Card::connect(abi::Boot* boot, int me, int num_processes) {
  me_ = me;
  num_processes_ = num_processes;
  context_ = current_context();
  random_.seed(variable("SOFTNIC_SEED", 1) * 1000 + me);
  const size_t bytes = num_processes * kRingBytes;
  SharedMemory::Name name{};
  own_ = std::make_unique<SharedMemory>(SharedMemory::create(bytes, &name));
  std::vector<SharedMemory::Name> names(num_processes);
  if (boot->allgather(&name, names.data(), sizeof name, boot)) SOFTNIC_DIE("allgather failed");
  for (int i = 0; i < num_processes; ++i) {
    in_.emplace_back(own_->ring(i));
    if (i == me) {
      out_.emplace_back(own_->ring(i));
    } else {
      others_.push_back(SharedMemory::open(names[i], bytes));
      out_.emplace_back(others_.back().ring(me));
    }
    replies_.push_back(std::make_unique<Queue>(i, false));
  }
  if (boot->barrier(boot)) SOFTNIC_DIE("barrier failed");
  make_queues();
}

void Card::start() {
  scratch_ = static_cast<uint64_t*>(pinned_memory(4 * sizeof(uint64_t)));
  receiver_ = std::thread([this] {
    receiving_.start(context_);
    receive();
  });
  sender_ = std::thread([this] {
    sending_.start(context_);
    send();
  });
}

void Card::stop() {
  stop_ = true;
  if (sender_.joinable()) sender_.join();
  if (receiver_.joinable()) receiver_.join();
  for (SharedMemory& memory : others_) memory.unmap();
  if (own_) own_->unmap();
}

void Card::push_get(Queue& queue, uint64_t remote, uint64_t local, size_t bytes) {
  for (size_t done = 0; done < bytes;) {
    Message piece;
    piece.kind = Kind::kGet;
    piece.size = static_cast<uint32_t>(std::min(bytes - done, kChunkBytes));
    piece.remote = remote + done;
    piece.local = local + done;
    piece.cookie = address(&num_gets_);
    done += piece.size;
    ++num_gets_;
    queue.push(std::move(piece));
  }
}

void Card::wait_until_done(int process) {
  const auto is_done = [&] {
    for (const auto& queue : queues_) {
      if (queue->dest == process && !queue->is_empty()) return false;
    }
    return out_[process].head() == out_[process].tail() && num_gets_ == 0;
  };
  for (Patience patience; !stop_ && !is_done(); patience.wait()) {
  }
}

// ------------------------------------------------------------------------------------------
// sending

void Card::send() {
  for (Patience patience; !stop_; patience.wait()) {
    bool did = poll();
    did |= send_one();
    did |= complete();
    if (did) patience.found_something();
  }
}

// One message of any queue, beginning anywhere: so queues leave in no order among each other.
bool Card::send_one() {
  const size_t num_queues = queues_.size() + replies_.size();
  const size_t first = random_() % num_queues;
  for (size_t i = 0; i < num_queues; ++i) {
    const size_t index = (first + i) % num_queues;
    const bool is_reply = index >= queues_.size();
    Queue& queue = is_reply ? *replies_[index - queues_.size()] : *queues_[index];
    Message message;
    if (!queue.take(is_reply ? Faults{false, false, 0, nullptr} : faults_, random_, &message)) {
      continue;
    }
    if (message.kind != Kind::kNothing) put_on_wire(queue, message);
    if (!is_reply) on_sent(static_cast<int>(index), message, out_[queue.dest].head());
    queue.sent(message);
    counts.out_of_order += !message.leaves_queue;
    return true;
  }
  return false;
}

void Card::put_on_wire(Queue& queue, Message& message) {
  if (faults_.delay_us && random_() % 2) usleep(random_() % faults_.delay_us);
  while (faults_.is_cut() && !stop_) usleep(1000);
  const Ring& ring = out_[queue.dest];
  for (Patience patience; ring.is_full(); patience.wait()) {
    if (stop_) return;
  }
  const uint64_t head = ring.head();
  Slot* const slot = ring.slot(head);
  *slot = Slot{message.kind,   message.op,          message.width, message.size,
               message.remote, message.local,       message.value, message.compare,
               message.result, message.result_flag, message.cookie};
  switch (message.kind) {
    case Kind::kPut:
      ++counts.puts;
      counts.put_bytes += message.size;
      [[fallthrough]];
    case Kind::kReply:
      if (message.inlined.empty()) {
        sending_.copy(address(slot->bytes()), message.local, message.size);
        sending_.finish();
      } else {
        std::memcpy(slot->bytes(), message.inlined.data(), message.size);
      }
      break;
    case Kind::kGet:
      ++counts.gets;
      slot->from = message.remote;
      slot->to = message.local;
      break;
    default:
      counts.atomics += message.kind == Kind::kAtomic;
  }
  ring.set_head(head + 1);
}

// ----------------------------------------------------------------------------------------
// receiving

void Card::receive() {
  constexpr uint64_t kAtOnce = 16;
  for (Patience patience; !stop_; patience.wait()) {
    for (int source = 0; source < num_processes_; ++source) {
      const Ring& ring = in_[source];
      const uint64_t tail = ring.tail();
      const uint64_t end = std::min(ring.head(), tail + kAtOnce);
      for (uint64_t i = tail; i < end; ++i) carry_out(source, ring.slot(i));
      if (end == tail) continue;
      receiving_.finish();
      ring.set_tail(end);
      patience.found_something();
    }
  }
}

void Card::carry_out(int source, Slot* slot) {
  switch (slot->kind) {
    case Kind::kPut:
      receiving_.copy(slot->to, address(slot->bytes()), slot->size);
      break;
    case Kind::kReply:
      receiving_.copy(slot->to, address(slot->bytes()), slot->size);
      receiving_.finish();
      --*reinterpret_cast<std::atomic<int64_t>*>(slot->cookie);
      break;
    case Kind::kGet: {
      receiving_.finish();  // what was put before is there
      Message message;
      message.kind = Kind::kReply;
      message.size = slot->size;
      message.local = slot->from;
      message.remote = slot->to;
      message.cookie = slot->cookie;
      reply(source, std::move(message));
      break;
    }
    case Kind::kAtomic:
      carry_out_atomic(source, slot);
      break;
    case Kind::kAtomicReply:  // the value, then the flag that a thread of the GPU waits for
      scratch_[2] = slot->value;
      scratch_[3] = slot->result_flag;
      receiving_.copy(slot->to, address(&scratch_[2]), 8);
      receiving_.copy(slot->to + 8, address(&scratch_[3]), 8);
      receiving_.finish();
      break;
    default:
      SOFTNIC_DIE("a message of kind %d", static_cast<int>(slot->kind));
  }
}

void Card::carry_out_atomic(int source, Slot* slot) {
  uint64_t was = 0, now = slot->value;
  const bool sets =
      slot->op == abi::kSet || slot->op == abi::kSignal || slot->op == abi::kSignalSet;
  if (!sets) {
    scratch_[0] = 0;
    receiving_.copy(address(&scratch_[0]), slot->to, slot->width);
    receiving_.finish();
    was = scratch_[0];
    switch (slot->op) {
      case abi::kInc:
      case abi::kFetchInc:
        now = was + 1;
        break;
      case abi::kAdd:
      case abi::kSignalAdd:
      case abi::kFetchAdd:
        now = was + slot->value;
        break;
      case abi::kAnd:
      case abi::kFetchAnd:
        now = was & slot->value;
        break;
      case abi::kOr:
      case abi::kFetchOr:
        now = was | slot->value;
        break;
      case abi::kXor:
      case abi::kFetchXor:
        now = was ^ slot->value;
        break;
      case abi::kFetch:
        now = was;
        break;
      case abi::kSwap:
        break;
      case abi::kCompareSwap:
        now = was == (slot->compare & mask_of(slot->width)) ? slot->value : was;
        break;
      default:
        SOFTNIC_DIE("atomic %d", slot->op);
    }
  }
  slot->value = now & mask_of(slot->width);  // pinned, and not written to before the copy is done
  if (slot->op != abi::kFetch) receiving_.copy(slot->to, address(&slot->value), slot->width);
  if (slot->op <= abi::kEndNonFetch) return;
  Message message;
  message.kind = Kind::kAtomicReply;
  message.remote = slot->result;
  message.value = was;
  message.result_flag = slot->result_flag;
  reply(source, std::move(message));
}

void Card::reply(int source, Message message) { replies_[source]->push(std::move(message)); }

}  // namespace softnic

// What tests read through ctypes: puts, their bytes, atomics, gets, messages out of order.
extern "C" __attribute__((visibility("default"))) uint64_t softnic_count(int which) {
  using softnic::counts;
  const std::atomic<uint64_t>* const all[] = {&counts.puts, &counts.put_bytes, &counts.atomics,
                                              &counts.gets, &counts.out_of_order};
  return which >= 0 && which < 5 ? all[which]->load() : ~0ull;
}
