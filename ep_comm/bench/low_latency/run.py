"""One run of ``ep-comm bench low-latency``: floors, then every size, then NCCL."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from ep_comm import Buffer
from ep_comm.bench.low_latency.clocks import (
    GpuClock,
    Times,
    host_round,
    host_times,
)
from ep_comm.bench.low_latency.floors import Floors, WireBytes, measure_one_way
from ep_comm.bench.low_latency.inputs import make_inputs
from ep_comm.bench.low_latency.settings import Point, Settings
from ep_comm.bench.low_latency.works import (
    REPEATS,
    Calls,
    Dispatches,
    Pairs,
    SplitPairs,
    Work,
)
from ep_comm.bench.ops.probe import measure_limit, usable_library
from ep_comm.bench.timing import Stopwatch

_CPU_ROUNDS = 2


@dataclass(frozen=True, kw_only=True)
class Result:
    """One operation of one size.

    Attributes:
        operation: Its name.
        hidden: Elements of a token.
        tokens: Of each rank.
        room: Most tokens of a rank in the call; None of what has none.
        num_sms: SMs that it may occupy; 0 is all, None is not ours to say.
        graph: In a CUDA graph that is replayed.
        eager: Called, the GPU's queue being filled; on a CPU by the host's clock.
        kernel: In the graph, from the kernel's begin to its end; None where it has no record.
        mean_us: In the graph, the mean by CUDA events around many replays.
        floor_us: Least time of its bytes and hops; None where that says nothing.
        wrong: Rows on all ranks that were not what they must be, after the replays and after the
            calls; None where nobody looked.
    """

    operation: str
    hidden: int
    tokens: int
    room: int | None
    num_sms: int | None
    graph: Times | None
    eager: Times | None
    kernel: Times | None = None
    mean_us: float | None = None
    floor_us: float | None = None
    wrong: int | None = None


@dataclass(frozen=True, kw_only=True)
class HostResult:
    """Host time of the four calls of one size.

    Attributes:
        point: The size.
        times: Of each of `clocks.HOST_CALLS`.
    """

    point: Point
    times: dict[str, Times]


@dataclass(kw_only=True)
class Run:
    """What a run has found so far.

    Attributes:
        settings: What was measured.
        num_ranks: Ranks, one GPU each, or CPU processes.
        num_experts: Over all ranks.
        backend: Description of the buffer's backend.
        floors: What the links carried; None without GPUs.
        step_ns: Step of the GPU's clock; None without GPUs.
        results: In the order measured.
        host: The same.
    """

    settings: Settings
    num_ranks: int
    num_experts: int
    backend: str = ""
    floors: Floors | None = None
    step_ns: int | None = None
    results: list[Result] = field(default_factory=list)
    host: list[HostResult] = field(default_factory=list)

    @property
    def num_wrong(self) -> int:
        """Wrong rows of all results; those of one row of operations count once for each."""
        return sum(result.wrong or 0 for result in self.results)


def measure_floors(watch: Stopwatch) -> Floors:
    """Measure what the links carry. Collective over the default group."""
    return Floors(limit=measure_limit(watch), one_way_us=measure_one_way(watch))


def run(
    settings: Settings,
    device: torch.device,
    progress: Callable[[str], None],
    save: Callable[[Run], None] = lambda found: None,
    measure_floors: Callable[[Stopwatch], Floors] = measure_floors,
) -> Run:
    """Measure everything that `settings` asks for. Collective over the default group.

    Args:
        settings: Checked before.
        device: This rank's.
        progress: Told what is measured next.
        save: Given what was found, after each size: a run that ends early leaves it.
        measure_floors: How the floors are found; not called on a CPU.
    """
    num_ranks = dist.get_world_size()
    found = Run(settings=settings, num_ranks=num_ranks, num_experts=settings.num_experts(num_ranks))
    if found.num_experts != settings.experts:
        progress(f"{found.num_experts} experts: the {settings.experts} asked for, rounded up to a "
                 f"multiple of the {num_ranks} ranks")  # fmt: skip
    watch = Stopwatch(device, iters=1)
    if device.type == "cuda":
        progress("floors: the links' rate, and a word's way")
        found.floors = measure_floors(watch)
    for hidden in settings.hidden:
        with Buffer(None, settings.buffer_config(hidden, num_ranks)) as buffer:
            found.backend = buffer.describe()
            for point in settings.points(hidden):
                sms = f", {point.num_sms} SMs" if point.num_sms else ""
                progress(f"hidden {hidden}, {point.tokens} tokens, room for {point.room}{sms}")
                buffer.set_num_sms(point.num_sms or None)
                _measure_point(found, point, buffer, watch, progress)
                save(found)
        for tokens in settings.tokens:
            progress(f"hidden {hidden}, {tokens} tokens: alltoall")
            found.results.append(_measure_alltoall(found, hidden, tokens, watch))
            save(found)
    return found


def _measure_point(
    found: Run, point: Point, buffer: Buffer, watch: Stopwatch, progress: Callable[[str], None]
) -> None:
    settings = found.settings
    inputs = make_inputs(settings, point, dist.get_rank(), found.num_ranks, watch.device)
    calls = Calls(buffer, inputs, point, settings.fp8)
    wire = WireBytes.of_inputs(inputs, point.hidden, settings.fp8)
    floors = _floors_of(wire, found.floors)
    works: list[Work] = [Dispatches(calls), Pairs(calls), Pairs(calls, own_weights=True)]
    if watch.device.type == "cpu":
        for work in works:
            found.results += _on_the_host(work, point, watch)
        rounds = [host_round(calls) for _ in range(1 + _CPU_ROUNDS)]
        found.host.append(HostResult(point=point, times=host_times(watch, rounds[1:])))
        return

    native = usable_library(watch.device)
    works += [Pairs(calls, general=True), SplitPairs(calls, native, watch.device)]
    clock = GpuClock(watch, native, settings.replays)
    for work in works:
        replayed = clock.replayed(work)
        buffer.synchronize()  # raises what a kernel reported
        wrong = work.wrong()
        eager = clock.eager(work)
        buffer.synchronize()
        wrong += work.wrong()
        if eager is None:
            progress("WARNING: the host was too slow to fill the queue: no eager times")
        found.step_ns = replayed.step_ns
        for name, times in replayed.times.items():
            found.results.append(
                Result(
                    operation=name,
                    **asdict(point),
                    graph=times,
                    eager=None if eager is None else eager.times[name],
                    kernel=replayed.kernels.get(name),
                    mean_us=replayed.mean_us if name == work.whole else None,
                    floor_us=floors.get(name),
                    wrong=wrong,
                )
            )
    found.host.append(HostResult(point=point, times=clock.host(calls)))
    buffer.synchronize()


def _floors_of(wire: WireBytes, floors: Floors | None) -> dict[str, float]:
    """Return the floor of each operation that has one, in µs."""
    if floors is None:
        return {}
    found = {"dispatch": floors.us(wire.dispatch)}
    for says, hops in (("", 1), (", own weights", 2), (", general kernel", 1)):  # weights go first
        combine = floors.us(wire.combine, hops)
        found[f"dispatch of a pair{says}"] = found["dispatch"]
        found[f"combine{says}"] = combine
        found[f"dispatch + combine{says}"] = found["dispatch"] + combine
    return found


def _on_the_host(work: Work, point: Point, watch: Stopwatch) -> list[Result]:
    """Time a row by the host's clock: the whole of it, over its repeats."""
    samples_us = []
    work.run()
    work.poison()
    for _ in range(_CPU_ROUNDS):
        dist.barrier()
        begin = time.perf_counter()
        work.run()
        samples_us.append(1e6 * (time.perf_counter() - begin) / REPEATS)
    return [
        Result(
            operation=work.whole,
            **asdict(point),
            graph=None,
            eager=Times.of(watch.slowest(samples_us)),
            wrong=work.wrong(),
        )
    ]


def _measure_alltoall(found: Run, hidden: int, tokens: int, watch: Stopwatch) -> Result:
    """Send every token to every rank in BF16: what fixed sizes take, whatever the routing is."""
    generator = torch.Generator(watch.device).manual_seed(dist.get_rank())  # rows of its own
    rows = torch.randn(
        found.num_ranks * tokens, hidden, generator=generator, device=watch.device
    ).bfloat16()
    out = torch.zeros_like(rows)

    def call() -> None:
        dist.all_to_all_single(out, rows)

    wire_bytes = (found.num_ranks - 1) * tokens * 2 * hidden
    graph: Times | None = None
    if watch.device.type == "cuda":
        clock = GpuClock(watch, usable_library(watch.device), found.settings.replays)
        graph, eager = clock.replayed_by_events(call), clock.eager_by_events(call)
    else:
        call()
        begin_us = [_call_us(call) for _ in range(_CPU_ROUNDS * REPEATS)]
        eager = Times.of(watch.slowest(begin_us))
    return Result(
        operation=alltoall_name(),
        hidden=hidden,
        tokens=tokens,
        room=None,
        num_sms=None,
        graph=graph,
        eager=eager,
        floor_us=None if found.floors is None else found.floors.us(wire_bytes),
        wrong=_wrong_alltoall(rows, out),
    )


def alltoall_name() -> str:
    """Return what the alltoall of the default group is called."""
    return {"nccl": "NCCL"}.get(dist.get_backend(), dist.get_backend()) + " alltoall"


def _call_us(call: Callable[[], None]) -> float:
    begin = time.perf_counter()
    call()
    return 1e6 * (time.perf_counter() - begin)


def _wrong_alltoall(rows: Tensor, out: Tensor) -> int:
    """Return how many rows are not those that the ranks meant for this one. Collective."""
    num_ranks, rank = dist.get_world_size(), dist.get_rank()
    of_all = [torch.empty_like(rows) for _ in range(num_ranks)]
    dist.all_gather(of_all, rows)
    meant = torch.cat([of_rank.chunk(num_ranks)[rank] for of_rank in of_all])
    wrong = (out != meant).any(dim=1).sum()
    dist.all_reduce(wrong)
    return int(wrong)
