"""Low latency between nodes: virtual ranks on one GPU with a hostile network, and a GPU each."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from buffer_cases import on_gpus
from cases import wait_for_stream
from low_latency_cases import (
    LowLatencyCase,
    check_in_turn,
    check_results,
    run_ahead_of_one,
    run_case,
    run_combined_twice,
    run_two_at_once,
    run_unwaited,
)
from low_latency_ranks import rank_one_stays_away
from low_latency_suite import (
    CASES,
    CHANGING,
    CHUNKS,
    GRAPH,
    HARD,
    LARGE,
    SHAPES,
    SMALL,
    TWICE,
    TWO_AT_ONCE,
    changing_operations,
    replays,
)
from ranks import RankFailure, run_ranks
from virtual_nodes import run_virtual_nodes

from ep_comm import Buffer

pytestmark = pytest.mark.gpu


def between_nodes(case: LowLatencyCase, shape: tuple[int, int]) -> LowLatencyCase:
    return dataclasses.replace(on_gpus(case, "nodes"), ranks_per_node=shape[1])


def on_buffer(rank: int, buffer: Buffer, case: LowLatencyCase) -> dict[str, Any]:
    results = run_case(rank, buffer, case, "cuda")
    buffer.synchronize()
    return results


def check_case(shape: tuple[int, int], case: LowLatencyCase, **how: Any) -> None:
    case = between_nodes(case, shape)
    check_results(case, run_virtual_nodes(*shape, on_buffer, case.config(), case, **how))


@pytest.mark.parametrize("split", [False, True], ids=["nodes-fused", "nodes-split"])
def test_small_cases(split):
    """What ``scripts/sanitize.sh`` runs under compute-sanitizer, where all takes its time."""
    case = between_nodes(dataclasses.replace(SMALL, split=split), (2, 1))
    config = case.config(timeout_s=100)
    results = run_virtual_nodes(2, 1, on_buffer, config, case, carried=False, in_step=True)
    check_results(case, results)


NAMED = [
    pytest.param(shape, case, id=f"{i}-{shape[0]}x{shape[1]}")
    for i, case in enumerate([*CASES, *HARD, CHUNKS])
    for shape in SHAPES[case.num_ranks]
]


@pytest.mark.parametrize(("shape", "case"), NAMED)
@pytest.mark.parametrize("carried", [False, True])
def test_named_cases(shape, case, carried):
    check_case(shape, case, carried=carried, delay_us=20 if carried else 0)


def combined_twice(rank: int, buffer: Buffer, case: LowLatencyCase) -> dict[str, Any]:
    return run_combined_twice(rank, buffer, case, "cuda")


@pytest.mark.parametrize("case", TWICE)
def test_one_dispatch_is_combined_twice(case):
    shape = SHAPES[case.num_ranks][0]
    case = between_nodes(case, shape)
    check_results(case, run_virtual_nodes(*shape, combined_twice, case.config(), case))


def two_at_once(rank: int, buffer: Buffer) -> list[dict[str, Any]]:
    cases = [between_nodes(case, (3, 1)) for case in TWO_AT_ONCE]
    return run_two_at_once(rank, buffer, cases, "cuda")


def test_two_results_are_out_at_once_beside_normal_operations():
    config = between_nodes(TWO_AT_ONCE[0], (3, 1)).config()
    results = run_virtual_nodes(3, 1, two_at_once, config)
    for number, case in enumerate(TWO_AT_ONCE):
        check_results(case, [of_rank[number] for of_rank in results], times=2 - number)


def changing(rank: int, buffer: Buffer) -> list[dict[str, Any]]:
    return changing_operations(rank, buffer, "cuda")


@pytest.mark.parametrize("delay_us", [0, 50])
def test_changing_operations_of_one_buffer(delay_us):
    config = between_nodes(CHANGING[0], (2, 1)).config()
    results = run_virtual_nodes(2, 1, changing, config, delay_us=delay_us)
    for number, case in enumerate(CHANGING):
        check_results(case, [of_rank[number] for of_rank in results])


def unwaited(rank: int, buffer: Buffer, case: LowLatencyCase, steps: int) -> list[dict[str, Any]]:
    return run_unwaited(rank, buffer, case, steps, "cuda")


@pytest.mark.parametrize("shape", [(2, 1), (2, 2), (4, 1)])
@pytest.mark.parametrize("split", [False, True], ids=["fused", "split"])
def test_operations_that_nobody_waits_for(shape, split):
    """A network that is late: a credit that is not heeded would show in what is written over."""
    weights_with = "combine" if split else "dispatch"
    case = dataclasses.replace(
        CHUNKS,
        tokens=CHUNKS.tokens[: shape[0] * shape[1]],
        split=split,
        weights_with=weights_with,
    )
    case = between_nodes(case, shape)
    results = run_virtual_nodes(
        *shape, unwaited, case.config(), case, 5, network_us=1000, delay_us=20
    )
    check_in_turn(case, results)


def ahead_of_one(rank: int, buffer: Buffer, case: LowLatencyCase) -> list[dict[str, Any]]:
    return run_ahead_of_one(rank, buffer, case, "cuda")


@pytest.mark.parametrize("shape", [(2, 1), (2, 2)])
@pytest.mark.parametrize("weights_with", ["dispatch", "combine"])
def test_who_is_ahead_does_not_write_over_what_is_read(shape, weights_with):
    case = dataclasses.replace(
        CHUNKS,
        tokens=CHUNKS.tokens[: shape[0] * shape[1]],
        split=True,
        weights_with=weights_with,
    )
    case = between_nodes(case, shape)
    results = run_virtual_nodes(*shape, ahead_of_one, case.config(timeout_s=20), case)
    check_in_turn(case, results)


@pytest.mark.parametrize("shape", [(2, 1), (2, 2)])
def test_flags_before_their_data_give_wrong_results(shape):
    """The control: on such a network the same test has to fail."""
    case = dataclasses.replace(CHUNKS, tokens=CHUNKS.tokens[: shape[0] * shape[1]], hidden=1024)
    with pytest.raises((AssertionError, RankFailure)) as failure:
        check_case(shape, case, early_flags=True, network_us=5000)
    if failure.type is RankFailure:  # found on the ranks; and their process did not just die
        assert re.search(r"AssertionError|ep_comm\.errors\.EP\w+Error", str(failure.value))


def test_a_late_rank_is_named():
    case = between_nodes(LowLatencyCase(tokens=(7, 5)), (2, 1))
    config = case.config(timeout_s=1.0)
    message, _ = run_virtual_nodes(2, 1, rank_one_stays_away, config, case)
    assert message.startswith("low_latency_dispatch #1: rank 0 waited 1 s for rank 1 (phase: plan)")


# ---- A GPU each, NVLink for a network ----------------------------------------------------------


def check_replays(shape: tuple[int, int], split: bool) -> None:
    num_ranks = shape[0] * shape[1]
    if num_ranks > torch.cuda.device_count():
        pytest.skip(f"needs {num_ranks} GPUs, this machine has {torch.cuda.device_count()}")
    tokens = (9, 12, 4, 7)[:num_ranks]
    case = between_nodes(dataclasses.replace(GRAPH, tokens=tokens, split=split), shape)
    seeds = range(10, 16)
    ranks = run_ranks(num_ranks, replays, case, seeds, backend="nccl", fresh=True)
    for number, seed in enumerate(seeds):
        for layer, salt in enumerate((0, 1000)):
            of_seed = dataclasses.replace(case, seed=seed + salt)
            check_results(of_seed, [results[2 * number + layer] for results in ranks])


@pytest.mark.parametrize("split", [False, True], ids=["fused", "split"])
def test_graphs_on_one_gpu(split):
    check_replays((1, 1), split)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("shape", [(2, 1), (2, 2)])
@pytest.mark.parametrize("split", [False, True], ids=["fused", "split"])
def test_graphs_on_gpus(shape, split):
    check_replays(shape, split)


def on_a_gpu(rank: int, case: LowLatencyCase, repeats: int) -> dict[str, Any]:
    with Buffer(None, case.config()) as buffer:
        for _ in range(repeats):
            results = run_case(rank, buffer, case, "cuda")
        wait_for_stream()
        assert buffer.records.num_operations == 2 * repeats
        assert all(0 < record.seconds < 1 for record in buffer.records)
        return results


@pytest.mark.multi_gpu
@pytest.mark.parametrize("split", [False, True], ids=["fused", "split"])
@pytest.mark.parametrize("weights_with", ["dispatch", "combine"])
def test_full_size_on_gpus(split, weights_with):
    case = dataclasses.replace(LARGE, split=split, weights_with=weights_with)
    case = between_nodes(case, (2, 1))
    check_results(case, run_ranks(2, on_a_gpu, case, 3, backend="nccl", fresh=True))
