"""The NVLink backend: our kernels between the GPUs of one host.

A rank writes into the others' memory (torch symmetric memory); nothing is read across NVLink. Two
streams serve a buffer: one pushes the rows of a new dispatch, the other does everything else. The
host waits once in a new dispatch, for the counts that the outputs are allocated by, while the rows
are already on their way (csrc/plan.cu, dispatch.cu, combine.cu).
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ep_comm import _native, fp8
from ep_comm._native import structs
from ep_comm.backends.base import Combined, Pending, Received
from ep_comm.backends.nvlink_memory import NodeMemory, Offsets
from ep_comm.config import EPConfig
from ep_comm.errors import EPArgumentError
from ep_comm.handle import DispatchHandle, RoutingSizes, RowLayout
from ep_comm.layout import checked_source, launch_layout, raise_if_bad
from ep_comm.records import OpRecord, Recorder

_RECV_KINDS = {torch.bfloat16: structs.EP_RECV_BF16, torch.float32: structs.EP_RECV_FP32}
_CHUNK_BYTES = 96 * 1024
_COMBINE_CHUNK_BYTES = 64 * 1024


@dataclass(kw_only=True, eq=False)
class NVLinkRouting:
    """See `ep_comm.handle.Routing`. S = max_tokens_per_rank; received rows stand at
    ``source * S + slot`` of ``N = num_ranks * S``.

    Attributes:
        send_slot: [T, R] int32.
        recv_idx: [N, K] int32, local experts of received rows, -1 elsewhere.
        row_of_k, rows_ascending: [N, K4] int32, output rows of a received row; -1 elsewhere.
        num_recv, source_tokens: [R] int32.
        expert_counts: [E_local] int32.
        expert_first_row: [E_local + 1] int32.
    """

    backend: NVLinkBackend
    epoch: int
    layout: RowLayout
    expert_alignment: int
    source: Tensor
    topk_idx: Tensor
    send_slot: Tensor
    recv_idx: Tensor
    row_of_k: Tensor
    rows_ascending: Tensor
    num_recv: Tensor
    source_tokens: Tensor
    expert_counts: Tensor
    expert_first_row: Tensor
    keep: tuple
    pushed: bool = False

    @cached_property
    def sizes(self) -> RoutingSizes:
        return self.backend.wait_for_sizes(self)

    @cached_property
    def recv_topk_idx(self) -> Tensor:
        max_tokens = self.backend.config.max_tokens_per_rank
        return torch.cat(
            [
                self.recv_idx[r * max_tokens : r * max_tokens + rows]
                for r, rows in enumerate(self.sizes.received)
            ]
        )


class NVLinkBackend:
    """See `ep_comm.backends.base.Backend`, whose methods these are."""

    name = "nvlink"

    @classmethod
    def unavailable_reason(cls, group: dist.ProcessGroup, config: EPConfig) -> str | None:
        if "cuda:nccl" not in dist.get_backend_config(group):
            return f"the group has no NCCL backend ({dist.get_backend_config(group)})"
        mine = (socket.gethostname(), cls._reason_here(dist.get_world_size(group), config))
        answers: list = [None] * dist.get_world_size(group)
        dist.all_gather_object(answers, mine, group=group)
        hosts = {host for host, _ in answers}
        if len(hosts) > 1:
            return f"the group spans {len(hosts)} hosts"
        for rank, (_, reason) in enumerate(answers):
            if reason is not None:
                return f"rank {rank}: {reason}"
        return None

    @classmethod
    def _reason_here(cls, num_ranks: int, config: EPConfig) -> str | None:
        if _native.load() is None:
            return _native.status()
        if num_ranks > structs.EP_MAX_NODE_RANKS:
            return f"{num_ranks} ranks, at most {structs.EP_MAX_NODE_RANKS} of one host"
        row_bytes = config.hidden * config.dtype.itemsize
        if row_bytes % 16:
            return f"rows of {row_bytes} bytes are not a multiple of 16"
        if config.num_experts // num_ranks > 1024:
            return f"{config.num_experts // num_ranks} experts a rank, at most 1024"
        return None

    def __init__(self, group: dist.ProcessGroup, config: EPConfig) -> None:
        self.config = config
        self.recorder = Recorder()
        self.rank = dist.get_rank(group)
        self.num_ranks = dist.get_world_size(group)
        self.num_local_experts = config.num_experts // self.num_ranks
        self.native = _native.load()
        self.native.load_kernels()
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.offsets = Offsets(config, self.num_ranks)
        self.memory = NodeMemory(group, self.offsets.total, config.timeout_s)
        self.push_stream = torch.cuda.Stream(priority=-1)
        self.stream = torch.cuda.Stream(priority=-1)
        self.num_sms = torch.cuda.get_device_properties(self.device).multi_processor_count
        self._dispatch_epoch = 0
        self._combine_epoch = 0

    @property
    def buffer_bytes(self) -> int:
        return self.offsets.total

    def describe(self) -> str:
        return f"nvlink ({self.num_ranks} GPUs of one host, {self.num_sms} SMs)"

    def destroy(self) -> None:
        self.memory.free()

    # --- plan ------------------------------------------------------------------------------------

    def plan(
        self,
        topk_idx: Tensor | None,
        routing_map: Tensor | None,
        layout: RowLayout,
        expert_alignment: int,
        has_weights: bool,
    ) -> NVLinkRouting:
        self.memory.check_fault("dispatch")
        config = self.config
        source, num_topk = checked_source(
            topk_idx, routing_map, config.num_topk if topk_idx is None else None,
            config.num_experts, self.num_ranks,
        )  # fmt: skip
        self._dispatch_epoch += 1
        epoch = self._dispatch_epoch
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            sent, error = launch_layout(
                self.native, source, num_topk, config.num_experts, self.num_ranks
            )
            self._layout_done = self.stream.record_event()
            num_rows = self.num_ranks * config.max_tokens_per_rank
            num_topk4 = -(-num_topk // 4) * 4

            def ints(*shape: int) -> Tensor:
                return torch.empty(shape, dtype=torch.int32, device=self.device)

            recv_idx = ints(num_rows, num_topk)
            num_recv, source_tokens = ints(self.num_ranks), ints(self.num_ranks)
            signature = (
                num_topk,
                config.hidden,
                config.num_experts,
                int(layout == "expert"),
                expert_alignment,
            )
            args = structs.PlanArgs(
                node=self.memory.node,
                topk_idx=sent.topk_idx.data_ptr(),
                send_slot=sent.send_slot.data_ptr(),
                num_sent=sent.num_tokens_per_rank.data_ptr(),
                routing_error=error.data_ptr(),
                recv_topk_idx=recv_idx.data_ptr(),
                num_recv=num_recv.data_ptr(),
                source_tokens=source_tokens.data_ptr(),
                counter=self.memory.counters[0].data_ptr(),
                flag_offset=self.offsets.plan_flags,
                credit_offset=self.offsets.dispatch_credits,
                header_offset=self.offsets.plan_headers,
                idx_offset=self.offsets.plan_idx,
                signature=(structs._INT32 * structs.EP_SIGNATURE_FIELDS)(*signature),
                epoch=epoch,
                num_tokens=source.shape[0],
                num_topk=num_topk,
                num_experts=config.num_experts,
                max_tokens=config.max_tokens_per_rank,
            )
            self.native.launch("ep_plan_exchange", args, self.stream.cuda_stream)
            # Each local expert taken for a rank: the slot is the row's place in the expert's group.
            placed, _ = launch_layout(
                self.native, recv_idx, num_topk, self.num_local_experts, self.num_local_experts
            )
            row_of_k, rows_ascending = ints(num_rows, num_topk4), ints(num_rows, num_topk4)
            expert_first_row = ints(self.num_local_experts + 1)
            rows = structs.RowsArgs(
                recv_topk_idx=recv_idx.data_ptr(),
                expert_slot=placed.send_slot.data_ptr(),
                num_tokens_per_expert=placed.num_tokens_per_expert.data_ptr(),
                num_sent=sent.num_tokens_per_rank.data_ptr(),
                num_recv=num_recv.data_ptr(),
                routing_error=error.data_ptr(),
                row_of_k=row_of_k.data_ptr(),
                rows_ascending=rows_ascending.data_ptr(),
                expert_first_row=expert_first_row.data_ptr(),
                mailbox=self.memory.mailbox_address,
                epoch=epoch,
                num_ranks=self.num_ranks,
                max_tokens=config.max_tokens_per_rank,
                num_topk=num_topk,
                num_topk4=num_topk4,
                num_local_experts=self.num_local_experts,
                expert_alignment=expert_alignment,
                expert_major=layout == "expert",
            )
            self.native.launch("ep_plan_rows", rows, self.stream.cuda_stream)
        return NVLinkRouting(
            backend=self,
            epoch=epoch,
            layout=layout,
            expert_alignment=expert_alignment,
            source=source,
            topk_idx=sent.topk_idx,
            send_slot=sent.send_slot,
            recv_idx=recv_idx,
            row_of_k=row_of_k,
            rows_ascending=rows_ascending,
            num_recv=num_recv,
            source_tokens=source_tokens,
            expert_counts=placed.num_tokens_per_expert,
            expert_first_row=expert_first_row,
            keep=(error, sent.num_tokens_per_rank, placed.send_slot),
        )

    def wait_for_sizes(self, routing: NVLinkRouting) -> RoutingSizes:
        """The plan's counts, as soon as they are in the mailbox."""
        mailbox = self.memory.mailbox
        arrived = self.native.mailbox_wait(
            self.memory.mailbox_address,
            self.memory.fault_address,
            routing.epoch,
            self.config.timeout_s + 1,  # a rank that is late is found by the kernels first
            self.stream.cuda_stream,
        )
        self.memory.check_fault("dispatch")
        if not arrived:
            raise self.memory.timeout("dispatch", "plan", (), routing.epoch)
        counts = torch.tensor(
            mailbox.num_tokens_per_expert[: self.num_local_experts], dtype=torch.int64
        )
        alignment = routing.expert_alignment
        self._routing_error = list(mailbox.routing_error)
        return RoutingSizes(
            sent=tuple(mailbox.num_sent_tokens[: self.num_ranks]),
            received=tuple(mailbox.num_recv_tokens[: self.num_ranks]),
            tokens_per_expert=counts,
            padded_tokens_per_expert=(counts + alignment - 1) // alignment * alignment,
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
    ) -> Pending[Received]:
        self.memory.check_fault("dispatch")
        routing: NVLinkRouting = handle.routing
        record = self.recorder.start("dispatch", self.device)
        is_new = not routing.pushed
        routing.pushed = True
        if not is_new:
            self._dispatch_epoch += 1
        if wire_dtype == fp8.FP8_DTYPE and scales is None:
            x, scales = fp8.quantize(x)
        weights = topk_weights
        if weights is not None and weights.shape[1] % 4:
            weights = F.pad(weights, (0, -weights.shape[1] % 4))
        args = self._dispatch_args(routing, x, scales, weights, recv_dtype)
        push_blocks = max(2, min(24, self.num_sms // 3))
        expand_blocks = max(1, self.num_sms - push_blocks)
        if is_new:
            self.push_stream.wait_event(self._layout_done)
            self.push_stream.wait_stream(torch.cuda.current_stream())
            args.num_push_blocks, args.num_expand_blocks = push_blocks, 0
            if self.num_ranks > 1:
                self.native.launch("ep_dispatch", args, self.push_stream.cuda_stream)
            args.num_push_blocks = 0
        else:
            args.num_push_blocks = push_blocks if self.num_ranks > 1 else 0
        num_rows = handle.num_rows  # waits for the plan
        received = self._allocate(num_rows, handle, scales, topk_weights, wire_dtype, recv_dtype)
        args.num_expand_blocks = expand_blocks
        args.recv_x = received.x.data_ptr()
        args.recv_scales = None if received.scales is None else received.scales.data_ptr()
        args.recv_weights = (
            None if received.topk_weights is None else received.topk_weights.data_ptr()
        )
        self.stream.wait_stream(torch.cuda.current_stream())
        self.native.launch("ep_dispatch", args, self.stream.cuda_stream)
        if is_new:
            self.stream.wait_stream(self.push_stream)
        done = self.stream.record_event()
        slot_bytes = args.row_bytes + args.scale_bytes
        self._record_rows(record, routing.sizes.sent, slot_bytes)
        keep = [x, scales, weights]  # the kernels read them until `done`

        def finish() -> Received:
            torch.cuda.current_stream().wait_event(done)
            self.recorder.finish(record)
            keep.clear()
            if is_new:
                raise_if_bad(
                    self._routing_error, routing.source, handle.num_topk, self.config.num_experts
                )
            return received

        return Pending(finish)

    def _dispatch_args(
        self,
        routing: NVLinkRouting,
        x: Tensor,
        scales: Tensor | None,
        weights: Tensor | None,
        recv_dtype: torch.dtype,
    ) -> structs.DispatchArgs:
        num_topk = routing.topk_idx.shape[1]
        row_bytes = x.shape[1] * x.element_size()
        scale_bytes = 0 if scales is None else scales.shape[1] * 4
        if scale_bytes % 16:
            raise EPArgumentError(
                f"FP8 over NVLink needs hidden to be a multiple of 512, got {x.shape[1]}"
            )
        kind = structs.EP_RECV_BYTES
        if scales is not None and recv_dtype != fp8.FP8_DTYPE:
            kind = _RECV_KINDS[recv_dtype]
        offsets = self.offsets
        return structs.DispatchArgs(
            node=self.memory.node,
            x=x.data_ptr(),
            scales=None if scales is None else scales.data_ptr(),
            weights=None if weights is None else weights.data_ptr(),
            send_slot=routing.send_slot.data_ptr(),
            recv_topk_idx=routing.recv_idx.data_ptr(),
            row_of_k=routing.row_of_k.data_ptr(),
            source_tokens=routing.source_tokens.data_ptr(),
            num_tokens_per_expert=routing.expert_counts.data_ptr(),
            expert_first_row=routing.expert_first_row.data_ptr(),
            counter=self.memory.counters[1].data_ptr(),
            flag_offset=offsets.dispatch_flags,
            credit_offset=offsets.dispatch_credits,
            slot_offset=offsets.dispatch_slots,
            epoch=self._dispatch_epoch,
            num_tokens=x.shape[0],
            num_topk=num_topk,
            num_topk4=routing.row_of_k.shape[1],
            max_tokens=self.config.max_tokens_per_rank,
            max_chunks=offsets.max_chunks,
            chunk_tokens=offsets.chunk_tokens(_CHUNK_BYTES, row_bytes),
            row_bytes=row_bytes,
            scale_bytes=scale_bytes,
            weight_bytes=0 if weights is None else weights.shape[1] * 4,
            num_local_experts=self.num_local_experts,
            expert_major=routing.layout == "expert",
            recv_kind=kind,
        )

    def _allocate(
        self,
        num_rows: int,
        handle: DispatchHandle,
        scales: Tensor | None,
        topk_weights: Tensor | None,
        wire_dtype: torch.dtype,
        recv_dtype: torch.dtype,
    ) -> Received:
        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=self.device)

        hidden = self.config.hidden
        recv_scales = recv_weights = None
        if recv_dtype == fp8.FP8_DTYPE:
            recv_scales = empty(num_rows, hidden // fp8.BLOCK)
        if topk_weights is not None:
            shape = (num_rows,) if handle.layout == "expert" else (num_rows, handle.num_topk)
            recv_weights = empty(*shape)
        return Received(empty(num_rows, hidden, dtype=recv_dtype), recv_scales, recv_weights)

    # --- combine ---------------------------------------------------------------------------------

    def combine(
        self, handle: DispatchHandle, x: Tensor, topk_weights: Tensor | None
    ) -> Pending[Combined]:
        self.memory.check_fault("combine")
        routing: NVLinkRouting = handle.routing
        record = self.recorder.start("combine", self.device)
        self._combine_epoch += 1
        row_bytes = x.shape[1] * x.element_size()
        combined = torch.empty(handle.num_tokens, x.shape[1], dtype=x.dtype, device=self.device)
        weights = None
        if topk_weights is not None:
            weights = topk_weights.new_empty(handle.num_tokens, handle.num_topk)
        offsets = self.offsets
        push_sms = max(1, self.num_sms * 96 // 132)
        blocks_per_sm = self.native.combine_blocks_per_sm(row_bytes)
        args = structs.CombineArgs(
            node=self.memory.node,
            x=x.data_ptr(),
            weights=None if topk_weights is None else topk_weights.data_ptr(),
            topk_idx=routing.topk_idx.data_ptr(),
            send_slot=routing.send_slot.data_ptr(),
            recv_topk_idx=routing.recv_idx.data_ptr(),
            row_of_k=routing.row_of_k.data_ptr(),
            rows_ascending=routing.rows_ascending.data_ptr(),
            num_recv=routing.num_recv.data_ptr(),
            combined_x=combined.data_ptr(),
            combined_weights=None if weights is None else weights.data_ptr(),
            counter=self.memory.counters[2].data_ptr(),
            flag_offset=offsets.combine_flags,
            credit_offset=offsets.combine_credits,
            row_offset=offsets.combine_rows,
            weight_offset=offsets.combine_weights,
            epoch=self._combine_epoch,
            num_tokens=handle.num_tokens,
            num_topk=handle.num_topk,
            num_topk4=routing.row_of_k.shape[1],
            max_tokens=self.config.max_tokens_per_rank,
            max_chunks=offsets.max_chunks,
            chunk_rows=offsets.chunk_tokens(_COMBINE_CHUNK_BYTES, row_bytes),
            row_bytes=row_bytes,
            dtype=structs.EP_BF16 if x.dtype == torch.bfloat16 else structs.EP_FP32,
            num_local_experts=self.num_local_experts,
            ranks_per_node=self.config.ranks_per_node or self.num_ranks,
            expert_major=routing.layout == "expert",
            num_push_blocks=push_sms * blocks_per_sm,
            num_sum_blocks=max(1, self.num_sms - push_sms) * blocks_per_sm,
        )
        self.stream.wait_stream(torch.cuda.current_stream())
        self.native.launch("ep_combine", args, self.stream.cuda_stream)
        done = self.stream.record_event()
        self._record_rows(record, handle.num_recv_tokens_per_rank, row_bytes)
        keep = [x, topk_weights]

        def finish() -> Combined:
            torch.cuda.current_stream().wait_event(done)
            self.recorder.finish(record)
            keep.clear()
            return Combined(combined, weights)

        return Pending(finish)

    def _record_rows(self, record: OpRecord, rows: tuple[int, ...], row_bytes: int) -> None:
        record.rows_to_rank = rows
        record.wire_bytes_to_rank = tuple(
            0 if r == self.rank else count * row_bytes for r, count in enumerate(rows)
        )
