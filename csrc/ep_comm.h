/* C ABI of libep_comm.so: pointers, integers, a stream; a status comes back.
 *
 * Plain C on purpose: one binary serves every Python and torch version. The caller owns all memory,
 * workspace included; nothing here allocates, synchronises, or keeps a pointer after it returns.
 *
 * Every function may be called from any thread. Kernels run on the current device and on the
 * `stream` that is passed (a cudaStream_t; NULL is the legacy default stream).
 */
#ifndef EP_COMM_H
#define EP_COMM_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define EP_API __attribute__((visibility("default")))

/* Raise it with every change that an older caller would not survive; ep_comm/_native mirrors it. */
#define EP_ABI_VERSION 1

/* What a function that returns a status may answer. ep_last_error() has the text. */
enum {
  EP_OK = 0,
  EP_ERR_ARGUMENT = 1, /* an argument is wrong; nothing was launched */
  EP_ERR_CUDA = 2      /* a CUDA call failed */
};

/* EP_ABI_VERSION of the library (not of the header that the caller was built with). */
EP_API int32_t ep_abi_version(void);

/* GPU architectures that the library holds code for, such as "90a+100a". */
EP_API const char* ep_cuda_archs(void);

/* Text of the calling thread's last failure; "" where there was none. Valid until its next one. */
EP_API const char* ep_last_error(void);

/* Layout of a struct of this header, so that a mirror in another language can be checked field by
 * field: writes sizeof, then the offset of each field in order of declaration, at most `capacity`
 * values. Returns how many values there are in all, or -1 for an unknown `struct_name`. */
EP_API int32_t ep_struct_layout(const char* struct_name, int32_t* values, int32_t capacity);

/* ---- Routing layout ------------------------------------------------------------------------- */

#define EP_MAX_TOPK 32
#define EP_MAX_EXPERTS 4096
#define EP_MAX_RANKS 1024

/* What ep_layout_args.input points to. */
enum {
  EP_INPUT_TOPK_INT32 = 0, /* int32 [T, K]: expert of each copy, -1 = dropped */
  EP_INPUT_TOPK_INT64 = 1, /* int64 [T, K]: the same */
  EP_INPUT_ROUTING_MAP = 2 /* bool  [T, E]: at most K true in a row */
};

/* error[0] after ep_layout: what is wrong with the first offending entry, in order of tokens and,
 * within a token, of k (or column). Of an expert that comes twice the second place offends. */
enum {
  EP_ROUTING_OK = 0,
  EP_ROUTING_OUT_OF_RANGE = 1, /* value is neither -1 nor in [0, E) */
  EP_ROUTING_DUPLICATE = 2,    /* value is an expert that the token named at a smaller k */
  EP_ROUTING_TOO_MANY = 3      /* value true entries in a row, the first beyond K in column k */
};

/* T = num_tokens, K = num_topk, E = num_experts, R = num_ranks; expert e lives on rank e / (E / R).
 * All tensors are contiguous, row-major, in device memory; a pointer to an empty one may be NULL.
 * Outputs are overwritten in full: they need no zeroing. */
typedef struct ep_layout_args {
  const void* input;              /* see input_kind */
  int32_t* topk_idx_out;          /* [T, K] experts: as in topk_idx, from a map ascending; or -1 */
  int32_t* num_tokens_per_rank;   /* [R]    tokens (not copies) sent to each rank */
  int32_t* num_tokens_per_expert; /* [E]    copies sent to each expert */
  uint8_t* is_token_in_rank;      /* [T, R] 1 where the token goes to the rank, else 0 */
  int32_t* send_slot;             /* [T, R] index among the tokens that go to the rank; or -1 */
  int32_t* error;                 /* [4]    code, token, k (or column), value; code 0 = fine */
  void* workspace;                /* 16-byte aligned; contents need no preparation */
  int64_t workspace_bytes;        /* at least ep_layout_workspace_bytes() */
  int64_t num_tokens;             /* 0 .. 2^31 - 1 */
  int32_t num_topk;               /* 1 .. EP_MAX_TOPK */
  int32_t num_experts;            /* 1 .. EP_MAX_EXPERTS, a multiple of num_ranks */
  int32_t num_ranks;              /* 1 .. EP_MAX_RANKS */
  int32_t input_kind;             /* EP_INPUT_* */
} ep_layout_args;

/* Bytes of workspace that ep_layout needs for these sizes; -1 if they are out of bounds. */
EP_API int64_t ep_layout_workspace_bytes(int64_t num_tokens, int32_t num_experts,
                                         int32_t num_ranks);

/* Computes who sends what where. Integers only, no global atomics: the result depends on nothing
 * but the input. A bad entry is reported in `error` and treated as dropped; the status stays EP_OK,
 * because the content of the input is known on the device only. An int64 value that does not fit
 * error[3] is clamped to int32. */
EP_API int32_t ep_layout(const ep_layout_args* args, void* stream);

#ifdef __cplusplus
}
#endif

#endif /* EP_COMM_H */
