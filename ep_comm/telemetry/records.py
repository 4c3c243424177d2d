"""Records of operations: the bytes that they moved, their time, and the ranks they waited for."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch

from ep_comm.telemetry.clocks import HOST, Clock, Origin

RING_LENGTH = 4096


class Records(Protocol):
    """The last operations of a buffer, and totals over its whole life.

    Attributes:
        is_backward: Whether operations from here on are those of a backward pass.
    """

    is_backward: bool

    @property
    def num_operations(self) -> int:
        """Dispatches and combines so far, low-latency ones too, replays of CUDA graphs not."""

    @property
    def wire_bytes(self) -> int:
        """Payload and scale bytes that left this rank so far."""

    def clock(self) -> Clock:
        """Return how the clock of `OpRecord.began_s` stands to the host's."""

    def origin(self) -> Origin:
        """Return a point of that clock to which spans of `timed` can be related."""

    def __iter__(self) -> Iterator[OpRecord]: ...

    def since(self, num_operations: int) -> list[OpRecord]:
        """Return the records of the operations after the first `num_operations`, oldest first."""


@dataclass(frozen=True)
class Interval:
    """A known time."""

    seconds: float


@dataclass(kw_only=True)
class OpRecord:
    """One dispatch or combine on one rank. Tuples are indexed by group rank.

    Attributes:
        op: "dispatch", "combine", "low_latency_dispatch" or "low_latency_combine"; of the reference
            backend also "plan", the exchange of a new dispatch's routing.
        epoch: Number of the operation among those of its kind on the buffer, from 1; warnings and
            errors call it "dispatch #3". A plan has that of its dispatch. On a GPU replays of CUDA
            graphs count.
        place: Number among all operations of the buffer, in the order of the calls.
        rows_to_rank: Token rows sent; the entry of the own rank counts rows that stayed.
            Of a low-latency dispatch over NVLink not known: see `rows_from_rank`.
        rows_from_rank: Of a low-latency dispatch over NVLink: token rows received.
        rows_of_experts: Of a dispatch: token rows that each local expert received, padding not
            counted. Empty where the host does not know: with `num_worst_tokens`, low latency.
        wire_bytes_to_rank: Payload and FP8 scale bytes that left this rank; own entry 0.
        wait_s_by_rank: Seconds that were waited for each rank. Reference backend: of the host
            until the rank's header was there, in rank order, or next to nothing where it was there
            before its turn; empty where the transport is asynchronous to the host. NVLink: the
            longest wait of any thread on the GPU; low latency: the wait for the rank's header.
        is_backward: Whether a backward pass called it.
        called_s: When the host called it, by `time.monotonic`.
        began_s: When it began, by the clock that `Records.clock` compares with that one; NaN of the
            reference backend over NCCL, which does not know.
    """

    op: str
    epoch: int
    place: int
    rows_to_rank: tuple[int, ...] = ()
    rows_from_rank: tuple[int, ...] = ()
    rows_of_experts: tuple[int, ...] = ()
    wire_bytes_to_rank: tuple[int, ...] = ()
    wait_s_by_rank: tuple[float, ...] = ()
    is_backward: bool = False
    called_s: float = math.nan
    began_s: float = math.nan
    span: TimedSpan | Interval | None = field(default=None, repr=False)

    @property
    def wire_bytes(self) -> int:
        """Payload and scale bytes that left this rank."""
        return sum(self.wire_bytes_to_rank)

    @property
    def seconds(self) -> float:
        """From the call (NVLink: from its first kernel) to the completed result, waiting for it."""
        return self.span.seconds if self.span else math.nan

    @property
    def slowest_rank(self) -> int | None:
        """The rank that was waited for longest, where that is known."""
        waits = self.wait_s_by_rank
        return max(range(len(waits)), key=waits.__getitem__) if any(waits) else None


class TimedSpan:
    """Time between two points: on the current stream of a GPU, on the host for a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = self._end = self._mark()

    def _mark(self) -> float | torch.cuda.Event:
        if self._device.type != "cuda":
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def stop(self) -> None:
        """Set the second point: now."""
        self._end = self._mark()

    @property
    def seconds(self) -> float:
        """Its length; waits for the end where that is on a stream."""
        if isinstance(self._start, torch.cuda.Event):
            assert isinstance(self._end, torch.cuda.Event)
            self._end.synchronize()
            return self._start.elapsed_time(self._end) / 1e3
        assert isinstance(self._end, float)
        return self._end - self._start

    def on_axis(self, origin: Origin) -> tuple[float, float]:
        """Return begin and end by the clock of `origin`, which is later; waits for the end."""
        seconds = self.seconds
        if origin.event is None:
            assert isinstance(self._end, float)
            return self._end - seconds, self._end
        assert isinstance(self._end, torch.cuda.Event)
        end = origin.seconds - self._end.elapsed_time(origin.event) / 1e3
        return end - seconds, end


class Recorder:
    """`Records` that the host writes.

    Attributes:
        num_started: Records opened, plans among them.
        num_operations: Dispatches and combines among them.
        is_backward: See `Records`.
    """

    def __init__(self) -> None:
        self.is_backward = False
        self._ring: deque[OpRecord] = deque(maxlen=RING_LENGTH)
        self._epochs: Counter[str] = Counter()
        self._first = 0
        self.num_started = 0
        self.num_operations = 0
        self.wire_bytes = 0

    @property
    def most_operations(self) -> int:
        """Of the kinds of operations the highest number so far."""
        return max(self._epochs.values(), default=self._first)

    def count_from(self, number: int) -> None:
        """Have the operations of each kind count on from `number`, the same on all ranks."""
        self._first = number
        self._epochs.clear()

    def clock(self) -> Clock:
        """Return the host's own."""
        return HOST

    def origin(self) -> Origin:
        """Return that of the host's clock."""
        return Origin(None, 0.0)

    def __iter__(self) -> Iterator[OpRecord]:
        return iter(self._ring)

    def since(self, num_operations: int) -> list[OpRecord]:
        """Return the records of the operations after the first `num_operations`, oldest first."""
        return [record for record in self._ring if record.place > num_operations]

    def start(self, op: str, device: torch.device) -> OpRecord:
        """Open the record of the next operation, or of the plan of the next dispatch."""
        self.num_started += 1
        is_plan = op == "plan"
        counted = "dispatch" if is_plan else op
        epoch, place = self._epochs.get(counted, self._first) + 1, self.num_operations + 1
        if not is_plan:
            self._epochs[op] = epoch
            self.num_operations = place
        return OpRecord(
            op=op,
            epoch=epoch,
            place=place,
            is_backward=self.is_backward,
            called_s=(now := time.monotonic()),
            began_s=now if device.type == "cpu" else math.nan,
            span=TimedSpan(device),
        )

    def finish(self, record: OpRecord) -> None:
        """Close `record`, once its result is complete or enqueued on the current stream."""
        assert isinstance(record.span, TimedSpan)  # `start` made it
        record.span.stop()
        self.wire_bytes += record.wire_bytes
        self._ring.append(record)


@contextmanager
def timed(device: torch.device) -> Iterator[TimedSpan]:
    """Time a block of code by the clock of operation records: read its `seconds` afterwards."""
    span = TimedSpan(device)
    yield span
    span.stop()
