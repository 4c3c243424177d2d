"""Arguments of the kernels between nodes that stay the same from call to call."""

from __future__ import annotations

from typing import NamedTuple

from ep_comm._native import header
from ep_comm.backends.nodes.memory import NodesMemory
from ep_comm.backends.nvlink.args import common_fields
from ep_comm.config import EPConfig
from ep_comm.telemetry.device import RecordAddresses


class NodesKernelArgs(NamedTuple):
    """The arguments of each kernel; every call fills in the rest anew."""

    plan: header.NodesPlanArgs
    dispatch: header.NodesDispatchArgs
    combine: header.NodesCombineArgs


def nodes_kernel_args(
    config: EPConfig,
    memory: NodesMemory,
    offsets: header.NodesOffsets,
    scratch: int,
    records: RecordAddresses,
) -> NodesKernelArgs:
    """Return the arguments of one buffer; takes what `kernel_args` does."""
    common = common_fields(config, memory, offsets, scratch, records)
    plan = header.NodesPlanArgs(
        **common.plan,
        network=memory.network,
        network_credit_offset=offsets.network_credits,
        network_flag_offset=offsets.network_plan_flags,
        network_send_offset=offsets.plan_to_send,
        network_receive_offset=offsets.plan_received,
        network_region=offsets.plan_region,
    )
    dispatch = header.NodesDispatchArgs(
        dispatch=header.DispatchArgs(**common.dispatch),
        network=memory.network,
        wave_counters=memory.wave_counters.data_ptr(),
        slot_half=offsets.dispatch_slots_half,
        network_credit_offset=offsets.network_credits,
        network_flag_offset=offsets.network_dispatch_flags,
        network_send_offset=offsets.dispatch_to_send,
        network_receive_offset=offsets.dispatch_received,
        network_region=offsets.dispatch_region,
        plan_flag_offset=offsets.network_plan_flags,
        plan_offset=offsets.plan_received,
        plan_region=offsets.plan_region,
        network_chunk_rows=offsets.network_chunk_rows,
    )
    num_nodes = memory.place.num_nodes
    combine = header.NodesCombineArgs(
        combine=header.CombineArgs(
            **common.combine,
            counters=memory.combine_counters.data_ptr(),
            ranks_per_node=memory.place.ranks_per_node,
        ),
        network=memory.network,
        row_half=offsets.combine_rows_half,
        network_credit_offset=offsets.network_credits + 8 * (num_nodes - 1),
        network_flag_offset=offsets.network_combine_flags,
        network_send_offset=offsets.combine_to_send,
        network_receive_offset=offsets.combine_received,
        network_region=offsets.combine_region,
        weight_flag_offset=offsets.network_weight_flags,
        weight_send_offset=offsets.weights_to_send,
        weight_receive_offset=offsets.weights_received,
        weight_region=offsets.weights_region,
        network_chunk_rows=offsets.network_chunk_rows,
    )
    return NodesKernelArgs(plan, dispatch, combine)
