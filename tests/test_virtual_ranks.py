"""The NVLink kernels between ranks that share one GPU: what there are not enough GPUs for."""

from __future__ import annotations

import dataclasses

import pytest
from cases import Case
from test_buffer import CASES, check_results, on_gpus, random_case, run_case
from test_dispatch_fp8 import CASE as FP8_CASE
from test_dispatch_fp8 import check_fp8_results, dispatch_all_ways
from virtual_ranks import run_virtual_ranks

from ep_comm import Buffer

pytestmark = pytest.mark.gpu


def run_on_buffer(rank: int, buffer: Buffer, case: Case) -> dict:
    return run_case(rank, case, buffer)


def fp8_on_buffer(rank: int, buffer: Buffer, case: Case) -> dict:
    return dispatch_all_ways(rank, case, buffer)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_named_cases(case):
    case = on_gpus(case, "nvlink")
    check_results(case, run_virtual_ranks(case.num_ranks, run_on_buffer, case.config(), case))


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("delay_us", [0, 100])
def test_random_cases(num_ranks, delay_us):
    for seed in range(3):
        case = random_case(100 * num_ranks + seed, num_ranks)
        results = run_virtual_ranks(
            num_ranks, run_on_buffer, case.config(), case, delay_us=delay_us
        )
        check_results(case, results)


@pytest.mark.parametrize("hidden", [64, 512, 2048])
def test_many_experts_a_token(hidden):
    """With them, and with few SMs, the lists of a combine are longest."""
    case = Case(tokens=(90, 41, 70), experts_per_rank=32, num_topk=32, hidden=hidden)
    case = on_gpus(case, "nvlink")
    check_results(case, run_virtual_ranks(3, run_on_buffer, case.config(), case))


@pytest.mark.parametrize("hidden", [8192, 7176])
def test_rows_of_several_passes(hidden):
    case = on_gpus(Case(tokens=(21, 9), hidden=hidden, dtype="fp32"), "nvlink")
    check_results(case, run_virtual_ranks(2, run_on_buffer, case.config(), case))


@pytest.mark.parametrize("layout", ["expert", "rank"])
@pytest.mark.parametrize("num_ranks", [3, 8])
def test_fp8(num_ranks, layout):
    tokens = (90, 41, 0, 7, 64, 33, 1, 20)[:num_ranks]
    case = dataclasses.replace(
        on_gpus(FP8_CASE, "nvlink"), layout=layout, tokens=tokens, hidden=1024
    )
    check_fp8_results(case, run_virtual_ranks(num_ranks, fp8_on_buffer, case.config(), case))
