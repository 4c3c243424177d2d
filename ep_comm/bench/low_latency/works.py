"""Operations that follow one another: what a graph holds, or what is called eagerly in a row.

Each says how long its operations took, from times that the GPU has noted. An operation lasts from
the end of the one before to its own end: so the times of a row add up to that of the row, and the
launch of a kernel behind another one is in them. A kernel's begin says less, for one that waits for
its predecessor on the GPU may begin early.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from ep_comm import Buffer, LowLatencyCombineOutput, LowLatencyDispatchOutput
from ep_comm._native import NativeLibrary, header
from ep_comm.backends.nvlink.low_latency import NVLinkLowLatency
from ep_comm.bench.low_latency import check
from ep_comm.bench.low_latency.inputs import NUM_SETS, InputSet
from ep_comm.bench.low_latency.settings import Point
from ep_comm.telemetry.device import DeviceRecorder
from ep_comm.telemetry.records import RING_LENGTH

REPEATS = 20  # of dispatch, or of dispatch and combine, in a row
BUSY_NS = 30_000  # of other work between phases
_BUSY_A_ROUND = 5
PHASES = ("send of dispatch", "receive of dispatch", "send of combine", "receive of combine")
ALL_PHASES = "four phases"

Durations = dict[str, Tensor]  # of each operation, in ns; of each the same number


class Calls:
    """Low-latency operations of one size.

    Args:
        buffer: Serves them.
        inputs: Rotated.
        point: Their size.
        fp8: Whether dispatch sends FP8.
    """

    def __init__(self, buffer: Buffer, inputs: list[InputSet], point: Point, fp8: bool) -> None:
        self.buffer = buffer
        self._inputs = inputs
        self._room = point.room
        self._fp8 = fp8

    def given(self, i: int) -> InputSet:
        """Return the inputs of the i-th call."""
        return self._inputs[i % NUM_SETS]

    def dispatch(
        self, i: int, own_weights: bool = False, split: bool = False
    ) -> LowLatencyDispatchOutput:
        """Dispatch the i-th inputs; with their weights, unless combine brings its own."""
        given = self.given(i)
        return self.buffer.low_latency_dispatch(
            given.x,
            given.topk_idx,
            self._room,
            self.buffer.config.num_experts,
            None if own_weights else given.topk_weights,
            use_fp8=self._fp8,
            return_recv_hook=split,
        )

    def combine(
        self,
        i: int,
        received: LowLatencyDispatchOutput,
        out: Tensor,
        own_weights: bool = False,
        split: bool = False,
    ) -> LowLatencyCombineOutput:
        """Combine what the experts made of the i-th dispatch."""
        given = self.given(i)
        return self.buffer.low_latency_combine(
            given.y,
            given.topk_idx,
            given.topk_weights if own_weights else None,
            received.handle,
            out=out,
            return_recv_hook=split,
        )


@contextmanager
def general_kernels(buffer: Buffer) -> Iterator[None]:
    """Have low-latency operations of a buffer over NVLink take the kernels for any sizes."""
    low_latency = buffer._session.backend.low_latency
    assert isinstance(low_latency, NVLinkLowLatency)
    for call in low_latency.calls:
        call.common.is_general = True
    try:
        yield
    finally:
        for call in low_latency.calls:
            call.common.is_general = False


class Work(Protocol):
    """A sequence of operations to be timed: each of them, and all of them as one."""

    num_stamps: int
    whole: str  # name of all its operations in turn, of which it has `REPEATS`
    is_gapless: bool  # nothing but these operations is in it

    def run(self) -> None:
        """Call or capture them all."""

    def reader(self) -> Callable[[Tensor], None]:
        """Return what copies the stamps of the next `run` to [num_stamps, 2]; before that run."""

    def durations(self, stamps: Tensor) -> Durations:
        """Return how long operations took on this rank; [rows, num_stamps, 2] begins and ends."""

    def kernels(self, stamps: Tensor) -> Durations:
        """Return the same of the kernels alone, from begin to end."""

    def poison(self) -> None:
        """Overwrite the results."""

    def wrong(self) -> int:
        """Return how many rows of the last results are wrong, on all ranks. Collective."""


class _Checked:
    """Results of a row: what its last dispatch gave, and what all of its combines gave.

    Args:
        calls: What to call.
        combines: Whether dispatches are combined.
    """

    def __init__(self, calls: Calls, combines: bool) -> None:
        self._calls = calls
        self._received: LowLatencyDispatchOutput | None = None
        num_combines = REPEATS if combines else 0
        self._combined = [torch.empty_like(calls.given(i).x) for i in range(num_combines)]

    def poison(self) -> None:
        """Overwrite the results."""
        assert self._received is not None
        check.poison_received(self._received)
        check.poison(*self._combined)

    def wrong(self) -> int:
        """Return how many rows of the last results are wrong, on all ranks. Collective."""
        assert self._received is not None
        given = self._calls.given
        return check.over_all_ranks(
            check.wrong_received(self._received, given(REPEATS - 1)),
            *(check.wrong_combined(out, given(i)) for i, out in enumerate(self._combined)),
        )


class _Recorded(_Checked):
    """A row whose times are in the records of a buffer's operations.

    Args:
        calls: What to call.
        names: Of the operations that are repeated.
        together: Name of all of them in turn.
    """

    is_gapless = True

    def __init__(self, calls: Calls, names: tuple[str, ...], together: str | None = None) -> None:
        super().__init__(calls, combines=together is not None)
        self._names = names
        self.whole = together or names[0]
        self.num_stamps = REPEATS * len(names)

    def reader(self) -> Callable[[Tensor], None]:
        """Copy times of the operations that come next."""
        records = self._calls.buffer.records
        assert isinstance(records, DeviceRecorder)  # only NVLink is measured on the GPU
        times_ns = records.times_ns
        first = records.num_operations
        places = torch.arange(first, first + self.num_stamps, device=times_ns.device)
        places %= RING_LENGTH

        def read(row: Tensor) -> None:
            torch.index_select(times_ns, 0, places, out=row)

        return read

    def durations(self, stamps: Tensor) -> Durations:
        """Return the times from end to end."""
        ends = stamps[..., 1]
        # Nothing is known to end just before the first of a row: the first round is left out.
        of_each = self._rounds(ends.diff(dim=1, prepend=ends[:, :1]))
        durations = {name: of_each[..., k].flatten() for k, name in enumerate(self._names)}
        return {**durations, self.whole: of_each.sum(dim=2).flatten()}

    def kernels(self, stamps: Tensor) -> Durations:
        """Return the times from begin to end."""
        of_each = self._rounds(stamps[..., 1] - stamps[..., 0])
        return {name: of_each[..., k].flatten() for k, name in enumerate(self._names)}

    def _rounds(self, of_each: Tensor) -> Tensor:
        return of_each.unflatten(1, (REPEATS, len(self._names)))[:, 1:]


class Dispatches(_Recorded):
    """Dispatches alone: none of them needs a combine."""

    def __init__(self, calls: Calls) -> None:
        super().__init__(calls, ("dispatch",))

    def run(self) -> None:
        """Call or capture them all."""
        for i in range(REPEATS):
            self._received = self._calls.dispatch(i)


class Pairs(_Recorded):
    """Dispatches and combines in turns.

    Args:
        calls: What to call.
        own_weights: Combine brings the weights; else they travel with the dispatch.
        general: By the kernels for any sizes, where there are others for these.
    """

    def __init__(self, calls: Calls, *, own_weights: bool = False, general: bool = False) -> None:
        says = ", own weights" * own_weights + ", general kernel" * general
        names = f"dispatch of a pair{says}", f"combine{says}"
        super().__init__(calls, names, together=f"dispatch + combine{says}")
        self._own_weights = own_weights
        self._kernels = general_kernels if general else nullcontext

    def run(self) -> None:
        """Call or capture them all."""
        with self._kernels(self._calls.buffer):
            for i, out in enumerate(self._combined):
                self._received = self._calls.dispatch(i, self._own_weights)
                self._calls.combine(i, self._received, out, self._own_weights)


class SplitPairs(_Checked):
    """The four phases with other work between, which notes when it began and ended.

    A phase lasts from the end of the work before to the begin of the work behind; of that the same
    time between two works with nothing between is taken off.

    Args:
        calls: What to call.
        native: The CUDA library.
        device: The GPU.
    """

    whole = ALL_PHASES
    is_gapless = False

    def __init__(self, calls: Calls, native: NativeLibrary, device: torch.device) -> None:
        super().__init__(calls, combines=True)
        self.num_stamps = REPEATS * _BUSY_A_ROUND + 1
        self._native = native
        self._device = device
        self._stamps = torch.zeros(self.num_stamps, 2, dtype=torch.int64, device=device)

    def run(self) -> None:
        """Call or capture them all."""
        stream = torch.cuda.current_stream(self._device).cuda_stream
        addresses = iter(
            range(self._stamps.data_ptr(), self._stamps.data_ptr() + self._stamps.nbytes, 16)
        )

        def busy() -> None:
            args = header.BusyArgs(stamps_ns=next(addresses), duration_ns=BUSY_NS)
            self._native.launch("ep_busy", args, stream)

        for i, out in enumerate(self._combined):
            busy()
            busy()
            received = self._received = self._calls.dispatch(i, split=True)
            busy()
            receive(received)
            busy()
            combined = self._calls.combine(i, received, out, split=True)
            busy()
            receive(combined)
        busy()

    def reader(self) -> Callable[[Tensor], None]:
        """Copy what the works between noted."""

        def read(row: Tensor) -> None:
            row.copy_(self._stamps)

        return read

    def durations(self, stamps: Tensor) -> Durations:
        """Return the phases' times, and of the four together."""
        between = stamps[:, 1:, 0] - stamps[:, :-1, 1]
        rounds = between.unflatten(1, (REPEATS, _BUSY_A_ROUND))[:, 1:]
        of_each = rounds[..., 1:] - rounds[..., 0].median()
        durations = {name: of_each[..., k].flatten() for k, name in enumerate(PHASES)}
        return {**durations, self.whole: of_each.sum(dim=2).flatten()}

    def kernels(self, stamps: Tensor) -> Durations:
        """Return nothing: a phase is one kernel."""
        return {}


def receive(out: LowLatencyDispatchOutput | LowLatencyCombineOutput) -> None:
    """Call the hook."""
    assert out.hook is not None  # it was asked for
    out.hook()
