"""Copy engines on GPUs: every bit as without them, on virtual ranks and on a GPU each."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from buffer_cases import CASES, check_results, on_gpus, random_case, run_case
from capacity_cases import GRAPH_CASE, captured
from cases import Case, to_numpy, to_torch
from copy_engine_cases import (
    BY_COPY,
    capacity_on_buffer,
    check_dense_bytes,
    fp8_on_buffer,
    run_on_buffer,
)
from fp8_cases import CASE as FP8_CASE
from fp8_cases import check_fp8_results
from ranks import run_ranks
from virtual_ranks import run_virtual_ranks

from ep_comm import Buffer, EPConfig


def config_of(case: Case) -> EPConfig:
    return case.config(**BY_COPY)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [case for case in CASES if case.num_ranks <= 4])
def test_named_cases(case):
    case = on_gpus(case, "nvlink")
    results = run_virtual_ranks(case.num_ranks, run_on_buffer, config_of(case), case)
    if case.num_ranks > 1:
        check_results(case, results, check_dense_bytes)
    else:
        check_results(case, results)


@pytest.mark.gpu
@pytest.mark.parametrize("num_ranks", [2, 3, 4, 6])
@pytest.mark.parametrize("delay_us", [0, 100])
def test_random_cases(num_ranks, delay_us):
    for seed in range(3):
        case = random_case(100 * num_ranks + seed, num_ranks)
        results = run_virtual_ranks(
            num_ranks, run_on_buffer, config_of(case), case, delay_us=delay_us
        )
        check_results(case, results, check_dense_bytes)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_fp8(layout):
    case = dataclasses.replace(
        on_gpus(FP8_CASE, "nvlink"), layout=layout, tokens=(190, 41, 0), hidden=1024
    )
    check_fp8_results(case, run_virtual_ranks(3, fp8_on_buffer, config_of(case), case))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_outputs_of_a_given_size(layout):
    case = on_gpus(Case(tokens=(90, 160), num_topk=3, hidden=128, layout=layout), "nvlink")
    run_virtual_ranks(2, capacity_on_buffer, config_of(case), case)


def begins_ahead(rank: int, buffer: Buffer, case: Case) -> None:
    """As without, with a combine between, and on one rank alone."""
    topk = to_torch(case.topk_idx(rank), "cuda")
    probs = to_torch(case.probabilities(rank, tuple(topk.shape), salt=3), "cuda")
    x = to_torch(case.rows(rank, case.tokens[rank], salt=2), "cuda")
    plain = buffer.dispatch(x, topk, probs)
    wanted = to_numpy(plain.recv_x)
    for begins in (True, rank == 0):
        for how in (dict(topk_idx=topk), dict(handle=plain.handle)):
            if begins:
                buffer.begin_dispatch(x)
            buffer.combine(plain.recv_x, plain.handle)
            out = buffer.dispatch(x, **how, topk_weights=probs)
            assert (to_numpy(out.recv_x) == wanted).all()
            assert (to_numpy(out.recv_topk_weights) == to_numpy(plain.recv_topk_weights)).all()


@pytest.mark.gpu
def test_rows_ahead_of_their_routing():
    case = on_gpus(Case(tokens=(190, 70, 0), num_topk=4, hidden=512), "nvlink")
    run_virtual_ranks(3, begins_ahead, config_of(case), case)


def on_a_gpu_each(rank: int, case: Case) -> dict:
    buffer = Buffer(None, config_of(case))
    result = run_case(rank, case, buffer)
    buffer.destroy()
    return result


@pytest.mark.multi_gpu
@pytest.mark.parametrize("seed", range(10))
def test_random_cases_on_gpus(seed):
    """The links' own order of copies and flags."""
    case = random_case(seed, 2)
    case = dataclasses.replace(case, num_topk=max(case.num_topk, 2), experts_per_rank=8)
    check_results(case, run_ranks(2, on_a_gpu_each, case, backend="nccl"), check_dense_bytes)


def many_large(rank: int, case: Case, num_operations: int) -> None:
    """Rows of many MB, again and again, each time others: a flag before its rows would show."""
    buffer = Buffer(None, config_of(case))
    topk = to_torch(case.topk_idx(rank), "cuda")
    handle = buffer.dispatch(torch.zeros_like(of_operation(case, rank, 0)), topk).handle
    for number in range(num_operations):
        x = of_operation(case, rank, number)
        out = buffer.dispatch(x, handle=handle)
        back = buffer.combine(out.recv_x, handle)
        # Every row arrives as many times as it has experts, and comes back as their sum.
        assert torch.equal(back.combined_x.float(), case.num_topk * x.float()), number
    buffer.destroy()


def of_operation(case: Case, rank: int, number: int) -> torch.Tensor:
    shape = (case.tokens[rank], case.hidden)
    rows = torch.arange(shape[0], device="cuda").view(-1, 1) % 7 + 1
    return ((rows + rank + number) % 16).bfloat16().expand(shape).contiguous()


@pytest.mark.multi_gpu
def test_no_flag_comes_before_its_rows():
    case = on_gpus(Case(tokens=(4096, 4096), num_topk=4, hidden=7168), "nvlink")
    run_ranks(2, many_large, case, 200, backend="nccl", timeout_s=200)


def captured_by_copy(rank: int, case: Case) -> None:
    with torch.cuda.stream(torch.cuda.Stream()):
        captured(rank, Buffer(None, config_of(case)), case)


@pytest.mark.multi_gpu
def test_graph_on_gpus():
    run_ranks(2, captured_by_copy, GRAPH_CASE, backend="nccl")
