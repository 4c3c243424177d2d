"""Inputs of one size for DeepEP's calls on GPUs, and what the host takes for them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from buffer_cases import on_gpus

ON_GPUS = dict(backend="nccl", timeout_s=240)


def of_two(cases: list) -> list:
    return [on_gpus(case, "nvlink") for case in cases if case.num_ranks == 2]


HIDDEN, EXPERTS, TOPK, TOKENS = 7168, 32, 8, 128


def inputs(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(rank)
    x = torch.randn(TOKENS, HIDDEN, device="cuda").bfloat16()
    weights, topk_idx = torch.rand(TOKENS, EXPERTS, device="cuda").topk(TOPK)
    return x, topk_idx, weights


_BLOCKS, _CALLS = 15, 40


def host_times(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median over blocks of the microseconds that the host is in a call; calls take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(_BLOCKS):
        for name, call in calls.items():
            torch.cuda.synchronize()
            dist.barrier()
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(_CALLS):
                call()
            times[name].append(1e6 * (time.perf_counter() - start) / _CALLS)
    torch.cuda.synchronize()
    return {name: statistics.median(values) for name, values in times.items()}


def check_times(times: dict[str, dict[str, float]], whose: str, most: float) -> None:
    """Print what calls take natively and by `whose`, and see that none takes `most` times that."""
    for name, of_call in times.items():
        ratio = of_call[whose] / of_call["native"]
        print(f"{name}: {of_call['native']:.1f} us natively, {ratio:.3f} times that")
    slow = {name for name, each in times.items() if each[whose] > most * each["native"]}
    assert not slow, times
