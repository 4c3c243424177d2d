"""The NVLink backend: our kernels between the GPUs of one host.

A rank writes into the others' memory (torch symmetric memory); nothing is read across NVLink. The
host waits once in a new dispatch, for the counts that the outputs are allocated by, while the rows
are already on their way (csrc/plan, csrc/dispatch, csrc/combine). It waits for nothing where the
caller says how many rows the output has; epochs are counted on the device, so that all of it can be
captured in a CUDA graph.

Operations run on the caller's stream, asynchronous ones on the communication stream. Beside them a
new dispatch uses a side stream: it takes the routing in and moves arrived rows to their places
while the other one pushes. Two operations run at once where both find room (streams.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ep_comm import _native, fp8
from ep_comm._native import NativeLibrary, header
from ep_comm.backends.nvlink import prices, support
from ep_comm.backends.nvlink.args import KernelArgs, kernel_args
from ep_comm.backends.nvlink.copies import Copies
from ep_comm.backends.nvlink.dispatches import Dispatches
from ep_comm.backends.nvlink.low_latency import LowLatency, NVLinkLowLatency
from ep_comm.backends.nvlink.memory import PeerMemory, buffer_offsets
from ep_comm.backends.nvlink.planner import Planner
from ep_comm.backends.nvlink.resources import Resources
from ep_comm.backends.nvlink.routing import NVLinkRouting, entry_size
from ep_comm.backends.nvlink.rows import describe_sums
from ep_comm.backends.nvlink.sms import Sms
from ep_comm.backends.nvlink.streams import Streams
from ep_comm.backends.nvlink.tuning import combine_chunks_per_unit
from ep_comm.backends.requests import (
    Combined,
    CombineRequest,
    DispatchRequest,
    Pending,
    PlanRequest,
    Received,
)
from ep_comm.blank import maker
from ep_comm.config import EPConfig
from ep_comm.errors import EPArgumentError, EPUnsupportedError
from ep_comm.job.meeting import Meeting
from ep_comm.routing.types import RowLayout
from ep_comm.telemetry.device import DeviceRecorder
from ep_comm.telemetry.watch import Wait
from ep_comm.topology import Spot, num_hosts

if TYPE_CHECKING:
    from typing_extensions import Self


class NVLinkBackend:
    """The kernels of this project, between the GPUs of one host.

    `ep_comm.backends.base.Backend` says what each method is for.
    """

    name = "nvlink"
    _copies: Copies | None = None  # None: kernels push rows

    @classmethod
    def facts(cls, group: dist.ProcessGroup, config: EPConfig) -> support.Facts:
        """Find out this rank's GPU, those that it reaches, and what rules it out."""
        return support.facts_of(group, config, support.reason_here)

    @classmethod
    def unavailable_reason(
        cls, facts: list[support.Facts], spots: list[Spot], config: EPConfig
    ) -> str | None:
        """Return why the ranks are not peers of one host, or None where they are."""
        if num_hosts(spots) > 1:
            return f"the group spans {num_hosts(spots)} hosts"
        return support.unavailable_reason(facts, spots, len(facts))

    @classmethod
    def create(
        cls, group: dist.ProcessGroup, config: EPConfig, meeting: Meeting, spots: list[Spot]
    ) -> NVLinkBackend:
        """Map the memory of all ranks here."""
        native = _native.load()
        assert native is not None  # or `facts` says so
        offsets = buffer_offsets(native, config, dist.get_world_size(group))
        return cls._made(PeerMemory.of_group(group, meeting, offsets, config.timeout_s), config)

    @classmethod
    def _made(cls, *args: Any) -> Self:
        """Return a new one whose counts are zero for operations on any stream."""
        made = cls(*args)
        # Not the whole device: something there may wait for what the caller does next.
        torch.cuda.current_stream().synchronize()
        return made

    def __init__(self, memory: PeerMemory, config: EPConfig) -> None:
        self.config = config
        self.memory = memory
        self.rank, self.num_ranks = memory.rank, memory.num_ranks
        self.num_local_experts = config.num_experts // self.num_ranks
        self.native = self._load_kernels()
        self.device = self._current_device()
        self._streams = Streams(self.native, self.device.index, self._new_stream)
        self.recorder = self._make_recorder()
        self.offsets = self._find_offsets()
        self._scratch = torch.empty(self._scratch_bytes(), dtype=torch.uint8, device=self.device)
        self._args = self._make_args()
        resources = Resources(
            self.native,
            memory,
            self.offsets,
            config,
            self.device,
            self._streams,
            self.recorder,
        )
        if config.wire == "copy-engine" and self.num_ranks > 1:
            self._copies = Copies(resources, self._args)
        properties = torch.cuda.get_device_properties(self.device)
        num_sms: int = properties.multi_processor_count
        self._sms = Sms(
            num_sms,
            self._fewest_sms,
            self._copies is not None,
            self._find_prices(properties.name, num_sms),
            self.num_ranks,
        )
        self._planner = self._make_planner(resources)
        self._dispatches = Dispatches(
            resources, self._args.dispatch, self._planner, self._sms, self._copies
        )
        self.low_latency: LowLatency | None = None
        if config.low_latency_tokens is not None:
            self.low_latency = self._low_latency_type(resources, self._sms.of)

    # --- what is different between nodes, and in tests -------------------------------------------

    _fewest_sms = 2
    _low_latency_type: type[LowLatency] = NVLinkLowLatency

    @staticmethod
    def _current_device() -> torch.device:
        return torch.device("cuda", torch.cuda.current_device())

    @staticmethod
    def _new_stream(priority: int) -> torch.cuda.Stream:
        return torch.cuda.Stream(priority=priority)

    def _load_kernels(self) -> NativeLibrary:
        """Return the library whose kernels are launched, and load them."""
        native = _native.load()
        assert native is not None  # see `unavailable_reason`
        native.load_kernels()
        return native

    def _make_recorder(self) -> DeviceRecorder:
        return DeviceRecorder(self.rank, self.num_ranks, self.device, self._streams.synchronize)

    def _find_offsets(self) -> header.BufferOffsets:
        return buffer_offsets(self.native, self.config, self.num_ranks)

    def _scratch_bytes(self) -> int:
        config = self.config
        sizes = config.max_tokens_per_rank, config.num_experts, self.num_ranks
        return self.native.plan_scratch_bytes(*sizes)

    def _make_args(self) -> KernelArgs:
        return kernel_args(
            self.config,
            self.memory,
            self.offsets,
            self._scratch.data_ptr(),
            self.recorder.addresses,
        )

    def _find_prices(self, gpu: str, num_sms: int) -> prices.PriceTable | None:
        measured = prices.of_machine(gpu, num_sms)
        return measured if self.config.wire == "sm" else None  # nobody has measured copy engines

    def _make_planner(self, resources: Resources) -> Planner:
        copy_engine = None if self._copies is None else self._copies.dispatch
        return Planner(resources, self._args.plan, copy_engine)

    # --- state -----------------------------------------------------------------------------------

    @property
    def buffer_bytes(self) -> int:
        """The peer memory, that of plans, and the records."""
        own = self._scratch.nbytes + self._planner.entries.nbytes
        if self._copies is not None:
            own += self._copies.num_bytes
        return self.offsets.total + own + self.recorder.num_bytes

    def describe(self) -> str:
        """Name the GPUs, the SMs that an operation may occupy, and what a layer keeps."""
        kept = 4 * entry_size(self.config.num_topk)
        wire = ", rows by copy engines" if self._copies else ""
        return (
            f"nvlink ({self.num_ranks} GPUs of one host{wire}, {self._sms.most} SMs; a layer in "
            f"flight keeps {kept} bytes a received row)"
        )

    def waits(self) -> list[Wait]:
        """Return whom kernels wait for, as they write it into host memory."""
        return self.memory.waits()

    @property
    def has_failed(self) -> bool:
        """Whether a kernel has given up, or ranks are an operation apart."""
        return self.memory.has_fault or self.memory.has_diverged

    @property
    def comm_stream(self) -> torch.cuda.Stream:
        """The communication stream."""
        return self._streams.comm

    @property
    def num_started(self) -> int:
        """The dispatches and combines that were launched, and second halves of dispatches."""
        return self.recorder.num_operations + self._planner.num_resumed

    def destroy(self) -> None:
        """Wait until no rank writes here any more, and free the peer memory."""
        try:
            self.memory.free()
        finally:
            self._streams.forget()

    def set_num_sms(self, num_sms: int | None) -> None:
        """Limit the SMs that the kernels of later operations occupy."""
        self._sms.limit(num_sms)

    def set_overlapped(self, overlapped: bool) -> None:
        """Note whether computation runs beside all later operations."""
        self._sms.is_overlapped = overlapped

    def set_gemm_tiles(self, tiles: int | None) -> None:
        """Note the size of the GEMM that runs beside later operations."""
        self._sms.chooser.tiles = tiles

    def overlap_loss(self, op: str, layout: RowLayout, num_bytes: int) -> str | None:
        """Return why an operation is not to run beside GEMMs, by the prices of this machine."""
        return self._sms.loss(op, layout, num_bytes)

    def check_device(self, name: str, rows: Tensor) -> None:
        """Refuse rows that are not on the buffer's GPU."""
        if rows.get_device() != self.device.index:
            raise EPArgumentError(f"{name} is on {rows.device}, the buffer on {self.device}")

    def check_wire_dtype(self, wire_dtype: torch.dtype, recv_dtype: torch.dtype) -> None:
        """Refuse FP8 where bulk copies cannot move its scales."""
        if wire_dtype == fp8.FP8_DTYPE:
            support.check_fp8_hidden(self.config.hidden, recv_dtype)

    def inject_delays(self, up_to_ns: int) -> None:
        """Delay every wait and every signal of later operations at random, for tests."""
        for args in self._args:
            args.peers.delay_ns = up_to_ns
        if self._copies is not None:
            self._copies.delay(up_to_ns)
        for call in self.low_latency.calls if self.low_latency else ():
            call.peers.delay_ns = up_to_ns

    def synchronize(self) -> None:
        """Wait for all streams with an operation, and raise what their kernels reported."""
        self._streams.synchronize()
        self.memory.check()

    # --- operations ------------------------------------------------------------------------------

    def plan(self, request: PlanRequest) -> NVLinkRouting:
        """Start the kernels of a plan; its counts come while the dispatch pushes."""
        self.memory.check()
        num_bytes = request.source.shape[0] * self.config.hidden * self.config.dtype.itemsize
        num_sms = self._sms.of_rows("dispatch", request.layout, num_bytes, request.asynchronous)
        return self._planner.plan(request, num_sms, self._sms.available)

    def dispatch(self, routing: NVLinkRouting, request: DispatchRequest) -> Pending[Received]:
        """Launch the kernel of a cached dispatch, or let a new one follow its plan."""
        received, keep = self._dispatches.dispatch(routing, request)
        return self._pending(received, request.asynchronous, keep)

    def begin(self, x: Tensor, scales: Tensor | None, wire_dtype: torch.dtype) -> None:
        """Push rows; the dispatch that follows says where they go."""
        self._dispatches.begin(x, scales, wire_dtype)

    def check_ahead(self, x: Tensor, scales: Tensor | None, wire_dtype: torch.dtype) -> None:
        """Refuse another dispatch than the one that was begun."""
        self._dispatches.check_ahead(x, scales, wire_dtype)

    def push_alone(self, routing: NVLinkRouting, x: Tensor) -> None:
        """Push rows that nobody expands, for figures. Copy engines are the wire."""
        self._dispatches.push_alone(routing, x)

    def combine(self, routing: NVLinkRouting, request: CombineRequest) -> Pending[Combined]:
        """Launch the kernel of a combine."""
        self.memory.check()
        x, topk_weights, asynchronous, _ = request
        num_tokens, hidden = routing.num_tokens, x.shape[1]
        make = maker(self.device)
        combined = make((num_tokens, hidden), (hidden, 1), x.dtype)
        weights = None
        if topk_weights is not None:
            weights = make((num_tokens, routing.num_topk), (routing.num_topk, 1), torch.float32)
        args = self._args.combine
        describe_sums(args, routing, request, combined, weights)
        row_bytes = args.row_bytes
        sms = self._sms.of_rows("combine", routing.layout, num_tokens * row_bytes, asynchronous)
        args.chunks_per_unit = combine_chunks_per_unit(sms, args.chunk_rows)
        args.num_blocks = sms
        stream = self._streams.begin(header.EP_OP_COMBINE, asynchronous, sms)
        self._streams.keep_for_current(routing.memory, routing.stream)
        args.peers.record = self.recorder.start(header.EP_OP_COMBINE)
        self._launch_combine(args, routing, weights is not None, stream)
        keep = (x, topk_weights, routing.memory)
        return self._pending(Combined(combined, weights), asynchronous, keep)

    def _launch_combine(
        self, args: header.CombineArgs, routing: NVLinkRouting, has_weights: bool, stream: int
    ) -> None:
        if self._copies is None:
            self.native.launch("ep_combine", args, stream)
            return
        received = None if routing.capacity is not None else routing.sizes.received
        self._copies.sum(args, received, stream)
        self.recorder.complete(args.row_bytes)

    # --- order ------------------------------------------------------------------------------------

    def keep_for_comm_stream(self, tensors: Iterable[Tensor | None]) -> None:
        """Record the communication stream as a user of the outputs."""
        for tensor in tensors:
            if tensor is not None:
                tensor.record_stream(self._streams.comm)

    def quiesce(self) -> int:
        """Wait for the GPU, and return the highest number of a low-latency operation."""
        if torch.cuda.is_current_stream_capturing():
            raise EPUnsupportedError("ranks cannot be masked while a CUDA graph is captured")
        assert isinstance(self.low_latency, NVLinkLowLatency)  # the caller has seen to it
        torch.cuda.synchronize()  # graphs too, whatever stream they were replayed on
        self._streams.forget()
        return self.low_latency.most_operations

    def restart(self, masked: tuple[int, ...], first: int, store: dist.Store) -> None:
        """Put all memory into its first state, and have low-latency kernels leave `masked` out.

        Kernels read the mask in device memory: captured ones too, when they are replayed.
        """
        assert isinstance(self.low_latency, NVLinkLowLatency)
        self.memory.restart(self.offsets, masked)
        self.low_latency.restart(masked, first)
        self._planner.restart()
        self.recorder.restart()
        if self._copies is not None:
            self._copies.restart()
        torch.cuda.synchronize()

    def give_up(self) -> None:
        """Leave the peer memory mapped for ever: a late peer may write to it."""
        self.memory.give_up()

    def abandon(self) -> None:
        """Order the caller's stream behind the side and the communication stream."""
        self._streams.abandon()

    def _pending(self, result, asynchronous: bool, keep: tuple) -> Pending:
        """Return the started operation, which holds `keep`, what its kernels read, till the end."""
        if not asynchronous:
            return Pending(result)
        return Pending(result, self._streams.comm_event(keep))
