"""The NVLink kernels between ranks that share GPUs: what there are not enough GPUs for."""

from __future__ import annotations

import dataclasses
import threading
import time

import pytest
import torch
from buffer_cases import (
    CASES,
    changing_config,
    changing_on_reference,
    changing_operations,
    check_results,
    on_gpus,
    random_case,
    run_case,
)
from capacity_cases import exact_and_roomy
from cases import Case, to_numpy, to_torch, wait_for_stream
from copy_engine_cases import check_dense_bytes
from fp8_cases import CASE as FP8_CASE
from fp8_cases import check_fp8_results, dispatch_all_ways
from ranks import run_ranks
from virtual_ranks import run_virtual_ranks, sms_of_a_rank

from ep_comm import Buffer, fp8

pytestmark = pytest.mark.gpu


def run_on_buffer(rank: int, buffer: Buffer, case: Case) -> dict:
    return run_case(rank, case, buffer)


def fp8_on_buffer(rank: int, buffer: Buffer, case: Case) -> dict:
    return dispatch_all_ways(rank, case, buffer)


def small_fp8(rank: int, buffer: Buffer, case: Case) -> None:
    x = to_torch(case.rows(rank, case.tokens[rank], salt=2), "cuda")
    topk = to_torch(case.topk_idx(rank), "cuda")
    probs = to_torch(case.probabilities(rank, tuple(topk.shape), salt=3), "cuda")
    for layout in ("expert", "rank"):
        out = buffer.dispatch(fp8.quantize(x), topk, probs, layout=layout)
        again = buffer.dispatch(x, handle=out.handle, wire_dtype=fp8.FP8_DTYPE)
        buffer.combine(again.recv_x, out.handle, out.recv_topk_weights)
        buffer.synchronize()
        assert to_numpy(out.recv_x[0].view(torch.uint8)).any()
        assert to_numpy(again.recv_x).any()


def small_capacity(rank: int, buffer: Buffer, case: Case) -> None:
    exact_and_roomy(rank, case, buffer)


SMALL = {
    "one-rank": (Case(tokens=(60,), experts_per_rank=32, num_topk=8, hidden=520), run_on_buffer),
    "expert-major": (Case(tokens=(7, 5)), run_on_buffer),
    "rank-major": (Case(tokens=(7, 5), layout="rank"), run_on_buffer),
    "fp8": (Case(tokens=(9, 4), hidden=512, num_topk=5), small_fp8),
    "capacity": (Case(tokens=(9, 6), hidden=128, num_topk=3), small_capacity),
    "copies": (Case(tokens=(41, 35), num_topk=3), run_on_buffer),
}


@pytest.mark.parametrize("name", SMALL)
def test_small_cases(name):
    """What ``scripts/sanitize.sh`` runs under compute-sanitizer, where all takes its time."""
    case, function = SMALL[name]
    case = on_gpus(case, "nvlink")
    by_copy = name == "copies"
    config = case.config(timeout_s=30, wire="copy-engine" if by_copy else "sm")
    results = run_virtual_ranks(case.num_ranks, function, config, case, in_step=True)
    if function is run_on_buffer:
        check_results(case, results, check_dense_bytes if by_copy else None)


@pytest.mark.parametrize("case", CASES)
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


def rank_one_is_late(rank: int, buffer: Buffer, case: Case) -> list[tuple]:
    """What another thread sees of the waits of this rank."""
    memory, seen, done = buffer._session.backend.memory, set(), threading.Event()
    x = to_torch(case.rows(rank, case.tokens[rank], salt=2), "cuda")
    topk = to_torch(case.topk_idx(rank), "cuda")

    def watch() -> None:
        while not done.wait(0.01):
            seen.update(memory.waits())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        time.sleep(3 * (rank == 1))
        out = buffer.dispatch(x, topk)
        wait_for_stream()
        time.sleep(3 * (rank == 1))
        buffer.combine(out.recv_x, out.handle)
        buffer.synchronize()
    finally:
        done.set()
        watcher.join()
    assert memory.waits() == []
    return sorted(seen)


def test_who_is_late_is_seen_while_it_is_waited_for():
    case = on_gpus(Case(tokens=(9, 6, 8), num_topk=3), "nvlink")
    waits = run_virtual_ranks(3, rank_one_is_late, case.config(), case)
    assert waits[0] == waits[2] == [("combine", "rows", 1, 1), ("dispatch", "plan", 1, 1)]
    assert waits[1] == []


def changing_on_buffer(rank: int, buffer: Buffer, num_operations: int, num_gpus: int) -> list[str]:
    share = sms_of_a_rank(buffer.num_ranks, num_gpus)
    sms = [n for n in (2, 3, 5, share) if n <= share]
    return changing_operations(rank, buffer, num_operations, "cuda", sms)


def check_changing_operations(num_gpus: int, num_operations: int, delay_us: int = 0) -> None:
    config = changing_config(8, "nvlink")
    got = run_virtual_ranks(
        8, changing_on_buffer, config, num_operations, num_gpus,
        num_gpus=num_gpus, delay_us=delay_us, timeout_s=200,
    )  # fmt: skip
    assert got == run_ranks(8, changing_on_reference, num_operations, timeout_s=200)


@pytest.mark.parametrize("delay_us", [0, 100])
def test_changing_operations_of_eight_ranks(delay_us):
    check_changing_operations(1, 60, delay_us)


@pytest.mark.multi_gpu
@pytest.mark.own_gpus
def test_a_thousand_changing_operations_of_eight_ranks():
    check_changing_operations(torch.cuda.device_count(), 340)


@pytest.mark.multi_gpu
@pytest.mark.own_gpus
@pytest.mark.parametrize("num_ranks", [5, 6, 7, 8])
def test_random_cases_with_links(num_ranks):
    """More ranks than GPUs, with NVLink between some of them."""
    num_gpus = torch.cuda.device_count()
    for seed in range(4):
        case = random_case(1000 * num_ranks + seed, num_ranks)
        results = run_virtual_ranks(
            num_ranks, run_on_buffer, case.config(), case, num_gpus=num_gpus, delay_us=20
        )
        check_results(case, results)
