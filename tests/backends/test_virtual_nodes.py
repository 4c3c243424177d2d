"""The kernels between nodes: several nodes of virtual ranks on one GPU, with a hostile network."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch
from buffer_cases import CASES, check_results, on_gpus, random_case, run_case
from capacity_cases import exact_and_roomy, groups_of_one_size
from cases import Case, to_torch
from fp8_cases import CASE as FP8_CASE
from fp8_cases import check_fp8_results, dispatch_all_ways
from ranks import RankFailure
from virtual_nodes import check_sums_of_two, check_wire_bytes, run_virtual_nodes, sums_of_few

from ep_comm import Buffer

pytestmark = pytest.mark.gpu

SHAPES = [(2, 1), (2, 2), (3, 1), (3, 2), (2, 3), (4, 2), (2, 4)]


def run_on_buffer(rank: int, buffer: Buffer, case: Case) -> dict:
    return run_case(rank, case, buffer)


def check(case: Case, results: list) -> None:
    check_results(case, results, check_wire_bytes)


def between_nodes(case: Case, ranks_per_node: int) -> Case:
    return dataclasses.replace(on_gpus(case, "auto"), ranks_per_node=ranks_per_node)


SMALL = {
    "nodes": Case(tokens=(7, 5, 0, 3)),
    "nodes-rank-major": Case(tokens=(7, 5, 0, 3), layout="rank"),
}


@pytest.mark.parametrize("name", SMALL)
def test_small_cases(name):
    """What ``scripts/sanitize.sh`` runs under compute-sanitizer, where all takes its time."""
    case = between_nodes(SMALL[name], 2)
    config = case.config(timeout_s=100)
    check(case, run_virtual_nodes(2, 2, run_on_buffer, config, case, carried=False, in_step=True))


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("case", [case for case in CASES if case.num_ranks % 2 == 0])
def test_named_cases(case, carried):
    case = between_nodes(case, case.num_ranks // 2)
    results = run_virtual_nodes(
        2, case.num_ranks // 2, run_on_buffer, case.config(), case, carried=carried
    )
    check(case, results)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("delay_us", [0, 50])
def test_random_cases(shape, delay_us):
    num_nodes, ranks_per_node = shape
    for seed in range(3):
        case = random_case(
            1000 * num_nodes + 100 * ranks_per_node + seed, num_nodes * ranks_per_node
        )
        case = dataclasses.replace(case, ranks_per_node=ranks_per_node)
        results = run_virtual_nodes(
            *shape, run_on_buffer, case.config(), case, delay_us=delay_us, network_us=200
        )
        check(case, results)


def test_fewest_sms():
    case = between_nodes(Case(tokens=(90, 41, 0, 7, 64, 33), num_topk=5), 2)
    results = run_virtual_nodes(3, 2, run_on_buffer, case.config(), case, num_sms=4)
    check(case, results)


def fp8_on_buffer(rank: int, buffer: Buffer, case: Case) -> dict:
    return dispatch_all_ways(rank, case, buffer)


@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_fp8(layout):
    case = dataclasses.replace(
        between_nodes(FP8_CASE, 2), layout=layout, tokens=(90, 41, 0, 7, 64, 33), hidden=1024
    )
    check_fp8_results(case, run_virtual_nodes(3, 2, fp8_on_buffer, case.config(), case))


def capacity_on_buffer(rank: int, buffer: Buffer, case: Case) -> None:
    exact_and_roomy(rank, case, buffer)


@pytest.mark.parametrize("shape", [(2, 2), (3, 1)])
def test_outputs_of_a_given_size(shape):
    tokens = (9, 6, 0, 20)[: shape[0] * shape[1]]
    case = between_nodes(Case(tokens=tokens, hidden=128, num_topk=3), shape[1])
    run_virtual_nodes(*shape, capacity_on_buffer, case.config(), case)


def groups_on_buffer(rank: int, buffer: Buffer, case: Case) -> None:
    groups_of_one_size(rank, case, buffer)


def test_groups_of_one_size():
    case = Case(tokens=(4, 3, 0, 5), hidden=128, num_topk=2, experts_per_rank=8)
    case = between_nodes(case, 2)
    run_virtual_nodes(2, 2, groups_on_buffer, case.config(), case)


def some_nodes_only(rank: int, buffer: Buffer, case: Case, steps: int) -> list[np.ndarray]:
    """Tokens of each step go to one or two nodes alone; operations follow one another unwaited."""
    per_node = case.num_experts // (case.num_ranks // case.node_size)
    x = to_torch(case.rows(rank, case.tokens[rank], salt=2), "cuda")
    outs = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(100 * step + rank)
        topk = torch.stack([
            torch.randperm(per_node * (1 + step % 2), generator=generator)[: case.num_topk]
            for _ in range(case.tokens[rank])
        ]).cuda() + per_node * (step // 2 % 2)  # fmt: skip
        out = buffer.dispatch(x, topk)
        outs.append(buffer.combine(out.recv_x, out.handle).combined_x)
    return [out.float().cpu().numpy() for out in outs]


def test_tokens_that_go_to_some_nodes_only():
    """A token's sum is as many times its row as it has experts: exact for these."""
    case = between_nodes(Case(tokens=(40, 33, 64, 9, 70, 5), num_topk=2, hidden=64), 2)
    results = run_virtual_nodes(3, 2, some_nodes_only, case.config(), case, 12)
    for rank, outs in enumerate(results):
        x = to_torch(case.rows(rank, case.tokens[rank], salt=2)).float()
        want = (x + x).bfloat16().float().numpy()
        for out in outs:
            np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize("shape", [(2, 1), (3, 1), (2, 2)])
def test_credits_that_overtake_one_another(shape):
    """Who sends nothing sees no credit: the next one may come first, and this one hide it."""
    tokens = (9, 6, 40, 3)[: shape[0] * shape[1]]
    case = between_nodes(Case(tokens=tokens, num_topk=2, hidden=64), shape[1])
    results = run_virtual_nodes(
        *shape, sums_of_few, case.config(timeout_s=10), case, 8, network_us=500
    )
    check_sums_of_two(case, results)


@pytest.mark.parametrize("shape", [(2, 2), (3, 2)])
def test_flags_before_their_data_give_wrong_results(shape):
    """The control: on such a network the same test has to fail."""
    tokens = (90, 41, 80, 70, 64, 33)[: shape[0] * shape[1]]
    case = between_nodes(Case(tokens=tokens, num_topk=5), shape[1])
    with pytest.raises((AssertionError, RankFailure)) as failure:
        results = run_virtual_nodes(
            *shape, run_on_buffer, case.config(timeout_s=5), case, early_flags=True, network_us=500
        )
        check(case, results)
    if failure.type is RankFailure:  # found on the ranks; and their process did not just die
        assert re.search(r"AssertionError|ep_comm\.errors\.EP\w+Error", str(failure.value))
