"""`Buffer`: dispatch tokens to the ranks of their experts, and combine the results."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ep_comm import checks, ops
from ep_comm.backends import make_backend
from ep_comm.backends.base import Backend
from ep_comm.backends.requests import (
    CombineRequest,
    DispatchRequest,
    PlanRequest,
)
from ep_comm.config import EPConfig, check_positive
from ep_comm.errors import EPArgumentError
from ep_comm.events import EventOverlap
from ep_comm.fault_file import Identity, run_name
from ep_comm.fp8 import FP8_DTYPE, Payload
from ep_comm.handle import CombineOutput, DispatchHandle, DispatchOutput, checked_handle
from ep_comm.job.blame import Blame
from ep_comm.job.roster import Roster
from ep_comm.job.store import default_store
from ep_comm.low_latency.masks import MaskCalls
from ep_comm.record_calls import RecordCalls
from ep_comm.routing.types import RowLayout
from ep_comm.session import Session
from ep_comm.telemetry.watch import watch
from ep_comm.tracing import plain_tensor, unseen, untraced

# Of buffers that were dropped and not destroyed.
_kept: list[Backend] = []


def _keep(backend: Backend) -> None:
    """Keep the memory of a buffer that was dropped: other ranks, and kernels, may still use it."""
    if backend.buffer_bytes:
        _kept.append(backend)
        warnings.warn(
            "a Buffer was dropped without destroy(): its memory is kept until the process ends",
            ResourceWarning,
            stacklevel=2,
        )


class Buffer(MaskCalls, RecordCalls):
    """Expert-parallel communication of one process group.

    Names and meaning follow DeepEP's ``Buffer`` wherever the same thing exists. The constructor,
    `dispatch`, `combine` and `destroy` are collective: every rank of the group calls them, in the
    same order. With ``torch.utils.checkpoint(use_reentrant=False)`` a recomputation may stop early
    and leave a dispatch out on one rank only, for which the others then wait until the timeout:
    turn that off with ``set_checkpoint_early_stop(False)``. On GPUs a process first chooses its own
    with ``torch.cuda.set_device``. One thread at a time uses a buffer; a forked process makes its
    own.

    Args:
        group: Ranks that share the experts; None is the default group.
        config: Sizes and settings, equal on all ranks.

    Attributes:
        group: The ranks that share the experts.
        config: As passed.
        rank: This process's rank in the group.
        num_ranks: Number of ranks in the group.
        num_local_experts: Experts that each rank owns.
        passed_over: Why each faster backend than the chosen one was not taken, by name; of those
            for one host or for several.

    Raises:
        EPStateError: torch.distributed is not initialised, or a rank has no memory for it.
        EPArgumentError: `config` does not fit the group; two ranks have the same GPU; or a group of
            GPUs is on hosts that differ in the number or order of its ranks.
        EPUnsupportedError: A group of GPUs is on several hosts, and NVSHMEM is missing, or belongs
            to another group in this process.
        EPMismatchError: Ranks passed different configs.
        EPTimeoutError: A rank did not arrive within ``config.timeout_s``. (A rank that an operation
            has waited for for 30 s is named before, by a warning of the logger "ep_comm".)
    """

    _when_dropped: weakref.finalize | None = None

    def __init__(self, group: dist.ProcessGroup | None, config: EPConfig) -> None:
        if not isinstance(config, EPConfig):
            raise EPArgumentError(f"config must be an EPConfig, got {type(config).__name__}")
        self.group = checks.checked_group(group)
        self.config = config
        self.rank = dist.get_rank(self.group)
        self.num_ranks = dist.get_world_size(self.group)
        config.check_group(self.num_ranks)
        self.num_local_experts = config.num_experts // self.num_ranks
        store = default_store()
        run = run_name(store, self.rank)
        with torch.inference_mode(False):  # its memory is written to in any mode, to the end
            backend, self.passed_over, name = make_backend(self.group, config)
        identity = Identity(run, name, self.rank, self.num_ranks)
        self._roster = Roster(store, name, self.rank, self.num_ranks, config.timeout_s)
        blame = Blame(self._roster.store(), self.rank, self.num_ranks)
        self._session = Session(backend, config, identity=identity, blame=blame)
        watch(backend, self.rank, config.timeout_s)
        self._when_dropped = weakref.finalize(self, _keep, backend)
        self._when_dropped.atexit = False

    def __enter__(self) -> Buffer:
        """Return the buffer; the end of the block destroys it."""
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is not None:
            self._session.backend.give_up()  # the other ranks may know nothing of it
        self.destroy()

    def __repr__(self) -> str:
        state = "" if self.is_usable else f", unusable: {self._session.unusable}"
        return (
            f"Buffer(rank {self.rank} of {self.num_ranks}, {self.describe()}, "
            f"{self.config.num_experts} experts, at most {self.config.max_tokens_per_rank} tokens "
            f"of {self.config.hidden} {str(self.config.dtype).removeprefix('torch.')} a "
            f"rank{state})"
        )

    # --- the two operations ----------------------------------------------------------------------

    @untraced
    def dispatch(
        self,
        x: Payload,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        *,
        routing_map: Tensor | None = None,
        handle: DispatchHandle | None = None,
        layout: RowLayout | None = None,
        expert_alignment: int | None = None,
        wire_dtype: torch.dtype | None = None,
        recv_dtype: torch.dtype | None = None,
        num_worst_tokens: int | None = None,
        expert_capacity: int | None = None,
        overflow_stats: Tensor | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
        during_backward: Callable[[], None] | None = None,
    ) -> DispatchOutput:
        """Send each token once to every rank that owns one of its experts. Differentiable.

        ``torch.compile`` breaks its graph here, and at `combine`. Selective checkpointing may not
        save the result.

        Rows arrive bit for bit as they were sent, by source rank and then by token index; in the
        expert layout that is the order inside each local expert's group, a token standing in the
        group of every local expert it selected. Exactly one of `topk_idx`, `routing_map` and
        `handle` says where tokens go.

        Args:
            x: [T, hidden] BF16, FP16 or FP32 (no wider than ``config.dtype``), contiguous; or FP8
                rows with their scales, (``float8_e4m3fn`` [T, hidden], FP32 [T, hidden / 128]), see
                `ep_comm.fp8`.
            topk_idx: [T, K] int32 or int64, K at most ``config.num_topk``: distinct experts of
                each token; -1 drops an entry.
            topk_weights: FP32 probabilities to send along: [T, K], or [T, num_experts] with
                `routing_map`. They arrive with the rows, and their gradients come back.
            routing_map: [T, num_experts] bool, Megatron's form of the same; at most
                ``config.num_topk`` true entries a token.
            handle: Repeat the routing of an earlier dispatch (cached dispatch).
                `topk_weights` are then [T, K] of the handle's ``topk_idx``.
            layout: "expert", the default: rows grouped by local expert, each group padded with zero
                rows to `expert_alignment`. "rank": rows by source rank, with ``recv_topk_idx``, as
                in DeepEP. A cached dispatch has both from its handle.
            expert_alignment: Expert layout: rows of each group are a multiple of this. The default,
                16, is what Transformer Engine's FP8 GEMMs need.
            wire_dtype: None sends rows as they are; ``torch.float8_e4m3fn`` quantises BF16 or
                FP32 rows for the way; hidden must be a multiple of 128, over NVLink of 512.
            recv_dtype: Type of the received rows; None is x's own. With FP8 on the wire:
                ``float8_e4m3fn`` gives (rows, scales) as they came, BF16 or FP32 dequantises.
                Gradients of FP8 rows go to `DispatchOutput.recv_edge`.
            num_worst_tokens: Rows of the output, padding included. With R ranks and E experts on
                each, R max_tokens_per_rank min(K, E) + E (`expert_alignment` - 1) rows have room
                for all in any case; in the rank layout R max_tokens_per_rank do. The host then
                waits for nothing, so that the call can be captured in a CUDA graph; counts are on
                the device (`DispatchHandle.device_tokens_per_expert`), and rows behind the last
                group are padding. Rows for which there is no room are dropped, and the next call
                raises `EPOverflowError` (one for all that overflowed before it). A cached dispatch
                takes it from its handle.
            expert_capacity: Expert layout: rows of every local expert's group, padding included,
                however many tokens come. Stands for `num_worst_tokens` (E `expert_capacity`) and
                `expert_alignment`, which are left out, and is the same on all ranks. The host then
                knows all sizes in advance. Of a group that more tokens come to the last ones are
                dropped, those of other groups are not; the next call raises, as there.
            overflow_stats: Expert layout, with `expert_capacity` or `num_worst_tokens`: int32
                [2, E] on the device, E the experts of this rank. The tokens that each of them drops
                are added to the first row, and the second one keeps the most that came to it.
                Nothing is raised then.
            previous_event: The operation starts after this event.
            async_finish: Run on the communication stream; wait for the returned event before
                touching the outputs, or freeing them. No effect with the reference backend.
            allocate_on_comm_stream: The output tensors may be freed at any time, as if they
                belonged to the communication stream (not handle and event); needs `previous_event`
                and `async_finish`. No effect with the reference backend.
            during_backward: Called in this dispatch's backward while its combine is in flight:
                the place for work that does not need the combined gradient, such as weight
                gradients. Not called where neither `x` nor `topk_weights` requires grad.

        Returns:
            See `DispatchOutput`.

        Raises:
            EPArgumentError: Wrong arguments; nothing was sent.
            EPRoutingError: A wrong routing, or too many tokens on some rank.
            EPMismatchError: Another rank called something else.
            EPTimeoutError: A rank did not arrive within ``config.timeout_s``.
            EPStateError: The buffer failed earlier or was destroyed; or a rank is masked, or was
                since the handle was made.
            EPUnsupportedError: FP8 with scales that are no powers of two; capture in a CUDA graph
                without `num_worst_tokens`; a tensor without memory of its own, such as a DTensor;
                selective checkpointing that saves the result.
            EPOverflowError: An earlier dispatch dropped rows, see `num_worst_tokens`; said before
                anything is started, and once.
        """
        session = self._session
        session.check_usable()
        session.check_no_mask()
        checks.check_stream_arguments(previous_event, async_finish, allocate_on_comm_stream)
        checks.check_during_backward(during_backward)
        num_tokens = None
        if handle is not None:
            routing = checked_handle(handle, session).routing
            num_tokens = routing.num_tokens
        rows, scales = checks.checked_payload(x, num_tokens, self.config)
        session.backend.check_device("x", rows)
        wire, recv = checks.wire_and_recv_dtype(
            rows, scales, wire_dtype, recv_dtype, self.config.hidden
        )
        session.backend.check_wire_dtype(wire, recv)
        session.backend.check_ahead(rows, scales, wire)
        if previous_event is not None:  # what comes may copy an argument
            previous_event.order_current_stream()
        if handle is None:
            layout, expert_alignment, capacity = checks.checked_output(
                layout, expert_alignment, num_worst_tokens, expert_capacity, self.num_local_experts
            )
            source, num_topk = checks.checked_source(topk_idx, routing_map, rows, self.config)
            weights_shape = tuple(source.shape)
        else:
            checks.check_repeated(
                routing,
                topk_idx,
                routing_map,
                layout,
                expert_alignment,
                expert_capacity if num_worst_tokens is None else num_worst_tokens,
            )
            layout, expert_alignment, capacity = routing.layout, routing.expert_alignment, None
            weights_shape = routing.token_weights_shape
        overflow_stats = checks.checked_overflow_stats(
            overflow_stats,
            layout == "expert" and capacity is not None,
            self.num_local_experts,
            rows.device,
        )
        checks.check_scale_groups(recv, layout, expert_alignment)
        weights = checks.checked_weights(topk_weights, weights_shape, rows.device)
        request = DispatchRequest(rows, scales, weights, wire, recv, async_finish)
        ops.check_dispatch_not_saved(request)

        plan = None
        if handle is None:
            plan = PlanRequest(
                source=source,
                num_topk=num_topk,
                layout=layout,
                expert_alignment=expert_alignment,
                has_weights=weights is not None,
                capacity=capacity,
                expert_capacity=expert_capacity,
                overflow_stats=overflow_stats,
                asynchronous=async_finish,
            )

        def begin() -> DispatchHandle:
            """Plan, if the routing is new, right before the rows are sent: these wait for it."""
            nonlocal handle
            if plan is not None:
                with unseen():
                    handle = DispatchHandle(session=session, routing=backend.plan(plan))
            assert handle is not None  # the caller's, or that
            handle.during_backward = during_backward
            return handle

        with session.operation() as backend:
            of_all_experts = routing_map is not None and weights is not None
            received = ops.dispatch(backend, begin, request, of_all_experts=of_all_experts)
            assert handle is not None
            routing = handle.routing
            if allocate_on_comm_stream:
                backend.keep_for_comm_stream((*received[:3], routing.recv_topk_idx))
        recv_x: Payload = received.x
        if recv == FP8_DTYPE:
            assert received.scales is not None
            recv_x = (received.x, received.scales)
        return DispatchOutput(
            recv_x=recv_x,
            recv_topk_idx=routing.recv_topk_idx,
            recv_topk_weights=None if weights is None else received.topk_weights,
            num_recv_tokens_per_expert_list=(
                list(routing.sizes.padded_expert_rows) if routing.capacity is None else []
            ),
            handle=handle,
            event=handle.event if async_finish else EventOverlap(),
            recv_edge=received.recv_edge,
        )

    @untraced
    def begin_dispatch(self, x: Payload, *, wire_dtype: torch.dtype | None = None) -> None:
        """Begin to send rows while their routing is still computed; `dispatch` says the rest.

        With ``EPConfig(wire="copy-engine")`` all rows go to all ranks, whatever their routing. So
        they can be on their way while a router finds out whose they are. The next dispatch of this
        buffer has to be theirs. Other ranks may or may not begin theirs ahead: results are the
        same.

        Args:
            x: As `dispatch` will get it: the same memory, not written to until then, scales too.
            wire_dtype: As `dispatch` will get it.

        Raises:
            EPArgumentError: Wrong arguments; or rows were begun before, and their dispatch has not
                come. `dispatch` raises it where it gets something else than what was begun.
            EPUnsupportedError: The buffer's wire needs the routing first.
            EPStateError, EPOverflowError: As `dispatch`.
        """
        session = self._session
        session.check_usable()
        session.check_no_mask()
        rows, scales = checks.checked_payload(x, None, self.config)
        session.backend.check_device("x", rows)
        wire, recv = checks.wire_and_recv_dtype(rows, scales, wire_dtype, None, self.config.hidden)
        session.backend.check_wire_dtype(wire, recv)
        with session.operation() as backend:
            backend.begin(rows, scales, wire)

    @untraced
    def combine(
        self,
        x: Tensor,
        handle: DispatchHandle,
        topk_weights: Tensor | None = None,
        *,
        add_weights: bool = False,
        grad_wire_dtype: torch.dtype | None = None,
        take_grad: ops.TakeGrad | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> CombineOutput:
        """Sum the rows of each token back on the rank it came from. Differentiable.

        Unweighted: probabilities are the experts' business. The order of every sum is fixed, in
        FP32, rounded to x's dtype after each level: a token's experts on one rank ascending, the
        ranks of one node ascending, nodes ascending (``config.ranks_per_node``). Padding rows
        are never read.

        Args:
            x: Rows in the order that the dispatch gave them, BF16, FP16 or FP32, contiguous.
            handle: The dispatch's.
            topk_weights: FP32, as the dispatch gave them ([M] or [N, K]): scattered back to
                [T, K] without any sum. With their gradients this is the backward of dispatch.
            add_weights: Rank layout: add up `topk_weights` over a token's ranks, as DeepEP does, in
                the order of rows. Otherwise entry k comes from the rank that owns expert k, and
                what others have there is not read. Not differentiable.
            grad_wire_dtype: In the backward, which dispatches the gradient of `combined_x`: None
                sends its rows as they are; ``torch.float8_e4m3fn`` quantises them for the way, and
                they arrive dequantised, in x's dtype (hidden as for `dispatch`'s `wire_dtype`).
                Gradients of `topk_weights` stay FP32.
            take_grad: With FP8 `grad_wire_dtype`: called in the backward with the gradient of `x`
                as it came, FP8 rows [M, H] and scales as `dispatch` returns them, and with the
                tensor that autograd has for the gradient. **That one holds nothing**: whoever gets
                it has to take these rows instead. Not called where selective checkpointing looks
                on; then the gradient is an ordinary one.
            previous_event: As in `dispatch`.
            async_finish: As in `dispatch`.
            allocate_on_comm_stream: As in `dispatch`.

        Returns:
            See `CombineOutput`.

        Raises:
            As `dispatch`.
        """
        session = self._session
        session.check_usable()
        checks.check_stream_arguments(previous_event, async_finish, allocate_on_comm_stream)
        routing = checked_handle(handle, session).routing
        x = plain_tensor("x", x)
        checks.check_rows("x", x, routing.num_rows, self.config.hidden)
        session.backend.check_device("x", x)
        checks.check_row_dtype("x", x, self.config)
        weights = checks.checked_weights(topk_weights, routing.row_weights_shape, x.device)
        if add_weights:
            checks.check_add_weights(routing.layout, x, weights)
        grad_wire = checks.grad_wire_dtype(x, grad_wire_dtype, take_grad is not None)
        session.backend.check_wire_dtype(grad_wire, x.dtype if take_grad is None else FP8_DTYPE)
        if take_grad is not None:
            checks.check_scale_groups(FP8_DTYPE, routing.layout, routing.expert_alignment)
        if previous_event is not None:
            previous_event.order_current_stream()

        request = CombineRequest(x, weights, async_finish, add_weights)
        with session.operation() as backend:
            combined = ops.combine(backend, handle, request, grad_wire, take_grad)
            if allocate_on_comm_stream:
                backend.keep_for_comm_stream(combined)
        return CombineOutput(
            combined.x,
            None if weights is None else combined.topk_weights,
            handle.event if async_finish else EventOverlap(),
        )

    @staticmethod
    def capture() -> EventOverlap:
        """Return the current end of the current stream, to pass as `previous_event`."""
        on_gpu = torch.cuda.is_available()
        return EventOverlap.record(torch.device("cuda" if on_gpu else "cpu"))

    def set_num_sms(self, num_sms: int | None) -> None:
        """Limit the SMs that an operation's kernels occupy, all of them counted.

        Fewer leave more to computation running beside, and take longer (docs/performance.md). Two
        operations run at once, on two streams, where both fit on the GPU. Results do not depend on
        it, and ranks may differ. No effect with the reference backend.

        Args:
            num_sms: At least 2, between nodes 4; None is all of the GPU's. Of an operation that
                runs beside computation (`async_finish`, `during_backward`, `set_overlapped`) None
                is what costs GEMMs least by the measured prices of this kind of machine
                (docs/performance.md), or 24 where there are none. By these prices `during_backward`
                may run behind its combine instead of beside it; a number here keeps it beside.

        Raises:
            EPArgumentError: It is less than that, or the GPU has fewer.
        """
        self._session.check_usable()
        checks.check_num_sms(num_sms)
        self._session.backend.set_num_sms(num_sms)

    def set_overlapped(self, overlapped: bool) -> None:
        """Say that computation runs beside every operation, as beside asynchronous ones.

        For callers that overlap by streams of their own. From now on it decides how many SMs an
        operation takes, see `set_num_sms`, and nothing else.
        """
        self._session.check_usable()
        self._session.backend.set_overlapped(overlapped)

    def set_gemm_tiles(self, tiles: int | None) -> None:
        """Say how large the GEMM is that runs beside operations from now on.

        How many SMs cost it least depends on its waves. No effect where `set_num_sms` has set them.

        Args:
            tiles: Of 128 x 256 elements, of its output. None: not known.

        Raises:
            EPArgumentError: It is no positive integer.
        """
        self._session.check_usable()
        if tiles is not None:
            check_positive("tiles", tiles)
        self._session.backend.set_gemm_tiles(tiles)

    def overlap_loss(
        self, op: Literal["dispatch", "combine"], layout: RowLayout, num_tokens: int
    ) -> str | None:
        """Return why an operation is not to run beside GEMMs; None where it is.

        Args:
            op: "dispatch" or "combine", with rows of ``config.dtype``.
            layout: Order of the rows.
            num_tokens: Of this rank.
        """
        num_bytes = num_tokens * self.config.hidden * self.config.dtype.itemsize
        return self._session.backend.overlap_loss(op, layout, num_bytes)

    # --- state -----------------------------------------------------------------------------------

    @property
    def is_usable(self) -> bool:
        """False after `destroy`, and after an operation that failed until ranks are masked."""
        return self._session.unusable is None

    @property
    def buffer_bytes(self) -> int:
        """Device memory that the buffer holds beyond the outputs of operations."""
        return self._session.backend.buffer_bytes

    @property
    def comm_stream(self) -> torch.cuda.Stream | None:
        """Where operations with ``async_finish=True`` run; None with the reference backend."""
        return self._session.backend.comm_stream

    def describe(self) -> str:
        """Return backend and transport in a few words."""
        return self._session.backend.describe()

    def synchronize(self) -> None:
        """Wait on the host for all operations that were started.

        Graphs of them that were replayed on the current stream are waited for too.

        Over NVLink a call only starts its kernels, and an error of theirs is raised by a later
        call. Before results are trusted for good, as in a checkpoint, this one says it. Gradients
        are results: the kernels of a backward pass were started by it.

        Raises:
            EPTimeoutError, EPMismatchError, EPRoutingError: An operation ended early with it.
            EPOverflowError: See `dispatch`'s `num_worst_tokens`.
            EPStateError: The buffer failed earlier or was destroyed.
            EPUnsupportedError: The current stream is being captured in a CUDA graph.
        """
        with self._session.operation() as backend:
            backend.synchronize()

    def destroy(self) -> None:
        """Free the buffer. Collective; every later call raises `EPStateError`.

        One that failed waits for no other rank. One that did not waits for the others, for at most
        ``config.timeout_s``; where a rank does not come, a warning names it. Memory that another
        rank may still write to is never freed.

        Raises:
            EPError: An operation that was still in flight ended with it.
        """
        self._session.destroy()
        if self._when_dropped is not None:
            self._when_dropped.detach()
