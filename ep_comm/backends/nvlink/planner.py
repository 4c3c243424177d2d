"""A new dispatch: its plan, and the dispatch that follows it at once."""

from __future__ import annotations

from typing import Any

import torch

from ep_comm._native import header
from ep_comm.backends.nvlink.ahead import Ahead
from ep_comm.backends.nvlink.copy_engine import DispatchCopyEngine, token_words
from ep_comm.backends.nvlink.mailbox import Mailbox
from ep_comm.backends.nvlink.resources import Resources
from ep_comm.backends.nvlink.routing import (
    FirstDispatch,
    NVLinkRouting,
    arena_places,
    entry_size,
    native_routing,
)
from ep_comm.backends.nvlink.rows import allocate_experts, allocate_rows
from ep_comm.backends.nvlink.tuning import split_dispatch, split_plan
from ep_comm.backends.requests import PlanRequest, Received
from ep_comm.blank import Make, comes_in_order, maker
from ep_comm.errors import EPUnsupportedError
from ep_comm.routing.layout import INPUT_KINDS
from ep_comm.routing.types import RowLayout

MAX_ROWS = 2**31 - 1


def check_capture(capacity: int | None) -> bool:
    """Return whether a CUDA graph is captured.

    Raises:
        EPUnsupportedError: One is, and the host would have to wait for the rows of a plan.
    """
    is_captured = torch.cuda.is_current_stream_capturing()
    if capacity is None and is_captured:
        raise EPUnsupportedError(
            "a new dispatch waits for the counts of its routing, which no CUDA graph can hold: "
            "pass num_worst_tokens, or capture a cached dispatch"
        )
    return is_captured


class Planner:
    """Launches plans, and the first dispatch of each while its plan and the host go on.

    Args:
        resources: The backend's.
        args: The arguments of plans; every plan fills in the rest anew.
        copy_engine: What copies rows; None where kernels push them.

    Attributes:
        entries: Where plans leave the entries of rows whose number nobody knows yet.
        ahead: What the next dispatch has begun with, if it has.
        num_resumed: Halves of dispatches that followed what was begun.
    """

    _mailbox_type: type[Mailbox] = Mailbox
    _routing_type: type[NVLinkRouting] = NVLinkRouting

    def __init__(
        self,
        resources: Resources,
        args: header.PlanArgs,
        copy_engine: DispatchCopyEngine | None = None,
    ) -> None:
        memory, config = resources.memory, resources.config
        self._copy_engine = copy_engine
        self.ahead: Ahead | None = None
        self.num_resumed = 0
        self._token_words = 0
        if copy_engine is not None:
            self._token_words = token_words(config.max_tokens_per_rank, memory.num_ranks)
        self._native = resources.native
        self._memory = memory
        self._mailbox = self._mailbox_type(resources.native, memory, config)
        self._config = config
        self._device = resources.device
        self._streams = resources.streams
        self._recorder = resources.recorder
        self._args = args
        self._num_ranks = memory.num_ranks
        self._num_local_experts = config.num_experts // memory.num_ranks
        self._max_rows = memory.num_ranks * config.max_tokens_per_rank
        self._num_plans = 0
        self.entries = torch.empty(
            self._max_rows * entry_size(config.num_topk), dtype=torch.int32, device=self._device
        )

    def plan(self, request: PlanRequest, num_sms: int, available_sms: int) -> NVLinkRouting:
        """Start a plan on so many of the GPU's `available_sms`; the host does not wait for it.

        Raises:
            EPUnsupportedError: A CUDA graph is captured, and the host would have to wait.
        """
        is_captured = check_capture(request.capacity)
        source, streams = request.source, self._streams
        num_tokens = source.shape[0]  # of torch's len() most is Python
        if num_tokens > self._config.max_tokens_per_rank:
            source, num_tokens = source[:0], 0  # the kernels tell all ranks
        selects_weights = request.has_weights and source.dtype == torch.bool
        # In a graph what pushes and expands is one kernel, and comes after the plan's second one:
        # of two branches CUDA might run first what expands, and so waits for the other ranks'
        # pushes.
        in_one = is_captured or (
            request.capacity is not None
            and not selects_weights
            and self._fits_beside_plan(num_sms == available_sms)
        )
        # Before the stream is ordered behind the current one, which may still fill them.
        arrays = self._allocate(request, num_tokens)
        stream = streams.begin(header.EP_OP_DISPATCH, request.asynchronous, num_sms)
        record, number = self._start(stream)
        self._num_plans += 1
        first = FirstDispatch(
            source=source,
            stream=stream,
            num_sms=num_sms,
            record=record,
            selects_weights=selects_weights,
            in_one=in_one,
            number=number,
            overflow_stats=request.overflow_stats,
        )
        routing = self._routing_type(
            num_tokens=num_tokens,
            num_topk=request.num_topk,
            layout=request.layout,
            expert_alignment=request.expert_alignment,
            capacity=request.capacity,
            expert_capacity=request.expert_capacity,
            ticket=self._num_plans,
            stream=streams.current,
            memory=(arrays["arena"],),
            is_captured=is_captured,
            first=first,
            wait_for_kernels=self._wait_for_kernels,
            **arrays,
        )
        self._describe_plan(request, routing, first)
        self._launch_plan(routing, stream, stream if in_one else streams.side)
        if request.asynchronous and selects_weights:
            # The caller's stream selects the probabilities by the experts that the plan finds.
            streams.wait(streams.current, stream)
        return routing

    def _describe_plan(
        self, request: PlanRequest, routing: NVLinkRouting, first: FirstDispatch
    ) -> None:
        """Set the arguments of a plan's kernels."""
        args, stats = self._args, request.overflow_stats
        args.peers.record = first.record
        args.routing = routing.native
        args.input = first.source.data_ptr()
        args.ticket = 0 if request.capacity is not None else routing.ticket
        args.capacity = MAX_ROWS if request.capacity is None else request.capacity
        args.input_kind = INPUT_KINDS[request.source.dtype]
        args.asked_tokens = request.source.shape[0]
        args.expert_alignment = request.expert_alignment
        args.expert_capacity = request.expert_capacity or 0
        args.overflow = None if stats is None else stats.data_ptr()
        expand_sms = self._sms_beside_plan(first.num_sms, request.layout, request.num_topk)
        args.num_send_blocks, args.num_receive_blocks = split_plan(first.num_sms, expand_sms)

    def _start(self, stream: int) -> tuple[int, int]:
        """Begin an operation, if its rows are not on their way; return its record and number."""
        if self.ahead is not None and self.ahead.number is not None:
            self.num_resumed += 1
            self._args.is_begun = True
            return self.ahead.record, self.ahead.number
        record = self._recorder.start(header.EP_OP_DISPATCH)
        if self._copy_engine is not None:
            self._args.is_begun = False
            self._copy_engine.begin(stream, record, begins=False)
        return record, self._recorder.num_operations

    def restart(self) -> None:
        """Count plans anew: the mailbox is empty."""
        self._num_plans = 0
        self.ahead = None

    def _wait_for_kernels(self) -> None:
        """Wait for all operations so far; their counts are then in device memory."""
        self._streams.synchronize()
        self._memory.check_fault()

    def wait_for_input(self, first: FirstDispatch, asynchronous: bool) -> None:
        """Order the first dispatch behind what the current stream was given since its plan.

        The plan's own streams are behind everything older.
        """
        streams = self._streams
        if asynchronous:
            streams.wait(first.stream, streams.current)
        if not first.in_one:
            streams.wait(streams.side, first.stream)

    def dispatch(
        self,
        args: header.DispatchArgs,
        routing: NVLinkRouting,
        recv_dtype: torch.dtype,
        first: FirstDispatch,
    ) -> Received:
        """Send while the plan and the host go on; allocate and expand once the counts are known.

        Raises:
            EPTimeoutError, EPMismatchError: The plan ended with it.
            EPRoutingError: The plan found the routing wrong; the dispatch is complete.
        """
        streams = self._streams
        args.peers.record = first.record
        args.is_planned = True
        self._launch_push(args, routing, first)
        epoch, alignment = self._recorder.num_dispatches, routing.expert_alignment
        fills, make = comes_in_order(), maker(self._device)
        args.planned_entries = None
        if routing.capacity is None:
            # The kernel that expands copies them: the next plan, on the same stream, is behind it.
            args.planned_entries = routing.native.entries
            # From the end of this wait to the launch the GPU may have nothing to do. So what can be
            # done before is done before, and what can wait comes after.
            num_received, num_expert_rows = self._mailbox.wait(
                routing.ticket, epoch, alignment, streams.side
            )
            args.num_received = num_received
            routing.num_rows = num_expert_rows if routing.layout == "expert" else num_received
        received = allocate_rows(args, routing, self._config.hidden, recv_dtype, make)
        if routing.layout == "rank":
            routing.recv_topk_idx = allocate_experts(args, routing, first.source, make)
        if routing.capacity is None:
            self._allocate_entries(routing, args.num_received, make)
            args.routing = routing.native
        if fills:
            self.wait_for_input(first, first.stream != streams.current)
        self._launch_expand(args, routing, first)
        if not first.in_one:
            streams.wait(first.stream, streams.side)
        if routing.capacity is None:
            routing.sizes = self._mailbox.sizes(alignment)
            routing.known_expert_rows = self._mailbox.packed_expert_rows()
        self._recorder.complete(
            args.row_bytes + args.scale_bytes, routing.known_expert_rows, first.number
        )
        if routing.capacity is None:
            self._mailbox.raise_if_bad(first.source, routing.num_topk)
        return received

    # --- what is different between nodes ---------------------------------------------------------

    def launch_known(
        self, args: header.DispatchArgs, routing: NVLinkRouting, num_sms: int, stream: int
    ) -> None:
        """Launch a dispatch whose routing is known: one kernel pushes and expands."""
        push_blocks, expand_blocks = split_dispatch(
            num_sms, self._num_ranks, routing.layout, routing.num_topk
        )
        args.num_push_blocks, args.num_expand_blocks = push_blocks, expand_blocks
        args.num_blocks = push_blocks + expand_blocks
        self._native.launch("ep_dispatch", args, stream)

    def _fits_beside_plan(self, has_all_sms: bool) -> bool:
        """Return whether one kernel may push and expand beside the plan's second one.

        With few SMs there is no room for both.
        """
        return has_all_sms

    def _sms_beside_plan(self, num_sms: int, layout: RowLayout, num_topk: int) -> int:
        """Return the SMs that a push leaves to the plan's second kernel."""
        if self._copy_engine is not None:
            return num_sms
        return split_dispatch(num_sms, self._num_ranks, layout, num_topk)[1]

    def _num_entries(self, request: PlanRequest) -> int:
        """Return the received rows that there are entries for."""
        if request.capacity is None or request.layout == "expert":
            return self._max_rows
        return min(self._max_rows, request.capacity + 1)  # rows from there on share one entry

    def _allocate(self, request: PlanRequest, num_tokens: int) -> dict[str, Any]:
        """Allocate the index arrays of a routing; return those fields of it that describe them.

        The entries of rows are among them where the request has a capacity.
        """
        num_entries = self._num_entries(request)
        sizes = (
            num_tokens,
            request.num_topk,
            0 if request.capacity is None else num_entries,
            self._num_ranks,
            self._num_local_experts,
            self._token_words,
        )
        places, total = arena_places(*sizes)
        arena = maker(self._device)((total,), (1,), torch.int32)
        native = native_routing(
            arena.data_ptr(),
            sizes,
            self.entries.data_ptr(),
            last_entry=num_entries - 1,
            expert_major=request.layout == "expert",
        )
        if request.capacity is None:  # it is to have entries of its own
            native = header.Routing.from_buffer_copy(native)
        return dict(arena=arena, places=places, native=native)

    def _allocate_entries(self, routing: NVLinkRouting, num_received: int, make: Make) -> None:
        """Allocate what depends on the rows that come."""
        routing.allocate_entries(num_received, make)

    def _launch_plan(self, routing: NVLinkRouting, stream: int, second_stream: int) -> None:
        """Launch the kernels of a plan, the second one on a stream of its own."""
        self._native.plan(self._args, stream, second_stream, self._streams.event)

    def _launch_push(
        self, args: header.DispatchArgs, routing: NVLinkRouting, first: FirstDispatch
    ) -> None:
        """Launch what pushes rows, where it is not one with what expands them."""
        push_blocks, expand_blocks = split_dispatch(
            first.num_sms, self._num_ranks, routing.layout, routing.num_topk
        )
        args.num_blocks = push_blocks + expand_blocks
        args.num_push_blocks, args.num_expand_blocks = push_blocks, 0
        if push_blocks and not first.in_one and self._copy_engine is None:
            self._native.launch("ep_dispatch", args, first.stream)

    def _launch_expand(
        self, args: header.DispatchArgs, routing: NVLinkRouting, first: FirstDispatch
    ) -> None:
        """Launch what moves rows to their places, and pushes them too where it is one."""
        stream = first.stream if first.in_one else self._streams.side
        if self._copy_engine is not None:
            self._copy_engine.expand(args, first.num_sms, stream)
            return
        args.num_expand_blocks = args.num_blocks - args.num_push_blocks
        if not first.in_one:
            args.num_push_blocks = 0
        self._native.launch("ep_dispatch", args, stream)
