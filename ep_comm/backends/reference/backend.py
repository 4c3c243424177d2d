"""The reference backend: the numerics contract in plain torch over torch.distributed.

It runs on any group that torch.distributed has (gloo on CPU, NCCL on GPU), for any number of
ranks. Every kernel of this project is compared with it bit by bit, so it is written to be
obviously right before fast; what goes over the wire is nevertheless what the fast backends send:
one copy of a token per destination rank, and one partial sum back.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from ep_comm import fp8
from ep_comm.backends.base import NEEDS_COPY_ENGINES
from ep_comm.backends.reference.low_latency import ReferenceLowLatency
from ep_comm.backends.reference.messages import Transport
from ep_comm.backends.reference.operations import Operations
from ep_comm.backends.reference.routing import ReferenceRouting
from ep_comm.backends.reference.rows import (
    collapse_weights,
    count_drops,
    expand,
    expert_rows,
    fit,
    fit_received,
    sum_expert_rows,
    sum_in_order,
    to_bytes,
    tokens_to_ranks,
    unpack,
)
from ep_comm.backends.requests import (
    Combined,
    CombineRequest,
    DispatchRequest,
    Pending,
    PlanRequest,
    Received,
)
from ep_comm.config import EPConfig
from ep_comm.errors import EPArgumentError, EPOverflowError, EPUnsupportedError
from ep_comm.job.meeting import Meeting
from ep_comm.routing.layout import index_dtype, layout_of
from ep_comm.routing.types import RoutingSizes, RowLayout
from ep_comm.telemetry.records import Recorder
from ep_comm.telemetry.watch import Wait
from ep_comm.topology import Spot


class ReferenceBackend(Operations):
    """The numerics contract in plain torch.

    `ep_comm.backends.base.Backend` says what each method is for.
    """

    name = "reference"

    @classmethod
    def facts(cls, group: dist.ProcessGroup, config: EPConfig) -> None:
        """Return nothing: this backend works in every group."""
        return None

    @classmethod
    def unavailable_reason(cls, facts: list, spots: list[Spot], config: EPConfig) -> str | None:
        """Return None: this backend works in every group."""
        return None

    @classmethod
    def create(
        cls, group: dist.ProcessGroup, config: EPConfig, meeting: Meeting, spots: list[Spot]
    ) -> ReferenceBackend:
        """Take the group's next number, by which messages of its buffers are told apart."""
        return cls(group, config, meeting.number)

    def __init__(self, group: dist.ProcessGroup, config: EPConfig, number: int) -> None:
        super().__init__(Transport(group, config.timeout_s), config, number, Recorder())
        self.low_latency = None
        if config.low_latency_tokens is not None:
            self.low_latency = ReferenceLowLatency(self.transport, config, number, self.recorder)
        self._overflow: EPOverflowError | None = None

    @property
    def buffer_bytes(self) -> int:
        """Nothing is held between operations."""
        return 0

    @property
    def comm_stream(self) -> None:
        """Operations run on the caller's stream."""
        return None

    @property
    def num_started(self) -> int:
        """The operations that were begun, plans among them."""
        return self.recorder.num_started

    def describe(self) -> str:
        """Name torch's backends that carry the messages."""
        return f"reference over {'/'.join(sorted(set(self.transport.backends.values())))}"

    def waits(self) -> list[Wait]:
        """Return whom the host waits for in a message."""
        return self.transport.waits()

    @property
    def has_failed(self) -> bool:
        """False: the error itself says whether ranks are apart."""
        return False

    def synchronize(self) -> None:
        """Wait for the current stream, and raise an overflow that was not said yet."""
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        self._raise_overflow()

    def keep_for_comm_stream(self, tensors: Iterable[Tensor | None]) -> None:
        """Do nothing: all runs on the current stream."""

    def quiesce(self) -> int:
        """Return the highest number of an operation; messages on their way may stay there."""
        self.transport.check_can_mask()
        return self.recorder.most_operations

    def restart(self, masked: tuple[int, ...], first: int, store: dist.Store) -> None:
        """Connect the ranks that go on anew."""
        self.transport.restart(masked, store)
        self.recorder.count_from(first)
        self._overflow = None

    def give_up(self) -> None:
        """Do nothing: `destroy` waits for nobody."""

    def abandon(self) -> None:
        """Do nothing: all runs on the current stream."""

    def destroy(self) -> None:
        """Do nothing: memory goes with its tensors."""

    def set_num_sms(self, num_sms: int | None) -> None:
        """Do nothing: there are no kernels of this project here."""

    def set_overlapped(self, overlapped: bool) -> None:
        """Do nothing: an operation takes no SMs of anybody here."""

    def set_gemm_tiles(self, tiles: int | None) -> None:
        """Do nothing: an operation takes no SMs of GEMMs here."""

    def overlap_loss(self, op: str, layout: RowLayout, num_bytes: int) -> str | None:
        """Return None: nothing runs beside GEMMs here."""
        return None

    def check_device(self, name: str, rows: Tensor) -> None:
        """Refuse rows on a device whose tensors the group cannot send."""
        if rows.device.type not in self.transport.device_types:
            raise EPArgumentError(
                f"{name} is on {rows.device}, but the buffer's group moves tensors on "
                f"{' or '.join(self.transport.device_types)}"
            )

    def check_wire_dtype(self, wire_dtype: torch.dtype, recv_dtype: torch.dtype) -> None:
        """Accept every pair that the buffer accepts."""

    def begin(self, x: Tensor, scales: Tensor | None, wire_dtype: torch.dtype) -> None:
        """Refuse it: rows are sent by their routing."""
        raise EPUnsupportedError(NEEDS_COPY_ENGINES)

    def check_ahead(self, x: Tensor, scales: Tensor | None, wire_dtype: torch.dtype) -> None:
        """Accept any rows: none can have been begun."""

    # --- routing -------------------------------------------------------------------------------

    def plan(self, request: PlanRequest) -> ReferenceRouting:
        """Find the layout of this rank's tokens, and send each peer the experts of its rows."""
        self._raise_overflow()
        num_ranks, num_topk = self.transport.num_ranks, request.num_topk
        sent = layout_of(request.source, num_topk, self.config.num_experts, num_ranks)
        topk_idx = sent.topk_idx
        record = self.recorder.start("plan", topk_idx.device)
        sent_tokens = tokens_to_ranks(sent.is_token_in_rank)
        rows_to_rank = tuple(len(tokens) for tokens in sent_tokens)
        recv_rows = self._exchange_headers(
            record,
            rows_to_rank,
            num_tokens=len(topk_idx),
            num_topk=num_topk,
            has_weights=request.has_weights,
            layout=request.layout,
            expert_alignment=request.expert_alignment,
        )

        local_TK = topk_idx % self.num_local_experts  # of dropped entries: never selected
        send = self._for_owners(local_TK, topk_idx, sent_tokens, -1)
        recv_topk_idx = topk_idx.new_empty(sum(recv_rows), num_topk)
        self._send_rows(record, send, recv_topk_idx, recv_rows, "routing").wait()
        self._check_received(recv_topk_idx)

        alignment, capacity = request.expert_alignment, request.capacity
        expert_capacity = request.expert_capacity
        came, expert_row_NK = expert_rows(
            recv_topk_idx, self.num_local_experts, alignment, expert_capacity
        )
        counts = came
        if expert_capacity is not None:
            counts = tuple(min(tokens, expert_capacity) for tokens in came)
        sizes = RoutingSizes(rows_to_rank, recv_rows, counts, alignment, expert_capacity)
        if capacity is not None:
            if request.overflow_stats is not None:
                count_drops(request.overflow_stats, came, sizes, capacity)
            expert_row_NK = torch.where(expert_row_NK < capacity, expert_row_NK, -1)
            recv_topk_idx = fit(recv_topk_idx, capacity, -1)
        record.rows_to_rank = rows_to_rank
        self.recorder.finish(record)
        in_ranks = request.layout == "rank"
        return ReferenceRouting(
            num_tokens=len(topk_idx),
            num_topk=num_topk,
            layout=request.layout,
            expert_alignment=alignment,
            capacity=capacity,
            expert_capacity=expert_capacity,
            topk_idx=topk_idx,
            sizes=sizes,
            recv_topk_idx=recv_topk_idx.to(index_dtype(request.source)) if in_ranks else None,
            epoch=record.epoch,
            sent_tokens=sent_tokens,
            expert_row_NK=expert_row_NK,
            num_dropped=sum(came) - sum(counts),
            is_counted=request.overflow_stats is not None,
        )

    # --- dispatch ------------------------------------------------------------------------------

    def dispatch(self, routing: ReferenceRouting, request: DispatchRequest) -> Pending[Received]:
        """Send rows and probabilities; `Pending` has what is done once they came."""
        self._raise_overflow()
        x, scales, topk_weights, wire_dtype, recv_dtype, _ = request
        recv_rows, num_received = routing.sizes.received, routing.sizes.num_received
        record = self.recorder.start("dispatch", x.device)
        record.rows_of_experts = routing.sizes.expert_rows
        self._exchange_headers(
            record,
            tuple(len(tokens) for tokens in routing.sent_tokens),
            expected_rows=recv_rows,
            routing_epoch=routing.epoch,
            dtype=wire_dtype,
            has_weights=topk_weights is not None,
        )
        if wire_dtype == fp8.FP8_DTYPE and scales is None:
            x, scales = fp8.quantize(x)
        rows = to_bytes(x) if scales is None else torch.cat([to_bytes(x), to_bytes(scales)], 1)
        send = [rows[tokens] for tokens in routing.sent_tokens]
        recv = rows.new_empty(num_received, rows.shape[1])
        exchanges = [self._send_rows(record, send, recv, recv_rows, "rows")]
        self._record_payload(record, send)

        recv_weights = None
        if topk_weights is not None:
            send_weights = self._for_owners(
                topk_weights, routing.topk_idx, routing.sent_tokens, 0.0
            )
            recv_weights = topk_weights.new_empty(num_received, routing.num_topk)
            exchanges.append(
                self._send_rows(record, send_weights, recv_weights, recv_rows, "weights")
            )

        def finish() -> Received:
            for exchange in exchanges:
                exchange.wait()
            received = unpack(recv, self.config.hidden, wire_dtype, recv_dtype)
            received = received._replace(topk_weights=recv_weights)
            if routing.layout == "expert":
                received = expand(received, routing)
            elif routing.capacity is not None:
                received = fit_received(received, routing.capacity)
            self._note_overflow(routing)
            self.recorder.finish(record)
            return received

        return Pending(finish=finish)

    # --- combine -------------------------------------------------------------------------------

    def combine(self, routing: ReferenceRouting, request: CombineRequest) -> Pending[Combined]:
        """Add up this rank's rows of each token, and send the partial sums back."""
        self._raise_overflow()
        x, topk_weights, _, adds_weights = request
        recv_rows, num_received = routing.sizes.received, routing.sizes.num_received
        record = self.recorder.start("combine", x.device)
        sent_rows = [len(tokens) for tokens in routing.sent_tokens]  # and as many come back
        self._exchange_headers(
            record,
            recv_rows,
            expected_rows=sent_rows,
            routing_epoch=routing.epoch,
            dtype=x.dtype,
            has_weights=topk_weights is not None,
            adds_weights=adds_weights,
        )
        if routing.layout == "expert":
            x = sum_expert_rows(x, routing)
            if topk_weights is not None:
                topk_weights = collapse_weights(topk_weights, routing.expert_row_NK)
        elif routing.capacity is not None:
            x = fit(x, num_received)
            if topk_weights is not None:
                topk_weights = fit(topk_weights, num_received)
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
            combined = self._sum_over_ranks(routing, recv.split(sent_rows))
            weights = None
            if recv_weights is not None:
                bring = self._sum_over_ranks if adds_weights else self._scatter_weights
                weights = bring(routing, recv_weights.split(sent_rows))
            self.recorder.finish(record)
            return Combined(combined, weights)

        return Pending(finish=finish)

    def _sum_over_ranks(self, routing: ReferenceRouting, partials: tuple[Tensor, ...]) -> Tensor:
        """Add up levels 2 and 3 of combine: a node's ranks, rounded, then the nodes, rounded."""
        num_ranks = self.transport.num_ranks
        ranks_per_node = self.config.ranks_per_node or num_ranks
        sent_tokens = routing.sent_tokens
        node_sums = []
        for first in range(0, num_ranks, ranks_per_node):
            node = slice(first, first + ranks_per_node)
            total, present = sum_in_order(
                routing.num_tokens, zip(sent_tokens[node], partials[node], strict=True)
            )
            tokens = present.nonzero(as_tuple=True)[0]
            node_sums.append((tokens, total[tokens].to(partials[0].dtype)))
        if len(node_sums) == 1:
            return total.to(partials[0].dtype)
        return sum_in_order(routing.num_tokens, node_sums)[0].to(partials[0].dtype)

    def _scatter_weights(self, routing: ReferenceRouting, received: tuple[Tensor, ...]) -> Tensor:
        """Take each entry [T, K] from the rank that owns its expert; dropped entries stay 0."""
        owner_TK = self._owner(routing.topk_idx)
        out = received[0].new_zeros(routing.token_weights_shape)
        for r, (tokens, rows) in enumerate(zip(routing.sent_tokens, received, strict=True)):
            out[tokens] = torch.where(owner_TK[tokens] == r, rows, out[tokens])
        return out

    def _note_overflow(self, routing: ReferenceRouting) -> None:
        """Keep what a dispatch dropped, to be said at the next call, as on a GPU."""
        capacity = routing.capacity
        needed = routing.sizes.num_rows(routing.layout) + routing.num_dropped
        if capacity is not None and needed > capacity and not routing.is_counted:
            self._overflow = EPOverflowError(num_rows=needed, capacity=capacity)

    def _raise_overflow(self) -> None:
        overflow, self._overflow = self._overflow, None
        if overflow is not None:
            raise overflow
