"""Host time of DeepEP's calls on a GPU beside that of the native calls: they take turns.

One rank will do: the host's work does not depend on how many there are. It prints the times:
``pytest -s``.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deep_ep_gpus import EXPERTS, HIDDEN, ON_GPUS, TOKENS, TOPK, inputs
from own_name import patience
from ranks import run_ranks

from ep_comm.bench.timing import Stopwatch
from ep_comm.deep_ep import Buffer, ElasticBuffer

patience()
pytestmark = pytest.mark.gpu

_BLOCKS, _CALLS = 200, 20
Pair = tuple[Callable[[], Any], Callable[[], Any]]  # native, DeepEP's


def pairs_of_buffer(rank: int) -> dict[str, Pair]:
    x, topk_idx, weights = inputs(rank)
    buffer = Buffer(dist.group.WORLD, low_latency_mode=True)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, EXPERTS)
    layout = dict(
        num_tokens_per_rank=per_rank, num_tokens_per_expert=per_expert, is_token_in_rank=in_rank
    )
    given = dict(topk_idx=topk_idx, topk_weights=weights)
    num_rows = dist.get_world_size() * TOKENS
    worst = dict(num_worst_tokens=num_rows)  # the host waits for nothing
    *_, handle, _ = buffer.dispatch(x, **given, **layout, **worst)
    native, kept = handle.buffer.native, handle.native
    assert native.describe().startswith("nvlink")
    y = torch.zeros(num_rows, HIDDEN, device="cuda", dtype=torch.bfloat16)
    y_weights = torch.zeros(num_rows, TOPK, device="cuda")
    recv_x, _, low, _, _ = buffer.low_latency_dispatch(x, topk_idx, TOKENS, EXPERTS, use_fp8=False)
    low_native = low.buffer.native
    sizes = (x, topk_idx, TOKENS, EXPERTS)
    return {
        "dispatch": (
            partial(native.dispatch, x, **given, layout="rank", **worst),
            partial(buffer.dispatch, x, **given, **layout, **worst),
        ),
        "cached dispatch": (
            partial(native.dispatch, x, handle=kept),
            partial(buffer.dispatch, x, handle=handle),
        ),
        "combine": (
            partial(native.combine, y, kept, y_weights, add_weights=True),
            partial(buffer.combine, y, handle, topk_weights=y_weights),
        ),
        "low_latency_dispatch": (
            partial(low_native.low_latency_dispatch, *sizes, use_fp8=True),
            partial(buffer.low_latency_dispatch, *sizes, use_fp8=True),
        ),
        "low_latency_combine": (
            partial(low_native.low_latency_combine, recv_x, topk_idx, weights, low.native),
            partial(buffer.low_latency_combine, recv_x, topk_idx, weights, low),
        ),
    }


def pairs_of_elastic_buffer(rank: int) -> dict[str, Pair]:
    x, topk_idx, weights = inputs(rank)
    buffer = ElasticBuffer(dist.group.WORLD, num_max_tokens_per_rank=TOKENS)
    given = dict(topk_idx=topk_idx, topk_weights=weights)
    how = dict(num_experts=EXPERTS, do_cpu_sync=False)
    recv_x, _, _, handle, _ = buffer.dispatch(x, **given, **how)
    native, kept = handle.buffer.native, handle.native
    assert native.describe().startswith("nvlink")
    worst = dict(layout="rank", num_worst_tokens=dist.get_world_size() * TOKENS)
    return {
        "dispatch": (
            partial(native.dispatch, x, **given, **worst),
            partial(buffer.dispatch, x, **given, **how),
        ),
        "cached dispatch": (
            partial(native.dispatch, x, handle=kept),
            partial(buffer.dispatch, x, handle=handle),
        ),
        "combine": (
            partial(native.combine, recv_x, kept),
            partial(buffer.combine, recv_x, handle),
        ),
    }


def host_times(
    rank: int, pairs_of: Callable[[int], dict[str, Pair]]
) -> dict[str, tuple[float, float]]:
    """Return, by call, the µs that the host is in it natively, and how many times that in DeepEP's.

    Medians. All calls take turns in short blocks, so that whatever else the host does for a while
    meets a few blocks of each.
    """
    pairs = pairs_of(rank)
    watch = Stopwatch(torch.device("cuda"), iters=1)

    def in_block(call: Callable[[], Any]) -> float:
        return watch.host_back_to_back(lambda _: call(), _CALLS)

    times: dict[str, list[tuple[float, float]]] = {name: [] for name in pairs}
    for block in range(_BLOCKS):
        for name, (native, theirs) in pairs.items():
            # Either is first in every other block: what that leaves in caches helps the second.
            if block % 2:
                native_us, theirs_us = in_block(native), in_block(theirs)
            else:
                theirs_us, native_us = in_block(theirs), in_block(native)
            times[name].append((native_us, theirs_us))
    torch.cuda.synchronize()
    return {
        name: (statistics.median(n for n, _ in both), statistics.median(t / n for n, t in both))
        for name, both in times.items()
    }


@pytest.mark.parametrize(
    ("pairs_of", "most"),
    [(pairs_of_buffer, 1.15), (pairs_of_elastic_buffer, 1.25)],
    ids=["Buffer", "ElasticBuffer"],
)
def test_calls_take_little_more_than_the_native_ones(pairs_of, most):
    (times,) = run_ranks(1, host_times, pairs_of, **ON_GPUS)
    for name, (native, ratio) in times.items():
        print(f"{name}: {native:.1f} us natively, {ratio:.3f} times that")
    assert max(ratio for _, ratio in times.values()) <= most, times
