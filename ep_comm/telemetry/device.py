"""Records of NVLink operations: written by kernels, read when somebody asks."""

from __future__ import annotations

import ctypes
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle, islice
from time import monotonic
from typing import NamedTuple

import torch
from torch import Tensor

from ep_comm import _native
from ep_comm._native import header
from ep_comm.telemetry.clocks import Clock, Origin, gpu_origin, read_gpu_clock
from ep_comm.telemetry.records import RING_LENGTH, Interval, OpRecord

_RECORD_BYTES = ctypes.sizeof(header.Record)


class _Started(NamedTuple):
    """What the host knows of an operation; see `OpRecord`.

    It is kept as a plain tuple: to make one of these costs a call more than all the rest.
    """

    op: str
    place: int
    is_backward: bool
    called_s: float
    row_bytes: int
    rows_of_experts: tuple[int, ...]


class DeviceRecorder:
    """The last `RING_LENGTH` operations of a buffer, in a ring in device memory.

    See `ep_comm.telemetry.records.Records`, whose interface this is. A captured operation has the
    numbers of its graph's last replay. Reading waits for the operations.
    """

    def __init__(
        self,
        rank: int,
        num_ranks: int,
        device: torch.device,
        synchronize: Callable[[], None],
        record_bytes: int = _RECORD_BYTES,
    ) -> None:
        self.num_operations = 0
        self.is_backward = False
        self._epochs: defaultdict[str, int] = defaultdict(int)
        self._rank = rank
        self._num_ranks = num_ranks
        self._synchronize = synchronize
        self._ring = torch.zeros(RING_LENGTH, record_bytes, dtype=torch.uint8, device=device)
        self._wire_bytes = torch.zeros((), dtype=torch.int64, device=device)
        self._started: deque[tuple] = deque(maxlen=RING_LENGTH)
        # Looked up once, so that `start` costs an operation a quarter of a microsecond.
        self._note = self._started.append
        first = self._ring.data_ptr()
        end = first + RING_LENGTH * record_bytes
        self._next_address = cycle(range(first, end, record_bytes)).__next__

    @property
    def num_bytes(self) -> int:
        """Device memory of the ring."""
        return self._ring.numel()

    @property
    def times_ns(self) -> Tensor:
        """[RING_LENGTH, 2] int64 on the device: when each operation began and ended.

        By the GPU's clock. The n-th operation of the buffer, from 0, stands in row
        n % RING_LENGTH. Nothing is waited for: these are the numbers of operations that are done.
        """
        begin, end = (getattr(header.Record, name).offset // 8 for name in ("begin_ns", "end_ns"))
        assert end == begin + 1
        return self._ring.view(torch.int64)[:, begin : end + 1]

    @property
    def wire_bytes_address(self) -> int:
        """Where kernels add up `wire_bytes`, in device memory."""
        return self._wire_bytes.data_ptr()

    @property
    def wire_bytes(self) -> int:
        """Payload and scale bytes that left this rank so far; waits for the operations.

        Without those of low-latency operations, which count no bytes.
        """
        self._synchronize()
        return int(self._wire_bytes)

    def start(self, op: str, row_bytes: int, rows_of_experts: tuple[int, ...] = ()) -> int:
        """Return the address of the next operation's record.

        Args:
            op: Its kind.
            row_bytes: Of each of its rows.
            rows_of_experts: See `OpRecord`.
        """
        self.num_operations = number = self.num_operations + 1
        self._epochs[op] += 1
        self._note((op, number, self.is_backward, monotonic(), row_bytes, rows_of_experts))
        return self._next_address()

    def restart(self) -> None:
        """Count the operations of each kind anew, as the device does."""
        self._epochs.clear()

    def epoch(self, op: str) -> int:
        """Return the number of the last operation of that kind; the host knows of no replays."""
        return self._epochs[op]

    def complete(
        self, row_bytes: int, rows_of_experts: tuple[int, ...], number: int | None = None
    ) -> None:
        """Say of an operation what was not known when it started; see `start`.

        `number` counts the buffer's operations from 1; None is the last one.
        """
        place = -1 if number is None else number - self.num_operations - 1
        if -place <= len(self._started):  # else later ones have taken its place
            self._started[place] = (*self._started[place][:4], row_bytes, rows_of_experts)

    def clock(self) -> Clock:
        """Compare the GPU's clock with the host's; waits for the GPU."""
        native = _native.load()
        assert native is not None  # or there were no operations on a GPU
        return read_gpu_clock(native, self._ring.device)

    def origin(self) -> Origin:
        """Relate the GPU's clock to events; waits for the current stream."""
        native = _native.load()
        assert native is not None
        return gpu_origin(native, self._ring.device)

    def __iter__(self) -> Iterator[OpRecord]:
        return iter(self.since(0))

    def since(self, num_operations: int) -> list[OpRecord]:
        """Return the records of the operations after the first `num_operations`, oldest first."""
        # Places follow one another: those asked for are the last ones, of many.
        num_before = len(self._started) - max(0, self.num_operations - num_operations)
        new = islice(self._started, max(0, num_before), None)
        started = list(map(_Started._make, new))
        if not started:
            return []
        self._synchronize()
        slots = torch.tensor([(entry.place - 1) % RING_LENGTH for entry in started], device="cpu")
        rows = self._ring[slots.to(self._ring.device)].cpu().numpy()
        return [
            self._record(entry, row.tobytes()) for entry, row in zip(started, rows, strict=True)
        ]

    def _record(self, started: _Started, raw: bytes) -> OpRecord:
        op, place, is_backward, called_s, row_bytes, rows_of_experts = started
        record = header.Record.from_buffer_copy(raw)
        rows, waits_ns = self._by_rank(raw)
        waits = [wait / 1e9 for wait in waits_ns]
        waits[self._rank] = 0.0  # its own blocks, for one another
        result = OpRecord(
            op=op,
            epoch=record.epoch,
            place=place,
            wait_s_by_rank=tuple(waits),
            is_backward=is_backward,
            called_s=called_s,
            began_s=record.begin_ns / 1e9,
            span=Interval((record.end_ns - record.begin_ns) / 1e9),
            rows_of_experts=rows_of_experts,
        )
        if op == "low_latency_dispatch":
            return replace(result, rows_from_rank=rows)
        wire_bytes = tuple(
            0 if r == self._rank else count * row_bytes for r, count in enumerate(rows)
        )
        return replace(result, rows_to_rank=rows, wire_bytes_to_rank=wire_bytes)

    def _by_rank(self, raw: bytes) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the rows counted for each rank, and the nanoseconds waited for it."""
        record = header.Record.from_buffer_copy(raw)
        num_ranks = self._num_ranks
        return tuple(record.num_rows[:num_ranks]), tuple(record.longest_wait_ns[:num_ranks])
