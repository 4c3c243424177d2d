"""The backend between nodes on real processes: parts of one host, NVLink for a network."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from buffer_cases import check_results, on_gpus, random_case, run_case
from cases import Case
from ranks import run_ranks
from virtual_nodes import check_wire_bytes

from ep_comm import Buffer, EPArgumentError, EPConfig

SIZES = dict(num_experts=16, hidden=1024, max_tokens_per_rank=512, num_topk=4, backend="nodes")
SHAPES = [(2, 1), (2, 2), (4, 1), (2, 3), (2, 4), (4, 2)]


def check(case: Case) -> None:
    if case.num_ranks > torch.cuda.device_count():
        pytest.skip(f"needs {case.num_ranks} GPUs, this machine has {torch.cuda.device_count()}")
    results = run_ranks(case.num_ranks, run_case, case, backend="nccl")
    check_results(case, results, check_wire_bytes)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_operations(shape, layout):
    tokens = (90, 0, 41, 300, 7, 64, 33, 1)[: shape[0] * shape[1]]
    case = Case(tokens=tokens, num_topk=7, layout=layout, ranks_per_node=shape[1], drop=0.1)
    check(on_gpus(case, "nodes"))


@pytest.mark.multi_gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(4))
def test_random_cases(shape, seed):
    case = random_case(5000 + seed, shape[0] * shape[1])
    check(dataclasses.replace(case, backend="nodes", ranks_per_node=shape[1]))


def replayed(rank: int, ranks_per_node: int) -> None:
    """A graph of both operations, replayed with other inputs, and eager operations in between."""
    buffer = Buffer(None, EPConfig(**SIZES, ranks_per_node=ranks_per_node))
    topk = torch.stack([torch.randperm(16)[:4] for _ in range(100)]).cuda()
    x = torch.randn(100, 1024, device="cuda").bfloat16()

    def both() -> torch.Tensor:
        out = buffer.dispatch(x, topk, num_worst_tokens=1024 * torch.distributed.get_world_size())
        return buffer.combine(out.recv_x, out.handle).combined_x

    both()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        combined = both()
    for step in range(5):
        x.copy_(torch.randn(100, 1024, device="cuda").bfloat16())
        topk.copy_(topk.flip(1) if step % 2 else (topk + 3) % 16)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(combined, both())
        # Three rows of a rank, rounded, and one of another are not four of one.
        torch.testing.assert_close(combined, 4 * x, rtol=2e-2, atol=0)
    buffer.synchronize()
    buffer.destroy()


@pytest.mark.gpu
def test_graphs_on_one_gpu():
    run_ranks(1, replayed, 1, backend="nccl", fresh=True)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("shape", [(2, 1), (2, 2), (4, 1)])
def test_graphs(shape):
    num_ranks = shape[0] * shape[1]
    if num_ranks > torch.cuda.device_count():
        pytest.skip(f"needs {num_ranks} GPUs, this machine has {torch.cuda.device_count()}")
    run_ranks(num_ranks, replayed, shape[1], backend="nccl", fresh=True)


def refusals(rank: int) -> None:
    buffer = Buffer(None, EPConfig(**SIZES))
    with pytest.raises(EPArgumentError, match="num_sms must be 4 to"):
        buffer.set_num_sms(3)
    assert "nodes (1 of 1 GPUs" in buffer._session.backend.describe()
    buffer.destroy()


@pytest.mark.gpu
def test_what_it_refuses():
    run_ranks(1, refusals, backend="nccl", fresh=True)
