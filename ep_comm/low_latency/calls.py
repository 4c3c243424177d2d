"""The low-latency methods of `Buffer`."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from ep_comm._native.header import EP_MAX_TOPK
from ep_comm.backends.base import LowLatencyBackend
from ep_comm.backends.requests import (
    LowLatencyCombineRequest,
    LowLatencyDispatchRequest,
    Pending,
)
from ep_comm.blank import maker
from ep_comm.config import EPConfig
from ep_comm.errors import EPArgumentError, EPUnsupportedError, setting
from ep_comm.events import EventOverlap
from ep_comm.fp8 import Payload
from ep_comm.low_latency.arguments import (
    Arguments,
    DispatchCall,
    DispatchTensors,
    check_same_routing,
    check_sizes,
    weights_to_bring,
)
from ep_comm.low_latency.handle import (
    MOST_OUT,
    HooksOut,
    LowLatencyCombineOutput,
    LowLatencyDispatchOutput,
    LowLatencyHandle,
    checked_handle,
)
from ep_comm.session import Session
from ep_comm.tracing import untraced

_NOTHING = EventOverlap()  # waits for nothing


class LowLatencyCalls:
    """The low-latency methods of `Buffer`."""

    config: EPConfig
    num_ranks: int
    num_local_experts: int
    _session: Session

    @untraced
    def low_latency_dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        topk_weights: Tensor | None = None,
        *,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        dispatch_wait_recv_cost_stats: Tensor | None = None,
    ) -> LowLatencyDispatchOutput:
        """Send each token once to every rank that owns one of its experts; receive by expert.

        Collective. The host waits for nothing, but for the other ranks with the reference backend.
        T tokens of this rank, M = `num_max_dispatch_tokens_per_rank`, R ranks, E experts on each.

        Args:
            x: [T, hidden] BF16, contiguous; T may be 0 and differ between ranks.
            topk_idx: [T, K] int32 or int64, K at most ``config.num_topk``: distinct experts of
                each token; -1 drops an entry. The caller leaves it as it is until the combine is
                done. Over NVLink no host looks at it: what is no expert is dropped, and the next
                low-latency dispatch raises.
            num_max_dispatch_tokens_per_rank: M, the most tokens of a rank in this call: T is at
                most M, and M at most ``config.low_latency_tokens``. Equal on all ranks.
            num_experts: That of the buffer.
            topk_weights: [T, K] FP32, contiguous, to travel with the rows; the caller leaves them
                as they are until combine has begun. None: pass them to combine.
            use_fp8: Send FP8 with scales, see `ep_comm.fp8_low_latency`; hidden is then a multiple
                of 128. Otherwise BF16.
            round_scale: Scales are powers of two; needs `use_fp8`.
            use_ue8m0: Scales come as their exponent bytes, four in an int32; needs `round_scale`,
                and hidden a multiple of 512.
            async_finish: Run on the communication stream; wait for the returned event before
                touching any of the tensors. Not together with `return_recv_hook`. No effect with
                the reference backend.
            return_recv_hook: Only send, on the current stream; the returned hook receives.
            cumulative_local_expert_recv_stats: [E] int32, to which the rows of each expert are
                added.
            dispatch_wait_recv_cost_stats: [R] int64, to which the nanoseconds are added that this
                rank waited for each rank.

        Returns:
            See `LowLatencyDispatchOutput`.

        Raises:
            EPArgumentError: Wrong arguments, or a buffer without ``config.low_latency_tokens``;
                nothing was sent.
            EPRoutingError: A wrong routing: see there when it is raised.
            EPMismatchError: Another rank called something else.
            EPTimeoutError: A rank did not arrive within ``config.timeout_s``.
            EPStateError: The dispatch before the last is still out; names the hook to call first.
                The buffer stays usable. Or it failed earlier, or was destroyed.
            EPUnsupportedError: The backend has no low-latency operations.
        """
        call = (
            num_max_dispatch_tokens_per_rank, num_experts, use_fp8, round_scale, use_ue8m0,
            async_finish, return_recv_hook,
        )  # fmt: skip
        given = (
            x, topk_idx, topk_weights,
            cumulative_local_expert_recv_stats, dispatch_wait_recv_cost_stats,
        )  # fmt: skip
        return self._low_latency_dispatch(call, given)

    def _low_latency_dispatch(
        self, call: DispatchCall, given: DispatchTensors
    ) -> LowLatencyDispatchOutput:
        """Do it, of arguments in two tuples; only for callers that are `untraced` themselves."""
        session = self._session
        operation = session.operation()
        x, topk_idx, topk_weights, _, _ = given
        *_, async_finish, return_recv_hook = call
        (x, source, weights, recv_stats, wait_stats), known = self._arguments.dispatch(call, given)
        self._dispatches.check_room()

        sizes, blank, make = known.sizes, known.received, maker(known.sizes.device)
        recv_x, recv_count = make(*blank.recv_x), make(*blank.recv_count)
        recv_scales = None if blank.recv_scales is None else make(*blank.recv_scales)
        recv_src_info = make(*blank.recv_src_info)
        request = LowLatencyDispatchRequest(
            sizes, x, source, weights, recv_x, recv_scales, recv_src_info, recv_count,
            recv_stats, wait_stats, return_recv_hook, async_finish,
        )  # fmt: skip
        with operation:
            pending = self._arguments.backend.dispatch(request)
            event = _receive_unless_split(pending, return_recv_hook, async_finish)
        hook = self._dispatches.add(session, pending, return_recv_hook)
        handle = LowLatencyHandle(
            session, self._dispatches.num_operations, topk_idx, topk_weights, sizes,
            recv_src_info, pending, hook,
        )  # fmt: skip
        rows: Payload = recv_x if recv_scales is None else (recv_x, recv_scales)
        return LowLatencyDispatchOutput(rows, recv_count, handle, event, hook)

    @untraced
    def low_latency_combine(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor | None,
        handle: LowLatencyHandle,
        *,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: Tensor | None = None,
        combine_wait_recv_cost_stats: Tensor | None = None,
    ) -> LowLatencyCombineOutput:
        """Add up the rows of each token, weighted, on the rank that it came from.

        Collective. The order of every sum is fixed, see `ep_comm.low_latency`.

        Args:
            x: [E, R M, hidden] BF16, contiguous: one row in the place of each row that the dispatch
                gave. Others are not read.
            topk_idx: That of the dispatch. Rows are summed as the handle says: on a GPU only the
                shape of this is looked at.
            topk_weights: [T, K] FP32, contiguous. Where weights travelled with the dispatch, None
                or the same tensor. Otherwise they are brought to the experts' ranks first, which
                takes one hop more.
            handle: What the dispatch returned. Its hook, if it has one, was called, and that of an
                earlier combine with it.
            zero_copy: The rows stand in `get_next_low_latency_combine_buffer` of the handle; of `x`
                nothing is read.
            async_finish: As in `low_latency_dispatch`.
            return_recv_hook: As in `low_latency_dispatch`.
            out: [T, hidden] BF16, contiguous, for the result; None: a new one.
            combine_wait_recv_cost_stats: As `dispatch_wait_recv_cost_stats` there.

        Returns:
            See `LowLatencyCombineOutput`.

        Raises:
            EPArgumentError: Wrong arguments; a handle of another buffer.
            EPStateError: The hook of the dispatch was not called, or that of an earlier combine of
                it; or the combine before the last is still out. The buffer stays usable. Or it
                failed earlier, or was destroyed.
            Others as `low_latency_dispatch`.
        """
        session = self._session
        operation = session.operation()
        handle = checked_handle(handle, session)
        check_same_routing(topk_idx, handle)
        weights = weights_to_bring(topk_weights, handle)
        call = handle.sizes, async_finish, return_recv_hook
        given = x, weights, out, combine_wait_recv_cost_stats
        x, weights, out, wait_stats = self._arguments.combine(call, given)
        if zero_copy:
            if handle.combine_buffer is None:
                raise EPArgumentError(
                    "zero_copy=True, but nobody asked for the rows' place: write them into "
                    "get_next_low_latency_combine_buffer(handle) before"
                )
            x = handle.combine_buffer
        self._combines.check_room()

        if out is None:
            hidden, sizes = self.config.hidden, handle.sizes
            out = maker(sizes.device)((sizes.num_tokens, hidden), (hidden, 1), torch.bfloat16)
        request = LowLatencyCombineRequest(
            x, weights, out, wait_stats, return_recv_hook, async_finish
        )
        with operation:
            pending = self._arguments.backend.combine(handle.pending.result, request)
            event = _receive_unless_split(pending, return_recv_hook, async_finish)
        handle.combine_hook = hook = self._combines.add(session, pending, return_recv_hook)
        return LowLatencyCombineOutput(out, event, hook)

    def get_next_low_latency_combine_buffer(self, handle: LowLatencyHandle) -> Tensor:
        """Return where the rows of a combine with ``zero_copy=True`` stand: BF16 [E, R M, hidden].

        No combine copies its rows, with or without: this is for code that was written for DeepEP.
        The same tensor for each call with the handle.

        Raises:
            EPArgumentError: A handle of another buffer.
            EPStateError: As `low_latency_combine`.
        """
        session = self._session
        self._low_latency()
        handle = checked_handle(handle, session)
        if handle.combine_buffer is None:
            handle.combine_buffer = torch.empty(
                handle.sizes.recv_shape, dtype=torch.bfloat16, device=handle.sizes.device
            )
        return handle.combine_buffer

    @staticmethod
    def get_low_latency_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """Bytes of device memory that are enough for the low-latency operations of a buffer.

        Tensors that operations return are not in it. The reference backend takes none.

        Args:
            num_max_dispatch_tokens_per_rank: ``EPConfig.low_latency_tokens``.
            hidden: The config's.
            num_ranks: The group's.
            num_experts: The config's.

        Raises:
            EPArgumentError: A config with these sizes would be refused.
        """
        EPConfig(
            num_experts=num_experts,
            hidden=hidden,
            max_tokens_per_rank=1,
            num_topk=1,
            low_latency_tokens=num_max_dispatch_tokens_per_rank,
        ).check_group(num_ranks)
        # A slot for each token and rank: its row for dispatch and for combine, and what belongs to
        # its selections, which is less than 16 bytes each. Beside them stand flags and gaps.
        slot = 2 * 2 * hidden + 16 * EP_MAX_TOPK
        return MOST_OUT * num_ranks * num_max_dispatch_tokens_per_rank * slot + 4096

    def clean_low_latency_buffer(
        self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int
    ) -> None:
        """Do nothing, once the sizes are checked: normal operations leave nothing to clean.

        Raises:
            EPArgumentError: These are not sizes of this buffer's low-latency operations.
        """
        self._low_latency()
        check_sizes(num_max_dispatch_tokens_per_rank, num_experts, self.config)
        if hidden != self.config.hidden:
            raise EPArgumentError(f"hidden is {self.config.hidden} in this buffer, got {hidden!r}")

    # --- what the calls share ------------------------------------------------------------------

    @cached_property
    def _arguments(self) -> Arguments:
        return Arguments(
            self._made_for_low_latency(), self._session.backend, self.config, self.num_ranks
        )

    @cached_property
    def _dispatches(self) -> HooksOut:
        return HooksOut("low_latency_dispatch")

    @cached_property
    def _combines(self) -> HooksOut:
        return HooksOut("low_latency_combine")

    def _low_latency(self) -> LowLatencyBackend:
        """Return the backend's low-latency part.

        Raises:
            EPStateError: The buffer is unusable.
            EPArgumentError: The buffer was made without.
            EPUnsupportedError: The backend has none.
        """
        self._session.check_usable()
        return self._made_for_low_latency()

    def _made_for_low_latency(self) -> LowLatencyBackend:
        """Return the backend's low-latency part, of an unusable buffer too."""
        if self.config.low_latency_tokens is None:
            raise EPArgumentError(
                "the buffer was made without low-latency operations: pass "
                f"{setting('low_latency_tokens')}"
            )
        backend = self._session.backend
        if backend.low_latency is None:
            raise EPUnsupportedError(
                f"the backend {backend.name!r} has no low-latency operations: "
                'EPConfig(backend="reference") has them'
            )
        return backend.low_latency


def _receive_unless_split(pending: Pending, is_split: bool, asynchronous: bool) -> EventOverlap:
    """Receive, where no hook does; return the event that the caller gets."""
    if is_split:
        return _NOTHING
    if not asynchronous:
        pending.wait()
        return _NOTHING
    _ = pending.result
    return pending.event
