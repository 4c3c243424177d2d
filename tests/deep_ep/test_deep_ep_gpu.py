"""`ep_comm.deep_ep` on GPUs: what tests/deep_ep checks on CPU, streams, graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deep_ep_low_latency
import deep_ep_normal
import pytest
import torch
import torch.distributed as dist
from deep_ep_gpus import EXPERTS, HIDDEN, ON_GPUS, TOKENS, inputs, of_two
from low_latency_cases import check_results
from own_name import patience
from ranks import run_ranks

from ep_comm import EPUnsupportedError
from ep_comm.deep_ep import Buffer, EventHandle, EventOverlap

patience()
pytestmark = pytest.mark.multi_gpu


@pytest.mark.parametrize("case", of_two(deep_ep_normal.CASES))
def test_normal_operations(case):
    run_ranks(2, deep_ep_normal.every_way, case, **ON_GPUS)


def test_fp8_rows():
    case = deep_ep_normal.Case(tokens=(7, 5), layout="rank", hidden=512, device="cuda")
    run_ranks(2, deep_ep_normal.fp8_rows, case, **ON_GPUS)


def test_sizes_follow_the_calls():
    run_ranks(2, deep_ep_normal.sizes_that_change, "cuda", **ON_GPUS)


@pytest.mark.parametrize("zero_copy", [False, True])
@pytest.mark.parametrize("case", of_two(deep_ep_low_latency.CASES))
def test_low_latency_operations(case, zero_copy):
    results = run_ranks(2, deep_ep_low_latency.every_way, case, zero_copy, **ON_GPUS)
    check_results(case, results)


# ---- Groups, streams, graphs -------------------------------------------------------------------


def of_gloo(rank: int) -> None:
    """As vLLM makes it: of its CPU group."""
    buffer = Buffer(dist.new_group(backend="gloo"))
    x, topk_idx, weights = inputs(rank)
    layout = layout_of(buffer, topk_idx)
    recv_x, *_, handle, _ = buffer.dispatch(x, topk_idx=topk_idx, topk_weights=weights, **layout)
    assert buffer._buffers.newest.native.describe().startswith("nvlink")
    combined, _, _ = buffer.combine(recv_x, handle)
    count = layout["is_token_in_rank"].sum(1, keepdim=True)
    assert torch.equal(combined, (x.float() * count).bfloat16())
    buffer.destroy()


def layout_of(buffer: Buffer, topk_idx: torch.Tensor, **how: Any) -> dict[str, torch.Tensor]:
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, EXPERTS, **how)
    return dict(
        num_tokens_per_rank=per_rank,
        num_tokens_per_expert=per_expert,
        is_token_in_rank=in_rank,
    )


def test_a_gloo_group_will_do():
    run_ranks(2, of_gloo, **ON_GPUS)


def asynchronous(rank: int) -> None:
    """Operations that follow one another by events alone, and a bias on their stream."""
    buffer = Buffer(dist.group.WORLD)
    x, topk_idx, weights = inputs(rank)
    layout = layout_of(buffer, topk_idx)
    bias = torch.randn_like(x)

    def run(streams: Callable[[], dict]) -> list[torch.Tensor]:
        recv_x, _, recv_weights, _, handle, event = buffer.dispatch(
            x, topk_idx=topk_idx, topk_weights=weights, **layout, **streams()
        )
        event.current_stream_wait()
        combined, back, event = buffer.combine(
            recv_x * 2, handle, topk_weights=recv_weights, bias=(bias, bias), **streams()
        )
        event.current_stream_wait()
        return [recv_x, recv_weights, combined, back]

    want = run(dict)
    for allocate in (False, True):
        for _ in range(20):
            got = run(
                lambda allocate=allocate: dict(
                    previous_event=EventOverlap(EventHandle()),
                    async_finish=True,
                    allocate_on_comm_stream=allocate,
                )
            )
            assert all(map(torch.equal, got, want))
    assert torch.equal(want[3], weights)
    count = layout["is_token_in_rank"].sum(1, keepdim=True)
    total = (x.float() * 2 * count).bfloat16().float() + bias.float() + bias.float()
    assert torch.equal(want[2], total.bfloat16())
    assert buffer.get_comm_stream() != torch.cuda.current_stream()
    EventHandle().current_stream_wait()
    buffer.destroy()


def test_asynchronous_operations():
    run_ranks(2, asynchronous, **ON_GPUS)


def in_a_graph(rank: int) -> None:
    """Low latency as SGLang has it: the buffer is made before, the first call is captured."""
    x, topk_idx, weights = inputs(rank)
    buffer = Buffer(dist.group.WORLD, low_latency_mode=True)

    def step() -> torch.Tensor:
        recv_x, _, handle, _, hook = buffer.low_latency_dispatch(
            x, topk_idx, TOKENS, EXPERTS, use_fp8=False, return_recv_hook=True
        )
        hook()
        combined, _, hook = buffer.low_latency_combine(
            recv_x, topk_idx, weights, handle, return_recv_hook=True
        )
        hook()
        return combined

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="relaxed"):
            with pytest.raises(EPUnsupportedError, match="clean_low_latency_buffer"):
                step()
        buffer.clean_low_latency_buffer(TOKENS, HIDDEN, EXPERTS)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="relaxed"):
            combined = step()
        for scale in (1, 2, 3):
            x.mul_(scale)
            graph.replay()
            stream.synchronize()
            torch.testing.assert_close(
                combined.float(), x.float() * weights.sum(1, keepdim=True), rtol=2e-2, atol=2e-2
            )
    buffer.destroy()


def test_low_latency_in_a_graph():
    run_ranks(2, in_a_graph, **ON_GPUS)
