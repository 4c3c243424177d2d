"""One run of the benchmark: the links' limit, then every case with every SM count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean

import torch
import torch.distributed as dist

from ep_comm import Buffer
from ep_comm.bench.ops.alltoall import AllToAll
from ep_comm.bench.ops.cases import (
    NUM_SETS,
    Case,
    InputSet,
    alltoall_cases,
    buffer_cases,
    graph_cases,
    make_inputs,
)
from ep_comm.bench.ops.probe import Limit, measure_limit
from ep_comm.bench.ops.routing import tokens_per_expert, tokens_per_rank
from ep_comm.bench.ops.settings import Settings
from ep_comm.bench.tables import case_with_sms
from ep_comm.bench.timing import Samples, Stopwatch
from ep_comm.telemetry.records import Records
from ep_comm.telemetry.stats import max_over_mean


@dataclass(frozen=True, kw_only=True)
class Result:
    """One case with one SM count. Bytes are means over the input sets.

    Attributes:
        case: Name of the case.
        num_sms: SMs that the operation may occupy, 0 is all; None where that is NCCL's choice.
        samples: Its times.
        wire_bytes: Payload and scales that crossed the busiest link: most of any rank, in or out.
        floor_bytes: The least of that, one copy of a row for each destination rank: what the limit
            is about.
        logical_bytes: Of one rank: a row for each expert of each token.
    """

    case: str
    num_sms: int | None
    samples: Samples
    wire_bytes: float
    floor_bytes: float
    logical_bytes: int


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run found.

    Attributes:
        settings: What was measured.
        num_ranks: Ranks, one GPU each.
        backend: Description of the buffer's backend.
        buffer_bytes: Device memory of the buffer beyond the outputs.
        limit: What the links carried.
        rank_imbalance: Tokens a rank receives, largest over mean.
        expert_imbalance: Tokens an expert receives, largest over mean.
        results: In the order measured.
    """

    settings: Settings
    num_ranks: int
    backend: str
    buffer_bytes: int
    limit: Limit
    rank_imbalance: float
    expert_imbalance: float
    results: tuple[Result, ...]


def run(
    settings: Settings,
    device: torch.device,
    progress: Callable[[str], None],
    measure_limit: Callable[[Stopwatch], Limit] = measure_limit,
) -> Run:
    """Measure everything that `settings` asks for. Collective over the default group.

    Args:
        settings: Checked before.
        device: This rank's.
        progress: Told what is measured next.
        measure_limit: How the limit is found.
    """
    watch = Stopwatch(device, settings.iters)
    progress("limit of the links")
    limit = measure_limit(watch)
    progress(f"limit of the links: {limit.gb_per_s:.0f} GB/s")

    inputs = make_inputs(settings, dist.get_rank(), device)
    rank_imbalance, expert_imbalance = imbalances(settings, inputs, device)
    buffer = Buffer(None, settings.buffer_config(device))
    for name, reason in buffer.passed_over.items():
        progress(f"WARNING: this measures the slow reference backend, not {name}: {reason}")
    results: list[Result] = []

    def measure(
        cases: list[Case],
        num_sms: int | None,
        records: Records | None = None,
        floors: Sequence[float] = (),
    ) -> None:
        for i, case in enumerate(cases):
            progress(case_with_sms(case.name, num_sms))
            wire_bytes = warm_up(case, device)
            results.append(
                Result(
                    case=case.name,
                    num_sms=num_sms,
                    samples=watch.measure(case.call, records),
                    wire_bytes=wire_bytes,
                    floor_bytes=floors[i] if floors else wire_bytes,
                    logical_bytes=case.logical_bytes,
                )
            )

    cases = buffer_cases(buffer, inputs, settings)
    for num_sms in settings.sms:
        buffer.set_num_sms(num_sms or None)
        measure(cases, num_sms, buffer.records)
        if device.type == "cuda":
            measure(graph_cases(cases), num_sms)
    buffer.set_num_sms(None)
    backend, buffer_bytes = buffer.describe(), buffer.buffer_bytes
    del cases  # and with them the buffer's outputs
    # NCCL sends a copy for each expert, but need not have: the floor of its work is the same.
    by_name = {result.case: result.wire_bytes for result in results}
    floors = by_name["dispatch, fresh"], by_name["combine"]
    world = dist.group.WORLD
    assert world is not None  # the job was joined
    alltoall = AllToAll(world, settings.shape.experts, settings.shape.topk)
    measure(alltoall_cases(alltoall, inputs, settings), None, floors=floors)
    buffer.destroy()
    return Run(
        settings=settings,
        num_ranks=dist.get_world_size(),
        backend=backend,
        buffer_bytes=buffer_bytes,
        limit=limit,
        rank_imbalance=rank_imbalance,
        expert_imbalance=expert_imbalance,
        results=tuple(results),
    )


def warm_up(case: Case, device: torch.device) -> float:
    """Call it on every set, twice.

    Returns:
        Bytes over the busiest link, the mean of the sets.
    """
    busiest = []
    for i in range(2 * NUM_SETS):
        case.call(i)
        sent_R = torch.tensor(case.wire_bytes_to_rank(), dtype=torch.int64, device=device)
        traffic_RR = sent_R.new_empty(len(sent_R), len(sent_R))  # from, to
        dist.all_gather(list(traffic_RR), sent_R)
        busiest.append(int(torch.maximum(traffic_RR.sum(0), traffic_RR.sum(1)).max()))
    return mean(busiest)


def imbalances(
    settings: Settings, inputs: list[InputSet], device: torch.device
) -> tuple[float, float]:
    """Largest over mean of the tokens a rank, and an expert, receives; means of the sets."""
    experts, num_ranks = settings.shape.experts, dist.get_world_size()
    of_ranks: list[float] = []
    of_experts: list[float] = []
    for inputs_of_set in inputs:
        topk_idx = inputs_of_set.topk_idx.cpu()
        for counts, found in (
            (tokens_per_rank(topk_idx, experts, num_ranks), of_ranks),
            (tokens_per_expert(topk_idx, experts), of_experts),
        ):
            counts = counts.to(device)
            dist.all_reduce(counts)
            found.append(max_over_mean(counts.tolist()))
    return mean(of_ranks), mean(of_experts)
