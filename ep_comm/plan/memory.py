"""Memory of a buffer, beyond its outputs."""

from __future__ import annotations

from typing import NamedTuple

from ep_comm import _native
from ep_comm._native import header
from ep_comm.numeric import round_up
from ep_comm.plan.sizes import Cluster, Workload


class Memory(NamedTuple):
    """Bytes of each GPU.

    Attributes:
        nvlink: What the ranks of its node write into.
        network: What the network reads and writes.
        is_exact: As the CUDA library lays it out; else by the formula, within 1 % where rows are
            long and tokens many.
    """

    nvlink: int
    network: int
    is_exact: bool

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.nvlink + self.network


def memory_of(cluster: Cluster, workload: Workload) -> Memory:
    """Return what a buffer takes: exactly, where the CUDA library is there and serves so many."""
    native = _native.load()
    if native is None or cluster.num_gpus > header.EP_MAX_NODE_RANKS:
        return formula(cluster, workload)
    sizes = dict(
        max_tokens=workload.shape.tokens,
        row_bytes=workload.combine_row_bytes,
        num_topk=workload.shape.topk,
    )
    if cluster.num_nodes == 1:
        args = header.BufferLayoutArgs(
            **sizes, num_ranks=cluster.num_gpus, hidden=workload.shape.hidden
        )
        return Memory(native.buffer_offsets(args).total, 0, True)
    offsets = native.nodes_offsets(
        header.NodesLayoutArgs(
            **sizes, num_nodes=cluster.num_nodes, ranks_per_node=cluster.gpus_per_node
        )
    )
    return Memory(offsets.total, offsets.network_total, True)


def formula(cluster: Cluster, workload: Workload) -> Memory:
    """Return what csrc/PROTOCOL.md has for it, flags left out.

    Between N nodes of L ranks, S tokens with K experts, rows of B bytes and slots of Z::

        NVLink    2 (L - 1) S (Z + B)  +  8 L S K  +  4 N L S K
        network   2 (N - 1) S (Z + B)  +  8 (N - 1) S K  +  8 (N - 1) S (L + K)

    In one node NVLink's rows have one half instead of two.
    """
    nodes, local = cluster.num_nodes, cluster.gpus_per_node
    tokens, _, _, topk = workload.shape
    row = workload.combine_row_bytes
    slot = round_up(row + 4 * round_up(topk, 4), 128)  # probabilities too, in whole lines
    halves = 1 if nodes == 1 else 2
    return Memory(
        nvlink=halves * (local - 1) * tokens * (slot + row)
        + 4 * halves * local * tokens * topk
        + 4 * nodes * local * tokens * topk,
        network=(nodes - 1) * tokens * (2 * (slot + row) + 8 * topk + 8 * (local + topk)),
        is_exact=False,
    )
