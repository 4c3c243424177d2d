"""Masks over NVLink: the decode loops of tests/core on GPUs, late writers, and CUDA graphs."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch
from buffer_cases import on_gpus
from low_latency_cases import Inputs, LowLatencyCase, as_numpy, combine, dispatch
from mask_cases import (
    FOUR,
    THREE,
    TIMEOUT_S,
    Results,
    check_a_killed_rank,
    check_a_stopped_rank,
    check_steps,
    make_buffer,
    of_step,
    one_rank_is_late,
    ranks_go_one_by_one,
)
from ranks import run_ranks
from virtual_ranks import run_virtual_ranks

from ep_comm import EPTimeoutError

pytestmark = pytest.mark.gpu


# ---- Virtual ranks -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", [THREE, FOUR], ids=["three", "four"])
@pytest.mark.parametrize("delay_us", [0, 20])
def test_a_late_rank_is_masked_and_comes_back(case, delay_us):
    case, late = on_gpus(case, "nvlink"), case.num_ranks - 1
    ranks = run_virtual_ranks(
        case.num_ranks, one_rank_is_late, case.config(timeout_s=1.0), case, late, delay_us=delay_us
    )
    masks = check_steps(case, ranks, 30)
    assert masks == [()] * 4 + [(late,)] * 20 + [()] * 6


@pytest.mark.parametrize("split", [False, True], ids=["fused", "split"])
def test_ranks_go_one_by_one(split):
    case = LowLatencyCase(
        tokens=(12, 0, 7, 1, 12, 3, 9, 5), hidden=384, scales="fp32", num_topk=6, drop=0.1
    )
    case = replace(on_gpus(case, "nvlink"), split=split)
    ranks = run_virtual_ranks(8, ranks_go_one_by_one, case.config(timeout_s=5.0), case)
    masks = check_steps(case, ranks, 27)
    assert masks == [tuple(range(8 - gone, 8)) for gone in (*range(8), 0) for _ in range(3)]


# ---- Real processes ----------------------------------------------------------------------------


def of_gpus(case: LowLatencyCase) -> LowLatencyCase:
    """With a rank for each GPU, as far as the case has them."""
    num_ranks = min(case.num_ranks, torch.cuda.device_count())
    return on_gpus(replace(case, tokens=case.tokens[:num_ranks]), "nvlink")


@pytest.mark.multi_gpu
@pytest.mark.parametrize("when", ["before", "between", "1 ms later", "4 ms later"])
@pytest.mark.parametrize("case", [THREE, FOUR], ids=["three", "four"])
def test_a_killed_gpu_is_masked_and_the_decode_loop_goes_on(case, when):
    case = of_gpus(case)
    check_a_killed_rank(case, case.num_ranks - 1, when, backend="nccl")


@pytest.mark.multi_gpu
@pytest.mark.parametrize("case", [THREE, FOUR], ids=["three", "four"])
def test_a_stopped_gpu_is_masked_and_comes_back(case):
    case = of_gpus(case)
    check_a_stopped_rank(case, case.num_ranks - 1, backend="nccl")


# ---- CUDA graphs -------------------------------------------------------------------------------


def replay_with_masks(rank: int, case: LowLatencyCase) -> Results:
    """One graph, captured once: replayed with all, without the last rank, and with all again."""
    last = case.num_ranks - 1
    with torch.cuda.stream(torch.cuda.Stream()):
        buffer = make_buffer(case)
        store = buffer._roster._store
        given = Inputs.of_case(case, rank, "cuda")
        torch.cuda.current_stream().synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, stream=torch.cuda.current_stream(), capture_error_mode="relaxed"
        ):
            out = dispatch(buffer, case, given)
            if case.split:
                out.hook()
            back = combine(buffer, case, given, out.handle)
            if case.split:
                back.hook()

        def replay(step: int) -> tuple[tuple[int, ...], dict[str, Any]]:
            for static, new in zip(
                given, Inputs.of_case(of_step(case, step), rank, "cuda"), strict=True
            ):
                static.copy_(new)
            graph.replay()
            buffer.synchronize()
            return buffer.query_masked(), as_numpy(case, given, out)

        results = {step: replay(step) for step in range(3)}
        if rank == last:
            store.wait(["done without"], timedelta(seconds=60))
        else:
            start = time.monotonic()
            with pytest.raises(EPTimeoutError, match=f"for rank {last}"):
                replay(3)
            buffer.mask_rank(last)
            assert time.monotonic() - start < 4 * TIMEOUT_S
            results |= {step: replay(step) for step in range(3, 12)}
            store.set("done without", "1")
        buffer.clear_mask()
        results |= {step: replay(step) for step in range(12, 18)}
        buffer.destroy()
    return results


@pytest.mark.multi_gpu
@pytest.mark.parametrize("case", [THREE, FOUR], ids=["fused", "split"])
def test_a_captured_graph_heeds_masks(case):
    case = of_gpus(case)
    ranks = run_ranks(case.num_ranks, replay_with_masks, case, backend="nccl")
    masks = check_steps(case, ranks, 18)
    assert masks == [()] * 3 + [(case.num_ranks - 1,)] * 9 + [()] * 6
