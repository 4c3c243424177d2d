// The card: a thread that sends what waits in queues, and one that carries out what comes. Both
// copy with the GPU's copy engines. No process maps another one's GPU memory.
#pragma once
#include <atomic>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "abi.h"
#include "queue.h"
#include "wire.h"

namespace softnic {

// What has gone through this process's card; tests read it.
struct Counts {
  std::atomic<uint64_t> puts{0}, put_bytes{0}, atomics{0}, gets{0}, out_of_order{0};
};
extern Counts counts;

class Card {
 public:
  virtual ~Card() = default;

  // Collective. Maps everybody's rings; queues are made by `make_queues`.
  void connect(abi::Boot* boot, int me, int num_processes);
  void start();
  void stop();

  bool is_connected() const { return !out_.empty(); }
  Queue& queue(int index) { return *queues_[index]; }
  // Get `bytes` of another process's memory.
  void push_get(Queue& queue, uint64_t remote, uint64_t local, size_t bytes);
  // Wait until all that was pushed for a process has been carried out there.
  void wait_until_done(int process);

 protected:
  virtual void make_queues() = 0;
  // Of the sending thread: take orders in; after a message has left; report what is complete. They
  // return whether there was something to do.
  virtual bool poll() { return false; }
  virtual void on_sent(int /*queue*/, const Message&, uint64_t /*position*/) {}
  virtual bool complete() { return false; }

  int me_ = -1, num_processes_ = 0;
  void* context_ = nullptr;
  std::vector<std::unique_ptr<Queue>> queues_;
  std::vector<Ring> out_, in_;

 private:
  void send();
  bool send_one();
  void put_on_wire(Queue& queue, Message& message);
  void receive();
  void carry_out(int source, Slot* slot);
  void carry_out_atomic(int source, Slot* slot);
  void reply(int source, Message message);

  const Faults faults_;
  std::mt19937 random_;
  std::unique_ptr<SharedMemory> own_;
  std::vector<SharedMemory> others_;
  std::vector<std::unique_ptr<Queue>> replies_;
  std::atomic<bool> stop_{false};
  std::atomic<int64_t> num_gets_{0};
  uint64_t* scratch_ = nullptr;  // four words that copies read and write
  std::thread sender_, receiver_;
  Copies sending_, receiving_;
};

}  // namespace softnic
