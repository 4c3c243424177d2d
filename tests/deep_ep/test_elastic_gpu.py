"""`ep_comm.deep_ep.ElasticBuffer` on GPUs: what test_elastic.py checks, graphs, streams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deep_ep_elastic
import pytest
import torch
import torch.distributed as dist
from cases import Case
from deep_ep_gpus import EXPERTS, HIDDEN, ON_GPUS, TOKENS, TOPK, inputs, of_two
from deep_ep_normal import CASES
from own_name import patience
from ranks import run_ranks

from ep_comm import EPUnsupportedError, fp8
from ep_comm.deep_ep import ElasticBuffer

patience()
pytestmark = pytest.mark.multi_gpu


@pytest.mark.parametrize("case", of_two(CASES))
def test_every_way_to_call(case):
    run_ranks(2, deep_ep_elastic.every_way, case, **ON_GPUS)


def test_fp8_rows():
    case = Case(tokens=(70, 50), layout="rank", hidden=512, device="cuda")
    run_ranks(2, deep_ep_elastic.fp8_rows, case, **ON_GPUS)


# ---- As vLLM and SGLang decode: in a graph ------------------------------------------------------

Step = Callable[[], tuple[torch.Tensor, ...]]


def steps(
    buffer: ElasticBuffer, x: torch.Tensor, topk_idx: torch.Tensor, weights: torch.Tensor
) -> dict[str, Step]:
    """A layer whose experts give back what they get, weighted. The host waits for nothing."""
    how: dict[str, Any] = dict(topk_idx=topk_idx, topk_weights=weights, num_experts=EXPERTS)

    def by_source() -> tuple[torch.Tensor, ...]:
        """As vLLM: BF16, once a rank; the combine runs beside something else."""
        recv_x, idx, weight, handle, _ = buffer.dispatch(
            x=x, **how, num_max_tokens_per_rank=TOKENS, do_expand=False, do_cpu_sync=False
        )
        y = recv_x.float() * torch.where(idx >= 0, weight, 0.0).sum(1, keepdim=True)
        combined, _, event = buffer.combine(
            x=y.bfloat16(),
            handle=handle,
            async_with_compute_stream=True,
            allocate_on_comm_stream=True,
        )
        event.current_stream_wait()
        return combined, handle.psum_num_recv_tokens_per_scaleup_rank

    def by_expert() -> tuple[torch.Tensor, ...]:
        """As SGLang: FP8 by expert, groups of 128."""
        (rows, scales), _, weight, handle, _ = buffer.dispatch(
            fp8.quantize(x), **how, expert_alignment=128, do_expand=True, do_cpu_sync=False
        )
        y = fp8.dequantize(rows, scales, torch.float32) * weight.unsqueeze(1)
        combined, _, _ = buffer.combine(y.bfloat16(), handle=handle)
        return combined, handle.psum_num_recv_tokens_per_expert

    return dict(by_source=by_source, by_expert=by_expert)


def decode(rank: int, name: str) -> None:
    x, topk_idx, weights = inputs(rank)
    buffer = ElasticBuffer(
        dist.group.WORLD, num_max_tokens_per_rank=TOKENS, hidden=HIDDEN, num_topk=TOPK
    )
    step = steps(buffer, x, topk_idx, weights)[name]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="relaxed"):
            with pytest.raises(EPUnsupportedError, match="before the capture"):
                step()
        for _ in range(2):
            combined, _ = step()
        want = x.float() * weights.sum(1, keepdim=True)
        torch.testing.assert_close(combined.float(), want, rtol=0.1, atol=0.1)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="relaxed"):
            in_graph = step()
        for seed in range(2, 7):
            fresh = inputs(2 * seed + rank)
            for static, values in zip((x, topk_idx, weights), fresh, strict=True):
                static.copy_(values)
            graph.replay()
            stream.synchronize()
            replayed = [tensor.clone() for tensor in in_graph]
            assert all(map(torch.equal, replayed, step())), f"replay of {seed}"
    buffer.destroy()


@pytest.mark.parametrize("name", ["by_source", "by_expert"])
def test_decode_in_a_graph(name):
    run_ranks(2, decode, name, **ON_GPUS)


# ---- Streams ----------------------------------------------------------------------


def asynchronous(rank: int) -> None:
    """Operations that follow one another by events alone give what those in order do."""
    x, topk_idx, weights = inputs(rank)
    buffer = ElasticBuffer(dist.group.WORLD, num_max_tokens_per_rank=TOKENS)
    data = fp8.quantize(x)

    def run(allocate: bool, is_async: bool) -> list[torch.Tensor]:
        how = dict(async_with_compute_stream=is_async, allocate_on_comm_stream=allocate)
        (rows, scales), _, weight, handle, event = buffer.dispatch(
            data,
            topk_idx,
            weights,
            num_experts=EXPERTS,
            expert_alignment=128,
            do_expand=True,
            use_tma_aligned_col_major_sf=True,
            previous_event=buffer.capture(),
            **how,
        )
        ends = handle.psum_num_recv_tokens_per_expert  # before the event is waited for
        event.current_stream_wait()
        y = (fp8.dequantize(rows, scales, torch.float32) * weight.unsqueeze(1)).bfloat16()
        combined, _, event = buffer.combine(y, handle, bias=x, **how)
        event.current_stream_wait()
        return [rows.view(torch.uint8), scales, weight, ends, combined]

    want = run(False, False)
    for allocate in (False, True):
        for _ in range(20):
            assert all(map(torch.equal, run(allocate, True), want))
    assert buffer.get_comm_stream() != torch.cuda.current_stream()
    buffer.destroy()


def test_asynchronous_operations():
    run_ranks(2, asynchronous, **ON_GPUS)
