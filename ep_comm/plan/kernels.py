"""SMs and chunks, as our kernels choose them."""

from __future__ import annotations

from typing import NamedTuple

from ep_comm._native import header
from ep_comm.backends.nodes import tuning as nodes_tuning
from ep_comm.backends.nvlink import tuning
from ep_comm.numeric import ceil_div, round_up
from ep_comm.plan.sizes import Cluster, Workload


class DispatchSms(NamedTuple):
    """SMs of a dispatch that send to the network, push over NVLink, and expand."""

    gather: int
    push: int
    expand: int


class Chunks(NamedTuple):
    """Rows that share a flag.

    Attributes:
        dispatch: Over NVLink.
        combine: Over NVLink.
        network: Of a message.
    """

    dispatch: int
    combine: int
    network: int


def dispatch_sms(cluster: Cluster, workload: Workload, is_new: bool) -> DispatchSms:
    """Return the SMs of a dispatch; a new routing is pushed in two parts."""
    if cluster.num_nodes == 1:
        sizes = cluster.num_sms, cluster.gpus_per_node, workload.layout, workload.shape.topk
        return DispatchSms(0, *tuning.split_dispatch(*sizes))
    split = nodes_tuning.split_dispatch(cluster.num_sms, cluster.num_nodes, is_new)
    return DispatchSms(split.gather, split.push, split.expand)


def chunks_of(cluster: Cluster, workload: Workload) -> Chunks:
    """Return the chunks of both operations."""
    return Chunks(
        dispatch=tuning.chunk_tokens(tuning.DISPATCH_CHUNK_BYTES, workload.dispatch_row_bytes),
        combine=tuning.chunk_tokens(tuning.COMBINE_CHUNK_BYTES, workload.combine_row_bytes),
        network=network_chunk_rows(workload.shape.tokens) if cluster.num_nodes > 1 else 0,
    )


def network_chunk_rows(tokens: int) -> int:
    """Return the rows of a message: as few as 32 flags allow, in whole chunks of NVLink.

    It is `ep_nodes_offsets.network_chunk_rows`.
    """
    least = ceil_div(tokens, header.EP_MAX_NETWORK_CHUNKS)
    return round_up(least, tuning.MAX_CHUNK_TOKENS)
