"""``ep-comm bench low-latency``: a run on CPU, checks of its results, runs on GPUs."""

from __future__ import annotations

import contextlib
import dataclasses
from unittest import mock

import pytest
import torch
from made_up_low_latency import GPU_SETTINGS, OPERATIONS, SETTINGS
from ranks import run_ranks

from ep_comm import Buffer
from ep_comm.bench.low_latency import clocks, run, works
from ep_comm.bench.low_latency.clocks import HOST_CALLS
from ep_comm.bench.low_latency.floors import measure_one_way
from ep_comm.bench.low_latency.run import Run
from ep_comm.bench.low_latency.settings import Settings
from ep_comm.bench.timing import Stopwatch

FEW = 4  # instead of REPEATS


def a_run(rank: int, settings: Settings, fault: str = "") -> tuple[Run, list[str], int]:
    said: list[str] = []
    saved: list[int] = []
    with contextlib.ExitStack() as patches:
        for module in (works, clocks, run):
            patches.enter_context(mock.patch.object(module, "REPEATS", FEW))
        if fault:
            patches.enter_context(PLANTED[fault]())
        found = run.run(
            settings, torch.device("cpu"), said.append, lambda found: saved.append(len(found.host))
        )
    return found, said, len(saved)


def test_run_measures_every_size():
    settings = dataclasses.replace(SETTINGS, tokens=(3, 130), hidden=(128, 256))
    (found, said, num_saved), (other, *_) = run_ranks(2, a_run, settings)
    assert found == other  # each time is the slowest rank's
    assert found.num_experts == 6 and "6 experts: the 5 asked for" in said[0]
    rows = [(r.hidden, r.tokens, r.room, r.operation) for r in found.results]
    ours = ("dispatch", "dispatch + combine", "dispatch + combine, own weights")
    assert rows == [
        row
        for hidden in (128, 256)
        for row in [
            *((hidden, 3, room, name) for room in (3, 128) for name in ours),
            *((hidden, 130, 130, name) for name in ours),
            *((hidden, tokens, None, "gloo alltoall") for tokens in (3, 130)),
        ]
    ]
    assert num_saved == 2 * (3 + 2)
    for result in found.results:
        assert result.wrong == 0 and result.graph is None and result.floor_us is None
        assert result.eager is not None and 0 < result.eager.p50 <= result.eager.max
    assert [(h.point.hidden, h.point.room) for h in found.host] == [
        (hidden, room) for hidden in (128, 256) for room in (3, 128, 130)
    ]
    for host in found.host:
        assert list(host.times) == list(HOST_CALLS)
        assert all(0 < times.p50 <= times.p99 <= times.max for times in host.times.values())


def test_bf16_rows_are_right_too():
    found, *_ = run_ranks(2, a_run, dataclasses.replace(SETTINGS, fp8=False))[0]
    assert found.num_wrong == 0


def spoiled(method: str, spoil):
    """A `Buffer` of which one method's result is not what it should be, on rank 1."""
    good = getattr(Buffer, method)

    def bad(buffer, *args, **kwargs):
        out = good(buffer, *args, **kwargs)
        if torch.distributed.get_rank() == 1 and out.hook is None:  # or nothing has come yet
            spoil(out)
        return out

    return mock.patch.object(Buffer, method, bad)


def first_expert(out) -> int:
    return int(out.recv_count.nonzero()[0])


def flip_a_byte(out) -> None:
    out.recv_x[0].view(torch.uint8)[first_expert(out), 0, 5] ^= 1


def change_a_scale(out) -> None:
    out.recv_x[1][first_expert(out), 0, 1] *= 2


def change_a_source(out) -> None:
    out.handle.recv_src_info[first_expert(out), 0] += 1


def lose_a_row(out) -> None:
    out.recv_count[first_expert(out)] -= 1


def change_a_sum(out) -> None:
    out.combined_x[1, 3] = 100.0


def lose_the_results(out) -> None:
    out.combined_x.fill_(0)


# Faults, by name.
PLANTED = {
    "byte": lambda: spoiled("low_latency_dispatch", flip_a_byte),
    "scale": lambda: spoiled("low_latency_dispatch", change_a_scale),
    "source": lambda: spoiled("low_latency_dispatch", change_a_source),
    "count": lambda: spoiled("low_latency_dispatch", lose_a_row),
    "sum": lambda: spoiled("low_latency_combine", change_a_sum),
    "nothing": lambda: spoiled("low_latency_combine", lose_the_results),
}


@pytest.mark.parametrize("fault", ["byte", "scale", "source", "count"])
def test_a_wrong_row_is_found(fault):
    (found, *_), (other, *_) = run_ranks(2, a_run, SETTINGS, fault)
    assert found.num_wrong == other.num_wrong
    wrong = {result.operation: result.wrong for result in found.results if result.room == 3}
    assert wrong["dispatch"] == 1  # the last dispatch is looked at
    assert wrong["dispatch + combine"] == 1


@pytest.mark.parametrize(("fault", "num_rows"), [("sum", 1), ("nothing", 3)])
def test_a_wrong_sum_is_found(fault, num_rows):
    found, *_ = run_ranks(2, a_run, SETTINGS, fault)[0]
    wrong = {result.operation: result.wrong for result in found.results if result.room == 3}
    assert wrong["dispatch"] == 0
    assert wrong["dispatch + combine"] == FEW * num_rows  # all combines are looked at
    assert wrong["dispatch + combine, own weights"] == FEW * num_rows


# ---- On GPUs -------------------------------------------------------------------------------------


def a_run_on_gpus(rank: int, settings: Settings) -> Run:
    return run.run(settings, torch.device("cuda", rank), lambda text: None)


@pytest.mark.multi_gpu
def test_run_between_nodes_on_gpus():
    settings = dataclasses.replace(GPU_SETTINGS, backend="nodes")
    found, other = run_ranks(2, a_run_on_gpus, settings, backend="nccl", fresh=True)
    assert found == other and found.num_wrong == 0
    assert found.backend.startswith("nodes (2 of 1 GPUs over stores")


@pytest.mark.multi_gpu
@pytest.mark.parametrize("fp8", [True, False], ids=["fp8", "bf16"])
def test_run_on_gpus(fp8):
    settings = dataclasses.replace(GPU_SETTINGS, fp8=fp8, num_sms=(0, 16))
    found, other = run_ranks(2, a_run_on_gpus, settings, backend="nccl")
    assert found == other and found.num_wrong == 0
    assert found.step_ns and 0 < found.step_ns <= 2000
    assert found.floors is not None and 0.2 < found.floors.one_way_us < 20
    of_point = [result.operation for result in found.results if result.room is not None]
    assert of_point == OPERATIONS * 8  # 2 token counts, 2 rooms, 2 SM counts
    for result in found.results:
        assert result.graph is not None and 0 < result.graph.p50 <= result.graph.p99
        if result.floor_us is not None:
            assert result.graph.p50 > result.floor_us / 2
        if result.mean_us is not None:  # two ways to the same time
            assert result.mean_us == pytest.approx(result.graph.p50, rel=1)
    assert len(found.host) == 8


def one_way_on_gpus(rank: int) -> float:
    return measure_one_way(Stopwatch(torch.device("cuda", rank), iters=1))


@pytest.mark.multi_gpu
def test_a_word_takes_about_a_microsecond():
    first, second = run_ranks(2, one_way_on_gpus, backend="nccl")
    assert first == second and 0.2 < first < 20
