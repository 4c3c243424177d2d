"""What is read of a handle of `ElasticBuffer` in CUDA graphs and on other streams, on one GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from own_name import patience
from ranks import run_ranks

from ep_comm.deep_ep import ElasticBuffer, EPHandle, EventOverlap

patience()
pytestmark = pytest.mark.gpu
TOKENS, EXPERTS, HIDDEN = 64, 4, 512
LONG = 200_000_000  # cycles: 0.1 s


class Layer:
    """Dispatches all tokens to one expert, on one rank; the host waits for nothing."""

    def __init__(self) -> None:
        self.buffer = ElasticBuffer(dist.group.WORLD, num_max_tokens_per_rank=TOKENS)
        self.x = torch.ones(TOKENS, HIDDEN, device="cuda", dtype=torch.bfloat16)
        self.topk_idx = torch.zeros(TOKENS, 1, device="cuda", dtype=torch.int64)

    def dispatch(self, **how: Any) -> tuple[EPHandle, EventOverlap]:
        given = dict(num_experts=EXPERTS, do_expand=True, do_cpu_sync=False)
        *_, handle, event = self.buffer.dispatch(self.x, self.topk_idx, **given, **how)
        return handle, event


def ends(expert: int) -> list[int]:
    """Where the rows of each expert end."""
    return [TOKENS if e >= expert else 0 for e in range(EXPERTS)]


def on_a_stream(_: int, function: Any) -> None:
    stream = torch.cuda.Stream()
    layer = Layer()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for asynchronous in (False, True):  # all that is made by a first call
            layer.dispatch(async_with_compute_stream=asynchronous)[1].current_stream_wait()
        function(layer, stream)
    layer.buffer.destroy()


def replayed(layer: Layer, stream: torch.cuda.Stream) -> None:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="relaxed"):
        handle, event = layer.dispatch(async_with_compute_stream=True)
        event.current_stream_wait()
    for expert in (2, 0, 3):
        layer.topk_idx.fill_(expert)
        graph.replay()
        assert handle.psum_num_recv_tokens_per_expert.tolist() == ends(expert)
        assert handle.topk_idx.unique().tolist() == [expert]


def read_in_a_graph(layer: Layer, stream: torch.cuda.Stream) -> None:
    layer.topk_idx.fill_(1)
    handle, _ = layer.dispatch(async_with_compute_stream=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="relaxed"):
        in_graph = handle.psum_num_recv_tokens_per_expert
    assert handle.psum_num_recv_tokens_per_expert.tolist() == ends(1)
    graph.replay()
    assert in_graph.tolist() == ends(1)


def read_elsewhere(layer: Layer, stream: torch.cuda.Stream) -> None:
    """Its memory is not used for the next dispatch while another stream is still to read it."""
    other = torch.cuda.Stream()
    layer.topk_idx.fill_(1)
    handle, _ = layer.dispatch()
    other.wait_stream(stream)
    with torch.cuda.stream(other):
        torch.cuda._sleep(LONG)
        read = handle.psum_num_recv_tokens_per_expert
    del handle
    layer.topk_idx.fill_(3)
    handles = [layer.dispatch()[0] for _ in range(4)]
    torch.cuda.synchronize()
    assert read.tolist() == ends(1)
    assert all(each.psum_num_recv_tokens_per_expert.tolist() == ends(3) for each in handles)


@pytest.mark.parametrize("name", ["replayed", "read_in_a_graph", "read_elsewhere"])
def test_a_handle(name):
    run_ranks(1, on_a_stream, globals()[name], backend="nccl")
