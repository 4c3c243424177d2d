"""One run: every operation beside every GEMM, with every SM count."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import median
from typing import cast

import torch
import torch.distributed as dist

from ep_comm import Buffer
from ep_comm.backends.nvlink.backend import NVLinkBackend
from ep_comm.backends.nvlink.routing import NVLinkRouting
from ep_comm.bench.ops.alltoall import AllToAll
from ep_comm.bench.ops.cases import (
    NUM_SETS,
    Case,
    InputSet,
    alltoall_cases,
    buffer_cases,
    make_inputs,
)
from ep_comm.bench.ops.probe import Limit, measure_limit
from ep_comm.bench.ops.run import warm_up
from ep_comm.bench.overlap import gemms
from ep_comm.bench.overlap.check import Expected, check, expected
from ep_comm.bench.overlap.measure import Bench, Call
from ep_comm.bench.overlap.settings import OverlapSettings
from ep_comm.bench.tables import case_with_sms
from ep_comm.bench.timing import Stopwatch
from ep_comm.handle import RowLayout

_CASES = (
    "dispatch, fresh",
    "dispatch, cached",
    "combine",
    "FP8 dispatch, fresh",
    "FP8 dispatch, cached",
)


@dataclass(frozen=True, kw_only=True)
class Price:
    """One operation beside one GEMM with one SM count. Times in µs, each the slowest rank's.

    Attributes:
        case: The operation.
        layout: Order of its rows; None of NCCL's, and of rows that nobody orders.
        gemm: What ran beside it.
        tiles: Of that GEMM's output.
        num_sms: SMs that it may occupy, 0 is all; None where that is not ours to choose.
        alone: One of several back to back, with no GEMM beside them.
        beside: The same with GEMMs beside them; a sample a run.
        lost: GEMM time that one operation took; a sample a run.
        serial: The operation between GEMMs on their stream, with all SMs.
        wire_bytes: Payload and scales that cross the busiest link: most of any rank, in or out.
        num_wrong: Rows over all ranks that were not what they must be.
    """

    case: str
    layout: RowLayout | None
    gemm: str
    tiles: int
    num_sms: int | None
    alone: tuple[float, ...]
    beside: tuple[float, ...]
    lost: tuple[float, ...]
    serial: tuple[float, ...]
    wire_bytes: float
    num_wrong: int

    @property
    def name(self) -> str:
        """The operation with its layout."""
        return self.case if self.layout is None else f"{self.case}, {self.layout}-major"

    @property
    def pays(self) -> bool:
        """Whether GEMMs lose less to it than it takes between them."""
        return median(self.lost) < median(self.serial)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run found.

    Attributes:
        settings: What was measured.
        num_ranks: Ranks, one GPU each.
        available_sms: Of a GPU.
        limit: What the links carried.
        backend: Description of the buffer's backend.
        gemm_us: Time of one of each GEMM alone.
        prices: In the order measured.
    """

    settings: OverlapSettings
    num_ranks: int
    available_sms: int
    limit: Limit
    backend: str
    gemm_us: dict[str, float]
    prices: tuple[Price, ...]

    @property
    def num_wrong(self) -> int:
        """Wrong rows of all results."""
        return sum(price.num_wrong for price in self.prices)


@dataclass(frozen=True, kw_only=True)
class _Operation:
    """A case as it runs here.

    Attributes:
        case: What it is.
        layout: As in `Price`.
        sms: SM counts to measure with.
        beside: Launches it to run beside other work.
        serial: Launches it on the current stream.
        set_sms: Sets how many SMs it takes; None is all.
        wire_bytes: As in `Price`.
        sets: Its inputs, and what they must give; empty where that is not checked.
    """

    case: str
    layout: RowLayout | None
    sms: tuple[int | None, ...]
    beside: Call
    serial: Call
    set_sms: Callable[[int | None], None]
    wire_bytes: float
    sets: tuple[tuple[InputSet, Expected], ...]


def run(settings: OverlapSettings, device: torch.device, progress: Callable[[str], None]) -> Run:
    """Measure everything that `settings` asks for. Collective over the default group.

    Args:
        settings: Checked before.
        device: This rank's GPU.
        progress: Told what is measured next.
    """
    first = settings.operations(settings.layouts[0])
    inputs = make_inputs(first, dist.get_rank(), device)
    available_sms = torch.cuda.get_device_properties(device).multi_processor_count
    buffer = Buffer(None, settings.config(device))
    watch = Stopwatch(device, settings.runs)
    progress("limit of the links")
    limit = measure_limit(watch)
    progress(f"limit of the links: {limit.gb_per_s:.0f} GB/s")
    prices: list[Price] = []
    gemm_us: dict[str, float] = {}
    for gemm in _gemms(settings, buffer, inputs, device):
        progress(gemm.name)
        bench = Bench(watch, gemm)
        (gemm_us[gemm.name],) = watch.slowest([bench.gemms_alone() / bench.num_gemms])
        for operation in _operations(settings, buffer, inputs, device, available_sms):
            prices += _prices(operation, bench, gemm, watch, settings.runs, progress)
    backend = buffer.describe()
    buffer.destroy()
    return Run(
        settings=settings,
        num_ranks=dist.get_world_size(),
        available_sms=available_sms,
        limit=limit,
        backend=backend,
        gemm_us=gemm_us,
        prices=tuple(prices),
    )


def _gemms(
    settings: OverlapSettings, buffer: Buffer, inputs: list[InputSet], device: torch.device
) -> Iterator[gemms.Gemm]:
    for shape in settings.gemms:
        yield gemms.dense(shape, device)
    if settings.experts is not None:
        out = buffer.dispatch(inputs[0].x, inputs[0].topk_idx)
        yield gemms.grouped(settings.experts, out.handle.padded_tokens_per_expert.tolist(), device)


def _operations(
    settings: OverlapSettings,
    buffer: Buffer,
    inputs: list[InputSet],
    device: torch.device,
    available_sms: int,
) -> Iterator[_Operation]:
    """Yield what is measured, one layout's outputs in memory at a time."""

    def asynchronous(case: Case) -> Call:
        def call(i: int) -> object:
            out = case.call(i, async_finish=True)
            out.event.current_stream_wait()  # type: ignore[attr-defined]
            return out

        return call

    def set_sms(num_sms: int | None) -> None:
        buffer.set_num_sms(num_sms or available_sms)  # none would be few of an asynchronous one

    for layout in settings.layouts:
        sets = []
        for given in inputs:
            out = buffer.dispatch(given.x, given.topk_idx, layout=layout)
            alignment = out.handle.expert_alignment
            sets.append((given, expected(given, layout, alignment, settings.shape.experts)))
        del out
        for case in buffer_cases(buffer, inputs, settings.operations(layout)):
            if case.name in _CASES:
                yield _Operation(
                    case=case.name,
                    layout=layout,
                    sms=settings.sms,
                    beside=asynchronous(case),
                    serial=case.call,
                    set_sms=set_sms,
                    wire_bytes=warm_up(case, device),
                    sets=tuple(sets),
                )
    if settings.wire == "copy-engine":
        yield _copies_alone(buffer, inputs)
    world = dist.group.WORLD
    assert world is not None  # the job was joined
    alltoall = AllToAll(world, settings.shape.experts, settings.shape.topk)
    for case in alltoall_cases(alltoall, inputs, settings.operations(settings.layouts[0])):
        yield _Operation(
            case=case.name,
            layout=None,
            sms=(None,),
            beside=case.call,
            serial=case.call,
            set_sms=lambda _: None,
            wire_bytes=warm_up(case, device),
            sets=(),
        )


def _copies_alone(buffer: Buffer, inputs: list[InputSet]) -> _Operation:
    """Return a dispatch by copy engines without what its SMs do."""
    backend = buffer._session.backend
    assert isinstance(backend, NVLinkBackend)
    routings = [
        cast(NVLinkRouting, buffer.dispatch(each.x, each.topk_idx).handle.routing)
        for each in inputs
    ]

    def call(i: int) -> None:
        given = i % NUM_SETS
        backend.push_alone(routings[given], inputs[given].x)

    return _Operation(
        case="copies of a dispatch alone",
        layout=None,
        sms=(None,),
        beside=call,
        serial=call,
        set_sms=lambda _: None,
        wire_bytes=(dist.get_world_size() - 1) * inputs[0].x.nbytes,
        sets=(),
    )


def _prices(
    operation: _Operation,
    bench: Bench,
    gemm: gemms.Gemm,
    watch: Stopwatch,
    runs: int,
    progress: Callable[[str], None],
) -> Iterator[Price]:
    """Measure one operation beside one GEMM with every SM count."""
    operation.set_sms(None)
    bench.serial(operation.serial, 0)  # warm
    serial = watch.slowest(
        [bench.serial(operation.serial, bench.gemms_alone()) for _ in range(runs)]
    )
    for num_sms in operation.sms:
        operation.set_sms(num_sms)
        price = replace(
            _one_price(operation, bench, watch, runs),
            gemm=gemm.name,
            tiles=gemm.tiles,
            num_sms=num_sms,
            serial=serial,
        )
        what = case_with_sms(price.name, num_sms)
        progress(f"{what}: GEMMs lose {median(price.lost):.0f} µs")
        yield price
    operation.set_sms(None)


def _one_price(operation: _Operation, bench: Bench, watch: Stopwatch, runs: int) -> Price:
    """Measure with the SM count of now; what is the same for all of them is not filled in."""
    bench.alone(operation.beside)  # warm, with memory of its own stream
    alone = watch.slowest(bench.alone(operation.beside))
    beside: list[float] = []
    lost: list[float] = []
    num_wrong = 0
    for _ in range(runs):
        gemms_us = bench.gemms_alone()
        found = bench.beside(operation.beside, median(alone), max(watch.slowest([gemms_us])))
        beside.append(found.time_beside)
        lost.append(found.lost(gemms_us))
        if operation.sets:
            i, out = bench.last
            num_wrong += check(out, *operation.sets[i % NUM_SETS])
    bench.last = (0, None)
    return Price(
        case=operation.case,
        layout=operation.layout,
        gemm="",
        tiles=0,
        num_sms=None,
        alone=alone,
        beside=watch.slowest(beside),
        lost=watch.slowest(lost),
        serial=(),
        wire_bytes=operation.wire_bytes,
        num_wrong=num_wrong,
    )
