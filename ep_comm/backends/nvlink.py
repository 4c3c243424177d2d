"""The NVLink backend: our kernels between the GPUs of one host.

A rank writes into the others' memory (torch symmetric memory); nothing is read across NVLink. The
host waits once in a new dispatch, for the counts that the outputs are allocated by, while the rows
are already on their way (csrc/plan.cu, dispatch.cu, combine.cu).

Operations run on the caller's stream, asynchronous ones on the communication stream. Beside them a
new dispatch uses a side stream: it exchanges the routing and moves arrived rows to their places
while the other one pushes.
"""

from __future__ import annotations

import socket
import zlib

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ep_comm import _native, fp8
from ep_comm._native import structs
from ep_comm.backends.base import Combined, Pending, Received
from ep_comm.backends.nvlink_memory import NodeMemory, Offsets
from ep_comm.backends.nvlink_routing import NVLinkRouting, arena_places
from ep_comm.backends.nvlink_tuning import (
    COMBINE_CHUNK_BYTES,
    DISPATCH_CHUNK_BYTES,
    combine_chunks_per_unit,
    split_combine,
    split_dispatch,
)
from ep_comm.config import EPConfig
from ep_comm.errors import EPArgumentError, EPMismatchError, EPUnsupportedError
from ep_comm.events import EventOverlap
from ep_comm.handle import DispatchHandle, RoutingSizes, RowLayout
from ep_comm.layout import INPUT_KINDS, checked_source, raise_if_bad
from ep_comm.records import OpRecord, Recorder

_RECV_KINDS = {torch.bfloat16: structs.EP_RECV_BF16, torch.float32: structs.EP_RECV_FP32}
_MAX_ROW_BYTES = 112_000


def _tag(*call: int) -> int:
    """0 to 255, the same for the same call on every rank: chunks carry it."""
    return zlib.crc32(repr(tuple(map(int, call))).encode()) & 0xFF


def _raw_stream(device_index: int) -> int:
    """The current ``cudaStream_t``; `torch.cuda.current_stream` costs 6 µs, this a fraction."""
    return torch._C._cuda_getCurrentRawStream(device_index)


class NVLinkBackend:
    """See `ep_comm.backends.base.Backend`, whose methods these are."""

    name = "nvlink"

    @classmethod
    def unavailable_reason(cls, group: dist.ProcessGroup, config: EPConfig) -> str | None:
        if "cuda:nccl" not in dist.get_backend_config(group):
            return f"the group has no NCCL backend ({dist.get_backend_config(group)})"
        mine = (socket.gethostname(), cls._reason_here(dist.get_world_size(group), config), config)
        answers: list = [None] * dist.get_world_size(group)
        dist.all_gather_object(answers, mine, group=group)
        for rank, (_, _, theirs) in enumerate(answers):
            if theirs != config:
                raise EPMismatchError(
                    f"ranks disagree: rank {dist.get_rank(group)} has {config}; rank {rank} has "
                    f"{theirs}"
                )
        hosts = {host for host, _, _ in answers}
        if len(hosts) > 1:
            return f"the group spans {len(hosts)} hosts"
        for rank, (_, reason, _) in enumerate(answers):
            if reason is not None:
                return f"rank {rank}: {reason}"
        return None

    @classmethod
    def _reason_here(cls, num_ranks: int, config: EPConfig) -> str | None:
        if _native.load() is None:
            return _native.status()
        if num_ranks > structs.EP_MAX_NODE_RANKS:
            return f"{num_ranks} ranks, at most {structs.EP_MAX_NODE_RANKS} of one host"
        row_bytes = config.hidden * 2
        if row_bytes % 16:
            return f"rows of {row_bytes} bytes are not a multiple of 16"
        if config.hidden * config.dtype.itemsize > _MAX_ROW_BYTES:
            return f"rows of more than {_MAX_ROW_BYTES} bytes do not fit shared memory twice"
        if config.max_tokens_per_rank * num_ranks * config.num_topk >= 2**31:
            return "max_tokens_per_rank x ranks x num_topk is not below 2^31"
        if config.num_experts // num_ranks > 1024:
            return f"{config.num_experts // num_ranks} experts a rank, at most 1024"
        return None

    def __init__(self, group: dist.ProcessGroup, config: EPConfig) -> None:
        self.config = config
        self.recorder = Recorder(timed=False)
        self.rank = dist.get_rank(group)
        self.num_ranks = dist.get_world_size(group)
        self.num_local_experts = config.num_experts // self.num_ranks
        self.native = _native.load()
        self.native.load_kernels()
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.offsets = Offsets(config, self.num_ranks)
        self.memory = NodeMemory(group, self.offsets.total, config.timeout_s)
        self._scratch = torch.empty(
            self.native.plan_scratch_bytes(
                config.max_tokens_per_rank, config.num_experts, self.num_ranks
            ),
            dtype=torch.uint8,
            device=self.device,
        )
        # The side stream's expand waits for other ranks' pushes: it must never run before one.
        self._side_stream = torch.cuda.Stream()
        self._comm_stream = torch.cuda.Stream(priority=-1)
        self._fork_event = torch.cuda.Event()
        self._fork_event.record()  # torch makes the CUDA event at the first use
        self.set_num_sms(None)
        self._dispatch_epoch = self._combine_epoch = 0
        self._last_stream = _raw_stream(self.device.index)
        self._dispatch_args = structs.DispatchArgs(
            node=self.memory.node(structs.EP_OP_DISPATCH),
            counter=self.memory.counters[0].data_ptr(),
            flag_offset=self.offsets.dispatch_flags,
            credit_offset=self.offsets.dispatch_credits,
            slot_offset=self.offsets.dispatch_slots,
            max_tokens=config.max_tokens_per_rank,
            max_chunks=self.offsets.max_chunks,
            num_local_experts=self.num_local_experts,
        )
        self._combine_args = structs.CombineArgs(
            node=self.memory.node(structs.EP_OP_COMBINE),
            counter=self.memory.counters[1].data_ptr(),
            flag_offset=self.offsets.combine_flags,
            credit_offset=self.offsets.combine_credits,
            row_offset=self.offsets.combine_rows,
            weight_offset=self.offsets.combine_weights,
            max_tokens=config.max_tokens_per_rank,
            max_chunks=self.offsets.max_chunks,
            num_local_experts=self.num_local_experts,
            ranks_per_node=config.ranks_per_node or self.num_ranks,
        )
        self._plan_args = structs.PlanArgs(
            node=self.memory.node(structs.EP_OP_DISPATCH),
            scratch=self._scratch.data_ptr(),
            mailbox=self.memory.mailbox_address,
            counter=self.memory.counters[2].data_ptr(),
            flag_offset=self.offsets.plan_flags,
            credit_offset=self.offsets.dispatch_credits,
            header_offset=self.offsets.plan_headers,
            idx_offset=self.offsets.plan_idx,
            num_experts=config.num_experts,
            max_tokens=config.max_tokens_per_rank,
            hidden=config.hidden,
        )

    @property
    def buffer_bytes(self) -> int:
        return self.offsets.total + self._scratch.numel()

    def describe(self) -> str:
        return f"nvlink ({self.num_ranks} GPUs of one host, {self.num_sms} SMs)"

    @property
    def num_started(self) -> int:
        return self._dispatch_epoch + self._combine_epoch

    def destroy(self) -> None:
        self.memory.free()

    def set_num_sms(self, num_sms: int | None) -> None:
        available = torch.cuda.get_device_properties(self.device).multi_processor_count
        if num_sms is not None and not 2 <= num_sms <= available:
            raise EPArgumentError(f"num_sms must be 2 to {available}, or None, got {num_sms}")
        self.num_sms = num_sms or available

    def check_wire_dtype(self, wire_dtype: torch.dtype) -> None:
        # Bulk copies move multiples of 16 bytes, so the FP32 scales of a row must be that.
        if wire_dtype == fp8.FP8_DTYPE and self.config.hidden % 512:
            raise EPArgumentError(
                f"FP8 over NVLink needs hidden to be a multiple of 512, got {self.config.hidden}"
            )

    # --- plan ------------------------------------------------------------------------------------

    def plan(
        self,
        topk_idx: Tensor | None,
        routing_map: Tensor | None,
        layout: RowLayout,
        expert_alignment: int,
        has_weights: bool,
    ) -> NVLinkRouting:
        self.memory.check_fault()
        config = self.config
        source, num_topk = checked_source(
            topk_idx,
            routing_map,
            config.num_topk if topk_idx is None else None,
            config.num_experts,
            self.num_ranks,
        )
        num_tokens = source.shape[0]
        num_rows = self.num_ranks * config.max_tokens_per_rank
        places, total = arena_places(
            num_tokens, num_topk, num_rows, self.num_ranks, self.num_local_experts
        )
        self._dispatch_epoch += 1
        routing = NVLinkRouting(
            backend=self,
            epoch=self._dispatch_epoch,
            expert_major=layout == "expert",
            expert_alignment=expert_alignment,
            num_tokens=num_tokens,
            num_topk=num_topk,
            source=source,
            arena=torch.empty(total, dtype=torch.int32, device=self.device),
            places=places,
        )
        args = self._plan_args
        args.input = source.data_ptr()
        for name in places:
            setattr(args, name, routing.address(name))
        args.epoch = routing.epoch
        args.input_kind = INPUT_KINDS[source.dtype]
        args.num_tokens = num_tokens
        args.num_topk = num_topk
        args.num_topk4 = routing.num_topk4
        args.expert_alignment = expert_alignment
        args.expert_major = routing.expert_major
        side_stream, event = self._side_stream.cuda_stream, self._fork_event.cuda_event
        self.native.plan(args, self._stream(asynchronous=False), side_stream, event)
        return routing

    def wait_for_sizes(self, routing: NVLinkRouting) -> RoutingSizes:
        """The plan's counts, as soon as they are in the mailbox."""
        mailbox = self.memory.mailbox
        arrived = self.native.mailbox_wait(
            self.memory.mailbox_address,
            self.memory.fault_address,
            routing.epoch,
            # The kernels' own bound names the late rank; it begins when they start.
            10 * self.config.timeout_s,
            self._side_stream.cuda_stream,
        )
        self.memory.check_fault()
        if not arrived:
            raise self.memory.timeout("dispatch", "plan", (), routing.epoch)
        return RoutingSizes(
            sent=tuple(mailbox.num_sent_tokens[: self.num_ranks]),
            received=tuple(mailbox.num_recv_tokens[: self.num_ranks]),
            expert_rows=tuple(mailbox.num_tokens_per_expert[: self.num_local_experts]),
            alignment=routing.expert_alignment,
        )

    # --- dispatch --------------------------------------------------------------------------------

    def dispatch(
        self,
        handle: DispatchHandle,
        x: Tensor,
        scales: Tensor | None,
        topk_weights: Tensor | None,
        wire_dtype: torch.dtype,
        recv_dtype: torch.dtype,
        asynchronous: bool,
    ) -> Pending[Received]:
        self.memory.check_fault()
        routing: NVLinkRouting = handle.routing
        record = self.recorder.start("dispatch", self.device)
        if wire_dtype == fp8.FP8_DTYPE and scales is None:
            x, scales = fp8.quantize(x)
        weights = topk_weights
        if weights is not None and weights.shape[1] % 4:
            weights = F.pad(weights, (0, -weights.shape[1] % 4))
        elif weights is not None and weights.data_ptr() % 16:
            weights = weights.clone()
        args = self._dispatch_args
        self._describe_rows(args, routing, x, scales, weights, recv_dtype)
        is_new, routing.is_new = routing.is_new, False
        if not is_new:
            self._dispatch_epoch += 1
        args.epoch = routing.epoch if is_new else self._dispatch_epoch
        args.tag = _tag(routing.epoch, is_new, args.row_bytes, args.scale_bytes, args.weight_bytes)
        push_blocks, expand_blocks = split_dispatch(self.num_sms, self.num_ranks)
        stream = expand_stream = self._stream(asynchronous)
        args.num_push_blocks, args.num_expand_blocks = push_blocks, expand_blocks
        if is_new:
            expand_stream, event = self._side_stream.cuda_stream, self._fork_event.cuda_event
            self.native.stream_wait(expand_stream, stream, event)  # the input is ready
            if push_blocks:
                args.num_expand_blocks = 0
                self.native.launch("ep_dispatch", args, stream)
                args.num_push_blocks, args.num_expand_blocks = 0, expand_blocks
        try:
            num_rows = handle.num_rows  # waits for the plan
            received = self._allocate(num_rows, handle, topk_weights is not None, recv_dtype)
            args.recv_x = received.x.data_ptr()
            args.recv_scales = None if received.scales is None else received.scales.data_ptr()
            args.recv_weights = (
                None if received.topk_weights is None else received.topk_weights.data_ptr()
            )
            self.native.launch("ep_dispatch", args, expand_stream)
            if is_new:
                self.native.stream_wait(stream, expand_stream, event)
                raise_if_bad(
                    list(self.memory.mailbox.routing_error),
                    routing.source,
                    routing.num_topk,
                    self.config.num_experts,
                )
        except BaseException:
            self._wait_for_all_streams()  # what they still use is about to be freed
            raise
        self._finish_record(record, routing.sizes.sent, args.row_bytes + args.scale_bytes)
        return self._pending(received, asynchronous, (x, scales, weights, routing.arena))

    def _describe_rows(
        self,
        args: structs.DispatchArgs,
        routing: NVLinkRouting,
        x: Tensor,
        scales: Tensor | None,
        weights: Tensor | None,
        recv_dtype: torch.dtype,
    ) -> None:
        args.x = x.data_ptr()
        args.scales = None if scales is None else scales.data_ptr()
        args.weights = None if weights is None else weights.data_ptr()
        for name in (
            "send_slot", "recv_topk_idx", "row_of_k", "source_tokens", "expert_tokens",
            "expert_first_row",
        ):  # fmt: skip
            setattr(args, name, routing.address(name))
        args.num_tokens = routing.num_tokens
        args.num_topk = routing.num_topk
        args.num_topk4 = routing.num_topk4
        args.expert_major = routing.expert_major
        args.row_bytes = row_bytes = x.shape[1] * x.element_size()
        args.scale_bytes = 0 if scales is None else scales.shape[1] * 4
        args.weight_bytes = 0 if weights is None else args.num_topk4 * 4
        args.chunk_tokens = self.offsets.chunk_tokens(DISPATCH_CHUNK_BYTES, row_bytes)
        args.recv_kind = structs.EP_RECV_BYTES
        if scales is not None and recv_dtype != fp8.FP8_DTYPE:
            args.recv_kind = _RECV_KINDS[recv_dtype]

    def _allocate(
        self, num_rows: int, handle: DispatchHandle, has_weights: bool, recv_dtype: torch.dtype
    ) -> Received:
        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=self.device)

        hidden = self.config.hidden
        recv_scales = recv_weights = None
        if recv_dtype == fp8.FP8_DTYPE:
            recv_scales = empty(num_rows, hidden // fp8.BLOCK)
        if has_weights:
            shape = (num_rows,) if handle.layout == "expert" else (num_rows, handle.num_topk)
            recv_weights = empty(*shape)
        return Received(empty(num_rows, hidden, dtype=recv_dtype), recv_scales, recv_weights)

    # --- combine ---------------------------------------------------------------------------------

    def combine(
        self,
        handle: DispatchHandle,
        x: Tensor,
        topk_weights: Tensor | None,
        asynchronous: bool,
    ) -> Pending[Combined]:
        self.memory.check_fault()
        routing: NVLinkRouting = handle.routing
        record = self.recorder.start("combine", self.device)
        self._combine_epoch += 1
        num_tokens, hidden = routing.num_tokens, x.shape[1]
        combined = torch.empty(num_tokens, hidden, dtype=x.dtype, device=self.device)
        weights = None
        if topk_weights is not None:
            weights = topk_weights.new_empty(num_tokens, routing.num_topk)
        args = self._combine_args
        args.x = x.data_ptr()
        args.weights = None if topk_weights is None else topk_weights.data_ptr()
        for name in (
            "topk_idx", "send_slot", "recv_topk_idx", "row_of_k", "rows_ascending", "num_recv",
        ):  # fmt: skip
            setattr(args, name, routing.address(name))
        args.combined_x = combined.data_ptr()
        args.combined_weights = None if weights is None else weights.data_ptr()
        args.epoch = self._combine_epoch
        args.tag = _tag(routing.epoch, hidden * x.element_size(), weights is not None)
        args.num_tokens = num_tokens
        args.num_topk = routing.num_topk
        args.num_topk4 = routing.num_topk4
        args.row_bytes = row_bytes = hidden * x.element_size()
        args.chunk_rows = self.offsets.chunk_tokens(COMBINE_CHUNK_BYTES, row_bytes)
        args.chunks_per_unit = combine_chunks_per_unit(self.num_sms, args.chunk_rows, row_bytes)
        args.dtype = structs.EP_BF16 if x.dtype == torch.bfloat16 else structs.EP_FP32
        args.expert_major = routing.expert_major
        blocks_per_sm = self.native.combine_blocks_per_sm(row_bytes)
        push_sms, sum_sms = split_combine(self.num_sms)
        args.num_push_blocks = push_sms * blocks_per_sm
        args.num_sum_blocks = sum_sms * blocks_per_sm
        self.native.launch("ep_combine", args, self._stream(asynchronous))
        self._finish_record(record, routing.sizes.received, row_bytes)
        keep = (x, topk_weights, routing.arena)
        return self._pending(Combined(combined, weights), asynchronous, keep)

    # --- streams ---------------------------------------------------------------------------------

    def _stream(self, asynchronous: bool) -> int:
        """The stream of the next operation, ordered behind the last one and the caller's."""
        if torch.cuda.is_current_stream_capturing():
            raise EPUnsupportedError("CUDA graph capture of dispatch and combine is not supported")
        current = _raw_stream(self.device.index)
        stream = self._comm_stream.cuda_stream if asynchronous else current
        if stream != current:
            self.native.stream_wait(stream, current, self._fork_event.cuda_event)
        if self._last_stream not in (stream, current):
            self.native.stream_wait(stream, self._last_stream, self._fork_event.cuda_event)
        self._last_stream = stream
        return stream

    def _wait_for_all_streams(self) -> None:
        current = _raw_stream(self.device.index)
        for stream in (self._side_stream, self._comm_stream):
            self.native.stream_wait(current, stream.cuda_stream, self._fork_event.cuda_event)

    def _pending(self, result, asynchronous: bool, keep: tuple) -> Pending:
        """`keep` is what the kernels read: held until the caller's stream has waited."""
        if not asynchronous:
            return Pending(result, EventOverlap())
        return Pending(result, EventOverlap(self._comm_stream.record_event(), keep))

    def _finish_record(self, record: OpRecord, rows: tuple[int, ...], row_bytes: int) -> None:
        record.rows_to_rank = rows
        record.wire_bytes_to_rank = tuple(
            0 if r == self.rank else count * row_bytes for r, count in enumerate(rows)
        )
        self.recorder.finish(record)
