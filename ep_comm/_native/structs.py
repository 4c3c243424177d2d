"""Mirrors of the structs, enums and limits of csrc/include/ep_comm.h, which documents every field.

The loader compares each mirror with the library field by field, and tests/native/test_native.py
compares the numbers with the header.
"""

from __future__ import annotations

import ctypes

EP_OK = 0
EP_ERR_ARGUMENT = 1
EP_ERR_CUDA = 2
EP_MAX_TOPK = 32
EP_MAX_EXPERTS = 4096
EP_MAX_RANKS = 1024
EP_INPUT_TOPK_INT32 = 0
EP_INPUT_TOPK_INT64 = 1
EP_INPUT_ROUTING_MAP = 2
EP_ROUTING_OK = 0
EP_ROUTING_OUT_OF_RANGE = 1
EP_ROUTING_DUPLICATE = 2
EP_ROUTING_TOO_MANY = 3
EP_MAX_NODE_RANKS = 8
EP_PHASE_CREDIT = 1
EP_PHASE_PLAN = 2
EP_PHASE_ROWS = 3
EP_FAULT_NONE = 0
EP_FAULT_TIMEOUT = 1
EP_FAULT_MISMATCH = 2
EP_FIELD_NUM_TOPK = 0
EP_FIELD_HIDDEN = 1
EP_FIELD_NUM_EXPERTS = 2
EP_FIELD_EXPERT_MAJOR = 3
EP_FIELD_EXPERT_ALIGNMENT = 4
EP_NUM_FIELDS = 5
EP_FIELD_CALL = 5
EP_OP_DISPATCH = 1
EP_OP_COMBINE = 2
EP_NOTICE_NONE = 0
EP_NOTICE_ROUTING = 1
EP_NOTICE_OVERFLOW = 2
EP_NOTICE_TOO_MANY = 3
EP_RECV_BYTES = 0
EP_RECV_BF16 = 1
EP_RECV_FP32 = 2
EP_BF16 = 0
EP_FP32 = 1
EP_PROBE_ROW_BYTES = 14336

_POINTER = ctypes.c_void_p
_INT32 = ctypes.c_int32
_INT64 = ctypes.c_int64


class LayoutArgs(ctypes.Structure):
    """``ep_layout_args``: routing layout."""

    _fields_ = [
        ("input", _POINTER),
        ("topk_idx_out", _POINTER),
        ("num_tokens_per_rank", _POINTER),
        ("num_tokens_per_expert", _POINTER),
        ("is_token_in_rank", _POINTER),
        ("send_slot", _POINTER),
        ("error", _POINTER),
        ("workspace", _POINTER),
        ("workspace_bytes", _INT64),
        ("num_tokens", _INT64),
        ("num_topk", _INT32),
        ("num_experts", _INT32),
        ("num_ranks", _INT32),
        ("input_kind", _INT32),
    ]


class Fault(ctypes.Structure):
    """``ep_fault``: what went wrong on the device."""

    _fields_ = [
        ("code", _INT32),
        ("op", _INT32),
        ("phase", _INT32),
        ("peer", _INT32),
        ("field", _INT32),
        ("expected", _INT64),
        ("seen", _INT64),
    ]


class Progress(ctypes.Structure):
    """``ep_progress``: for whom kernels have been waiting for long."""

    _fields_ = [
        ("dispatch", _INT64 * EP_MAX_NODE_RANKS),
        ("combine", _INT64 * EP_MAX_NODE_RANKS),
    ]


class Record(ctypes.Structure):
    """``ep_record``: what an operation did."""

    _fields_ = [
        ("begin_ns", _INT64),
        ("end_ns", _INT64),
        ("longest_wait_ns", _INT64 * EP_MAX_NODE_RANKS),
        ("num_rows", _INT32 * EP_MAX_NODE_RANKS),
    ]


class Node(ctypes.Structure):
    """``ep_node``: whom a kernel talks to."""

    _fields_ = [
        ("memory", _POINTER * EP_MAX_NODE_RANKS),
        ("fault", _POINTER),
        ("progress", _POINTER),
        ("abort", _POINTER),
        ("epoch", _POINTER),
        ("longest_wait_ns", _POINTER),
        ("record", _POINTER),
        ("wire_bytes", _POINTER),
        ("timeout_ns", _INT64),
        ("delay_ns", _INT64),
        ("op", _INT32),
        ("rank", _INT32),
        ("num_ranks", _INT32),
    ]


class Mailbox(ctypes.Structure):
    """``ep_mailbox``: counts for the host."""

    _fields_ = [
        ("ticket", _INT32),
        ("routing_error", _INT32 * 4),
        ("asked_tokens", _INT32 * EP_MAX_NODE_RANKS),
        ("num_sent_tokens", _INT32 * EP_MAX_NODE_RANKS),
        ("num_recv_tokens", _INT32 * EP_MAX_NODE_RANKS),
        ("num_tokens_per_expert", _INT32 * 1024),
    ]


class Notice(ctypes.Structure):
    """``ep_notice``: what nobody waited to hear."""

    _fields_ = [
        ("code", _INT32),
        ("routing_error", _INT32 * 4),
        ("asked_tokens", _INT32 * EP_MAX_NODE_RANKS),
        ("num_rows", _INT32),
        ("capacity", _INT32),
    ]


class Routing(ctypes.Structure):
    """``ep_routing``: where the rows of a dispatch go."""

    _fields_ = [
        ("topk_idx", _POINTER),
        ("send_slot", _POINTER),
        ("entries", _POINTER),
        ("num_sent", _POINTER),
        ("num_recv", _POINTER),
        ("first_of_source", _POINTER),
        ("source_tokens", _POINTER),
        ("expert_tokens", _POINTER),
        ("expert_first_row", _POINTER),
        ("num_tokens", _INT32),
        ("num_topk", _INT32),
        ("num_topk4", _INT32),
        ("expert_major", _INT32),
        ("last_entry", _INT32),
    ]


class PlanArgs(ctypes.Structure):
    """``ep_plan_args``: plan of a dispatch."""

    _fields_ = [
        ("node", Node),
        ("routing", Routing),
        ("input", _POINTER),
        ("scratch", _POINTER),
        ("mailbox", _POINTER),
        ("notice", _POINTER),
        ("counters", _POINTER),
        ("flag_offset", _INT64),
        ("credit_offset", _INT64),
        ("header_offset", _INT64),
        ("idx_offset", _INT64),
        ("ticket", _INT32),
        ("capacity", _INT32),
        ("input_kind", _INT32),
        ("num_experts", _INT32),
        ("max_tokens", _INT32),
        ("asked_tokens", _INT32),
        ("hidden", _INT32),
        ("expert_alignment", _INT32),
        ("num_send_blocks", _INT32),
        ("num_receive_blocks", _INT32),
    ]


class QuantizeArgs(ctypes.Structure):
    """``ep_quantize_args``: quantisation to FP8."""

    _fields_ = [
        ("x", _POINTER),
        ("data", _POINTER),
        ("scales", _POINTER),
        ("num_blocks", _INT64),
        ("dtype", _INT32),
    ]


class ProbabilitiesArgs(ctypes.Structure):
    """``ep_probabilities_args``: probabilities of the selected experts."""

    _fields_ = [
        ("input", _POINTER),
        ("topk_idx", _POINTER),
        ("output", _POINTER),
        ("num_tokens", _INT64),
        ("num_topk", _INT32),
        ("num_experts", _INT32),
    ]


class DispatchArgs(ctypes.Structure):
    """``ep_dispatch_args``: dispatch."""

    _fields_ = [
        ("node", Node),
        ("routing", Routing),
        ("x", _POINTER),
        ("scales", _POINTER),
        ("weights", _POINTER),
        ("recv_x", _POINTER),
        ("recv_scales", _POINTER),
        ("recv_weights", _POINTER),
        ("recv_topk_idx", _POINTER),
        ("planned_entries", _POINTER),
        ("counter", _POINTER),
        ("flag_offset", _INT64),
        ("credit_offset", _INT64),
        ("slot_offset", _INT64),
        ("tag", _INT32),
        ("max_tokens", _INT32),
        ("max_chunks", _INT32),
        ("chunk_tokens", _INT32),
        ("row_bytes", _INT32),
        ("scale_bytes", _INT32),
        ("weight_bytes", _INT32),
        ("num_local_experts", _INT32),
        ("recv_kind", _INT32),
        ("recv_idx_bytes", _INT32),
        ("num_received", _INT32),
        ("num_rows", _INT32),
        ("is_planned", _INT32),
        ("is_behind_plan", _INT32),
        ("num_push_blocks", _INT32),
        ("num_expand_blocks", _INT32),
        ("num_blocks", _INT32),
    ]


class CombineArgs(ctypes.Structure):
    """``ep_combine_args``: combine."""

    _fields_ = [
        ("node", Node),
        ("routing", Routing),
        ("x", _POINTER),
        ("weights", _POINTER),
        ("combined_x", _POINTER),
        ("combined_weights", _POINTER),
        ("counters", _POINTER),
        ("flag_offset", _INT64),
        ("credit_offset", _INT64),
        ("row_offset", _INT64),
        ("weight_offset", _INT64),
        ("zero_offset", _INT64),
        ("tag", _INT32),
        ("max_tokens", _INT32),
        ("max_chunks", _INT32),
        ("chunk_rows", _INT32),
        ("chunks_per_unit", _INT32),
        ("row_bytes", _INT32),
        ("dtype", _INT32),
        ("num_local_experts", _INT32),
        ("ranks_per_node", _INT32),
        ("num_blocks", _INT32),
        ("push_percent", _INT32),
    ]


class ProbeArgs(ctypes.Structure):
    """``ep_probe_args``: probe of NVLink."""

    _fields_ = [
        ("node", Node),
        ("source", _POINTER),
        ("num_rows", _INT64),
        ("num_blocks", _INT32),
    ]


STRUCTS: dict[str, type[ctypes.Structure]] = {
    "ep_layout_args": LayoutArgs,
    "ep_fault": Fault,
    "ep_progress": Progress,
    "ep_record": Record,
    "ep_node": Node,
    "ep_mailbox": Mailbox,
    "ep_notice": Notice,
    "ep_routing": Routing,
    "ep_plan_args": PlanArgs,
    "ep_quantize_args": QuantizeArgs,
    "ep_probabilities_args": ProbabilitiesArgs,
    "ep_dispatch_args": DispatchArgs,
    "ep_combine_args": CombineArgs,
    "ep_probe_args": ProbeArgs,
}
