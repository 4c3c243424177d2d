"""Dispatches over NVLink: with a new plan, with a routing that is known, with rows sent ahead."""

from __future__ import annotations

import torch
from torch import Tensor

from ep_comm import fp8
from ep_comm._native import header
from ep_comm.backends.base import NEEDS_COPY_ENGINES
from ep_comm.backends.nvlink.ahead import Ahead
from ep_comm.backends.nvlink.copies import Copies
from ep_comm.backends.nvlink.planner import Planner
from ep_comm.backends.nvlink.resources import Resources
from ep_comm.backends.nvlink.routing import NVLinkRouting
from ep_comm.backends.nvlink.rows import (
    allocate_rows,
    describe_payload,
    describe_rows,
    tag,
    tag_of_rows,
    whole_weight_rows,
)
from ep_comm.backends.nvlink.sms import Sms
from ep_comm.backends.requests import DispatchRequest, Received
from ep_comm.blank import maker
from ep_comm.errors import EPArgumentError, EPUnsupportedError


class Dispatches:
    """Says what a dispatch sends, and launches it or lets it follow its plan.

    Args:
        resources: The backend's.
        args: The arguments of dispatches; every one fills in the rest anew.
        planner: Makes plans, and launches the dispatches that follow them.
        sms: How many an operation takes.
        copies: Where copy engines move rows.
    """

    def __init__(
        self,
        resources: Resources,
        args: header.DispatchArgs,
        planner: Planner,
        sms: Sms,
        copies: Copies | None,
    ) -> None:
        self._memory = resources.memory
        self._config = resources.config
        self._device = resources.device
        self._streams = resources.streams
        self._recorder = resources.recorder
        self._args = args
        self._planner = planner
        self._sms = sms
        self._copies = copies

    def dispatch(
        self, routing: NVLinkRouting, request: DispatchRequest
    ) -> tuple[Received, tuple[object, ...]]:
        """Launch a dispatch; return what comes, and what its kernels read."""
        ahead = self._planner.ahead
        if ahead is not None and not ahead.is_of(request.x, request.scales):
            # A backward pass, which asks nobody.
            ahead.check(request.x, request.scales, request.wire_dtype)
        if routing.first is None:
            self._memory.check()  # before anything of what was begun is given up
        if ahead is not None and ahead.number is None:
            ahead = None  # nothing was sent
        if ahead is not None:
            self._planner.num_resumed += 1
        try:
            return self._dispatch(routing, request, ahead)
        finally:
            self._planner.ahead = None

    def _dispatch(
        self, routing: NVLinkRouting, request: DispatchRequest, ahead: Ahead | None
    ) -> tuple[Received, tuple[object, ...]]:
        x, scales, topk_weights, wire_dtype, recv_dtype, asynchronous = request
        first, routing.first = routing.first, None
        quantises = wire_dtype == fp8.FP8_DTYPE and scales is None and ahead is None
        if ahead is not None:
            x, scales = ahead.rows, ahead.scales
            self._streams.keep_for_current(ahead.memory, ahead.stream)
        elif quantises:
            x, scales = fp8.quantize(x)
        weights = whole_weight_rows(topk_weights)
        args = self._args
        describe_rows(args, routing, x, scales, weights, recv_dtype)
        args.tag = tag(
            routing.ticket,
            first is not None,
            fp8.NATIVE_DTYPES.get(x.dtype, -1),
            args.row_bytes,
            args.scale_bytes,
            args.weight_bytes,
        )
        if self._copies is not None:
            args.rows_tag = tag_of_rows(args, x)
        if first is None:
            received = self._repeat(routing, recv_dtype, asynchronous, ahead)
        else:
            was_made = quantises or first.selects_weights or weights is not topk_weights
            if was_made:
                self._planner.wait_for_input(first, asynchronous)
            # Rows that are pushed have to be there: only an input of before the plan certainly is.
            args.is_behind_plan = first.in_one and not (was_made or routing.is_captured)
            if self._copies is not None:
                made_weights = was_made or ahead is not None
                self._copies.push_planned(args, routing.num_tokens, quantises, made_weights)
            received = self._planner.dispatch(args, routing, recv_dtype, first)
        of_plan = () if first is None else (first.source, first.overflow_stats)
        return received, (x, scales, weights, *of_plan, routing.memory)

    def _repeat(
        self,
        routing: NVLinkRouting,
        recv_dtype: torch.dtype,
        asynchronous: bool,
        ahead: Ahead | None,
    ) -> Received:
        """Launch a dispatch whose routing is known."""
        args = self._args
        num_bytes = routing.num_tokens * args.row_bytes
        sms = self._sms.of_rows("dispatch", routing.layout, num_bytes, asynchronous)
        make = maker(self._device)
        received = allocate_rows(args, routing, self._config.hidden, recv_dtype, make)
        stream = self._streams.begin(header.EP_OP_DISPATCH, asynchronous, sms)
        self._streams.keep_for_current(routing.memory, routing.stream)
        expert_rows = routing.known_expert_rows
        if ahead is None:
            args.peers.record = self._recorder.start(header.EP_OP_DISPATCH, expert_rows)
        else:
            args.peers.record = ahead.record
        args.is_planned = args.is_behind_plan = False
        if self._copies is None:
            self._planner.launch_known(args, routing, sms, stream)
        else:
            self._copies.repeat(args, routing.num_tokens, sms, stream, ahead is not None)
            number = None if ahead is None else ahead.number
            self._recorder.complete(args.row_bytes + args.scale_bytes, expert_rows, number)
        return received

    # --- rows ahead of their routing -------------------------------------------------------------

    def begin(self, x: Tensor, scales: Tensor | None, wire_dtype: torch.dtype) -> None:
        """Push rows; the dispatch that follows says where they go."""
        if self._config.wire != "copy-engine":
            raise EPUnsupportedError(NEEDS_COPY_ENGINES)
        if self._planner.ahead is not None:
            raise EPArgumentError(
                "begin_dispatch was called before, and the dispatch of its rows has not come"
            )
        self._memory.check()
        sent = x.detach(), scales
        number, record = None, 0
        if self._copies is not None:  # else there is nobody to send to
            if wire_dtype == fp8.FP8_DTYPE and scales is None:
                sent = fp8.quantize(sent[0])
            args, num_tokens = self._args, len(x)
            describe_payload(args, *sent)
            args.rows_tag = tag_of_rows(args, sent[0])
            if num_tokens > self._config.max_tokens_per_rank:
                num_tokens = 0  # the dispatch tells all ranks
            record = self._recorder.start(header.EP_OP_DISPATCH)
            number = self._recorder.num_operations
            self._copies.push_rows_ahead(args, num_tokens, record)
        stream = self._streams.current
        self._planner.ahead = Ahead.of(x, scales, wire_dtype, sent, number, record, stream)

    def check_ahead(self, x: Tensor, scales: Tensor | None, wire_dtype: torch.dtype) -> None:
        """Refuse another dispatch than the one that was begun."""
        if self._planner.ahead is not None:
            self._planner.ahead.check(x, scales, wire_dtype)

    def push_alone(self, routing: NVLinkRouting, x: Tensor) -> None:
        """Push rows that nobody expands, for figures. Copy engines are the wire."""
        assert self._copies is not None
        args = self._args
        describe_rows(args, routing, x, None, None, x.dtype)
        stream = self._streams.begin(header.EP_OP_DISPATCH, False, 1)
        args.peers.record = self._recorder.start(header.EP_OP_DISPATCH)
        args.is_planned = False
        self._copies.push_alone(args, routing.num_tokens, stream)
        self._recorder.complete(args.row_bytes)
