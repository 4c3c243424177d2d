"""The reference backend: the numerics contract in plain torch over torch.distributed.

It runs on any group that torch.distributed has (gloo on CPU, NCCL on GPU), for any number of
ranks. Every kernel of this project is compared with it bit by bit, so it is written to be
obviously right before fast; what goes over the wire is nevertheless what the fast backends send:
one copy of a token per destination rank, and one partial sum back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from ep_comm import fp8
from ep_comm.backends.base import Combined, Pending, Received
from ep_comm.backends.reference.headers import exchange_headers
from ep_comm.backends.reference.messages import Exchange, Operation, Transport
from ep_comm.backends.reference.rows import (
    collapse_weights,
    expand,
    expert_rows,
    fit,
    fit_received,
    sum_expert_rows,
    sum_in_order,
    to_bytes,
    unpack,
)
from ep_comm.config import EPConfig
from ep_comm.errors import EPArgumentError, EPMismatchError, EPOverflowError
from ep_comm.handle import DispatchHandle, RoutingSizes, RowLayout
from ep_comm.job.meeting import Meeting
from ep_comm.routing.layout import index_dtype, layout_of
from ep_comm.telemetry.records import OpRecord, Recorder
from ep_comm.telemetry.watch import Wait


@dataclass(frozen=True, kw_only=True)
class ReferenceRouting:
    """See `ep_comm.handle.Routing`.

    Attributes:
        epoch: Operation that exchanged the routing; tells handles of different dispatches apart.
        sent_tokens: For each rank r, the tokens [n_r] int64 that went there, ascending.
        expert_row_NK: [N, K] int64, for each received row its rows in the expert-major output,
            in the order of ``recv_topk_idx``; -1 where the expert is not local, or the output has
            no such row.
    """

    topk_idx: Tensor
    sizes: RoutingSizes
    recv_topk_idx: Tensor | None
    epoch: int
    sent_tokens: tuple[Tensor, ...]
    expert_row_NK: Tensor
    capacity: int | None

    @property
    def num_tokens(self) -> int:
        return self.topk_idx.shape[0]

    @property
    def num_topk(self) -> int:
        return self.topk_idx.shape[1]

    @property
    def num_bytes(self) -> int:
        tensors = [self.topk_idx, self.expert_row_NK, *self.sent_tokens]
        if self.recv_topk_idx is not None:
            tensors.append(self.recv_topk_idx)
        return sum(tensor.nbytes for tensor in tensors)

    @property
    def device_tokens_per_expert(self) -> Tensor:
        offsets = self.device_expert_offsets
        tokens = torch.tensor(self.sizes.expert_rows, dtype=torch.int32, device=offsets.device)
        return torch.minimum(tokens, offsets.diff()) if self.capacity is not None else tokens

    @property
    def device_expert_offsets(self) -> Tensor:
        ends = torch.tensor((0, *self.sizes.padded_expert_rows)).cumsum(0)
        if self.capacity is not None:
            ends = ends.clamp(max=self.capacity)
        return ends.to(self.topk_idx.device, torch.int32)


class ReferenceBackend:
    """See `ep_comm.backends.base.Backend`, whose methods these are."""

    name = "reference"

    @classmethod
    def facts(cls, group: dist.ProcessGroup, config: EPConfig) -> None:
        return None

    @classmethod
    def unavailable_reason(cls, facts: list) -> str | None:
        return None

    @classmethod
    def create(
        cls, group: dist.ProcessGroup, config: EPConfig, meeting: Meeting
    ) -> ReferenceBackend:
        return cls(group, config, meeting.number)

    def __init__(self, group: dist.ProcessGroup, config: EPConfig, number: int) -> None:
        self.config = config
        self.number = number
        self.recorder = Recorder()
        self.transport = Transport(group, config.timeout_s)
        self._exchange_headers = partial(exchange_headers, self.transport, config, number)
        self.num_local_experts = config.num_experts // self.transport.num_ranks
        self._overflow: EPOverflowError | None = None

    @property
    def buffer_bytes(self) -> int:
        return 0

    @property
    def num_started(self) -> int:
        return self.recorder.num_operations

    def describe(self) -> str:
        return f"reference over {'/'.join(sorted(set(self.transport.backends.values())))}"

    def waits(self) -> list[Wait]:
        return self.transport.waits()

    @property
    def has_failed(self) -> bool:
        return False  # the error itself says so

    def synchronize(self) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        self._say_overflow()

    def keep_for_comm_stream(self, tensors: Iterable[Tensor | None]) -> None:
        pass

    def give_up(self) -> None:
        pass

    def abandon(self) -> None:
        pass

    def destroy(self) -> None:
        pass

    def set_num_sms(self, num_sms: int | None) -> None:
        pass

    def check_device(self, name: str, rows: Tensor) -> None:
        if rows.device.type not in self.transport.device_types:
            raise EPArgumentError(
                f"{name} is on {rows.device}, but the buffer's group moves tensors on "
                f"{' or '.join(self.transport.device_types)}"
            )

    def check_wire_dtype(self, wire_dtype: torch.dtype, recv_dtype: torch.dtype) -> None:
        pass

    # --- routing -------------------------------------------------------------------------------

    def plan(
        self,
        source: Tensor,
        num_topk: int,
        layout: RowLayout,
        expert_alignment: int,
        has_weights: bool,
        capacity: int | None,
        asynchronous: bool,
        num_sms: int | None,
    ) -> ReferenceRouting:
        self._say_overflow()
        routing = layout_of(source, num_topk, self.config.num_experts, self.transport.num_ranks)
        device = routing.topk_idx.device
        record = self.recorder.start("plan", device)
        ranks = range(self.transport.num_ranks)
        sent_tokens = tuple(routing.is_token_in_rank[:, r].nonzero(as_tuple=True)[0] for r in ranks)
        rows_to_rank = tuple(len(tokens) for tokens in sent_tokens)
        recv_rows = self._exchange_headers(
            record,
            rows_to_rank,
            num_tokens=len(routing.topk_idx),
            num_topk=routing.topk_idx.shape[1],
            has_weights=has_weights,
            layout=layout,
            expert_alignment=expert_alignment,
        )

        owner_TK = self._owner(routing.topk_idx)
        local_TK = routing.topk_idx % self.num_local_experts  # of dropped entries: never selected
        send = [
            torch.where(owner_TK[tokens] == r, local_TK[tokens], -1).to(torch.int32)
            for r, tokens in enumerate(sent_tokens)
        ]
        recv_topk_idx = routing.topk_idx.new_empty(sum(recv_rows), routing.topk_idx.shape[1])
        self._send_rows(record, send, recv_topk_idx, recv_rows, "routing").wait()
        self._check_received(recv_topk_idx)

        counts, expert_row_NK = expert_rows(recv_topk_idx, self.num_local_experts, expert_alignment)
        if capacity is not None:
            expert_row_NK = torch.where(expert_row_NK < capacity, expert_row_NK, -1)
            recv_topk_idx = fit(recv_topk_idx, capacity, -1)
        record.rows_to_rank = rows_to_rank
        self.recorder.finish(record)
        return ReferenceRouting(
            topk_idx=routing.topk_idx,
            sizes=RoutingSizes(rows_to_rank, recv_rows, counts, expert_alignment),
            recv_topk_idx=recv_topk_idx.to(index_dtype(source)) if layout == "rank" else None,
            epoch=record.epoch,
            sent_tokens=sent_tokens,
            expert_row_NK=expert_row_NK,
            capacity=capacity,
        )

    # --- dispatch ------------------------------------------------------------------------------

    def dispatch(
        self,
        handle: DispatchHandle,
        x: Tensor,
        scales: Tensor | None,
        topk_weights: Tensor | None,
        wire_dtype: torch.dtype,
        recv_dtype: torch.dtype,
        asynchronous: bool,
        num_sms: int | None,
    ) -> Pending[Received]:
        self._say_overflow()
        routing: ReferenceRouting = handle.routing
        record = self.recorder.start("dispatch", x.device)
        self._exchange_headers(
            record,
            tuple(len(tokens) for tokens in routing.sent_tokens),
            routing_epoch=routing.epoch,
            dtype=wire_dtype,
            has_weights=topk_weights is not None,
        )
        if wire_dtype == fp8.FP8_DTYPE and scales is None:
            x, scales = fp8.quantize(x)
        rows = to_bytes(x) if scales is None else torch.cat([to_bytes(x), to_bytes(scales)], 1)
        send = [rows[tokens] for tokens in routing.sent_tokens]
        recv = rows.new_empty(handle.num_recv_tokens, rows.shape[1])
        exchanges = [self._send_rows(record, send, recv, handle.num_recv_tokens_per_rank, "rows")]
        self._record_payload(record, send)

        recv_weights = None
        if topk_weights is not None:
            owner_TK = self._owner(handle.topk_idx)
            send_weights = [
                torch.where(owner_TK[tokens] == r, topk_weights[tokens], 0.0)
                for r, tokens in enumerate(routing.sent_tokens)
            ]
            recv_weights = topk_weights.new_empty(handle.num_recv_tokens, handle.num_topk)
            exchanges.append(
                self._send_rows(
                    record, send_weights, recv_weights, handle.num_recv_tokens_per_rank, "weights"
                )
            )

        def finish() -> Received:
            for exchange in exchanges:
                exchange.wait()
            received = unpack(recv, self.config.hidden, wire_dtype, recv_dtype)
            received = received._replace(topk_weights=recv_weights)
            if handle.layout == "expert":
                received = expand(received, handle)
            elif routing.capacity is not None:
                received = fit_received(received, routing.capacity)
            self._note_overflow(handle)
            self.recorder.finish(record)
            return received

        return Pending(finish=finish)

    # --- combine -------------------------------------------------------------------------------

    def combine(
        self,
        handle: DispatchHandle,
        x: Tensor,
        topk_weights: Tensor | None,
        asynchronous: bool,
        num_sms: int | None,
    ) -> Pending[Combined]:
        self._say_overflow()
        routing: ReferenceRouting = handle.routing
        record = self.recorder.start("combine", x.device)
        sent_rows = [len(tokens) for tokens in routing.sent_tokens]  # and as many come back
        self._exchange_headers(
            record,
            handle.num_recv_tokens_per_rank,
            routing_epoch=routing.epoch,
            dtype=x.dtype,
            has_weights=topk_weights is not None,
        )
        if handle.layout == "expert":
            x = sum_expert_rows(x, handle)
            if topk_weights is not None:
                topk_weights = collapse_weights(topk_weights, routing.expert_row_NK)
        elif routing.capacity is not None:
            x = fit(x, handle.num_recv_tokens)
            if topk_weights is not None:
                topk_weights = fit(topk_weights, handle.num_recv_tokens)
        recv_rows = handle.num_recv_tokens_per_rank
        send = to_bytes(x).split(recv_rows)
        recv = x.new_empty(sum(sent_rows), x.shape[1])
        exchanges = [self._send_rows(record, send, to_bytes(recv), sent_rows, "rows")]
        self._record_payload(record, send)

        recv_weights = None
        if topk_weights is not None:
            send_weights = topk_weights.split(recv_rows)
            recv_weights = topk_weights.new_empty(sum(sent_rows), topk_weights.shape[1])
            exchanges.append(
                self._send_rows(record, send_weights, recv_weights, sent_rows, "weights")
            )

        def finish() -> Combined:
            for exchange in exchanges:
                exchange.wait()
            combined = self._sum_over_ranks(handle, recv.split(sent_rows))
            scattered = None
            if recv_weights is not None:
                scattered = self._scatter_weights(handle, recv_weights.split(sent_rows))
            self.recorder.finish(record)
            return Combined(combined, scattered)

        return Pending(finish=finish)

    def _sum_over_ranks(self, handle: DispatchHandle, partials: tuple[Tensor, ...]) -> Tensor:
        """Levels 2 and 3 of combine: over a node's ranks, rounded, then over nodes, rounded."""
        num_ranks = self.transport.num_ranks
        ranks_per_node = self.config.ranks_per_node or num_ranks
        sent_tokens = handle.routing.sent_tokens
        node_sums = []
        for first in range(0, num_ranks, ranks_per_node):
            node = slice(first, first + ranks_per_node)
            total, present = sum_in_order(
                handle.num_tokens, zip(sent_tokens[node], partials[node], strict=True)
            )
            tokens = present.nonzero(as_tuple=True)[0]
            node_sums.append((tokens, total[tokens].to(partials[0].dtype)))
        if len(node_sums) == 1:
            return total.to(partials[0].dtype)
        return sum_in_order(handle.num_tokens, node_sums)[0].to(partials[0].dtype)

    def _scatter_weights(self, handle: DispatchHandle, received: tuple[Tensor, ...]) -> Tensor:
        """Each entry [T, K] from the rank that owns its expert; dropped entries stay 0."""
        owner_TK = self._owner(handle.topk_idx)
        out = received[0].new_zeros(handle.topk_idx.shape)
        for r, (tokens, rows) in enumerate(zip(handle.routing.sent_tokens, received, strict=True)):
            out[tokens] = torch.where(owner_TK[tokens] == r, rows, out[tokens])
        return out

    def _note_overflow(self, handle: DispatchHandle) -> None:
        """As on a GPU: a dispatch that drops rows says so at the next call."""
        capacity, sizes = handle.routing.capacity, handle.routing.sizes
        needed = sizes.num_received if handle.layout == "rank" else sizes.num_expert_rows
        if capacity is not None and needed > capacity:
            self._overflow = EPOverflowError(num_rows=needed, capacity=capacity)

    def _say_overflow(self) -> None:
        overflow, self._overflow = self._overflow, None
        if overflow is not None:
            raise overflow

    def _check_received(self, recv_topk_idx: Tensor) -> None:
        """What a peer sent is used as an index."""
        if not recv_topk_idx.numel():
            return
        lowest, highest = (int(value) for value in recv_topk_idx.aminmax())
        if lowest < -1 or highest >= self.num_local_experts:
            raise EPMismatchError(
                f"rank {self.transport.rank} received tokens for local expert "
                f"{lowest if lowest < -1 else highest}, and has {self.num_local_experts}"
            )

    # --- messages ------------------------------------------------------------------------------

    def _owner(self, topk_idx: Tensor) -> Tensor:
        """Rank that owns each selected expert; -1 for dropped entries."""
        return torch.div(topk_idx, self.num_local_experts, rounding_mode="floor")

    def _send_rows(
        self,
        record: OpRecord,
        send: Iterable[Tensor],
        recv: Tensor,
        recv_rows: Sequence[int],
        phase: str,
    ) -> Exchange:
        """Send ``send[r]`` to rank r; `recv` takes the rows of all ranks, in rank order."""
        return self.transport.exchange(
            [tensor.contiguous() for tensor in send],
            recv,
            recv_rows,
            Operation(record.op, record.epoch, self.number),
            phase,
        )

    def _record_payload(self, record: OpRecord, send: Iterable[Tensor]) -> None:
        rank = self.transport.rank
        send = list(send)
        record.rows_to_rank = tuple(len(rows) for rows in send)
        record.wire_bytes_to_rank = tuple(
            0 if r == rank else rows.numel() for r, rows in enumerate(send)
        )
