"""The backend between nodes: our kernels inside each, and a network between them.

What it does beyond the NVLink backend is in csrc/PROTOCOL.md, "Between nodes". The public calls,
streams, rows and errors are that backend's. So far the nodes are parts of one host, and the network
is stores over NVLink: for tests and figures, and only where it is asked for by name.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from ep_comm import _native
from ep_comm._native import header
from ep_comm.backends.base import PlanRequest
from ep_comm.backends.nodes.args import nodes_kernel_args
from ep_comm.backends.nodes.memory import NodesMemory, nodes_offsets
from ep_comm.backends.nodes.planner import NodesPlanner
from ep_comm.backends.nodes.records import NodesRecorder
from ep_comm.backends.nodes.routing import NodesRouting
from ep_comm.backends.nodes.tuning import MIN_SMS, split_dispatch
from ep_comm.backends.nvlink import support
from ep_comm.backends.nvlink.args import KernelArgs
from ep_comm.backends.nvlink.backend import NVLinkBackend
from ep_comm.backends.nvlink.routing import NVLinkRouting
from ep_comm.backends.nvlink.streams import Streams
from ep_comm.config import EPConfig
from ep_comm.errors import EPArgumentError
from ep_comm.job.meeting import Meeting


class NodesBackend(NVLinkBackend):
    """The kernels of this project, between the GPUs of several hosts.

    `ep_comm.backends.base.Backend` says what each method is for. Low latency is not among it.
    """

    name = "nodes"
    memory: NodesMemory
    _planner: NodesPlanner

    @classmethod
    def facts(cls, group: dist.ProcessGroup, config: EPConfig) -> support.Facts:
        """Find out what `NVLinkBackend.facts` does, and what rules out this backend."""
        facts = support.facts_of(group, config)
        if facts.reason is None and config.low_latency_tokens is not None:
            return facts._replace(reason="it has no low-latency operations")
        return facts

    @classmethod
    def create(cls, group: dist.ProcessGroup, config: EPConfig, meeting: Meeting) -> NodesBackend:
        """Map the memory of all ranks here: they are on one host, in nodes for the sake of it."""
        native = _native.load()
        assert native is not None  # or `facts` says so
        num_ranks = dist.get_world_size(group)
        size = config.ranks_per_node or num_ranks
        offsets = nodes_offsets(native, config, num_ranks // size, size)
        return cls(NodesMemory.of_one_host(group, meeting, offsets, size, config.timeout_s), config)

    def __init__(self, memory: NodesMemory, config: EPConfig) -> None:
        self.config = config
        self.memory = memory
        self.rank, self.num_ranks = memory.rank, memory.num_ranks
        self.num_local_experts = config.num_experts // self.num_ranks
        native = _native.load()
        assert native is not None
        self.native = native
        self.native.load_kernels()
        self.device = self._current_device()
        place = memory.place
        self._streams = Streams(self.native, self.device.index, self._new_stream)
        self.recorder = NodesRecorder(place, self.device, self._streams.synchronize)
        self.nodes_offsets = nodes_offsets(native, config, place.num_nodes, place.ranks_per_node)
        self._scratch = torch.empty(
            self.native.nodes_plan_scratch_bytes(
                config.max_tokens_per_rank,
                config.num_experts,
                place.num_nodes,
                place.ranks_per_node,
            ),
            dtype=torch.uint8,
            device=self.device,
        )
        properties = torch.cuda.get_device_properties(self.device)
        self._available_sms: int = properties.multi_processor_count
        self._num_sms: int | None = None
        self._all_args = nodes_kernel_args(
            config,
            memory,
            self.nodes_offsets,
            self._scratch.data_ptr(),
            self.recorder.wire_bytes_address,
        )
        # Views of the parts that are the same on one node.
        self._args = KernelArgs(
            self._all_args.plan, self._all_args.dispatch.dispatch, self._all_args.combine.combine
        )
        self._planner = NodesPlanner(
            self.native, memory, config, self.device, self._streams, self.recorder, self._all_args
        )
        self.low_latency = None

    @staticmethod
    def _current_device() -> torch.device:
        return torch.device("cuda", torch.cuda.current_device())

    @property
    def buffer_bytes(self) -> int:
        """The memory of peers and network, that of plans, and the records."""
        own = self._scratch.nbytes + self._planner.entries.nbytes
        staged = self.nodes_offsets.total + self.nodes_offsets.network_total
        return staged + own + self.recorder.num_bytes

    def describe(self) -> str:
        """Name the nodes, and the SMs that an operation may occupy."""
        place = self.memory.place
        sms = self._num_sms or self._available_sms
        return f"nodes ({place.num_nodes} of {place.ranks_per_node} GPUs, {sms} SMs)"

    def set_num_sms(self, num_sms: int | None) -> None:
        """Limit the SMs that the kernels of later operations occupy."""
        if num_sms is not None and not MIN_SMS <= num_sms <= self._available_sms:
            raise EPArgumentError(
                f"num_sms must be {MIN_SMS} to {self._available_sms}, or None, got {num_sms}"
            )
        self._num_sms = num_sms

    def throttle(self, bytes_per_s: float) -> None:
        """Let the network of this rank be no faster than that, for figures; 0 is no limit."""
        for args in self._all_args:
            args.network.bytes_per_us = int(bytes_per_s / 1e6)

    def plan(self, request: PlanRequest) -> NodesRouting:
        """Start the kernels of a plan; its counts come while the dispatch sends."""
        self.memory.check()
        return self._planner.plan(request, self._sms(request.asynchronous), self._available_sms)

    def _launch_dispatch(
        self, args: header.DispatchArgs, routing: NVLinkRouting, num_sms: int, stream: int
    ) -> None:
        assert isinstance(routing, NodesRouting)
        all_args, num_nodes = self._all_args.dispatch, self.memory.place.num_nodes
        split = split_dispatch(num_sms, num_nodes, False)
        args.num_push_blocks, args.num_expand_blocks = split.push, split.expand
        args.num_blocks = split.total
        all_args.num_gather_blocks = split.gather
        all_args.first_wave, all_args.end_wave = 0, num_nodes
        all_args.nodes = routing.nodes
        self.native.launch("ep_nodes_dispatch", all_args, stream)

    def _launch_combine(
        self, args: header.CombineArgs, routing: NVLinkRouting, has_weights: bool, stream: int
    ) -> None:
        assert isinstance(routing, NodesRouting)
        all_args = self._all_args.combine
        all_args.nodes = routing.nodes
        all_args.has_weights = has_weights
        self.native.launch("ep_nodes_combine", all_args, stream)
