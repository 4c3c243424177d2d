"""What each operation moved, how long it took and whom it waited for."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

RING_LENGTH = 4096


@dataclass(kw_only=True)
class OpRecord:
    """One dispatch or combine on one rank. Tuples are indexed by group rank.

    Attributes:
        op: "dispatch" or "combine"; of the reference backend also "plan", the exchange of a new
            dispatch's routing, which has a number of its own.
        epoch: Number of the operation on its buffer, from 1.
        rows_to_rank: Token rows sent; the entry of the own rank counts rows that stayed.
        wire_bytes_to_rank: Payload and FP8 scale bytes that left this rank; own entry 0.
        metadata_bytes: Headers, routing and probabilities that left this rank.
        wait_s_by_rank: Host seconds until each rank's header was there, waited for in rank order;
            empty where the transport is asynchronous to the host.
    """

    op: str
    epoch: int
    rows_to_rank: tuple[int, ...] = ()
    wire_bytes_to_rank: tuple[int, ...] = ()
    metadata_bytes: int = 0
    wait_s_by_rank: tuple[float, ...] = ()
    _span: _Span | None = field(default=None, repr=False)

    @property
    def wire_bytes(self) -> int:
        """Payload and scale bytes that left this rank."""
        return sum(self.wire_bytes_to_rank)

    @property
    def seconds(self) -> float:
        """From the call to the completed result, waiting for it; NaN if it was not timed."""
        return self._span.seconds if self._span else math.nan

    @property
    def slowest_rank(self) -> int | None:
        """The rank that was waited for longest, where that is known."""
        waits = self.wait_s_by_rank
        return max(range(len(waits)), key=waits.__getitem__) if any(waits) else None


class _Span:
    """Time between two points: on the stream for CUDA, on the host for CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = self._mark()
        self._end: float | torch.cuda.Event = self._start

    def _mark(self) -> float | torch.cuda.Event:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def stop(self) -> None:
        self._end = self._mark()

    @property
    def seconds(self) -> float:
        if isinstance(self._start, float):
            return self._end - self._start
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1e3


class Recorder:
    """The last `RING_LENGTH` records of a buffer, and totals over its whole life.

    Attributes:
        num_operations: Operations so far.
        wire_bytes: Payload and scale bytes that left this rank so far.
        timed: Whether operations from now on get their `OpRecord.seconds`: on a GPU that costs two
            events each.
    """

    def __init__(self, timed: bool = True) -> None:
        self.timed = timed
        self._ring: deque[OpRecord] = deque(maxlen=RING_LENGTH)
        self.num_operations = 0
        self.wire_bytes = 0

    def __iter__(self) -> Iterator[OpRecord]:
        return iter(self._ring)

    def since(self, epoch: int) -> list[OpRecord]:
        """Records of operations after number `epoch`, oldest first."""
        return [record for record in self._ring if record.epoch > epoch]

    def start(self, op: str, device: torch.device) -> OpRecord:
        """Open the record of the next operation."""
        self.num_operations += 1
        span = _Span(device) if self.timed else None
        return OpRecord(op=op, epoch=self.num_operations, _span=span)

    def finish(self, record: OpRecord) -> None:
        """Close `record`, once its result is complete or enqueued on the current stream."""
        if record._span is not None:
            record._span.stop()
        self.wire_bytes += record.wire_bytes
        self._ring.append(record)


@contextmanager
def timed(device: torch.device) -> Iterator[_Span]:
    """Time a block of code by the same clock as operation records: ``span.seconds`` afterwards."""
    span = _Span(device)
    yield span
    span.stop()
