"""Arguments of the NVLink kernels that stay the same from call to call."""

from __future__ import annotations

from typing import Any, NamedTuple

from ep_comm._native import header
from ep_comm.backends.nvlink.memory import PeerMemory
from ep_comm.backends.nvlink.tuning import COMBINE_PUSH_PERCENT
from ep_comm.config import EPConfig
from ep_comm.telemetry.device import RecordAddresses


class KernelArgs(NamedTuple):
    """The arguments of each kernel; every call fills in the rest anew."""

    plan: header.PlanArgs
    dispatch: header.DispatchArgs
    combine: header.CombineArgs


class CommonFields(NamedTuple):
    """Fields of each kernel's arguments that are found alike on one node and on several."""

    plan: dict[str, Any]
    dispatch: dict[str, Any]
    combine: dict[str, Any]


def kernel_args(
    config: EPConfig,
    memory: PeerMemory,
    offsets: header.BufferOffsets,
    scratch: int,
    records: RecordAddresses,
) -> KernelArgs:
    """Return the arguments of one buffer.

    Args:
        config: The buffer's.
        memory: This rank's.
        offsets: Where things stand in it.
        scratch: Address of the plan's scratch memory.
        records: Where kernels write records.
    """
    common = common_fields(config, memory, offsets, scratch, records)
    return KernelArgs(
        plan=header.PlanArgs(**common.plan, token_bits_offset=offsets.plan_token_bits),
        dispatch=header.DispatchArgs(**common.dispatch, region_bytes=offsets.region_bytes),
        combine=header.CombineArgs(
            **common.combine,
            counters=memory.counters[1].data_ptr(),
            ranks_per_node=config.ranks_per_node or memory.num_ranks,
            push_percent=COMBINE_PUSH_PERCENT,
            num_pushed=-1,
        ),
    )


def common_fields(
    config: EPConfig,
    memory: PeerMemory,
    offsets: header.BufferOffsets | header.NodesOffsets,
    scratch: int,
    records: RecordAddresses,
) -> CommonFields:
    """Return what `kernel_args` and those between nodes begin with; its arguments are theirs."""
    dispatch_peers = memory.peers(header.EP_OP_DISPATCH, records)
    sizes = dict(
        max_tokens=config.max_tokens_per_rank,
        max_chunks=offsets.max_chunks,
        num_local_experts=config.num_experts // memory.num_ranks,
    )
    return CommonFields(
        plan=dict(
            peers=dispatch_peers,
            scratch=scratch,
            mailbox=memory.mailbox_address,
            notice=memory.notice_address,
            counters=memory.counters[2].data_ptr(),
            flag_offset=offsets.plan_flags,
            credit_offset=offsets.dispatch_credits,
            header_offset=offsets.plan_headers,
            idx_offset=offsets.plan_idx,
            num_experts=config.num_experts,
            max_tokens=config.max_tokens_per_rank,
            hidden=config.hidden,
        ),
        dispatch=dict(
            peers=dispatch_peers,
            counter=memory.counters[0].data_ptr(),
            flag_offset=offsets.dispatch_flags,
            credit_offset=offsets.dispatch_credits,
            slot_offset=offsets.dispatch_slots,
            **sizes,
        ),
        combine=dict(
            peers=memory.peers(header.EP_OP_COMBINE, records),
            flag_offset=offsets.combine_flags,
            credit_offset=offsets.combine_credits,
            row_offset=offsets.combine_rows,
            weight_offset=offsets.combine_weights,
            zero_offset=offsets.zeros,
            **sizes,
        ),
    )
