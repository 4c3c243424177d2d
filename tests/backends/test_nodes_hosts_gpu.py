"""Several hosts for us, one for NVSHMEM, which then sends over NVLink: no network card is needed.

Python is told other host names. All else is as between hosts: the world, memory on NVSHMEM's heap,
its puts and signals, the end. tests/softnic has hosts that NVSHMEM takes for such, too.
"""

from __future__ import annotations

import dataclasses
import socket

import pytest
import torch
import torch.distributed as dist
from buffer_cases import check_results, on_gpus, random_case, run_case
from cases import Case
from low_latency_cases import LowLatencyCase
from low_latency_cases import check_results as check_low_latency_results
from low_latency_cases import run_case as run_low_latency_case
from ranks import run_ranks
from virtual_nodes import check_wire_bytes

from ep_comm import Buffer, EPConfig, EPUnsupportedError, _native

SHAPES = [(2, 1), (2, 2), (4, 1)]
SIZES = dict(num_experts=16, hidden=1024, max_tokens_per_rank=64, num_topk=4)
pytestmark = [
    pytest.mark.multi_gpu,
    pytest.mark.skipif(
        _native.nvshmem_unusable_reason() is not None, reason=str(_native.nvshmem_unusable_reason())
    ),
]


def run(shape: tuple[int, int], function, *args) -> list:
    num_ranks = shape[0] * shape[1]
    if num_ranks > torch.cuda.device_count():
        pytest.skip(f"needs {num_ranks} GPUs, this machine has {torch.cuda.device_count()}")
    # A world ends with its process: so each test has its own.
    return run_ranks(num_ranks, on_hosts, shape[1], function, args, backend="nccl", fresh=True)


def on_hosts(rank: int, ranks_per_host: int, function, args: tuple):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: f"host{rank // ranks_per_host}")
        return function(rank, *args)


def cases_for(shape: tuple[int, int]) -> list[Case]:
    num_ranks = shape[0] * shape[1]
    tokens = (90, 41, 0, 300)[:num_ranks]
    cases = [
        Case(tokens=tokens, num_topk=min(7, 4 * num_ranks), drop=0.1),
        Case(tokens=tokens, num_topk=4, layout="rank", dtype="fp32", hidden=256),
        *(random_case(9000 + seed, num_ranks) for seed in range(4)),
    ]
    return [dataclasses.replace(on_gpus(c, "auto"), ranks_per_node=shape[1]) for c in cases]


def run_cases(rank: int, cases: list[Case]) -> list[dict]:
    """One buffer after the other, in one world."""
    results = []
    for case in cases:
        with Buffer(None, case.config()) as buffer:
            assert " GPUs over NVSHMEM " in buffer.describe(), buffer.describe()
            assert buffer.passed_over == {}
            results.append(run_case(rank, case, buffer))
            memory = buffer._session.backend.memory
        assert memory.tensor is memory._network_tensor is None  # given back
    return results


@pytest.mark.parametrize("shape", SHAPES)
def test_operations(shape):
    cases = cases_for(shape)
    results = run(shape, run_cases, cases)
    for number, case in enumerate(cases):
        check_results(case, [of_rank[number] for of_rank in results], check_wire_bytes)


def low_latency(rank: int, cases: list[LowLatencyCase]) -> list[dict]:
    results = []
    for case in cases:
        with Buffer(None, case.config()) as buffer:
            assert " GPUs over NVSHMEM " in buffer.describe(), buffer.describe()
            for _ in range(3):
                given = run_low_latency_case(rank, buffer, case, "cuda")
            buffer.synchronize()
            results.append(given)
    return results


@pytest.mark.parametrize("shape", SHAPES)
def test_low_latency(shape):
    sizes = dict(
        tokens=(40, 33, 64, 9)[: shape[0] * shape[1]], max_tokens=64, hidden=1024, drop=0.1
    )
    cases = [
        LowLatencyCase(**sizes, num_topk=4),
        LowLatencyCase(**sizes, num_topk=4, scales="ue8m0", split=True, weights_with="combine"),
        LowLatencyCase(**sizes, num_topk=6, scales="fp32", weights_with="combine"),
    ]
    cases = [dataclasses.replace(on_gpus(c, "auto"), ranks_per_node=shape[1]) for c in cases]
    results = run(shape, low_latency, cases)
    for number, case in enumerate(cases):
        check_low_latency_results(case, [of_rank[number] for of_rank in results])


def found_and_given(rank: int) -> list[str]:
    texts = []
    for ranks_per_node in (None, 1):
        with Buffer(None, EPConfig(**SIZES, ranks_per_node=ranks_per_node)) as buffer:
            texts.append(buffer.describe())
    return texts


def test_nodes_are_found_or_given():
    for rank, (found, given) in enumerate(run((2, 2), found_and_given)):
        assert found.startswith("nodes (2 of 2 GPUs over NVSHMEM ")
        assert f"rail of rank {rank}: {rank % 2}, {rank % 2 + 2}, NIC not known" in found
        assert given.startswith("nodes (4 of 1 GPUs over NVSHMEM ")
        assert f"rail of rank {rank}: 0, 1, 2, 3, NIC" in given


def another_group(rank: int) -> str:
    crosswise = [dist.new_group([r, r + 2]) for r in range(2)][rank % 2]
    with Buffer(None, EPConfig(**SIZES)), pytest.raises(EPUnsupportedError) as caught:
        Buffer(crosswise, EPConfig(**SIZES))
    return str(caught.value)


def test_another_group_is_refused_before_anything_is_allocated():
    for rank, text in enumerate(run((2, 2), another_group)):
        members = f"ranks {rank % 2}, {rank % 2 + 2}"
        assert (
            f"rank 0 of the group of {members} has joined the NVSHMEM world of ranks 0, 1" in text
        )


def one_gives_up(rank: int) -> bool:
    buffer = Buffer(None, EPConfig(**SIZES, timeout_s=5))
    memory = buffer._session.backend.memory
    if rank == 1:
        buffer._session.backend.give_up()
        buffer.destroy()
    else:
        with pytest.warns(match="keeps the memory of its buffer: rank 1 did not destroy its own"):
            buffer.destroy()
    return memory._network_tensor is not None


def test_nobody_frees_where_one_has_failed():
    assert all(run((2, 1), one_gives_up))
