// NVSHMEM's world, seen from the host: it is made or joined, memory is allocated in it, and it is
// left. Nothing here ends the process.

#include <nvshmem_host.h>

#include <cstring>

#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "network/network.cuh"

#define EP_STRINGIFY(x) #x
#define EP_TO_STRING(x) EP_STRINGIFY(x)
#define EP_NVSHMEM_PART(part) EP_TO_STRING(NVSHMEM_VENDOR_##part##_VERSION)

namespace ep::network {

__device__ int32_t flushes_after_wait;

// The name makes the version findable in the binary's bytes (setup.py looks for it).
extern const char built_for[];
const char built_for[] =
    "EP_NVSHMEM=" EP_NVSHMEM_PART(MAJOR) "." EP_NVSHMEM_PART(MINOR) "." EP_NVSHMEM_PART(PATCH);

}  // namespace ep::network

namespace {

using namespace ep;

constexpr size_t kAlignment = 512;
constexpr nvshmemi_version_t kCompiled = {
    NVSHMEM_VENDOR_MAJOR_VERSION, NVSHMEM_VENDOR_MINOR_VERSION, NVSHMEM_VENDOR_PATCH_VERSION};

// Whether the kernels of this library know the world.
bool has_joined = false;

int32_t number_of(int major, int minor, int patch) { return major * 10000 + minor * 100 + patch; }

bool is_up() {
  const int status = nvshmemx_init_status();
  return status >= NVSHMEM_STATUS_IS_INITIALIZED && status < NVSHMEM_STATUS_INVALID;
}

// Without it kernels would find no world, even where NVSHMEM is up.
int32_t refuse_if_not_joined(const char* what) {
  if (has_joined) return EP_OK;
  return fail(EP_ERR_NVSHMEM, "%s: ep_nvshmem_init has not been called", what);
}

// Refuses another world than the one of this group.
int32_t check_world(int32_t rank, int32_t num_ranks) {
  const int pe = nvshmem_my_pe(), num_pes = nvshmem_n_pes();
  if (pe == rank && num_pes == num_ranks) return EP_OK;
  return fail(EP_ERR_NVSHMEM,
              "NVSHMEM is initialised in this process as PE %d of %d, and this is rank %d of %d of "
              "its group: one process has one NVSHMEM world, so it has to be that of the group",
              pe, num_pes, rank, num_ranks);
}

int32_t reads_in_order(int32_t* in_order) {
  int device = 0, ordering = 0;
  int32_t status = check_cuda(cudaGetDevice(&device), "ep_nvshmem_consistent");
  if (status != EP_OK) return status;
  status =
      check_cuda(cudaDeviceGetAttribute(&ordering, cudaDevAttrGPUDirectRDMAWritesOrdering, device),
                 "ep_nvshmem_consistent");
  *in_order = ordering >= cudaGPUDirectRDMAWritesOrderingOwner;
  return status;
}

int32_t flush_after_wait(int32_t flushes) {
  return check_cuda(cudaMemcpyToSymbol(network::flushes_after_wait, &flushes, sizeof(flushes)),
                    "cudaMemcpyToSymbol(flushes_after_wait)");
}

// Initialises NVSHMEM, or, where it is up, tells it of the device state in this library: each
// library with device code has its own. This is what nvshmemx_init_attr calls, which ends the
// process where it fails.
int32_t join(unsigned int flags, nvshmemx_init_attr_t* attributes) {
  int provided = 0;
  const int status =
      nvshmemi_init_thread(NVSHMEM_THREAD_SERIALIZED, &provided, flags, attributes, kCompiled);
  if (status != 0) {
    return fail(EP_ERR_NVSHMEM,
                "NVSHMEM did not initialise (its status is %d): its own words are "
                "on stderr, and NVSHMEM_DEBUG=INFO has it say more",
                status);
  }
  // It returns 0 too where it has come no further than meeting the other ranks.
  if (!is_up()) {
    return fail(EP_ERR_NVSHMEM,
                "NVSHMEM met the other ranks and did not initialise after that: its "
                "own words are on stderr, and NVSHMEM_DEBUG=INFO has it say more");
  }
  has_joined = true;
  int32_t in_order = 0;
  const int32_t error = reads_in_order(&in_order);
  return error != EP_OK ? error : flush_after_wait(in_order == 0);
}

__global__ void raise_kernel(network::Flag* flag, network::Flag value, int pe) {
  ptx::fence_acq_rel_sys();
  network::nvshmem::raise(flag, value, pe);
}

const Kernels kernels("NVSHMEM kernel", Setup::kBesideDispatch, 0, raise_kernel);

}  // namespace

int32_t ep_nvshmem_versions(int32_t* compiled, int32_t* loaded) {
  int major = 0, minor = 0, patch = 0;
  nvshmemx_vendor_get_version_info(&major, &minor, &patch);
  *loaded = number_of(major, minor, patch);
  *compiled = number_of(kCompiled.major, kCompiled.minor, kCompiled.patch);
  return EP_OK;
}

int64_t ep_nvshmem_id_bytes(void) { return sizeof(nvshmemx_uniqueid_t); }

int32_t ep_nvshmem_new_id(uint8_t* id) {
  nvshmemx_uniqueid_t made = NVSHMEMX_UNIQUEID_INITIALIZER;
  const int status = nvshmemx_get_uniqueid(&made);
  if (status != 0) {
    return fail(EP_ERR_NVSHMEM,
                "NVSHMEM made no unique id (its status is %d): its own words are on "
                "stderr; NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME names the interface to listen on",
                status);
  }
  std::memcpy(id, &made, sizeof(made));
  return EP_OK;
}

int32_t ep_nvshmem_is_up(void) { return is_up() ? 1 : 0; }

int32_t ep_nvshmem_init(const uint8_t* id, int32_t rank, int32_t num_ranks) {
  if (num_ranks < 1 || rank < 0 || rank >= num_ranks) {
    return fail(EP_ERR_ARGUMENT, "rank %d of %d ranks", rank, num_ranks);
  }
  // Makes the device's context current, which NVSHMEM takes for granted.
  int32_t status = check_cuda(cudaFree(nullptr), "ep_nvshmem_init");
  if (status != EP_OK) return status;
  if (is_up()) {
    status = check_world(rank, num_ranks);
    return status != EP_OK || has_joined ? status : join(0, nullptr);
  }
  if (id == nullptr) return fail(EP_ERR_ARGUMENT, "NVSHMEM is not up, so its world needs an id");
  nvshmemx_uniqueid_t made;
  std::memcpy(&made, id, sizeof(made));
  nvshmemx_init_attr_t attributes = NVSHMEMX_INIT_ATTR_INITIALIZER;
  if (nvshmemx_set_attr_uniqueid_args(rank, num_ranks, &made, &attributes) != 0) {
    return fail(EP_ERR_NVSHMEM, "NVSHMEM does not take the unique id");
  }
  status = join(NVSHMEMX_INIT_WITH_UNIQUEID, &attributes);
  return status != EP_OK ? status : check_world(rank, num_ranks);
}

int32_t ep_nvshmem_world(int32_t* pe, int32_t* num_pes) {
  if (!is_up()) return fail(EP_ERR_NVSHMEM, "NVSHMEM is not initialised in this process");
  *pe = nvshmem_my_pe();
  *num_pes = nvshmem_n_pes();
  return EP_OK;
}

int32_t ep_nvshmem_allocate(int64_t num_bytes, uint8_t** memory) {
  const int32_t status = refuse_if_not_joined("ep_nvshmem_allocate");
  if (status != EP_OK) return status;
  if (num_bytes < 1) {
    return fail(EP_ERR_ARGUMENT, "%lld bytes of network memory", static_cast<long long>(num_bytes));
  }
  *memory = static_cast<uint8_t*>(nvshmem_align(kAlignment, static_cast<size_t>(num_bytes)));
  if (*memory != nullptr) return EP_OK;
  return fail(EP_ERR_NVSHMEM,
              "NVSHMEM has no %lld bytes: its own words are on stderr; without "
              "CUDA's virtual memory its heap has NVSHMEM_SYMMETRIC_SIZE",
              static_cast<long long>(num_bytes));
}

int32_t ep_nvshmem_free(uint8_t* memory) {
  const int32_t status = refuse_if_not_joined("ep_nvshmem_free");
  if (status == EP_OK) nvshmem_free(memory);
  return status;
}

int32_t ep_nvshmem_finalize(void) {
  const int32_t status = refuse_if_not_joined("ep_nvshmem_finalize");
  if (status != EP_OK) return status;
  has_joined = false;
  nvshmem_finalize();
  return EP_OK;
}

int32_t ep_nvshmem_raise(uint8_t* flag, int64_t value, int32_t pe, void* stream) {
  const int32_t status = refuse_if_not_joined("ep_nvshmem_raise");
  if (status != EP_OK) return status;
  if (pe < 0 || pe >= nvshmem_n_pes()) {
    return fail(EP_ERR_ARGUMENT, "PE %d is none of %d", pe, nvshmem_n_pes());
  }
  raise_kernel<<<1, 1, 0, static_cast<cudaStream_t>(stream)>>>(reinterpret_cast<uint64_t*>(flag),
                                                               static_cast<uint64_t>(value), pe);
  return check_cuda(cudaGetLastError(), "ep_nvshmem_raise");
}

int32_t ep_nvshmem_consistent(int32_t* is_consistent) { return reads_in_order(is_consistent); }
