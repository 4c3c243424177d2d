"""Records of NVLink operations: written by kernels and what launches them, read on request."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ep_comm import _native
from ep_comm._native import header
from ep_comm.telemetry.clocks import Clock, Origin, gpu_origin, read_gpu_clock
from ep_comm.telemetry.records import RING_LENGTH, Interval, OpRecord

_RECORD_BYTES = ctypes.sizeof(header.Record)
OP_NAMES = {
    header.EP_OP_DISPATCH: "dispatch",
    header.EP_OP_COMBINE: "combine",
    header.EP_OP_LOW_LATENCY_DISPATCH: "low_latency_dispatch",
    header.EP_OP_LOW_LATENCY_COMBINE: "low_latency_combine",
}
_DISPATCH = header.EP_OP_DISPATCH


class RecordAddresses(NamedTuple):
    """Addresses that kernels, and what launches them, write records to.

    Attributes:
        wire_bytes: Address at which kernels add up the bytes that they send.
        call_offset: From an operation's record to what the library notes of its call.
    """

    wire_bytes: int
    call_offset: int


class _Started(NamedTuple):
    """What the host knows of an operation; see `OpRecord`."""

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

    The host's part costs each operation, so it is a few stores. An object that is thousands of
    operations old is in no cache any more, and to free it takes longer than all the rest: so the
    counts of a new dispatch are one, not one for each expert. The library notes the time of a call
    when it launches a kernel, see ``csrc/common/calls.cuh``.

    Attributes:
        num_operations: How many were started.
        num_dispatches: Those among them that were dispatches, since `restart`. The host knows of no
            replays.
        is_backward: Whether what starts next is part of a backward pass.
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
        self.num_dispatches = 0
        self.is_backward = False
        self._rank = rank
        self._num_ranks = num_ranks
        self._synchronize = synchronize
        self._record_bytes = record_bytes
        self._ring = torch.zeros(RING_LENGTH, record_bytes, dtype=torch.uint8, device=device)
        self._wire_bytes = torch.zeros((), dtype=torch.int64, device=device)
        self._address = self._ring.data_ptr()
        # As far apart as the records, so that there is one offset from any of these.
        self._calls = bytearray(RING_LENGTH * record_bytes)
        self._called_ns = self._noted("called_ns")
        self._row_bytes = self._noted("row_bytes")
        # EP_OP_*, negative where it is of a backward. Of what a list can hold small numbers are
        # written fastest: Python has one object for each.
        self._ops = [0] * RING_LENGTH
        self._rows_of_experts = [b""] * RING_LENGTH  # of dispatches; what others have is older

    def _noted(self, name: str) -> memoryview:
        """Return a field of all calls. To write to one of it makes no object."""
        field = getattr(header.Call, name)
        numbers = memoryview(self._calls).cast("q" if field.size == 8 else "i")
        return numbers[field.offset // field.size :: self._record_bytes // field.size]

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
    def addresses(self) -> RecordAddresses:
        """For kernels, and for what launches them."""
        calls = ctypes.addressof(ctypes.c_char.from_buffer(self._calls))
        return RecordAddresses(self._wire_bytes.data_ptr(), calls - self._address)

    @property
    def wire_bytes(self) -> int:
        """Payload and scale bytes that left this rank so far; waits for the operations.

        Without those of low-latency operations, which count no bytes.
        """
        self._synchronize()
        return int(self._wire_bytes)

    def start(self, op: int, rows_of_experts: bytes = b"") -> int:
        """Return the address of the next operation's record.

        Args:
            op: Its kind, EP_OP_*.
            rows_of_experts: Of a dispatch, in int32; see `OpRecord`.
        """
        slot = self.num_operations % RING_LENGTH
        self.num_operations += 1
        self._ops[slot] = -op if self.is_backward else op
        if op == _DISPATCH:
            self.num_dispatches += 1
            self._rows_of_experts[slot] = rows_of_experts
        return self._address + slot * self._record_bytes

    def restart(self) -> None:
        """Count dispatches anew, as the device does."""
        self.num_dispatches = 0

    def complete(
        self, row_bytes: int, rows_of_experts: bytes = b"", number: int | None = None
    ) -> None:
        """Say of an operation what was not known when its first kernel was launched.

        Called after that launch, which notes other row bytes.

        Args:
            row_bytes: Of each of its rows, with its scales.
            rows_of_experts: As in `start`.
            number: Counts the buffer's operations from 1; None is the last one.
        """
        place = self.num_operations if number is None else number
        if place > self.num_operations - RING_LENGTH:  # else a later one stands there
            slot = (place - 1) % RING_LENGTH
            self._rows_of_experts[slot] = rows_of_experts
            self._row_bytes[slot] = row_bytes

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
        oldest = max(num_operations, self.num_operations - RING_LENGTH, 0)
        started = list(self._started(oldest))
        if not started:
            return []
        self._synchronize()
        slots = torch.tensor([(entry.place - 1) % RING_LENGTH for entry in started], device="cpu")
        rows = self._ring[slots.to(self._ring.device)].cpu().numpy()
        return [
            self._record(entry, row.tobytes()) for entry, row in zip(started, rows, strict=True)
        ]

    def _started(self, oldest: int) -> Iterator[_Started]:
        """Yield what the host knows of the operations after the first `oldest`."""
        has_one_before = oldest > self.num_operations - RING_LENGTH and oldest > 0
        before_ns = self._called_ns[(oldest - 1) % RING_LENGTH] if has_one_before else 0
        for place in range(oldest + 1, self.num_operations + 1):
            slot = (place - 1) % RING_LENGTH
            called_ns, op = self._called_ns[slot], self._ops[slot]
            # Where a launch was refused an older operation's is still there.
            is_noted = called_ns > before_ns
            before_ns = max(before_ns, called_ns)
            rows = self._rows_of_experts[slot] if abs(op) == _DISPATCH else b""
            yield _Started(
                op=OP_NAMES[abs(op)],
                place=place,
                is_backward=op < 0,
                called_s=called_ns / 1e9 if is_noted else math.nan,
                row_bytes=self._row_bytes[slot],
                rows_of_experts=tuple(memoryview(rows).cast("i")),
            )

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
