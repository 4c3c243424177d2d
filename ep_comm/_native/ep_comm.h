/* C ABI of libep_comm.so: pointers, integers, a stream; a status comes back.
 *
 * And of libep_comm_nvshmem.so, which has the functions of "Between nodes" over another network,
 * those of "NVSHMEM", and those that every library needs.
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
/* What libep_comm_nvshmem.so alone has. */
#define EP_NVSHMEM_API EP_API

/* What a function that returns a status may answer. ep_last_error() has the text. */
enum {
  EP_OK = 0,
  EP_ERR_ARGUMENT = 1, /* an argument is wrong; nothing was launched */
  EP_ERR_CUDA = 2,     /* a CUDA call failed */
  EP_ERR_NVSHMEM = 3   /* NVSHMEM refused; its own words are on stderr */
};

/* SHA-256 of the text of this header, as the library was built from it. A caller that reads another
 * text must not call anything else. */
EP_API const char* ep_header_digest(void);

/* GPU architectures that the library holds code for, such as "90a+100a". */
EP_API const char* ep_cuda_archs(void);

/* Text of the calling thread's last failure; "" where there was none. Valid until its next one. */
EP_API const char* ep_last_error(void);

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

/* ---- Peers: the ranks of one host, connected by NVLink -------------------------------------- */

#define EP_MAX_PEERS 8
#define EP_MAX_LOCAL_EXPERTS 1024 /* of one rank */

/* What a bounded wait on the device was for; ep_fault.phase. */
enum {
  EP_PHASE_CREDIT = 1, /* the peer had not read what the operation before had sent it */
  EP_PHASE_PLAN = 2,   /* the peer's routing had not come */
  EP_PHASE_ROWS = 3    /* a chunk of the peer's rows had not come */
};

enum {
  EP_FAULT_NONE = 0,
  EP_FAULT_TIMEOUT = 1,     /* the peer did not arrive */
  EP_FAULT_MISMATCH = 2,    /* the peer plans something else */
  EP_FAULT_RESULTS = 3,     /* low latency: a third result of this rank would be out */
  EP_FAULT_OVERWRITTEN = 4, /* the peer gave up, and its copies may have come over rows that were
                               being read */
  EP_FAULT_UNFINISHED = 5   /* copy engines: an operation came between what begins another one of
                               its kind and the rest of that */
};

/* What the ranks of one plan must agree on; ep_fault.field. */
enum {
  EP_FIELD_NUM_TOPK = 0,
  EP_FIELD_HIDDEN = 1,
  EP_FIELD_NUM_EXPERTS = 2,
  EP_FIELD_EXPERT_MAJOR = 3,
  EP_FIELD_EXPERT_ALIGNMENT = 4,
  EP_NUM_FIELDS = 5, /* of a plan's header */
  EP_FIELD_CALL = 5  /* tag of a dispatch or combine: expected and seen are tags */
};

/* Operations; ep_fault.op. */
enum {
  EP_OP_DISPATCH = 1,
  EP_OP_COMBINE = 2,
  EP_OP_LOW_LATENCY_DISPATCH = 3,
  EP_OP_LOW_LATENCY_COMBINE = 4
};

/* Written by the first kernel that fails, into host memory that the device sees. Every kernel that
 * finds it set ends its waits. */
typedef struct ep_fault {
  int32_t code;     /* EP_FAULT_*; 0 = all is well */
  int32_t op;       /* EP_OP_* */
  int32_t phase;    /* EP_PHASE_* */
  int32_t peer;     /* rank that was waited for, or that disagrees */
  int32_t field;    /* EP_FAULT_MISMATCH: EP_FIELD_* */
  int64_t expected; /* epoch, or this rank's value of the field */
  int64_t seen;     /* epoch, or the peer's value */
} ep_fault;

/* For whom kernels have been waiting for more than a second; host memory that the device sees. For
 * each peer 0, or phase << 32 | what ep_fault.expected would say, in 32 bits. Of several threads
 * that wait the last one to write counts. One whose wait ends writes 0; those that still wait write
 * again within a second or two. After a fault it stays. */
typedef struct ep_progress {
  int64_t dispatch[EP_MAX_PEERS];
  int64_t combine[EP_MAX_PEERS];
  int64_t low_latency_dispatch[EP_MAX_PEERS];
  int64_t low_latency_combine[EP_MAX_PEERS];
} ep_progress;

/* What an operation did, written at its end; device memory. Times are of %globaltimer. The end of a
 * low-latency one is that of the first warps of its blocks. */
typedef struct ep_record {
  int64_t epoch; /* number of the operation among those of its kind, from 1 */
  int64_t begin_ns;
  int64_t end_ns;
  int64_t longest_wait_ns[EP_MAX_PEERS]; /* for each rank, of any thread of the operation; low
                                            latency: for its header */
  int32_t num_rows[EP_MAX_PEERS];        /* sent to each rank, or back to it; low-latency dispatch:
                                            received from it */
} ep_record;

/* What the host notes of an operation when it launches the kernel that begins it; host memory. */
typedef struct ep_call {
  int64_t called_ns; /* of CLOCK_MONOTONIC */
  int32_t row_bytes; /* a row with its scales; 0 where that is not known yet */
} ep_call;

/* Whom a kernel talks to. */
typedef struct ep_peers {
  uint8_t* memory[EP_MAX_PEERS]; /* each rank's symmetric memory, as mapped here */
  ep_fault* fault;               /* host memory, mapped */
  int64_t* progress;             /* host memory, mapped: [R] of ep_progress, of this kind */
  int32_t* abort;                /* device memory: set together with the fault */
  uint32_t* epoch;               /* device memory: operations of this kind that have ended, so
                                    that a captured graph counts on when it is replayed */
  int64_t* longest_wait_ns;      /* device memory [R], zero between operations */
  ep_record* record;             /* of this operation */
  int64_t call_offset;           /* its ep_call is so many bytes from there; 0: there is none */
  int64_t* wire_bytes;           /* device memory: rows and scales sent so far, in bytes */
  int64_t timeout_ns;            /* bound of every wait */
  int64_t delay_ns;              /* for tests: every wait and every signal comes up to this
                                    much later, at random; 0 is none */
  int32_t op;                    /* EP_OP_* that the kernel is part of */
  int32_t rank;
  int32_t num_ranks;
} ep_peers;

/* Copy engines as the wire of an operation: what its kernels need to know of it. */
typedef struct ep_wire {
  int64_t flag_offset; /* copy_flags, those of the operation */
  int64_t mark_offset; /* copy_marks, those of the operation */
  int32_t number;      /* of the operation among those of its kind outside of graphs, from 1; in a
                          graph 0: flags are stamped with the epoch */
  int32_t chunk_rows;  /* rows of a chunk, a multiple of 32; 0: rows travel by SMs */
} ep_wire;

/* Ask for as much as possible now: kernels are loaded, shared-memory limits raised. A kernel that
 * is loaded while another one spins would wait for it for ever. */
EP_API int32_t ep_load_kernels(void);

/* ---- Memory of a buffer --------------------------------------------------------------------- */

/* Flags that a rank raises at another one in an operation by copy engines: of the head (scales,
 * weights and the tag of the call), then of the chunks of rows. */
#define EP_COPY_CHUNKS 4
#define EP_COPY_FLAGS 8

/* Rows of the shortest chunk, which sets how many flags there is room for. */
#define EP_MIN_CHUNK_TOKENS 4

typedef struct ep_buffer_layout_args {
  int64_t max_tokens; /* rows that each source rank has room for */
  int64_t row_bytes;  /* of the widest type of rows; a multiple of 16 */
  int32_t num_topk;
  int32_t num_ranks;
  int32_t low_latency_tokens; /* most tokens of a low-latency operation; 0: there are none */
  int32_t hidden;             /* elements of their rows, which are BF16; a multiple of 8 */
  int32_t copy_engines;       /* whether they are the wire */
} ep_buffer_layout_args;

/* Where things stand in the symmetric memory of every rank, in bytes from its start; the same on
 * all ranks. Each begins at a multiple of 256. R = num_ranks, S = max_tokens, K = num_topk,
 * C = max_chunks. All of it is zero before the first operation. */
typedef struct ep_buffer_offsets {
  int64_t farewells;        /* int32 [R]: of ranks that write no more, see farewell.py */
  int64_t plan_flags;       /* uint32 [R]: epoch of the routing that came from each rank */
  int64_t dispatch_credits; /* uint32 [R]: epoch of the dispatch that each rank has read */
  int64_t combine_credits;  /* uint32 [R]: the same of combines */
  int64_t plan_headers;     /* int32 [R, 16]: rows, tokens and EP_FIELD_* of each rank's routing */
  int64_t dispatch_flags;   /* uint64 [R, C]: of each rank's chunks of slots */
  int64_t combine_flags;    /* uint32 [R, C]: of each rank's chunks of partial rows */
  int64_t plan_idx;         /* int32 [R, S, K]: local experts of each rank's rows, or -1 */
  int64_t combine_weights;  /* float [R, S, K]: gradients of probabilities from each rank */
  int64_t dispatch_slots;   /* [R - 1, S, slot]: the next rank's rows first; slots of whole
                               128-byte lines, as long as the rows of a dispatch need */
  int64_t combine_rows;     /* [R - 1, S, row_bytes]: partial rows, the next rank's first */
  int64_t zeros;            /* [row_bytes]: never written */
  /* Where copy engines are the wire: two kinds of operations (dispatch, combine), two of flags
   * (outside of graphs, in graphs). The slots of a source are then its rows by token. */
  int64_t plan_token_bits; /* uint32 [R, ceil(S / 32), 2]: see ep_routing.token_bits */
  int64_t copy_flags;      /* uint32 [2, 2, R, EP_COPY_FLAGS] */
  int64_t copy_marks;      /* uint32 [2, R]: epoch for which each rank writes here */
  /* Low latency, where there is room for it: M = low_latency_tokens, two of each (epochs take
   * turns), words of 16 bytes. */
  int64_t low_latency_credits;  /* uint32 [dispatch and combine, 2, R] */
  int64_t low_latency_headers;  /* words [dispatch and combine, 2, R] */
  int64_t low_latency_entries;  /* words [2, R, M, ceil(K / 8) + ceil(K / 3)]: experts, weights */
  int64_t low_latency_weights;  /* words [2, R, M, ceil(K / 3)]: given to combine */
  int64_t low_latency_dispatch; /* [2, R, M, 2 hidden bytes]: rows, all ones while none is there */
  int64_t low_latency_combine;  /* [2, R, M, 2 hidden bytes]: partial rows, the same */
  int64_t total;                /* bytes of it all */
  int64_t region_bytes;         /* of dispatch_slots: those of one source */
  int32_t max_chunks;
} ep_buffer_offsets;

/* Fills `offsets`. Host code alone: needs no GPU. */
EP_API int32_t ep_buffer_layout(const ep_buffer_layout_args* args, ep_buffer_offsets* offsets);

/* ---- Plan: the routing of a dispatch reaches the ranks that it concerns --------------------- */

/* Counts that the host needs to allocate the outputs, in host memory that the device sees. */
typedef struct ep_mailbox {
  int32_t ticket;                        /* of the plan; written last */
  int32_t routing_error[4];              /* of this rank's own input; as ep_layout_args */
  int32_t asked_tokens[EP_MAX_PEERS];    /* of each rank; more than max_tokens: none was sent */
  int32_t num_sent_tokens[EP_MAX_PEERS]; /* rows to each rank */
  int32_t num_recv_tokens[EP_MAX_PEERS]; /* rows from each rank */
  int32_t num_tokens_per_expert[EP_MAX_LOCAL_EXPERTS]; /* [E_local] before padding */
} ep_mailbox;

/* What an operation that no host waits for has to say; host memory that the device sees. The first
 * one stays until the host has cleared it. */
typedef struct ep_notice {
  int32_t routing_error[4]; /* EP_NOTICE_ROUTING: as ep_layout_args.error; aligned to 16 */
  int32_t code;             /* EP_NOTICE_*, written last */
  int32_t asked_tokens[EP_MAX_PEERS]; /* EP_NOTICE_TOO_MANY: as ep_mailbox.asked_tokens */
  int32_t num_rows; /* EP_NOTICE_OVERFLOW: rows that the output would have needed */
  int32_t capacity; /* rows that it has; EP_NOTICE_TOO_MANY: ep_plan_args.max_tokens */
} ep_notice;

enum { EP_NOTICE_NONE = 0, EP_NOTICE_ROUTING = 1, EP_NOTICE_OVERFLOW = 2, EP_NOTICE_TOO_MANY = 3 };

/* Where the rows of one dispatch go: device memory, written by ep_plan and read by every operation
 * with that routing. K4 is K rounded up to a multiple of 4: rows of 16 bytes. Received rows are
 * numbered by source rank, then by slot: row first_of_source[source] + slot.
 *
 * The entry of a received row is int32 [3, K4]: the output row of each of its experts, -1 where
 * there is none; its local experts, -1 elsewhere (from column K on nothing is written); and the
 * output rows again, ascending, then -1. Rows behind last_entry share that one: the output has room
 * for none of them. */
typedef struct ep_routing {
  int32_t* topk_idx;         /* [T, K] of this rank's own tokens: global experts or -1 */
  int32_t* send_slot;        /* [T, R] index among the tokens that go to the rank; or -1 */
  int32_t* entries;          /* of the received rows, but at most last_entry + 1 */
  int32_t* num_sent;         /* [R] rows to each rank */
  int32_t* num_recv;         /* [R] rows from each rank */
  int32_t* first_of_source;  /* [R] rows from the ranks before each */
  int32_t* source_tokens;    /* [R] T of each rank */
  int32_t* expert_tokens;    /* [E_local] rows of each group, without padding */
  int32_t* expert_first_row; /* [E_local + 1] first row of each group, then the end; of rank-major
                                rows only the end */
  uint32_t* token_bits;      /* [R, ceil(S / 32), 2]: of 32 tokens of a source, which come here, and
                                the slot of the first that does; NULL: rows travel by slot */
  int32_t num_tokens;
  int32_t num_topk;
  int32_t num_topk4;
  int32_t expert_major; /* else rank-major: one row a token, in column 0 */
  int32_t last_entry;
} ep_routing;

/* Fields *_offset here and below are those of ep_buffer_offsets. */
typedef struct ep_plan_args {
  ep_peers peers;
  ep_routing routing;
  const void* input;         /* [T, K] or [T, E], see ep_layout_args */
  void* scratch;             /* ep_plan_scratch_bytes(), 256-byte aligned */
  ep_mailbox* mailbox;       /* host memory, mapped */
  ep_notice* notice;         /* host memory, mapped */
  int32_t* counters;         /* [4] zero; left zero */
  int32_t* overflow;         /* [2, E_local], to which it adds the rows of each expert that were
                                dropped, and in which it raises the most that came; NULL: `notice`
                                says that rows were dropped */
  int64_t flag_offset;       /* plan_flags */
  int64_t credit_offset;     /* dispatch_credits */
  int64_t header_offset;     /* plan_headers */
  int64_t idx_offset;        /* plan_idx */
  int64_t token_bits_offset; /* plan_token_bits; routing.token_bits says whether there are any */
  int32_t ticket;            /* for the mailbox; 0: nobody waits, and `notice` is used */
  int32_t capacity;          /* rows of the output: what does not fit is dropped, and none of the
                                outputs above names it */
  int32_t input_kind;
  int32_t num_experts;
  int32_t max_tokens;
  int32_t asked_tokens; /* routing.num_tokens; or more than max_tokens, while that is 0: the
                           operation goes on without them, and all ranks hear of it */
  int32_t hidden;       /* only compared between ranks */
  int32_t expert_alignment;
  int32_t expert_capacity; /* rows of each group, padding counted: what does not fit into its group
                              is dropped; 0: as many as come, padded to expert_alignment */
  int32_t num_send_blocks; /* of the two kernels; all of one must fit on the GPU at once */
  int32_t num_receive_blocks;
  int32_t is_begun; /* ep_gate has begun the operation: its rows are on their way */
} ep_plan_args;

/* Bytes of scratch that ep_plan needs, the same for every input up to these sizes; -1 if they are
 * out of bounds. */
EP_API int64_t ep_plan_scratch_bytes(int64_t max_tokens, int32_t num_experts, int32_t num_ranks);

/* On `stream`, computes the layout of this rank's tokens and sends it; on `side_stream`, which
 * follows (or is the same one), gathers the others', finds where every received row stands in the
 * output, and tells the host the counts. Rows can be pushed meanwhile. `event` is a cudaEvent_t to
 * use. */
EP_API int32_t ep_plan(const ep_plan_args* args, void* stream, void* side_stream, void* event);

/* `waiting` goes on when all that is on `other` now is done; `event` is a cudaEvent_t to use. */
EP_API int32_t ep_stream_wait(void* waiting, void* other, void* event);

/* A wait of the host for a plan, and the sums of its counts that outputs are allocated by: while it
 * adds them up the GPU may have nothing to do. */
typedef struct ep_mailbox_args {
  const int32_t* mailbox; /* of ep_plan_args or ep_nodes_plan_args: the ticket stands first */
  const ep_fault* fault;
  const int32_t* received;    /* in the mailbox, [num_ranks] rows from each rank */
  const int32_t* expert_rows; /* in the mailbox, [num_experts] rows of each group */
  void* stream;
  int64_t timeout_ns;
  int64_t num_received;    /* set: of all ranks */
  int64_t num_expert_rows; /* set: of all groups, each rounded up to the alignment */
  int32_t ticket;
  int32_t num_ranks;
  int32_t num_experts;
  int32_t alignment;
} ep_mailbox_args;

/* Waits on the host for the ticket, at most timeout_ns. Returns 1 when it has come and the sums are
 * set, 0 after the timeout, 2 if `fault` was set, 3 if `stream` reports a CUDA error (see
 * ep_last_error). */
EP_API int32_t ep_mailbox_wait(ep_mailbox_args* args);

/* ---- Copy engines: rows without SMs --------------------------------------------------------- */

/* What stands before the copies of an operation: waits for the credits of the one before. */
typedef struct ep_gate_args {
  ep_peers peers;
  uint32_t* epoch;       /* device memory, zero at first: of the operation that is pushed, for
                            ep_push. Where it is that of this operation already, another one has
                            begun it and is not done: EP_FAULT_UNFINISHED */
  int64_t credit_offset; /* dispatch_credits or combine_credits */
  int64_t mark_offset;   /* copy_marks, those of the operation */
  int32_t begins;        /* whether the operation begins here */
} ep_gate_args;

EP_API int32_t ep_gate(const ep_gate_args* args, void* stream);

/* EP_OK where the driver can raise flags behind copies; else EP_ERR_CUDA, and the text says what it
 * lacks. Launches nothing. */
EP_API int32_t ep_check_copies(void);

/* Rows [first_row, first_row + chunk_rows) of those that go to each peer. The regions of the others
 * stand in the order of ranks, at each rank the next one's first. */
typedef struct ep_push_args {
  ep_peers peers;
  const uint32_t* epoch; /* as ep_gate left it */
  const uint8_t* source; /* the first row of the first region */
  void* event;           /* a cudaEvent_t to record behind it, or NULL */
  int64_t source_stride; /* from one region to the next; 0: all peers get the same rows */
  int64_t target_offset; /* in the peer's memory, of the first row in the first region */
  int64_t target_stride;
  int64_t flag_offset; /* ep_wire */
  int32_t num_rows[EP_MAX_PEERS];
  int32_t row_bytes;
  int32_t first_row;
  int32_t chunk_rows;
  int32_t number; /* ep_wire */
  int32_t flag;   /* to raise behind it, or -1: more is to come before */
  int32_t tag;    /* 0 .. 255 */
} ep_push_args;

EP_API int32_t ep_push(const ep_push_args* args, void* stream);

/* `waiting` goes on when what `event` was recorded behind is done. */
EP_API int32_t ep_event_wait(void* waiting, void* event);

/* ---- FP8 ------------------------------------------------------------------------------------ */

/* Quantises rows [T, H] to E4M3 in blocks of 128 with power-of-two scales; see ep_comm/fp8.py. */
typedef struct ep_quantize_args {
  const void* x;      /* [T, H], 16-byte aligned */
  uint8_t* data;      /* [T, H] out */
  float* scales;      /* [T, H / 128] out: what a byte is multiplied with to give the value back */
  int64_t num_blocks; /* T * H / 128 */
  int32_t dtype;      /* EP_BF16 or EP_FP32 */
} ep_quantize_args;

EP_API int32_t ep_quantize(const ep_quantize_args* args, void* stream);

/* Makes the column-wise copies that weight gradients read, of all experts in one launch: columns of
   each expert's rows in blocks of 128 rows from its first one on, quantised as above from the rows'
   BF16 values. A tile is such a block of rows. */
typedef struct ep_columnwise_args {
  const uint8_t* rows; /* [M, H] grouped by expert, 16-byte aligned; H a multiple of 128 */
  const float* scales; /* of each expert [H / 128, its rows], one expert behind the other */
  const int32_t* expert_offsets; /* [E + 1] rows where groups begin and the last ends: times 16 */
  uint8_t* data;                 /* of each expert [H, its rows] out, 16-byte aligned */
  float* column_scales;          /* [num_tiles, H] out */
  int32_t num_experts;
  int32_t hidden;
  int32_t num_tiles; /* sum of ceil(rows / 128) over the experts, as the host knows them */
} ep_columnwise_args;

EP_API int32_t ep_columnwise(const ep_columnwise_args* args, void* stream);

/* ---- Probabilities: those of a token's selected experts out of those of all ----------------- */

/* Distinct experts in a row of topk_idx, or -1 where dropped. */
typedef struct ep_probabilities_args {
  const float* input;      /* select: [T, E]; scatter: [T, K] */
  const int32_t* topk_idx; /* [T, K] */
  float* output; /* select: [T, K], 0 where dropped; scatter: [T, E], 0 where not selected */
  int64_t num_tokens;
  int32_t num_topk;
  int32_t num_experts;
} ep_probabilities_args;

EP_API int32_t ep_select_probabilities(const ep_probabilities_args* args, void* stream);

/* The gradient of the other one. */
EP_API int32_t ep_scatter_probabilities(const ep_probabilities_args* args, void* stream);

/* ---- Dispatch ------------------------------------------------------------------------------- */

enum {
  EP_RECV_BYTES = 0, /* rows, and scales where there are any, as they were sent */
  EP_RECV_BF16 = 1,  /* FP8 rows dequantised */
  EP_RECV_FP32 = 2
};

/* A row travels as one slot: its bytes, then its scales, then K4 probabilities. */
typedef struct ep_dispatch_args {
  ep_peers peers;
  ep_routing routing;
  const uint8_t* x;     /* [T, row_bytes] */
  const float* scales;  /* [T, scale_bytes / 4], or NULL */
  const float* weights; /* [T, K4], or NULL */
  uint8_t* recv_x;      /* [num_rows] */
  float* recv_scales;   /* B = scale_bytes / 4 scales a row, or NULL. Rank-major [rows, B];
                           expert-major for each expert [B, rows of its group] */
  float* recv_weights;  /* expert-major [rows], rank-major [rows, K]; or NULL */
  void* recv_topk_idx;  /* rank-major [rows, K] local experts, -1 elsewhere; or NULL */
  const int32_t* planned_entries; /* is_planned: where ep_plan left the routing's entries, if not
                                   there; those that expand copy them. Or NULL */
  int32_t* counter;               /* zero; left zero */
  int64_t flag_offset;            /* dispatch_flags */
  int64_t credit_offset;          /* dispatch_credits */
  int64_t slot_offset;            /* dispatch_slots */
  int64_t region_bytes;           /* of one source's slots; ep_expand alone */
  ep_wire wire;                   /* ep_expand alone */
  int32_t tag;                    /* 0 .. 255, equal on ranks that make the same call */
  int32_t max_tokens;
  int32_t max_chunks;
  int32_t chunk_tokens;
  int32_t row_bytes;
  int32_t scale_bytes;
  int32_t weight_bytes;
  int32_t num_local_experts;
  int32_t recv_kind;
  int32_t recv_idx_bytes;  /* 4 or 8: an entry of recv_topk_idx */
  int32_t num_received;    /* rows that came: entries to copy */
  int32_t num_rows;        /* of the output; those behind the last group become padding */
  int32_t is_planned;      /* ep_plan has begun this operation: else it begins here */
  int32_t is_behind_plan;  /* ep_plan is the last thing on this stream, and the input is older: may
                              run beside its second kernel, which those that expand wait for */
  int32_t num_push_blocks; /* either may be 0: the other half is launched on its own */
  int32_t num_expand_blocks;
  int32_t num_blocks;  /* of the operation, both halves, or all launches of ep_expand */
  int32_t rows_tag;    /* ep_expand: 0 .. 255, of the flags of rows; `tag` is that of the head */
  int32_t first_token; /* ep_expand: the tokens that it moves, multiples of 32 */
  int32_t end_token;
} ep_dispatch_args;

/* Pushes this rank's rows into the others' memory, and moves arrived rows to where they belong. */
EP_API int32_t ep_dispatch(const ep_dispatch_args* args, void* stream);

/* Moves rows that copy engines bring, of some tokens of every rank, and this rank's own. The first
 * launch of an operation also does what comes once. */
EP_API int32_t ep_expand(const ep_dispatch_args* args, void* stream);

/* ---- Combine -------------------------------------------------------------------------------- */

enum { EP_BF16 = 0, EP_FP32 = 1, EP_FP16 = 2 };

typedef struct ep_combine_args {
  ep_peers peers;
  ep_routing routing;
  const uint8_t* x;        /* rows as dispatch gave them */
  const float* weights;    /* expert-major [rows], rank-major [rows, K]; or NULL */
  uint8_t* combined_x;     /* [T, row_bytes] */
  float* combined_weights; /* [T, K], or NULL */
  int32_t* counters;       /* [3] zero; left zero */
  int64_t flag_offset;     /* combine_flags */
  int64_t credit_offset;   /* combine_credits */
  int64_t row_offset;      /* combine_rows */
  int64_t weight_offset;   /* combine_weights */
  int64_t zero_offset;     /* zeros: a row of what fitted nowhere or went nowhere */
  int32_t tag;             /* 0 .. 255, equal on ranks that make the same call */
  int32_t max_tokens;
  int32_t max_chunks;
  int32_t chunk_rows;      /* rows of a flag: equal on all ranks */
  int32_t chunks_per_unit; /* chunks that a team pushes before it raises their flags */
  int32_t row_bytes;
  int32_t dtype; /* EP_BF16, EP_FP32 or EP_FP16 */
  int32_t num_local_experts;
  int32_t ranks_per_node;
  int32_t num_blocks;   /* one an SM */
  int32_t push_percent; /* of their teams: those that begin with pushing */
  int32_t adds_weights; /* those of all ranks of a token; else each is of its expert's rank.
                           Rank-major only */
  /* Copy engines. The chunks above are then those of `wire`, and no team pushes. */
  ep_wire wire;
  uint8_t* partial_rows;  /* [R - 1, S, row_bytes]: partial rows of the next rank first */
  float* partial_weights; /* [R - 1, S, K], or NULL */
  int32_t first_row;      /* ep_partial_sums: the slots that it adds up begin here */
  int32_t num_pushed;     /* rows that go to each peer; -1: those that came from it */
} ep_combine_args;

/* Sums rows back to the ranks that own their tokens. */
EP_API int32_t ep_combine(const ep_combine_args* args, void* stream);

/* Adds up this rank's rows of the others' tokens: one chunk of slots of each, into local memory,
 * and with the first chunk all weights. ep_combine then adds up what the others have pushed. */
EP_API int32_t ep_partial_sums(const ep_combine_args* args, void* stream);

/* ---- Low latency: dispatch and combine of a few tokens --------------------------------------- */

/* Most tokens of a rank in an operation. */
#define EP_LOW_LATENCY_MAX_TOKENS 4096
/* Most experts of a rank x tokens of all ranks: a bit each in an SM's shared memory. */
#define EP_LOW_LATENCY_MAX_PLACES 1200000
/* Counts of a buffer's low-latency operations, device memory. Kernels count on; the host writes it
 * anew when ranks are masked. Index 0 of `kind` is dispatch, 1 combine; `half` is that of the
 * memory which an epoch uses, epoch % 2. */
typedef struct ep_low_latency_state {
  uint32_t launches;       /* kernels so far */
  uint32_t sent[2];        /* [kind] operations */
  uint32_t received[2][2]; /* [kind][half] */
  uint32_t known[2][2][2]; /* [launches % 2][kind][half]: what all ranks have received, as a kernel
                              before this one has learnt */
  uint32_t masked;         /* bit r: rank r is dead, or taken for dead; the host writes it */
} ep_low_latency_state;

/* int32 numbers of ep_low_latency.state, at least those of ep_low_latency_state. */
#define EP_LOW_LATENCY_STATE_INTS 32

/* Phases of an operation that a kernel runs; both are 3. */
enum { EP_LOW_LATENCY_SEND = 1, EP_LOW_LATENCY_RECEIVE = 2 };

/* How rows travel and arrive. */
enum {
  EP_LOW_LATENCY_BF16 = 0,
  EP_LOW_LATENCY_FP8 = 1,         /* scales amax / 448 */
  EP_LOW_LATENCY_FP8_ROUNDED = 2, /* scales rounded up to powers of two */
  EP_LOW_LATENCY_UE8M0 = 3        /* the same, received as exponents, four in an int32 */
};

/* What both operations say. R ranks, M = max_tokens, K = num_topk, E = experts of a rank, L = room.
 */
typedef struct ep_low_latency {
  ep_peers peers;
  int32_t* state;        /* device memory [EP_LOW_LATENCY_STATE_INTS], zero at first: both
                            operations' counts, see csrc/low_latency/epochs.cuh */
  int32_t* finished;     /* device memory, zero between kernels: blocks that are done */
  int64_t* wait_stats;   /* device memory [R], to which the nanoseconds waited for each rank are
                            added; or NULL */
  int64_t credit_offset; /* ep_buffer_offsets.low_latency_credits */
  int64_t row_offset;    /* of this operation: [2, R, L, 2 hidden bytes] */
  int64_t header_offset; /* ep_buffer_offsets.low_latency_headers */
  int64_t entry_offset;  /* dispatch: .low_latency_entries; combine: .low_latency_weights */
  const void* topk_idx;  /* [num_tokens, K] experts, or -1; of this rank's tokens */
  const float* weights;  /* [num_tokens, K], where has_weights */
  int32_t has_weights;
  int32_t idx_bytes;  /* of an entry of topk_idx: 4 or 8 */
  int32_t num_tokens; /* of this rank */
  int32_t max_tokens; /* of any rank in this operation; the same on all */
  int32_t room;       /* low_latency_tokens of the buffer */
  int32_t hidden;
  int32_t num_topk;
  int32_t num_local_experts;
  int32_t phases;     /* EP_LOW_LATENCY_* */
  int32_t is_general; /* take the kernel for any sizes, where there is one for these */
  int32_t num_blocks; /* SMs */
} ep_low_latency;

/* What a dispatch leaves for its combine, device memory. A received row is n = source * M + token.
 */
typedef struct ep_low_latency_handle {
  uint32_t* epochs;    /* [2] of the dispatch and of the combine, as their sends leave them */
  int32_t* num_tokens; /* [R] of each rank; after a fault zero, or as it came */
  int32_t* num_rows;   /* [R] rows that came from each rank */
  int32_t* ranks; /* [num_tokens] bit r: some expert of the token is on rank r; of this rank's */
  int32_t* rows;  /* [R, M, K] row of recv_x | k << 24 of a token's k-th expert, ascending by local
                     expert; -1 behind the last */
  float* weights; /* [R, M, K] of these rows, where they came; or NULL */
} ep_low_latency_handle;

typedef struct ep_low_latency_dispatch_args {
  ep_low_latency common;
  ep_low_latency_handle handle;
  ep_notice* notice;      /* host memory, mapped: of what is no expert, and is dropped */
  const void* x;          /* BF16 [num_tokens, hidden] */
  void* recv_x;           /* [E, R M, hidden] BF16 or E4M3 */
  void* recv_scales;      /* FP32 [E, hidden / 128, S] or int32 [E, hidden / 512, S], S =
                             scale_stride; or NULL */
  int32_t* recv_count;    /* [E] rows of each expert */
  int32_t* recv_stats;    /* [E], to which these are added; or NULL */
  int32_t* recv_src_info; /* [E, R M] n of each row */
  int32_t scale_stride;   /* at least R M */
  int32_t format;         /* EP_LOW_LATENCY_* */
} ep_low_latency_dispatch_args;

/* topk_idx and the handle are those of the dispatch. Without common.has_weights the weights are
 * handle.weights, which came with the rows. */
typedef struct ep_low_latency_combine_args {
  ep_low_latency common;
  ep_low_latency_handle handle;
  const void* x;    /* BF16 [E, R M, hidden]: what the experts made of recv_x */
  void* combined_x; /* BF16 [num_tokens, hidden] */
} ep_low_latency_combine_args;

EP_API int32_t ep_low_latency_dispatch(const ep_low_latency_dispatch_args* args, void* stream);
EP_API int32_t ep_low_latency_combine(const ep_low_latency_combine_args* args, void* stream);

/* ---- Between nodes -------------------------------------------------------------------------- */

/* N nodes of L ranks: csrc/PROTOCOL.md, "Between nodes". R = N L ranks. Peers, in ep_peers and in
 * all that is told of them, are the ranks (k, l), rank l of the node k before this one, in this
 * order: number k L + l. Sources of rows are global ranks. */
#define EP_MAX_NODES 256
#define EP_MAX_NODE_RANKS 1024 /* R */
/* Chunks of rows to one node in one operation. */
#define EP_MAX_NETWORK_CHUNKS 32

typedef struct ep_nodes_layout_args {
  int64_t max_tokens; /* rows that each source rank has room for */
  int64_t row_bytes;  /* of the widest type of rows; a multiple of 16 */
  int32_t num_topk;
  int32_t num_nodes;
  int32_t ranks_per_node;
  int32_t low_latency_tokens; /* most tokens of a low-latency operation; 0: there are none */
  int32_t hidden;             /* elements of their rows, which are BF16; a multiple of 8 */
} ep_nodes_layout_args;

/* Where things stand, in bytes; each at a multiple of 256. All of it is zero before the first
 * operation. Fields *_half and *_region are sizes: from one of two halves, or from the memory of
 * one distance, to the next. S = max_tokens, K = num_topk, C = max_chunks, O = N - 1. */
typedef struct ep_nodes_offsets {
  /* In the symmetric memory of a node's ranks. */
  int64_t farewells;        /* int32 [R] */
  int64_t plan_flags;       /* uint32 [R]: epoch of the routing that came from each source */
  int64_t dispatch_credits; /* uint32 [L]: wave of dispatch that each local rank has read */
  int64_t combine_credits;  /* uint32 [L]: the same of combine */
  int64_t plan_headers;     /* int32 [R, 16] */
  int64_t dispatch_flags;   /* uint64 [2, L, C] */
  int64_t combine_flags;    /* uint32 [2, L, C] */
  int64_t plan_idx;         /* int32 [R, S, K] */
  int64_t combine_weights;  /* float [2, L, S, K] */
  int64_t dispatch_slots;   /* [2, L - 1, S, slot] */
  int64_t combine_rows;     /* [2, L - 1, S, row_bytes] */
  int64_t zeros;            /* [row_bytes] */
  int64_t total;
  int64_t dispatch_slots_half;
  int64_t combine_rows_half;
  /* In network memory. Of distance k everything has number k - 1. */
  int64_t network_credits;        /* uint64 [dispatch and combine, O]: of the node k after */
  int64_t network_greetings;      /* uint64 [R]: of the rank so many before this one. Of the host,
                                     when a buffer is made: 1 + rank */
  int64_t network_plan_flags;     /* uint64 [O]: of the node k before, as all that follows but what
                                     is to be sent: that is for the node k after */
  int64_t network_dispatch_flags; /* uint64 [O, EP_MAX_NETWORK_CHUNKS]: stamp | rows in all */
  int64_t network_combine_flags;  /* uint64 [O, EP_MAX_NETWORK_CHUNKS]: stamp */
  int64_t network_weight_flags;   /* the same, of weights */
  int64_t plan_to_send;           /* int32 [O, 16 + S (L + K)]: header, relay entries */
  int64_t plan_received;
  int64_t dispatch_to_send; /* [O, S, slot] */
  int64_t dispatch_received;
  int64_t combine_to_send; /* [O, S, row_bytes] */
  int64_t combine_received;
  int64_t weights_to_send; /* float [O, S, K] */
  int64_t weights_received;
  /* Low latency, where there is room for it: M = low_latency_tokens; kind is dispatch or combine,
   * and two of each (epochs take turns). Of all R ranks: what is to be sent by the rank that it
   * goes to, all else by the rank that it is from. */
  int64_t low_latency_credits;          /* uint64 [kind, 2, R] */
  int64_t low_latency_head_flags;       /* uint64 [kind, 2, R] */
  int64_t low_latency_row_flags;        /* uint64 [kind, 2, R, EP_LOW_LATENCY_CHUNKS] */
  int64_t low_latency_heads_to_send[2]; /* [kind] words of 16 bytes [2, R, heads]: a header, then
                                           entries of M rows or, of combine, weights */
  int64_t low_latency_heads_received[2];
  int64_t low_latency_rows_to_send[2]; /* [kind] [2, R, M, 2 hidden bytes] */
  int64_t low_latency_rows_received[2];
  int64_t network_total;
  int64_t low_latency_head_region[2]; /* [kind] of one rank */
  int64_t low_latency_row_region;
  int64_t plan_region;
  int64_t dispatch_region;
  int64_t combine_region;
  int64_t weights_region;
  int32_t max_chunks;
  int32_t network_chunk_rows; /* rows of a chunk on the network, in both operations */
} ep_nodes_offsets;

/* Fills `offsets`. Host code alone: needs no GPU. */
EP_API int32_t ep_nodes_layout(const ep_nodes_layout_args* args, ep_nodes_offsets* offsets);

/* A message that is to be carried out late: csrc/network/network.cuh. */
typedef struct ep_network_message {
  const uint8_t* from;
  uint8_t* to;
  int64_t num_bytes;
  int64_t value; /* of the flag */
  int64_t* flag;
} ep_network_message;

/* For tests: puts wait here for whoever carries them out, late and in any order. Memory that all
 * ranks see, zero at first. */
#define EP_NETWORK_QUEUE_LENGTH 4096
typedef struct ep_network_queue {
  ep_network_message messages[EP_NETWORK_QUEUE_LENGTH];
  int32_t posted[EP_NETWORK_QUEUE_LENGTH]; /* 1: the message is there; 0 again when it is taken */
  int32_t num_posted;
  int32_t stop;        /* set by the host: ep_network_carry ends */
  int32_t early_flags; /* for a test that must fail: flags of rows are raised before the rows are
                          there */
} ep_network_queue;

/* How a rank reaches its rail, the ranks with its number on the other nodes. Over NVSHMEM only
 * `memory`, the last four and no other are read: `memory` is from ep_nvshmem_allocate, and the
 * rail's rank on node n is PE n x pe_stride + pe_first. */
typedef struct ep_network {
  uint8_t* memory;           /* this rank's network memory */
  uint8_t* const* memory_of; /* device memory [N]: that of the rank on the node k after */
  ep_network_queue* queue;   /* NULL: puts are stores, carried out at once */
  int64_t* free_at_ns;       /* device memory: when the line has sent what it has, see below */
  int64_t bytes_per_us;      /* of this rank's line, for figures; 0: as fast as stores are */
  int32_t num_nodes;
  int32_t node;
  int32_t pe_stride; /* L */
  int32_t pe_first;  /* l */
} ep_network;

/* For tests: carries messages out until `stop` is set, each up to delay_ns late, in random order.
 */
typedef struct ep_network_carry_args {
  ep_network_queue* queue;
  int64_t delay_ns;
  int32_t seed;
} ep_network_carry_args;
EP_API int32_t ep_network_carry(const ep_network_carry_args* args, void* stream);

/* What a routing has besides ep_routing where there are several nodes. In ep_routing num_sent,
 * num_recv, first_of_source and source_tokens are [R] by global rank, send_slot is [T, L] for the
 * ranks of this node, and source_tokens of other nodes are the rows that the network brings. */
typedef struct ep_nodes_routing {
  int32_t* node_slot;   /* [T, N] place among the tokens that go to each node; or -1 */
  int32_t* node_tokens; /* [N, S] tokens that go to the node k after, in order; row 0 is not used */
  int32_t* num_to_node; /* [N] tokens that go to each node */
  int32_t* num_relayed; /* [N] rows that the network brings from the node k before; of 0 none */
  int32_t* relay_first; /* [N] rows from nearer nodes */
  int32_t* num_pushed;  /* [L] rows that this rank pushes to each of its node, relayed ones too */
  int32_t* relay;       /* [rows, L + K] relay entries, nearest node first: those that expand the
                           first dispatch copy them there */
} ep_nodes_routing;

/* Counts for the host, int32 in host memory that the device sees: ticket, written last; 4 of
 * ep_layout_args.error; [R] tokens that each rank asked for; [R] rows sent to each; [R] rows
 * received from each; [N] num_relayed; [E_local] rows of each expert, before padding. */
#define EP_NODES_MAILBOX_ERROR 1
#define EP_NODES_MAILBOX_COUNTS 5

/* What a plan that no host waits for has to say, int32: EP_NOTICE_*, written last; 4 of
 * ep_layout_args.error; rows that the output would have needed; rows that it has, or max_tokens;
 * [R] tokens that each rank asked for. */
#define EP_NODES_NOTICE_ERROR 1
#define EP_NODES_NOTICE_ROWS 5
#define EP_NODES_NOTICE_CAPACITY 6
#define EP_NODES_NOTICE_ASKED 7

/* What an operation did, in int64: fields of ep_record up to end_ns, then [R] longest_wait_ns of
 * each peer, then [R] rows sent to each peer: over NVLink to the ranks of this node, relayed ones
 * too; over the network to the rail. */
#define EP_NODES_RECORD_WAITS 3

/* Fields with the names of ep_plan_args mean the same. */
typedef struct ep_nodes_plan_args {
  ep_peers peers; /* num_ranks = L, rank = l */
  ep_network network;
  ep_routing routing;
  ep_nodes_routing nodes;
  const void* input;
  void* scratch; /* ep_nodes_plan_scratch_bytes(), 256-byte aligned */
  int32_t* mailbox;
  int32_t* notice;
  int32_t* counters; /* [5] zero; left zero */
  int32_t* overflow;
  int64_t flag_offset;            /* plan_flags */
  int64_t credit_offset;          /* dispatch_credits */
  int64_t header_offset;          /* plan_headers */
  int64_t idx_offset;             /* plan_idx */
  int64_t network_credit_offset;  /* network_credits */
  int64_t network_flag_offset;    /* network_plan_flags */
  int64_t network_send_offset;    /* plan_to_send */
  int64_t network_receive_offset; /* plan_received */
  int64_t network_region;         /* plan_region */
  int32_t ticket;
  int32_t capacity;
  int32_t input_kind;
  int32_t num_experts;
  int32_t max_tokens;
  int32_t asked_tokens;
  int32_t hidden;
  int32_t expert_alignment;
  int32_t expert_capacity;
  int32_t num_send_blocks;
  int32_t num_receive_blocks;
} ep_nodes_plan_args;

EP_API int64_t ep_nodes_plan_scratch_bytes(int64_t max_tokens, int32_t num_experts,
                                           int32_t num_nodes, int32_t ranks_per_node);

/* As ep_plan. */
EP_API int32_t ep_nodes_plan(const ep_nodes_plan_args* args, void* stream, void* side_stream,
                             void* event);

/* `dispatch` is that of one node with its ranks as peers; of it planned_entries and what follows to
 * weight_bytes mean the same, and is_behind_plan is 0. */
typedef struct ep_nodes_dispatch_args {
  ep_dispatch_args dispatch;
  ep_network network;
  ep_nodes_routing nodes;
  int32_t* wave_counters;         /* [N] zero; left zero */
  int64_t slot_half;              /* dispatch_slots_half */
  int64_t network_credit_offset;  /* network_credits */
  int64_t network_flag_offset;    /* network_dispatch_flags */
  int64_t network_send_offset;    /* dispatch_to_send */
  int64_t network_receive_offset; /* dispatch_received */
  int64_t network_region;         /* dispatch_region */
  int64_t plan_flag_offset;       /* network_plan_flags */
  int64_t plan_offset;            /* plan_received: where relay entries are while is_planned */
  int64_t plan_region;            /* plan_region */
  int32_t network_chunk_rows;
  int32_t num_gather_blocks; /* these come first, then those that push, then those that expand */
  int32_t first_wave;        /* waves [first_wave, end_wave) are pushed; all are expanded */
  int32_t end_wave;
} ep_nodes_dispatch_args;

EP_API int32_t ep_nodes_dispatch(const ep_nodes_dispatch_args* args, void* stream);

/* Of one operation, and of each of its waves: groups that are done in it and in each chunk, and
 * whether the wave before has had its credit. */
#define EP_NODES_COMBINE_COUNTERS 2
#define EP_NODES_COMBINE_WAVE_COUNTERS 34

/* `combine` is that of one node with its ranks as peers, and ranks_per_node = L. */
typedef struct ep_nodes_combine_args {
  ep_combine_args combine; /* counters: EP_NODES_COMBINE_COUNTERS + N x
                              EP_NODES_COMBINE_WAVE_COUNTERS */
  ep_network network;
  ep_nodes_routing nodes;
  int64_t row_half;               /* combine_rows_half */
  int64_t network_credit_offset;  /* network_credits, the second row */
  int64_t network_flag_offset;    /* network_combine_flags */
  int64_t network_send_offset;    /* combine_to_send */
  int64_t network_receive_offset; /* combine_received */
  int64_t network_region;         /* combine_region */
  int64_t weight_flag_offset;     /* network_weight_flags */
  int64_t weight_send_offset;     /* weights_to_send */
  int64_t weight_receive_offset;  /* weights_received */
  int64_t weight_region;          /* weights_region */
  int32_t network_chunk_rows;
  int32_t has_weights; /* on any rank: combine.weights may be NULL where no row came */
} ep_nodes_combine_args;

EP_API int32_t ep_nodes_combine(const ep_nodes_combine_args* args, void* stream);

/* ---- Low latency between nodes --------------------------------------------------------------- */

/* csrc/PROTOCOL.md, "Low latency between nodes". R ranks, M = max_tokens, K = num_topk. */

/* Chunks of rows to one rank in one operation. With the head that goes before them these are four
 * puts. */
#define EP_LOW_LATENCY_CHUNKS 3

/* As ep_low_latency_state. */
typedef struct ep_nodes_low_latency_state {
  uint32_t sent[2];        /* [kind] operations */
  uint32_t received[2][2]; /* [kind][half] */
  uint32_t noticed;        /* the last dispatch that has told the host of a wrong routing */
  uint32_t masked[32];     /* bit r % 32 of word r / 32: rank r is dead, or taken for dead */
} ep_nodes_low_latency_state;

/* int32 numbers of an ep_nodes_low_latency_state. */
#define EP_NODES_LOW_LATENCY_STATE_INTS 39

/* What both operations say besides ep_low_latency. Of that the offsets, is_general, and
 * peers.memory are not used; `state` is an ep_nodes_low_latency_state, and wait_stats are [R] by
 * rank. Peers are those of an operation between nodes.
 *
 * Of ep_low_latency_handle num_tokens is not used, and num_rows are [R]. `rows` and `weights` are
 * by source and place among its rows here, source * M + place, where a token's number was.
 * `ranks` is int32 [num_tokens, K]: where partial rows of a token come back, rank * M + place among
 * the rows to that rank, ascending; -1 behind the last. */
typedef struct ep_nodes_low_latency {
  ep_network network; /* every rank as a node of its own: num_nodes = R, node = rank */
  int32_t* counters;  /* [R, EP_LOW_LATENCY_CHUNKS] zero; left zero: rows that are packed */
  /* Of the operation's kind, see ep_nodes_offsets. */
  int64_t credit_offset;
  int64_t head_flag_offset;
  int64_t row_flag_offset;
  int64_t head_send_offset;
  int64_t head_receive_offset;
  int64_t head_region;
  int64_t row_send_offset;
  int64_t row_receive_offset;
  int64_t row_region;
  int32_t ranks_per_node;
} ep_nodes_low_latency;

typedef struct ep_nodes_low_latency_dispatch_args {
  ep_low_latency_dispatch_args dispatch; /* its notice is ep_nodes_plan_args.notice */
  ep_nodes_low_latency nodes;
} ep_nodes_low_latency_dispatch_args;

typedef struct ep_nodes_low_latency_combine_args {
  ep_low_latency_combine_args combine;
  ep_nodes_low_latency nodes;
} ep_nodes_low_latency_combine_args;

EP_API int32_t ep_nodes_low_latency_dispatch(const ep_nodes_low_latency_dispatch_args* args,
                                             void* stream);
EP_API int32_t ep_nodes_low_latency_combine(const ep_nodes_low_latency_combine_args* args,
                                            void* stream);

/* ---- NVSHMEM -------------------------------------------------------------------------------- */

/* The world that kernels between nodes send through. There is one a process: whoever initialises
 * NVSHMEM first makes it. These functions belong to the current device, the same one in all calls.
 * "Collective": every rank of the world has to call it, and waits there for the others,
 * unboundedly.
 *
 * NVSHMEM ends the process by itself where a transport fails while it starts, and where one breaks
 * later on. Of all else that fails there comes a status. */

/* major * 10000 + minor * 100 + patch of the NVSHMEM whose device part is in this library, and of
 * the host library that is loaded. They have to be the same. Needs no driver. */
EP_NVSHMEM_API int32_t ep_nvshmem_versions(int32_t* compiled, int32_t* loaded);

/* Bytes of an id of a world. */
EP_NVSHMEM_API int64_t ep_nvshmem_id_bytes(void);

/* Makes an id: one rank does, and gives it to the others. It listens from now on on the interface
 * that NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME names. */
EP_NVSHMEM_API int32_t ep_nvshmem_new_id(uint8_t* id);

/* 1 where NVSHMEM has been initialised in this process, by whomever. */
EP_NVSHMEM_API int32_t ep_nvshmem_is_up(void);

/* Makes this rank PE `rank` of a world of num_ranks. Collective. Where NVSHMEM is up already, the
 * kernels of this library join that world: nobody waits then, and `id` is not read and may be NULL.
 * It has to be done in that case too. A world in which this rank has another number, or that has
 * another size, is refused, and left as it was. */
EP_NVSHMEM_API int32_t ep_nvshmem_init(const uint8_t* id, int32_t rank, int32_t num_ranks);

/* This rank's number, and the size of the world; refused where NVSHMEM is not up. */
EP_NVSHMEM_API int32_t ep_nvshmem_world(int32_t* pe, int32_t* num_pes);

/* Network memory of num_bytes, the same on all ranks, at a multiple of 512 bytes. Nothing is
 * written to it: its owner makes it zero, and meets the others before anybody sends. Collective. */
EP_NVSHMEM_API int32_t ep_nvshmem_allocate(int64_t num_bytes, uint8_t** memory);
EP_NVSHMEM_API int32_t ep_nvshmem_free(uint8_t* memory); /* collective */

/* Leaves the world; the last one of the process to do so ends it, which is collective. Not behind a
 * fault: it waits for what is on its way. */
EP_NVSHMEM_API int32_t ep_nvshmem_finalize(void);

/* On the stream: sets an aligned uint64 of PE `pe`, which has the place of `flag` in network
 * memory. Nothing that was sent before is ordered in front of it. */
EP_NVSHMEM_API int32_t ep_nvshmem_raise(uint8_t* flag, int64_t value, int32_t pe, void* stream);

/* 1 where this GPU sees what a network writes to it in the order in which it came (CUDA's GPUDirect
 * RDMA writes ordering: owner or better). Where it is 0 the kernels have NVSHMEM flush these writes
 * after each wait for data; it does so only where its proxy thread sends, not over IBGDA. */
EP_NVSHMEM_API int32_t ep_nvshmem_consistent(int32_t* is_consistent);

/* ---- Probe: what the links carry ------------------------------------------------------------ */

#define EP_PROBE_ROW_BYTES 14336

typedef struct ep_probe_args {
  ep_peers peers;        /* memory: [R - 1, num_rows, EP_PROBE_ROW_BYTES] at each; no waits */
  const uint8_t* source; /* [num_rows, EP_PROBE_ROW_BYTES] of this GPU */
  int64_t num_rows;
  int32_t num_blocks; /* one an SM */
} ep_probe_args;

/* Pushes every row of the source to every other rank. */
EP_API int32_t ep_probe(const ep_probe_args* args, void* stream);

/* ---- Ping: how long 16 bytes take from one GPU to another ------------------------------------ */

typedef struct ep_ping_args {
  ep_peers peers;      /* memory: one word of 16 bytes, zero before the first launch */
  int64_t* elapsed_ns; /* device memory: of all timed round trips; -1 after a fault */
  int32_t partner;     /* rank that answers; its kernel has this one for a partner */
  int32_t first; /* number of the first round trip, from 1: they go on from launch to launch */
  int32_t num_round_trips; /* timed ones, behind one that is not */
} ep_ping_args;

/* The lower rank of two sends a word, and the other one answers, again and again: relaxed stores
 * and loads of system scope. */
EP_API int32_t ep_ping(const ep_ping_args* args, void* stream);

/* ---- Busy: other work, which knows when it began and ended ----------------------------------- */

typedef struct ep_busy_args {
  int64_t* stamps_ns; /* device memory [2]: begin and end, of %globaltimer; or NULL */
  int64_t duration_ns;
} ep_busy_args;

/* Keeps the stream busy for so long: one block that spins. */
EP_API int32_t ep_busy(const ep_busy_args* args, void* stream);

#ifdef __cplusplus
}
#endif

#endif /* EP_COMM_H */
