// What waits to be sent to one process, and in which order it leaves.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <random>
#include <vector>

#include "abi.h"
#include "wire.h"

namespace softnic {

inline long variable(const char* name, long otherwise) {
  const char* const text = std::getenv(name);
  return text && *text ? std::atol(text) : otherwise;
}

// What goes wrong on purpose; tests/softnic/hosts.py says what each is for.
struct Faults {
  bool reorder = variable("SOFTNIC_REORDER", 0);
  bool early_signals = variable("SOFTNIC_EARLY_SIGNALS", 0);
  long delay_us = variable("SOFTNIC_DELAY_US", 0);
  const char* cut_file = std::getenv("SOFTNIC_CUT_FILE");

  bool is_cut() const { return cut_file && access(cut_file, F_OK) == 0; }
};

struct Message {
  Kind kind = Kind::kNothing;
  uint8_t op = 0, width = 0;
  uint32_t size = 0;
  uint64_t local = 0, remote = 0, value = 0, compare = 0, result = 0, result_flag = 0, cookie = 0;
  std::vector<char> inlined;  // its bytes, where they are not in memory at `local`
  // Of a work request of IBGDA: its index; whether this is its last message; whether it is to be
  // reported as complete.
  uint32_t request = 0;
  bool ends_request = false, is_signaled = false;
  // Messages of one group leave in order. A message passes no fence.
  uint32_t group = 0, fences = 0;
  bool leaves_queue = true;
};

class Queue {
 public:
  // In a queue with `pairs` a group ends with an atomic: a put and its signal are one. Else a
  // message is a group of its own, and fences alone order.
  Queue(int dest, bool pairs) : dest(dest), pairs_(pairs) {}

  const int dest;

  void push(Message message) {
    const std::lock_guard<std::mutex> lock(mutex_);
    message.group = group_;
    message.fences = fences_;
    group_ += !pairs_ || message.kind == Kind::kAtomic;
    ++num_waiting_;
    messages_.push_back(std::move(message));
  }

  // A put of any length. `ends_request` goes to its last piece.
  void push_put(uint64_t remote, uint64_t local, size_t bytes, const Message& like = {}) {
    size_t done = 0;
    do {
      Message piece = like;
      piece.kind = Kind::kPut;
      piece.size = static_cast<uint32_t>(std::min(bytes - done, kChunkBytes));
      piece.remote = remote + done;
      piece.local = local + done;
      done += piece.size;
      piece.ends_request = like.ends_request && done == bytes;
      push(std::move(piece));
    } while (done < bytes);
  }

  void fence() {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++fences_;
  }

  // Takes a message that may leave. One that has left before its turn is found as kNothing there.
  bool take(const Faults& faults, std::mt19937& random, Message* message) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (messages_.empty()) return false;
    const size_t index = choose(faults, random);
    Message& chosen = messages_[index];
    if (index == 0) {
      *message = std::move(chosen);
      messages_.pop_front();
      return true;
    }
    *message = chosen;
    message->ends_request = message->leaves_queue = false;
    chosen.kind = Kind::kNothing;
    ++num_out_of_order;
    return true;
  }

  // After `take`, when the message is on the wire.
  void sent(const Message& message) { num_waiting_ -= message.leaves_queue; }
  bool is_empty() const { return num_waiting_ == 0; }

  std::atomic<uint64_t> num_out_of_order{0};

 private:
  static constexpr size_t kWindow = 64;

  size_t choose(const Faults& faults, std::mt19937& random) const {
    const size_t window = std::min(messages_.size(), kWindow);
    if (messages_[0].kind == Kind::kNothing) return 0;
    if (faults.early_signals) {
      for (size_t i = 0; i < window; ++i) {
        if (messages_[i].kind == Kind::kAtomic) return i;
      }
    }
    if (!faults.reorder) return 0;
    // The first of each group that passes no fence.
    std::vector<size_t> firsts;
    std::vector<uint32_t> groups;
    for (size_t i = 0; i < window && messages_[i].fences == messages_[0].fences; ++i) {
      const Message& message = messages_[i];
      if (message.kind == Kind::kNothing) continue;
      if (!groups.empty() && groups.back() == message.group) continue;
      groups.push_back(message.group);
      firsts.push_back(i);
    }
    return firsts[random() % firsts.size()];
  }

  const bool pairs_;
  std::mutex mutex_;
  std::deque<Message> messages_;
  uint32_t group_ = 0, fences_ = 0;
  std::atomic<uint64_t> num_waiting_{0};
};

}  // namespace softnic
