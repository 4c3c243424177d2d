// A remote transport of NVSHMEM 3.4.5 as NVSHMEM sees it: plug-in interface 3. Those of later
// versions differ. NVSHMEM publishes no header for it, so this is what we found out.
#pragma once
#include <cstddef>
#include <cstdint>
#include <unordered_map>

namespace softnic::abi {

enum Op { kPut = 1, kP, kPutSignal, kGet, kG, kFence, kAtomic, kQuiet };

enum Atomic {
  kAck = 1,
  kInc,
  kSet,
  kAdd,
  kAnd,
  kOr,
  kXor,
  kSignal,
  kSignalSet,
  kSignalAdd,
  kEndNonFetch,  // those behind it bring the old value back
  kFetch,
  kFetchInc,
  kFetchAdd,
  kFetchAnd,
  kFetchOr,
  kFetchXor,
  kSwap,
  kCompareSwap
};

// What one side may do to the other's memory.
enum Reach {
  kCpuWrite = 1 << 4,
  kCpuRead = 1 << 5,
  kCpuAtomics = 1 << 6,
  kGpuWrite = 1 << 7,
  kGpuRead = 1 << 8,
  kGpuAtomics = 1 << 9
};

struct MemHandle {
  char bytes[512];
};
struct RmaVerb {
  int op, is_nbi, is_stream;
  void* stream;
};
struct RmaMem {
  void* address;
  uint64_t offset;
  MemHandle* handle;
};
struct RmaBytes {
  size_t num_elements;
  int element_bytes;
  ptrdiff_t source_stride, dest_stride;
};
struct AtomicVerb {
  int op, is_fetch, is_value, is_compare;
};
struct AtomicMem {
  RmaMem remote;
  uint64_t result_flag;
  void *result, *value_address, *compare_address;
  uint64_t value, compare;
  MemHandle* result_handle;
};
struct AtomicBytes {
  int type, element_bytes;
};

// How processes meet before they can send; more follows that is not used here.
struct Boot {
  int version, rank, num_ranks, local_pe, num_local_pes;
  int (*allgather)(const void*, void*, int, Boot*);
  int (*alltoall)(const void*, void*, int, Boot*);
  int (*barrier)(Boot*);
};

struct Transport;
struct HostOps {
  int (*can_reach_peer)(int*, void*, Transport*);
  int (*connect_endpoints)(Transport*, int*, int);
  int (*get_mem_handle)(MemHandle*, void*, size_t, Transport*, bool);
  int (*release_mem_handle)(MemHandle*, Transport*);
  int (*finalize)(Transport*);
  int (*show_info)(Transport*, int);
  int (*progress)(Transport*);
  int (*rma)(Transport*, int, RmaVerb, RmaMem*, RmaMem*, RmaBytes, int);
  int (*amo)(Transport*, int, void*, AtomicVerb, AtomicMem*, AtomicBytes, int);
  int (*fence)(Transport*, int, int);
  int (*quiet)(Transport*, int, int);
  int (*enforce_cst)(Transport*);
  int (*enforce_cst_at_target)(Transport*);
  int (*add_device_remote_mem_handles)(Transport*, int, MemHandle*, uint64_t, size_t);
};
static_assert(sizeof(HostOps) == 14 * sizeof(void*));

struct Transport {
  int api_version;
  int type;  // 0, or 1 for IBGDA
  int* capabilities;
  HostOps ops;
  Boot* boot;
  void *state, *shared, *cache;
  char** pci_paths;
  int attributes, num_devices;
  bool atomics_complete_on_quiet, is_initialized, no_proxy;
  void* heap;
  size_t log2_granularity;
  uint64_t max_op_bytes;
  uint32_t atomic_host_endian_min_size;
  int index, my_pe, num_pes;
  std::unordered_map<void*, void*>* aliases;
  std::unordered_map<void*, size_t>* extended_memory;
};

}  // namespace softnic::abi
