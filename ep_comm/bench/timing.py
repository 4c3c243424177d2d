"""How a call is timed: on the GPU, with all ranks at once, taking the slowest."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from ep_comm.telemetry.records import Records, TimedSpan, timed

UNALIGNED_CALLS = 20
_UNALIGNED_REPEATS = 5
# About half a millisecond: more than the host needs to launch any of the measured calls.
_SPIN_CYCLES = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Times of one call in µs, each the slowest rank's.

    For what the ranks do together that is the slowest rank of each sample. For what each host does
    alone it is the rank with the largest median.

    Attributes:
        call: Public call: everything between the call and the complete result. The GPUs are
            aligned by a reduction just before; the queue is filled, so that the host runs ahead
            where it can, as in training.
        idle: The same call after host and GPU were idle: the host's time until its first launch is
            in it, and the wait for the rank whose host was slowest.
        host: Until a call of `call` returned to the host; of one that waits for the GPU that is in
            it, and so are earlier things in the queue.
        host_idle: Until a call of `idle` returned to the host.
        kernel: From the first kernel's begin to the last one's end, as the operation's record has
            it; empty where there is none.
        unaligned: One call of `UNALIGNED_CALLS` back to back.
    """

    call: tuple[float, ...]
    idle: tuple[float, ...]
    host: tuple[float, ...]
    host_idle: tuple[float, ...]
    kernel: tuple[float, ...]
    unaligned: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Median, least, and 90th percentile (the least sample that 90 % do not exceed)."""

    median: float
    min: float
    p90: float


def summarize(samples: Sequence[float]) -> Summary:
    """Return the summary of at least one sample."""
    p90 = float(np.percentile(samples, 90, method="inverted_cdf"))
    return Summary(median=statistics.median(samples), min=min(samples), p90=p90)


class Stopwatch:
    """Times calls on the current stream of a GPU (on a CPU: by the host's clock). Collective.

    Args:
        device: Where the calls run.
        iters: Samples of each time.
    """

    def __init__(self, device: torch.device, iters: int) -> None:
        self.device = device
        self._iters = iters
        self._token = torch.zeros(1, device=device)

    def measure(self, call: Callable[[int], object], records: Records | None = None) -> Samples:
        """Time ``call(i)`` for i = 0, 1, ...; it has to be warm.

        Args:
            call: One operation on the i-th inputs.
            records: Of the buffer, if `call` is one operation of it.
        """
        self._synchronize()
        before = records.num_operations if records else 0
        aligned = [self._sample(call, i, self.align) for i in range(self._iters)]
        # Of a new dispatch the reference backend has a record for its plan too.
        ended = [r for r in records.since(before) if r.op != "plan"] if records else []
        from_idle = [self._sample(call, i, self.align_from_idle) for i in range(self._iters)]
        in_a_row = [self.back_to_back(call, UNALIGNED_CALLS) for _ in range(_UNALIGNED_REPEATS)]
        return Samples(
            call=self.slowest([1e6 * span.seconds for span, _ in aligned]),
            idle=self.slowest([1e6 * span.seconds for span, _ in from_idle]),
            host=self.of_slowest([host_us for _, host_us in aligned]),
            host_idle=self.of_slowest([host_us for _, host_us in from_idle]),
            kernel=self.slowest([1e6 * record.seconds for record in ended]),
            unaligned=self.slowest(in_a_row),
        )

    def back_to_back(self, call: Callable[[int], object], count: int) -> float:
        """Return the µs of one of `count` calls with nothing between them, on this rank."""
        self.align_from_idle()
        with timed(self.device) as span:
            for i in range(count):
                call(i)
        return 1e6 * span.seconds / count

    def host_back_to_back(self, call: Callable[[int], object], count: int) -> float:
        """Return the µs that this rank's host is in one of `count` calls with nothing between them.

        The GPU is idle before. No other rank is waited for.
        """
        self._synchronize()
        start = time.perf_counter()
        for i in range(count):
            call(i)
        return 1e6 * (time.perf_counter() - start) / count

    def slowest(self, samples_us: list[float]) -> tuple[float, ...]:
        """Return each sample as the rank took for which it was longest."""
        samples = torch.tensor(samples_us, dtype=torch.float64, device=self.device)
        if samples_us:
            dist.all_reduce(samples, op=dist.ReduceOp.MAX)
        return tuple(samples.tolist())

    def of_slowest(self, samples_us: list[float]) -> tuple[float, ...]:
        """Return all samples of the rank whose median is largest."""
        mine = torch.tensor(samples_us, dtype=torch.float64, device=self.device)
        samples_RN = mine.new_empty(dist.get_world_size(), len(samples_us))
        dist.all_gather(list(samples_RN), mine)
        return tuple(max(samples_RN.tolist(), key=statistics.median))

    def align(self) -> None:
        """Let all GPUs begin what is launched next at the same time, the host ahead of them."""
        if self.device.type == "cuda":
            torch.cuda._sleep(_SPIN_CYCLES)
        dist.all_reduce(self._token)  # the GPUs come to it one by one, and leave it together

    def align_from_idle(self) -> None:
        """Align the GPUs after everything that was launched before is done."""
        self._synchronize()
        dist.all_reduce(self._token)

    def _sample(
        self, call: Callable[[int], object], i: int, align: Callable[[], None]
    ) -> tuple[TimedSpan, float]:
        """Return the span of one call, and its µs on the host."""
        align()
        with timed(self.device) as span:
            begin = time.perf_counter()
            call(i)
            host_us = (time.perf_counter() - begin) * 1e6
        return span, host_us

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
