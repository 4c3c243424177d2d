// What both transports answer alike.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "abi.h"
#include "card.h"

#define SOFTNIC_EXPORT extern "C" __attribute__((visibility("default")))

namespace softnic {

constexpr int kPluginInterface = 3;  // NVSHMEM 3.4

inline Card& card_of(abi::Transport* transport) { return *static_cast<Card*>(transport->state); }

inline int name_memory(abi::MemHandle* handle, void* memory, size_t bytes) {
  std::memset(handle, 0, sizeof *handle);
  std::snprintf(handle->bytes, sizeof handle->bytes, "softnic %p %zu", memory, bytes);
  return 0;
}
inline int release_memory(abi::MemHandle*, abi::Transport*) { return 0; }
inline int show_info(abi::Transport*, int) { return 0; }
inline int finalize(abi::Transport* transport) {
  card_of(transport).stop();
  delete &card_of(transport);
  std::free(transport);
  return 0;
}

// A transport with what is common filled in, or null where NVSHMEM is of another version.
inline abi::Transport* new_transport(int interface, Card* card) {
  if (interface / 10000 != kPluginInterface) {
    std::fprintf(stderr, "softnic: made for NVSHMEM 3.4, not for plug-in interface %d\n",
                 interface);
    return nullptr;
  }
  auto* const transport = static_cast<abi::Transport*>(std::calloc(1, sizeof(abi::Transport)));
  transport->state = card;
  transport->api_version = interface;
  transport->attributes = 2;  // connected before use
  transport->max_op_bytes = 1ull << 30;
  transport->is_initialized = true;
  transport->ops.release_mem_handle = release_memory;
  transport->ops.show_info = show_info;
  transport->ops.finalize = finalize;
  return transport;
}

}  // namespace softnic
