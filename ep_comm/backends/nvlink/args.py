"""Arguments of the NVLink kernels that stay the same from call to call."""

from __future__ import annotations

from typing import NamedTuple

from ep_comm._native import header
from ep_comm.backends.nvlink.memory import PeerMemory
from ep_comm.backends.nvlink.tuning import COMBINE_PUSH_PERCENT
from ep_comm.config import EPConfig


class KernelArgs(NamedTuple):
    """The arguments of each kernel; every call fills in the rest anew."""

    plan: header.PlanArgs
    dispatch: header.DispatchArgs
    combine: header.CombineArgs


def kernel_args(
    config: EPConfig,
    memory: PeerMemory,
    offsets: header.BufferOffsets,
    scratch: int,
    wire_bytes: int,
) -> KernelArgs:
    """Return the arguments of one buffer.

    Args:
        config: The buffer's.
        memory: This rank's.
        offsets: Where things stand in it.
        scratch: Address of the plan's scratch memory.
        wire_bytes: Where kernels count what they send, see `PeerMemory.peers`.
    """
    dispatch_peers = memory.peers(header.EP_OP_DISPATCH, wire_bytes)
    sizes = dict(
        max_tokens=config.max_tokens_per_rank,
        max_chunks=offsets.max_chunks,
        num_local_experts=config.num_experts // memory.num_ranks,
    )
    return KernelArgs(
        plan=header.PlanArgs(
            peers=dispatch_peers,
            scratch=scratch,
            mailbox=memory.mailbox_address,
            notice=memory.notice_address,
            counters=memory.counters[2].data_ptr(),
            flag_offset=offsets.plan_flags,
            credit_offset=offsets.dispatch_credits,
            header_offset=offsets.plan_headers,
            idx_offset=offsets.plan_idx,
            token_bits_offset=offsets.plan_token_bits,
            num_experts=config.num_experts,
            max_tokens=config.max_tokens_per_rank,
            hidden=config.hidden,
        ),
        dispatch=header.DispatchArgs(
            peers=dispatch_peers,
            counter=memory.counters[0].data_ptr(),
            flag_offset=offsets.dispatch_flags,
            credit_offset=offsets.dispatch_credits,
            slot_offset=offsets.dispatch_slots,
            region_bytes=offsets.region_bytes,
            **sizes,
        ),
        combine=header.CombineArgs(
            peers=memory.peers(header.EP_OP_COMBINE, wire_bytes),
            counters=memory.counters[1].data_ptr(),
            flag_offset=offsets.combine_flags,
            credit_offset=offsets.combine_credits,
            row_offset=offsets.combine_rows,
            weight_offset=offsets.combine_weights,
            zero_offset=offsets.zeros,
            ranks_per_node=config.ranks_per_node or memory.num_ranks,
            push_percent=COMBINE_PUSH_PERCENT,
            num_pushed=-1,
            **sizes,
        ),
    )
