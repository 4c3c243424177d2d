"""The protocol of a backend: the one interface behind which tokens move."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ep_comm.config import EPConfig
from ep_comm.events import EventOverlap
from ep_comm.fp8_low_latency import ScaleForm
from ep_comm.job.meeting import Meeting
from ep_comm.routing.types import Routing, RowLayout
from ep_comm.telemetry.records import Records
from ep_comm.telemetry.watch import Wait
from ep_comm.topology import Spot

if TYPE_CHECKING:
    from typing_extensions import Self

Result = TypeVar("Result")


_DONE = EventOverlap()
NEEDS_COPY_ENGINES = "begin_dispatch needs EPConfig(wire='copy-engine')"


class Pending(Generic[Result]):
    """An operation that was started.

    Args:
        result: Its result, which may be read after `event`.
        event: Its completion.
        finish: The rest of the host's work, which gives the result; None where there is none.
    """

    def __init__(
        self,
        result: Result | None = None,
        event: EventOverlap | None = None,
        finish: Callable[[], Result] | None = None,
    ) -> None:
        self._result: Any = result  # what `finish` gives, once it was called
        self._finish = finish
        self.event = _DONE if event is None else event

    @property
    def result(self) -> Result:
        """The result; on a GPU it may be incomplete until `event`."""
        if self._finish is not None:
            self._result, self._finish = self._finish(), None
        return self._result

    def wait(self) -> Result:
        """Return the result, complete on the current stream."""
        result = self.result
        self.event.current_stream_wait()
        return result


class PlanRequest(NamedTuple):
    """A new dispatch, as far as its routing goes.

    Attributes:
        source: A topk_idx [T, K] or, where it is bool, a routing_map [T, num_experts].
        num_topk: K, of a map too.
        layout, expert_alignment: Order and padding of the received rows.
        has_weights: Whether probabilities travel. With a map the caller selects them by
            ``routing.topk_idx``, on its stream, between plan and dispatch.
        capacity: Rows of the output, where the host is not to wait for their number.
        expert_capacity: Rows of each local expert's group, padding counted: what does not fit is
            dropped. None: as many as come, padded.
        overflow_stats: See `ep_comm.Buffer.dispatch`.
        asynchronous: That of the dispatch that follows.
    """

    source: Tensor
    num_topk: int
    layout: RowLayout
    expert_alignment: int
    has_weights: bool
    capacity: int | None
    expert_capacity: int | None
    overflow_stats: Tensor | None
    asynchronous: bool


class DispatchRequest(NamedTuple):
    """Rows to send.

    Attributes:
        x: [T, H]; with `scales` it is FP8 already, else it is quantised where `wire_dtype` is FP8.
        scales: FP32 [T, H / 128], or None.
        topk_weights: FP32 [T, K], or None.
        wire_dtype: The type that travels.
        recv_dtype: The type that arrives. FP8 leaves rows and scales as they came; anything else
            dequantises. Scales of the expert layout come as `ep_comm.fp8.split_scales` takes them.
        asynchronous: Leave the current stream free, where the backend can.
    """

    x: Tensor
    scales: Tensor | None
    topk_weights: Tensor | None
    wire_dtype: torch.dtype
    recv_dtype: torch.dtype
    asynchronous: bool


class CombineRequest(NamedTuple):
    """Rows to sum.

    Attributes:
        x: The rows, in the order of the routing's layout.
        topk_weights: FP32 [M] or [N, K] to scatter back, or None.
        asynchronous: Leave the current stream free, where the backend can.
        adds_weights: Rank layout: add up the weights of all ranks of a token, in the order of rows;
            otherwise each comes from the rank that owns its expert.
    """

    x: Tensor
    topk_weights: Tensor | None
    asynchronous: bool
    adds_weights: bool = False


class Received(NamedTuple):
    """Rows, scales (FP8 only) and probabilities (where sent) in the routing's layout."""

    x: Tensor
    scales: Tensor | None
    topk_weights: Tensor | None


class Combined(NamedTuple):
    """Summed rows [T, H] and, where passed, scattered or added probabilities [T, K]."""

    x: Tensor
    topk_weights: Tensor | None


class LowLatencySizes(NamedTuple):
    """What low-latency dispatches that are alike have in common, and what is combined of them.

    Those of a decoding loop share one object: what is worked out from it need not be once more.

    Attributes:
        num_tokens: T, tokens of this rank.
        num_topk: K, experts a token.
        idx_bytes: Of an entry of ``topk_idx``: 4 or 8.
        max_tokens: M, equal on all ranks, at most ``config.low_latency_tokens``.
        scale_form: Of the FP8 that travels; None sends BF16.
        recv_shape: [E, R M, H] of the received rows, with R ranks and E experts on each.
        device: Of all tensors.
    """

    num_tokens: int
    num_topk: int
    idx_bytes: int
    max_tokens: int
    scale_form: ScaleForm | None
    recv_shape: tuple[int, ...]
    device: torch.device


# Made in half of a named tuple's time, and by position: with names it takes three times as long.
@dataclass(slots=True, eq=False)
class LowLatencyDispatchRequest:
    """Rows of a low-latency dispatch, and the tensors that its receive phase writes.

    Letters are those of `LowLatencySizes`.

    Attributes:
        sizes: What its tensors are.
        x: [T, H] BF16.
        topk_idx: [T, K] int32 or int64, -1 where dropped. Its content is not checked yet.
        topk_weights: FP32 [T, K] that travel with the rows, or None.
        recv_x: [E, R M, H] BF16 or FP8, contiguous.
        recv_scales: Where FP8 travels [E, R M, H / 128] FP32, or [E, R M, H / 512] int32. The
            strides are (columns x S, 1, S) with S = R M rounded up to a multiple of 4.
        recv_src_info: [E R M + `LowLatencyBackend.num_kept_ints`] int32: source rank x M + token of
            each row, and behind them what the dispatch leaves for its combine.
        recv_count: [E] int32, rows of each expert.
        recv_stats: [E] int32, to which the rows of each expert are added, or None.
        wait_stats: [R] int64, to which the nanoseconds waited for each rank are added, or None.
        is_split: The caller has other work between the phases: send only, and receive when
            `Pending.result` is asked for.
        asynchronous: Leave the current stream free, where the backend can. Never with `is_split`.
    """

    sizes: LowLatencySizes
    x: Tensor
    topk_idx: Tensor
    topk_weights: Tensor | None
    recv_x: Tensor
    recv_scales: Tensor | None
    recv_src_info: Tensor
    recv_count: Tensor
    recv_stats: Tensor | None
    wait_stats: Tensor | None
    is_split: bool
    asynchronous: bool

    @property
    def scale_form(self) -> ScaleForm | None:
        """That of `sizes`."""
        return self.sizes.scale_form

    @property
    def max_tokens(self) -> int:
        """That of `sizes`."""
        return self.sizes.max_tokens


@dataclass(slots=True, eq=False)
class LowLatencyCombineRequest:
    """Rows of a low-latency combine.

    Attributes:
        x: [E, R M, H] BF16, in the order of the dispatch.
        topk_weights: FP32 [T, K] that the send phase first brings to the experts' ranks; None where
            they travelled with the rows.
        out: [T, H] BF16, which the receive phase writes.
        wait_stats, is_split, asynchronous: As in `LowLatencyDispatchRequest`.
    """

    x: Tensor
    topk_weights: Tensor | None
    out: Tensor
    wait_stats: Tensor | None
    is_split: bool
    asynchronous: bool


class LowLatencyBackend(Protocol):
    """The low-latency operations of a backend. Arguments arrive checked.

    What every backend gives, bit by bit: `ep_comm.low_latency`. Both calls send. What they return
    receives when its `Pending.result` is asked for, which happens once, in any order among those
    that are out; where the request is not split, at once. Of each kind only the last two are out.
    """

    def num_kept_ints(self, max_tokens: int, num_topk: int) -> int:
        """Return how many int32 numbers a dispatch leaves on the device for its combine."""

    def dispatch(self, request: LowLatencyDispatchRequest) -> Pending[Any]:
        """Send rows.

        The result is what `combine` needs of the dispatch. It keeps its own memory, whatever is
        dispatched afterwards.
        """

    def combine(self, routing: Any, request: LowLatencyCombineRequest) -> Pending[None]:
        """Weight and sum rows, and send them to their tokens' owners.

        Args:
            routing: The result of a dispatch. It is combined again when the combine before was
                received.
            request: The rows, and where their sums go.
        """


class Backend(Protocol):
    """Moves tokens between the ranks of one group. Arguments arrive checked.

    Every backend gives the same bits (docs/architecture.md, "Numerics"). Every wait is bounded by
    ``config.timeout_s`` and raises `EPTimeoutError`.
    """

    name: str

    @property
    def recorder(self) -> Records:
        """The records that the buffer shows."""

    @classmethod
    def facts(cls, group: dist.ProcessGroup, config: EPConfig) -> object:
        """Return what other ranks need to know of this one to choose a backend (`job.codec`)."""

    @classmethod
    def unavailable_reason(cls, facts: list, spots: list[Spot], config: EPConfig) -> str | None:
        """Return why this backend cannot serve a group, or None where it can.

        Args:
            facts: Those of every rank, by group rank.
            spots: Where they are.
            config: The buffer's.

        Raises:
            EPArgumentError: The group is not as any buffer of its kind needs it.
        """

    @classmethod
    def create(
        cls, group: dist.ProcessGroup, config: EPConfig, meeting: Meeting, spots: list[Spot]
    ) -> Self:
        """Make the backend of one buffer, whose ranks met at `meeting`. Collective.

        Raises:
            EPUnsupportedError: Something that has to be installed, or to be otherwise, is not.
        """

    @property
    def low_latency(self) -> LowLatencyBackend | None:
        """Its low-latency operations; None where it has none, or ``config`` asks for none."""

    @property
    def buffer_bytes(self) -> int:
        """Device memory held beyond the outputs of operations."""

    @property
    def comm_stream(self) -> torch.cuda.Stream | None:
        """Where asynchronous operations run; None where that is the caller's stream."""

    @property
    def num_started(self) -> int:
        """Operations started, which other ranks may be waiting for."""

    @property
    def has_failed(self) -> bool:
        """Whether ranks may have given an operation up halfway: no other one can be trusted."""

    def waits(self) -> list[Wait]:
        """Return whom this rank waits for now. No call of CUDA; from any thread."""

    def describe(self) -> str:
        """Return the backend and its transport in a few words, for the start-up line."""

    def set_num_sms(self, num_sms: int | None) -> None:
        """Limit the SMs of an operation, where the backend has kernels of its own."""

    def set_overlapped(self, overlapped: bool) -> None:
        """Note whether computation runs beside every operation, asynchronous or not."""

    def set_gemm_tiles(self, tiles: int | None) -> None:
        """Note the size of the GEMM beside operations, where that makes a difference.

        Args:
            tiles: Of its output; None where nobody has said.
        """

    def overlap_loss(self, op: str, layout: RowLayout, num_bytes: int) -> str | None:
        """Return why an operation is not to run beside GEMMs; None where it is.

        Args:
            op: "dispatch" or "combine".
            layout: Order of its rows.
            num_bytes: Tokens of this rank times bytes of a row.
        """

    def check_device(self, name: str, rows: Tensor) -> None:
        """Refuse `rows` that it cannot send from where they are; `name` is for the message."""

    def check_wire_dtype(self, wire_dtype: torch.dtype, recv_dtype: torch.dtype) -> None:
        """Refuse rows that cannot travel as `wire_dtype` and arrive as `recv_dtype`."""

    def begin(self, x: Tensor, scales: Tensor | None, wire_dtype: torch.dtype) -> None:
        """Begin to send rows whose routing is not known yet; their dispatch follows.

        Raises:
            EPArgumentError: Others are begun, and their dispatch has not come.
            EPUnsupportedError: This backend, or its wire, needs the routing.
        """

    def check_ahead(self, x: Tensor, scales: Tensor | None, wire_dtype: torch.dtype) -> None:
        """Refuse a dispatch of `x` where `begin` was called with something else.

        Raises:
            EPArgumentError: Says what is different.
        """

    def plan(self, request: PlanRequest) -> Routing:
        """Exchange the routing of a new dispatch.

        A dispatch with the routing follows at once. Bad content of the routing raises here, or,
        where the device has to find it, in that dispatch, once the other ranks have what they
        wait for.
        """

    def dispatch(self, routing: Any, request: DispatchRequest) -> Pending[Received]:
        """Send rows along a routing of this backend."""

    def combine(self, routing: Any, request: CombineRequest) -> Pending[Combined]:
        """Sum rows back to their tokens' owners, and scatter probabilities."""

    def synchronize(self) -> None:
        """Wait on the host for what was started; raise what ended it early."""

    def keep_for_comm_stream(self, tensors: Iterable[Tensor | None]) -> None:
        """Let the outputs of an asynchronous operation be freed at any time.

        Their memory is not used again before the operation is done.
        """

    def quiesce(self) -> int:
        """Have all that was started end, whatever has become of it.

        Returns:
            The highest number that an operation of this rank may have.

        Raises:
            EPUnsupportedError: The backend cannot mask ranks here, or not now.
        """

    def restart(self, masked: tuple[int, ...], first: int, store: dist.Store) -> None:
        """Begin anew without `masked`: nothing of before is ever taken for anything of after.

        Called behind `quiesce`, when it is behind it on all other ranks that go on. They call
        this too, and no operation begins before it has ended on all.

        Args:
            masked: Ranks that low-latency operations go on without. Nothing is sent to them or
                waited for; what they still send is never looked at.
            first: Low-latency operations count on from this number. It is even, the same on all
                ranks, and higher than any that `quiesce` gave.
            store: Of the ranks that go on, for this alone.
        """

    def give_up(self) -> None:
        """Have `destroy` wait for nobody: this rank failed, and others may not know of it."""

    def abandon(self) -> None:
        """Order the current stream behind what was started, after an error.

        The memory that it uses is about to be freed.
        """

    def destroy(self) -> None:
        """Free what the backend holds. Collective."""
