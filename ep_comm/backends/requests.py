"""What a backend is asked for, and what it gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from ep_comm.events import EventOverlap
from ep_comm.fp8_low_latency import ScaleForm
from ep_comm.routing.types import RowLayout

Result = TypeVar("Result")

_DONE = EventOverlap()


class Pending(Generic[Result]):
    """An operation that was started.

    Args:
        result: Its result, which may be read after `event`.
        event: Its completion.
        finish: The rest of the host's work, which gives the result; None where there is none.
    """

    __slots__ = ("_finish", "_result", "event")

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
        if self.event is not _DONE:
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
