"""What a buffer between nodes takes of a GPU's memory, by a formula."""

from __future__ import annotations

from typing import NamedTuple

from ep_comm._native import NativeLibrary
from ep_comm.backends.nodes.memory import nodes_offsets
from ep_comm.backends.nvlink.routing import entry_size
from ep_comm.config import EPConfig
from ep_comm.network.settings import NetworkSettings
from ep_comm.numeric import round_up

_QUEUE_PLACE_BYTES = 128  # an order and its completion, of 64 bytes each
_GIB = 2**30


class NodesSizes(NamedTuple):
    """Bytes on each GPU. What a sentence calls so: N nodes, L ranks on each, R = N L ranks.

    S = max_tokens_per_rank, K = num_topk, B = bytes of the widest row, Z = B with probabilities, in
    whole lines; H = hidden, and M = low_latency_tokens, where there is low latency.

    Attributes:
        nvlink: Staging within a node, 2 (L - 1) S (Z + B) + 8 L S K, which does not grow with the
            nodes; and the experts of all rows, 4 R S K.
        network: 2 (N - 1) S (Z + B + 4 K + 4 (L + K)), and for low latency R M (16 H + 51 K), of
            NVSHMEM's heap, rounded up to its granularity, and as much again as that for what
            NVSHMEM keeps there itself.
        plans: Scratch memory of plans, and the entries of R S rows, 12 K each.
        queue_pairs: Where the GPU gives its card orders (IBGDA), for each rank, pair of queues and
            place in it, 128. With the proxy they are in host memory.
    """

    nvlink: int
    network: int
    plans: int
    queue_pairs: int

    @property
    def total(self) -> int:
        """All of it; queue pairs, and what NVSHMEM keeps, once for all buffers of a process.

        Handles come beside it, see docs/buffer.md.
        """
        return sum(self)

    def describe(self) -> str:
        """Return the memory of each kind in GiB, for `NodesBackend.describe`."""
        besides = self.plans + self.queue_pairs
        return (
            f"{self.nvlink / _GIB:.2f} GiB for NVLink, {self.network / _GIB:.2f} for the network, "
            f"{besides / _GIB:.2f} besides"
        )


def nodes_sizes(
    native: NativeLibrary,
    config: EPConfig,
    num_nodes: int,
    ranks_per_node: int,
    settings: NetworkSettings | None,
) -> NodesSizes:
    """Return what one buffer takes on each GPU.

    Args:
        native: Knows the layout.
        config: The buffer's.
        num_nodes: The group's.
        ranks_per_node: The group's.
        settings: Of the network; None where the nodes are parts of one host.
    """
    offsets = nodes_offsets(native, config, num_nodes, ranks_per_node)
    tokens, num_ranks = config.max_tokens_per_rank, num_nodes * ranks_per_node
    scratch = native.nodes_plan_scratch_bytes(tokens, config.num_experts, num_nodes, ranks_per_node)
    network, queue_pairs = offsets.network_total, 0
    if settings is not None:
        network = round_up(network, settings.granularity) + settings.granularity
        if settings.ibgda and settings.nic_buffers == "gpumem":
            places = num_ranks * settings.queue_pairs * settings.queue_depth
            queue_pairs = places * _QUEUE_PLACE_BYTES
    entries = 4 * num_ranks * tokens * entry_size(config.num_topk)
    return NodesSizes(offsets.total, network, scratch + entries, queue_pairs)
