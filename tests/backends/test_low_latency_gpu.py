"""Low latency over NVLink: the cases of tests/core on virtual ranks and GPUs, and in graphs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from buffer_cases import on_gpus
from low_latency_cases import (
    Inputs,
    LowLatencyCase,
    check_results,
    dispatch,
    run_case,
    run_combined_twice,
    run_two_at_once,
)
from low_latency_ranks import (
    after_four_thousand_million,
    rank_one_stays_away,
    with_a_third_dispatch,
    with_experts_twice,
    with_foreign_experts,
    with_other_formats,
    with_other_handles,
    with_weights_on_one_side,
)
from low_latency_suite import (
    CASES,
    CHANGING,
    GRAPH,
    HARD,
    LARGE,
    SMALL,
    TWICE,
    TWO_AT_ONCE,
    changing_operations,
    replays,
)
from ranks import run_ranks
from virtual_ranks import run_virtual_ranks

from ep_comm import Buffer
from ep_comm.blank import Blank, maker
from ep_comm.errors import EPStateError

pytestmark = pytest.mark.gpu
EIGHT = LowLatencyCase(
    tokens=(12, 0, 7, 1, 12, 3, 9, 5), scales="fp32", hidden=384, num_topk=6, drop=0.1
)


def on_buffer(rank: int, buffer: Buffer, case: LowLatencyCase) -> dict[str, Any]:
    return run_case(rank, buffer, case, "cuda")


@pytest.mark.parametrize("split", [False, True], ids=["fused", "split"])
def test_small_cases(split):
    """What ``scripts/sanitize.sh`` runs under compute-sanitizer, where all takes its time."""
    case = dataclasses.replace(on_gpus(SMALL, "nvlink"), split=split)
    config = case.config(timeout_s=30)
    check_results(case, run_virtual_ranks(2, on_buffer, config, case, in_step=True))


STRIDED = Blank((3, 6, 4), (32, 1, 8), torch.float32)  # columns first, with gaps


def check_made(made: torch.Tensor, like: torch.Tensor) -> None:
    assert made.device == like.device and made.dtype == STRIDED.dtype
    assert (made.shape, made.stride()) == (STRIDED.size, STRIDED.stride)
    assert made.is_leaf and not made._is_view() and not made.requires_grad
    made.fill_(2.0)  # all of it is there
    assert float(made.sum()) == 2.0 * made.numel()


def test_tensors_without_content():
    like = torch.ones(1, device="cuda")
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            one, another = (maker(like.device)(*STRIDED) for _ in range(2))
            assert one.data_ptr() != another.data_ptr()
            assert one.is_inference() == (mode is torch.inference_mode)
            check_made(one, like)
    assert maker(like.device)((0, 8), (8, 1), torch.bfloat16).shape == (0, 8)


@pytest.mark.multi_gpu
@pytest.mark.own_gpus
def test_tensors_without_content_are_where_their_like_is():
    check_made(maker(torch.device("cuda", 1))(*STRIDED), torch.ones(1, device="cuda:1"))


@pytest.mark.parametrize("case", [*CASES, *HARD, EIGHT])
@pytest.mark.parametrize("delay_us", [0, 20])
def test_named_cases(case, delay_us):
    case = on_gpus(case, "nvlink")
    results = run_virtual_ranks(case.num_ranks, on_buffer, case.config(), case, delay_us=delay_us)
    check_results(case, results)


def combined_twice(rank: int, buffer: Buffer, case: LowLatencyCase) -> dict[str, Any]:
    return run_combined_twice(rank, buffer, case, "cuda")


@pytest.mark.parametrize("case", TWICE)
def test_one_dispatch_is_combined_twice(case):
    case = on_gpus(case, "nvlink")
    check_results(case, run_virtual_ranks(case.num_ranks, combined_twice, case.config(), case))


def two_at_once(rank: int, buffer: Buffer) -> list[dict[str, Any]]:
    return run_two_at_once(rank, buffer, [on_gpus(each, "nvlink") for each in TWO_AT_ONCE], "cuda")


def test_two_results_are_out_at_once_beside_normal_operations():
    config = on_gpus(TWO_AT_ONCE[0], "nvlink").config()
    results = run_virtual_ranks(3, two_at_once, config)
    for number, case in enumerate(TWO_AT_ONCE):
        check_results(case, [of_rank[number] for of_rank in results], times=2 - number)


def test_a_credit_waits_for_no_credit():
    case = on_gpus(LowLatencyCase(tokens=(7, 5), split=True), "nvlink")
    config = case.config(timeout_s=10)
    results = run_virtual_ranks(2, with_a_third_dispatch, config, case)
    for of_operation in zip(*results, strict=True):
        check_results(case, list(of_operation))


@pytest.mark.parametrize("split", [False, True], ids=["fused", "split"])
def test_numbers_of_operations_run_over(split):
    case = on_gpus(LowLatencyCase(tokens=(7, 5), split=split), "nvlink")
    results = run_virtual_ranks(2, after_four_thousand_million, case.config(timeout_s=10), case)
    for of_operation in zip(*results, strict=True):
        check_results(case, list(of_operation))


def dropped_after_a_hook(rank: int, buffer: Buffer) -> None:
    x = torch.ones(512, 1024, device="cuda", dtype=torch.bfloat16)
    topk_idx = torch.zeros(512, 1, device="cuda", dtype=torch.int64)
    out = buffer.low_latency_dispatch(x, topk_idx, 512, 4, use_fp8=False, return_recv_hook=True)
    assert isinstance(out.recv_x, torch.Tensor) and out.hook is not None
    shape, stream = out.recv_x.shape, torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # 0.1 s
        out.hook()
    del out
    others = [torch.full(shape, 7.0, device="cuda", dtype=torch.bfloat16) for _ in range(8)]
    torch.cuda.synchronize()
    assert all(bool((other == 7).all()) for other in others)


def test_memory_is_not_used_again_before_a_hook_on_another_stream_has_written_to_it():
    case = LowLatencyCase(tokens=(512,), max_tokens=512, num_topk=1, hidden=1024)
    run_virtual_ranks(1, dropped_after_a_hook, on_gpus(case, "nvlink").config())


def changing(rank: int, buffer: Buffer) -> list[dict[str, Any]]:
    return changing_operations(rank, buffer, "cuda")


@pytest.mark.parametrize("delay_us", [0, 50])
def test_changing_operations_of_one_buffer(delay_us):
    config = on_gpus(CHANGING[0], "nvlink").config()
    results = run_virtual_ranks(2, changing, config, delay_us=delay_us)
    for number, case in enumerate(CHANGING):
        check_results(case, [of_rank[number] for of_rank in results])


def test_a_late_rank_is_named():
    case = on_gpus(LowLatencyCase(tokens=(7, 5)), "nvlink")
    config = case.config(timeout_s=1.0)
    message, _ = run_virtual_ranks(2, rank_one_stays_away, config, case)
    assert message.startswith("low_latency_dispatch #1: rank 0 waited 1 s for rank 1 (phase: plan)")


def test_what_is_no_expert_is_dropped():
    case = on_gpus(LowLatencyCase(tokens=(12, 9), num_topk=4, drop=0.4), "nvlink")
    check_results(case, run_virtual_ranks(2, with_foreign_experts, case.config(), case))


def test_an_expert_twice_gets_the_row_once():
    case = on_gpus(LowLatencyCase(tokens=(12, 9), num_topk=2), "nvlink")
    counts = run_virtual_ranks(2, with_experts_twice, case.config(), case)
    assert sum(map(sum, counts)) == 21


def test_combines_of_different_dispatches_are_a_mismatch():
    case = on_gpus(LowLatencyCase(tokens=(7, 5)), "nvlink")
    messages = run_virtual_ranks(2, with_other_handles, case.config(timeout_s=20), case)
    for message in messages:
        assert "different low_latency_combine calls: handles of different dispatches" in message


def test_dispatches_in_different_formats_are_a_mismatch():
    case = on_gpus(LowLatencyCase(tokens=(7, 5), hidden=128), "nvlink")
    messages = run_virtual_ranks(2, with_other_formats, case.config(timeout_s=20), case)
    for message in messages:
        assert "made different low_latency_dispatch calls" in message


def test_weights_that_some_ranks_alone_bring_are_a_mismatch():
    case = on_gpus(LowLatencyCase(tokens=(7, 5)), "nvlink")
    messages = run_virtual_ranks(2, with_weights_on_one_side, case.config(timeout_s=20), case)
    for message in messages:
        assert "made different low_latency_combine calls" in message


# ---- CUDA graphs -------------------------------------------------------------------------------


def check_replays(num_ranks: int, split: bool) -> None:
    case = on_gpus(
        dataclasses.replace(GRAPH, tokens=GRAPH.tokens[:num_ranks], split=split), "nvlink"
    )
    seeds = range(10, 16)
    ranks = run_ranks(num_ranks, replays, case, seeds, backend="nccl")
    for number, seed in enumerate(seeds):
        for layer, salt in enumerate((0, 1000)):
            of_seed = dataclasses.replace(case, seed=seed + salt)
            check_results(of_seed, [results[2 * number + layer] for results in ranks])


@pytest.mark.parametrize("split", [False, True], ids=["fused", "split"])
def test_graphs_on_one_gpu(split):
    check_replays(1, split)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("split", [False, True], ids=["fused", "split"])
def test_graphs_on_gpus(split):
    check_replays(2, split)


def sends_without_receiving(rank: int) -> str:
    case = on_gpus(LowLatencyCase(tokens=(5,), split=True), "nvlink")
    with torch.cuda.stream(torch.cuda.Stream()):
        buffer = Buffer(None, case.config())
        given = Inputs.of_case(case, rank, "cuda")
        torch.cuda.current_stream().synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, stream=torch.cuda.current_stream(), capture_error_mode="relaxed"
        ):
            dispatch(buffer, case, given)
        for _ in range(2):
            graph.replay()
        buffer.synchronize()
        graph.replay()
        with pytest.raises(EPStateError, match="a third result would be out") as caught:
            buffer.synchronize()
        return str(caught.value)


def test_a_third_result_in_replays_is_a_fault():
    (message,) = run_ranks(1, sends_without_receiving, backend="nccl")
    assert message.startswith("low_latency_dispatch #3")


# ---- A GPU each --------------------------------------------------------------------------------


def on_a_gpu(rank: int, case: LowLatencyCase, repeats: int) -> dict[str, Any]:
    with Buffer(None, case.config()) as buffer:
        for _ in range(repeats):
            results = run_case(rank, buffer, case, "cuda")
        assert buffer.records.num_operations == 2 * repeats
        assert all(0 < record.seconds < 1 for record in buffer.records)
        return results


@pytest.mark.multi_gpu
@pytest.mark.parametrize("split", [False, True], ids=["fused", "split"])
@pytest.mark.parametrize("weights_with", ["dispatch", "combine"])
def test_full_size_on_gpus(split, weights_with):
    case = dataclasses.replace(on_gpus(LARGE, "nvlink"), split=split, weights_with=weights_with)
    check_results(case, run_ranks(2, on_a_gpu, case, 3, backend="nccl"))
