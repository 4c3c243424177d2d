"""The backend between nodes: our kernels inside each, and a network between them.

What it does beyond the NVLink backend is in csrc/PROTOCOL.md, "Between nodes". The public calls,
streams, rows and errors are that backend's. The nodes are hosts, or equal parts of them, with
NVSHMEM for a network. Or they are parts of one host, and the network is stores over NVLink: for
tests and figures, where it is asked for by name.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.distributed as dist

from ep_comm import _native
from ep_comm._native import NativeLibrary, header
from ep_comm.backends.nodes.args import nodes_kernel_args
from ep_comm.backends.nodes.low_latency import NodesLowLatency
from ep_comm.backends.nodes.memory import NodesMemory, nodes_offsets
from ep_comm.backends.nodes.planner import NodesPlanner
from ep_comm.backends.nodes.records import NodesRecorder
from ep_comm.backends.nodes.routing import NodesRouting
from ep_comm.backends.nodes.sizes import nodes_sizes
from ep_comm.backends.nodes.tuning import MIN_SMS
from ep_comm.backends.nvlink import support
from ep_comm.backends.nvlink.args import KernelArgs
from ep_comm.backends.nvlink.backend import NVLinkBackend
from ep_comm.backends.nvlink.resources import Resources
from ep_comm.backends.nvlink.routing import NVLinkRouting
from ep_comm.config import EPConfig
from ep_comm.errors import EPUnsupportedError
from ep_comm.job.meeting import Meeting
from ep_comm.network.settings import NetworkSettings
from ep_comm.network.world import World
from ep_comm.topology import Spot, num_hosts, ranks_of_a_node

_MOST_LISTED = 4


def _reason_here(num_ranks: int, config: EPConfig) -> str | None:
    """Return why this process cannot be one of `num_ranks` ranks of nodes, or None."""
    reason = _native.unusable_reason(torch.cuda.current_device())
    return reason or support.sizes_reason(num_ranks, config)


def _few(ranks: list[int]) -> str:
    if len(ranks) <= _MOST_LISTED:
        return ", ".join(map(str, ranks))
    return f"{ranks[0]}, {ranks[1]} ... {ranks[-1]}"


class NodesBackend(NVLinkBackend):
    """The kernels of this project, between the GPUs of several hosts.

    `ep_comm.backends.base.Backend` says what each method is for.
    """

    name = "nodes"
    memory: NodesMemory
    offsets: header.NodesOffsets
    low_latency: NodesLowLatency | None
    _low_latency_type = NodesLowLatency
    _fewest_sms = MIN_SMS

    @classmethod
    def facts(cls, group: dist.ProcessGroup, config: EPConfig) -> support.Facts:
        """Find out what `NVLinkBackend.facts` does, and what rules out this backend."""
        return support.facts_of(group, config, _reason_here)

    @classmethod
    def unavailable_reason(
        cls, facts: list[support.Facts], spots: list[Spot], config: EPConfig
    ) -> str | None:
        """Return why the ranks are no equal nodes of peers, or None where they are.

        Raises:
            EPArgumentError: Two ranks of a host have the same GPU; or hosts differ in number or
                order of their ranks, or do not have `ranks_per_node`.
        """
        if any(not each.gpu for each in facts):
            return next(each.reason for each in facts if not each.gpu)
        size = ranks_of_a_node(spots, config.ranks_per_node)
        if size > header.EP_MAX_PEERS:
            return f"{size} ranks a node, at most {header.EP_MAX_PEERS}"
        if len(facts) > min(header.EP_MAX_NODE_RANKS, header.EP_MAX_NODES * size):
            return (
                f"{len(facts) // size} nodes of {size} ranks, at most {header.EP_MAX_NODES} nodes "
                f"and {header.EP_MAX_NODE_RANKS} ranks"
            )
        return support.unavailable_reason(facts, spots, size)

    @classmethod
    def create(
        cls, group: dist.ProcessGroup, config: EPConfig, meeting: Meeting, spots: list[Spot]
    ) -> NodesBackend:
        """Map the memory of the ranks of a node; on several hosts join NVSHMEM's world before.

        Raises:
            EPUnsupportedError: NVSHMEM cannot be used.
        """
        num_ranks, size = len(spots), ranks_of_a_node(spots, config.ranks_per_node)
        world = None
        if num_hosts(spots) > 1:
            settings = config.network or NetworkSettings.from_environment()
            world = World.of_group(group, settings, config.timeout_s)
        native = _native.load()
        assert native is not None  # or `facts` says so
        offsets = nodes_offsets(native, config, num_ranks // size, size)
        how = (offsets, size, config.timeout_s)
        if world is None:
            return cls._made(NodesMemory.of_one_host(group, meeting, *how), config)
        hosts, rank = [spot.host for spot in spots], dist.get_rank(group)
        has_low_latency = config.low_latency_tokens is not None
        memory = NodesMemory.of_hosts(group, meeting, world, *how, has_low_latency)
        return cls._made(memory, config, world.nic(hosts[:rank].count(hosts[rank])))

    def __init__(self, memory: NodesMemory, config: EPConfig, nic: str | None = None) -> None:
        self._nic = nic
        super().__init__(memory, config)
        world, place = memory.world, memory.place
        self._network = "stores" if world is None else f"NVSHMEM {world.version}"
        self._sizes = nodes_sizes(
            self.native,
            config,
            place.num_nodes,
            place.ranks_per_node,
            world.settings if world else None,
        )

    def _load_kernels(self) -> NativeLibrary:
        native = super()._load_kernels()  # what quantises is in this library alone
        if self.memory.world is not None:
            # NVSHMEM's has all of the other one that is called here.
            native = cast(NativeLibrary, self.memory.world.native)
            native.load_kernels()
        return native

    def _make_recorder(self) -> NodesRecorder:
        return NodesRecorder(self.memory.place, self.device, self._streams.synchronize)

    def _find_offsets(self) -> header.NodesOffsets:
        place = self.memory.place
        return nodes_offsets(self.native, self.config, place.num_nodes, place.ranks_per_node)

    def _scratch_bytes(self) -> int:
        config, place = self.config, self.memory.place
        sizes = config.max_tokens_per_rank, config.num_experts
        return self.native.nodes_plan_scratch_bytes(*sizes, place.num_nodes, place.ranks_per_node)

    def _make_args(self) -> KernelArgs:
        """Return views of the parts that are the same on one node."""
        self._all_args = all_args = nodes_kernel_args(
            self.config,
            self.memory,
            self.offsets,
            self._scratch.data_ptr(),
            self.recorder.addresses,
        )
        return KernelArgs(all_args.plan, all_args.dispatch.dispatch, all_args.combine.combine)

    def _find_prices(self, gpu: str, num_sms: int) -> None:
        """Nobody has measured."""

    def _make_planner(self, resources: Resources) -> NodesPlanner:
        return NodesPlanner(resources, self._all_args)

    @property
    def buffer_bytes(self) -> int:
        """The memory of peers and network, that of plans, and the records, see `NodesSizes`."""
        return self._sizes.total + self.recorder.num_bytes

    def describe(self) -> str:
        """Name nodes and network, the SMs of an operation, this rank's rail, and the memory."""
        place = self.memory.place
        text = f"{place.num_nodes} of {place.ranks_per_node} GPUs over {self._network}, "
        text += f"{self._sms.most} SMs"
        if place.num_nodes > 1:
            text += f"; rail of rank {self.rank}: {_few(sorted(place.rail))}"
        if self.memory.world is not None:
            text += f", NIC {self._nic or 'not known'}"
        return f"nodes ({text}; {self._sizes.describe()})"

    def throttle(self, bytes_per_s: float) -> None:
        """Let the network of this rank be no faster than that, for figures; 0 is no limit."""
        networks = [args.network for args in self._all_args]
        if self.low_latency is not None:
            networks += self.low_latency.networks
        for network in networks:
            network.bytes_per_us = int(bytes_per_s / 1e6)

    def quiesce(self) -> int:
        """Refuse to mask ranks: what a network has still to bring would come to memory begun anew.

        Raises:
            EPUnsupportedError: Always.
        """
        raise EPUnsupportedError(
            "ranks of a buffer between nodes cannot be masked: make a new Buffer on a group "
            "without them"
        )

    def _launch_combine(
        self, args: header.CombineArgs, routing: NVLinkRouting, has_weights: bool, stream: int
    ) -> None:
        assert isinstance(routing, NodesRouting)
        all_args = self._all_args.combine
        all_args.nodes = routing.nodes
        all_args.has_weights = has_weights
        self.native.launch("ep_nodes_combine", all_args, stream)
