"""How long low-latency operations take: on the GPU, replayed or eager, and on the host.

Ranks are never aligned between the replays of a graph: each begins as soon as its own GPU is done
with the one before. A sample is the slowest rank's, operation by operation. The first round of a
row is left out: what comes before it is no operation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ep_comm._native import NativeLibrary, header
from ep_comm.bench.low_latency.settings import MIN_REPLAYS
from ep_comm.bench.low_latency.works import REPEATS, Calls, Work, receive
from ep_comm.bench.timing import Stopwatch

HOST_CALLS = ("dispatch", "hook of dispatch", "combine", "hook of combine")
_WARM_REPLAYS = 5
_EAGER_ROUNDS = 25
_HOST_ROUNDS = 10
_MEAN_SHARE = 5  # of so many replays one more is for the mean
_GAPS_SHARE = 5  # of so many replays one is made of what has gaps
_SPARE_NS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Times:
    """Median, 99th percentile (the least sample that 99 % do not exceed) and maximum, in µs.

    Attributes:
        samples: How many there were.
    """

    p50: float
    p99: float
    max: float
    samples: int

    @classmethod
    def of(cls, samples_us: Sequence[float] | np.ndarray) -> Times:
        """Summarise at least one sample."""
        p50, p99 = np.percentile(samples_us, (50, 99), method="inverted_cdf")
        return cls(p50=float(p50), p99=float(p99), max=float(np.max(samples_us)),
                   samples=len(samples_us))  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the GPU needed for a row of operations.

    Attributes:
        times: Of each operation.
        kernels: Of their kernels alone, from begin to end.
        mean_us: Of a round by CUDA events around many replays, what lies between them included;
            None where it is not known.
        step_ns: Step of the GPU's clock, as its values show it.
    """

    times: dict[str, Times]
    kernels: dict[str, Times]
    mean_us: float | None
    step_ns: int


class GpuClock:
    """Times rows of operations on the current stream of a GPU. Collective.

    Args:
        watch: Of the same GPU.
        native: The CUDA library.
        replays: Of each graph.
    """

    def __init__(self, watch: Stopwatch, native: NativeLibrary, replays: int) -> None:
        self._watch = watch
        self._device = watch.device
        self._native = native
        self._replays = replays
        self._token = torch.zeros(1, device=self._device)

    def replayed(self, work: Work) -> Measured:
        """Capture a row in a graph, and time its replays. Results are poisoned before these."""
        work.run()  # warm
        read = work.reader()
        graph = captured(work.run)
        # Other work between makes a replay long, and does not make it say more.
        share = 1 if work.is_gapless else _GAPS_SHARE
        stamps = self._empty_stamps(max(MIN_REPLAYS, self._replays // share), work)
        work.poison()
        for _ in range(_WARM_REPLAYS):
            graph.replay()
        mean_us = None
        if work.is_gapless:
            count = max(1, self._replays // _MEAN_SHARE)
            mean_us = self._mean_us(graph.replay, count) / REPEATS
        for row in stamps:
            graph.replay()
            read(row)
        return self._measured(work, stamps, mean_us)

    def eager(self, work: Work) -> Measured | None:
        """Time a row that is called; None where the host could not keep the GPU's queue filled."""
        work.poison()
        stamps = self._empty_stamps(_EAGER_ROUNDS, work)
        busy_ns = self._host_ns(work.run)
        was_filled = []
        for row in stamps:
            read = work.reader()
            begun = self._fill_queue(busy_ns)
            work.run()
            was_filled.append(not begun.query())
            read(row)
        filled = torch.tensor(was_filled, dtype=torch.int32, device=self._device)
        dist.all_reduce(filled, op=dist.ReduceOp.MIN)
        return self._measured(work, stamps[filled.bool()], None) if filled.any() else None

    def replayed_by_events(self, call: Callable[[], None]) -> Times:
        """Time one of the calls in a graph of `REPEATS`: the mean of each replay."""
        call()  # warm
        graph = captured(lambda: _repeat(call))
        for _ in range(_WARM_REPLAYS):
            graph.replay()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(self._replays + 1)]
        events[0].record()
        for event in events[1:]:
            graph.replay()
            event.record()
        return self._of_events(events)

    def eager_by_events(self, call: Callable[[], None]) -> Times:
        """Time one of `REPEATS` calls in a row, with the queue filled: the mean of each row."""
        busy_ns = self._host_ns(lambda: _repeat(call))
        samples_us = []
        for _ in range(_EAGER_ROUNDS):
            self._fill_queue(busy_ns)
            samples_us.append(self._mean_us(lambda: _repeat(call), 1) / REPEATS)
        return Times.of(self._watch.slowest(samples_us))

    def host(self, calls: Calls) -> dict[str, Times]:
        """Time the four calls of the phases on the host, with the GPU's queue filled."""
        busy_ns = self._host_ns(lambda: host_round(calls))
        rounds = []
        for _ in range(_HOST_ROUNDS):
            self._fill_queue(busy_ns)
            rounds.append(host_round(calls))
        return host_times(self._watch, rounds)

    def _fill_queue(self, busy_ns: int) -> torch.cuda.Event:
        """Keep the GPU busy for so long; let all GPUs then begin together: at the event."""
        torch.cuda.synchronize(self._device)
        stream = torch.cuda.current_stream(self._device).cuda_stream
        self._native.launch("ep_busy", header.BusyArgs(duration_ns=busy_ns), stream)
        dist.all_reduce(self._token)
        begun = torch.cuda.Event()
        begun.record()
        return begun

    def _host_ns(self, run: Callable[[], object]) -> int:
        """Return more than the slowest host needs for the calls of `run`, which it makes warm."""
        run()
        torch.cuda.synchronize(self._device)
        begin = time.perf_counter()
        run()
        (host_us,) = self._watch.slowest([1e6 * (time.perf_counter() - begin)])
        return int(2e3 * host_us) + _SPARE_NS

    def _mean_us(self, call: Callable[[], None], count: int) -> float:
        """Return the time of one of `count` calls by events around all, of the slowest rank."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        (us,) = self._watch.slowest([1e3 * begin.elapsed_time(end) / count])
        return us

    def _of_events(self, events: list[torch.cuda.Event]) -> Times:
        events[-1].synchronize()
        pairs = zip(events, events[1:], strict=False)
        mine_us = [1e3 * begin.elapsed_time(end) / REPEATS for begin, end in pairs]
        return Times.of(self._watch.slowest(mine_us))

    def _empty_stamps(self, rows: int, work: Work) -> Tensor:
        shape = (rows, work.num_stamps, 2)
        return torch.empty(shape, dtype=torch.int64, device=self._device)

    def _measured(self, work: Work, stamps: Tensor, mean_us: float | None) -> Measured:
        torch.cuda.synchronize(self._device)
        steps = stamps[..., 1].diff(dim=1).abs().flatten().cpu().numpy()
        (step_ns,) = self._watch.slowest([float(np.gcd.reduce(steps))])
        return Measured(
            times={name: self._slowest(ns) for name, ns in work.durations(stamps).items()},
            kernels={name: self._slowest(ns) for name, ns in work.kernels(stamps).items()},
            mean_us=mean_us,
            step_ns=int(step_ns),
        )

    @staticmethod
    def _slowest(durations_ns: Tensor) -> Times:
        durations_ns = durations_ns.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(durations_ns, op=dist.ReduceOp.MAX)
        return Times.of(durations_ns.cpu().numpy() / 1e3)


def captured(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Capture calls, which are warm, in a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    # NCCL's own thread may ask for events meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    return graph


def host_round(calls: Calls) -> list[list[float]]:
    """Return µs of the host for each of `HOST_CALLS`, `REPEATS` times."""
    times = []
    outs = [torch.empty_like(calls.given(i).x) for i in range(REPEATS)]
    for i, out in enumerate(outs):
        begin = time.perf_counter()
        received = calls.dispatch(i, split=True)
        sent = time.perf_counter()
        receive(received)
        came = time.perf_counter()
        combined = calls.combine(i, received, out, split=True)
        went = time.perf_counter()
        receive(combined)
        marks = (begin, sent, came, went, time.perf_counter())
        times.append([1e6 * us for us in np.diff(marks).tolist()])
    return times


def host_times(watch: Stopwatch, rounds: list[list[list[float]]]) -> dict[str, Times]:
    """Summarise rounds of `host_round`: for each call those of the rank whose median is largest."""
    of_calls = zip(*(times for each in rounds for times in each), strict=True)
    return {
        name: Times.of(watch.of_slowest(list(samples)))
        for name, samples in zip(HOST_CALLS, of_calls, strict=True)
    }


def _repeat(call: Callable[[], None]) -> None:
    for _ in range(REPEATS):
        call()
