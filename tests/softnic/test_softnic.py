"""Buffers between hosts over NVSHMEM itself, with the network card in software below it.

The hosts are processes of this machine (`softnic.hosts`), each with a GPU, or sharing one under
MPS. What a real card does otherwise stands in docs/network.md.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from buffer_cases import CASES, check_results, on_gpus, random_case, run_case
from cases import Case, to_torch
from example_runs import SMALL, losses
from fp8_cases import CASE as FP8_CASE
from fp8_cases import check_fp8_results, dispatch_all_ways
from softnic import build, hosts
from softnic.hosts import Card, HostFailure, run_hosts
from torch.utils._python_dispatch import TorchDispatchMode
from virtual_nodes import check_wire_bytes

from ep_comm import Buffer, EPTimeoutError
from ep_comm.bench.network.check import Sizes, check_network
from ep_comm.bench.network.report import is_sound

NUM_GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(build.missing() is not None, reason=str(build.missing())),
]
PATHS = ("proxy", "ibgda")
TIMEOUT_S = 10.0


@pytest.fixture(scope="session")
def libraries(tmp_path_factory) -> dict[str, Path]:
    return build.build(tmp_path_factory.mktemp("softnic"))


@pytest.fixture(scope="session")
def card(libraries) -> Callable[..., Card]:
    """Make one: ``card("proxy", delay_us=200)``."""
    return partial(_card, libraries)


def _card(libraries: dict[str, Path], path: str, **faults: Any) -> Card:
    return Card(path=path, libraries=libraries, **faults)


def run(
    shape: tuple[int, int], function: Callable[..., Any], *args: Any, card: Card, **options: Any
) -> list[Any]:
    """Run on `shape` hosts and ranks of each; skip where this machine cannot be them."""
    num_ranks = shape[0] * shape[1]
    if reason := hosts.missing_for(num_ranks, shape[1], NUM_GPUS):
        pytest.skip(reason)
    return run_hosts(
        shape[0], function, *args, ranks_per_host=shape[1], card=card, num_gpus=NUM_GPUS, **options
    )


def between_hosts(case: Case, ranks_per_host: int) -> Case:
    return dataclasses.replace(on_gpus(case, "nodes"), ranks_per_node=ranks_per_host)


# ----------------------------------------------------------------------------- what has to be right


def run_cases(rank: int, cases: list[Case], card: Card) -> list[dict]:
    """All cases, one buffer after the other; messages have to go through the card meanwhile."""
    results, before = [], card.counts()
    for case in cases:
        with Buffer(None, case.config()) as buffer:
            assert buffer.describe().startswith("nodes"), buffer.describe()
            results.append(run_case(rank, case, buffer))
    after = card.counts()
    assert after["puts"] > before["puts"] and after["atomics"] > before["atomics"]
    return results


def check_all(
    shape: tuple[int, int], cases: list[Case], card: Card, timeout_s: float = 240.0
) -> None:
    results = run(shape, run_cases, cases, card, card=card, timeout_s=timeout_s)
    for number, case in enumerate(cases):
        check_results(case, [of_rank[number] for of_rank in results], check_wire_bytes)


def cases_for(shape: tuple[int, int], num_random: int = 4) -> list[Case]:
    num_ranks = shape[0] * shape[1]
    tokens = (90, 41, 0, 300, 64, 7, 33, 1)[:num_ranks]
    cases = [
        Case(tokens=tokens, num_topk=min(7, 4 * num_ranks), drop=0.1),
        Case(tokens=tokens, num_topk=4, layout="rank", dtype="fp32", hidden=256),
        Case(tokens=tokens, num_topk=2, routing="last_rank", alignment=16),
        *(random_case(7000 + seed, num_ranks) for seed in range(num_random)),
    ]
    return [between_hosts(case, shape[1]) for case in cases]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", [(2, 1), (3, 1), (2, 2)])
def test_operations_and_backwards(card, shape, path):
    check_all(shape, cases_for(shape), card(path))


@pytest.mark.parametrize("path", PATHS)
def test_delayed_and_in_another_order(card, path):
    adversary = card(path, delay_us=300, reorder=True)
    check_all((2, 1), cases_for((2, 1), num_random=2), adversary)


def test_the_backend_is_found_without_being_asked_for(card):
    case = dataclasses.replace(CASES[1], tokens=(70, 33))
    case = dataclasses.replace(on_gpus(case, "auto"), ranks_per_node=None)
    ours = card("proxy")
    results = run((2, 1), run_cases, [case], ours, card=ours)
    case = dataclasses.replace(case, ranks_per_node=1)  # what was found
    check_results(case, [of_rank[0] for of_rank in results], check_wire_bytes)


def fp8(rank: int, case: Case) -> Any:
    with Buffer(None, case.config()) as buffer:
        return dispatch_all_ways(rank, case, buffer)


@pytest.mark.parametrize("path", PATHS)
def test_fp8(card, path):
    case = dataclasses.replace(between_hosts(FP8_CASE, 1), tokens=(90, 41), hidden=1024)
    check_fp8_results(case, run((2, 1), fp8, case, card=card(path)))


def many_unwaited(rank: int, case: Case, steps: int) -> None:
    """Operations follow one another, inputs change, and nobody waits in between."""
    with Buffer(None, case.config()) as buffer:
        topk = to_torch(case.topk_idx(rank), "cuda")
        x = to_torch(case.rows(rank, case.tokens[rank], salt=2), "cuda").nan_to_num(1.0, 1.0, 1.0)
        outs = []
        for step in range(steps):
            scale = float(2 ** (step % 3))
            out = buffer.dispatch(x * scale, (topk + step) % case.num_experts)
            outs.append((scale, buffer.combine(out.recv_x, out.handle).combined_x))
        torch.cuda.synchronize()  # a copy that waits for it would hold the card up, see hosts.py
        for scale, combined in outs:
            assert torch.equal(combined, x * scale * case.num_topk)


@pytest.mark.parametrize("path", PATHS)
def test_operations_that_nobody_waits_for(card, path):
    """With top-2 a token's sum is exactly twice its row."""
    case = between_hosts(Case(tokens=(200, 150), num_topk=2, hidden=512), 1)
    run((2, 1), many_unwaited, case, 40, card=card(path, delay_us=50, reorder=True))


def network_check(rank: int, sizes: Sizes) -> bool:
    with Buffer(None, sizes.config("nodes", 30)) as buffer:
        return is_sound(check_network(buffer, sizes, torch.device("cuda")))


@pytest.mark.parametrize("path", PATHS)
def test_what_doctor_sends(card, path):
    sizes = Sizes(num_nodes=2, ranks_per_node=1, tokens=1024, hidden=1024, repeats=5)
    assert run((2, 1), network_check, sizes, card=card(path)) == [True, True]


# ------------------------------------------------------------------------- what has to be found out


def operations(rank: int, cases: list[Case]) -> list[dict]:
    results = []
    for case in cases:
        buffer = Buffer(None, case.config(timeout_s=5))
        results.append(run_case(rank, case, buffer))
    return results  # nothing is given back: it may have failed


@pytest.mark.parametrize("path", PATHS)
def test_signals_before_their_data_give_wrong_results(card, path):
    """The control: on such a network the same cases have to fail."""
    cases = cases_for((2, 1))
    wrong = card(path, early_signals=True, delay_us=1000)
    with pytest.raises((AssertionError, HostFailure)) as error:
        results = run((2, 1), operations, cases, card=wrong)
        for number, case in enumerate(cases):
            check_results(case, [of_rank[number] for of_rank in results], check_wire_bytes)
    assert "the process died" not in str(error.value)


def warmed_up(rank: int, case: Case) -> tuple[Buffer, torch.Tensor, torch.Tensor]:
    """A buffer that has been used once, and the `x` and `topk_idx` of it."""
    buffer = Buffer(None, case.config(timeout_s=TIMEOUT_S))
    topk = to_torch(case.topk_idx(rank), "cuda")
    x = to_torch(case.rows(rank, case.tokens[rank], salt=2), "cuda")
    out = buffer.dispatch(x, topk)
    buffer.combine(out.recv_x, out.handle)
    torch.cuda.synchronize()
    return buffer, x, topk


def dispatch_until_timeout(
    buffer: Buffer, x: torch.Tensor, topk: torch.Tensor
) -> tuple[float, EPTimeoutError]:
    """Dispatch again and again; after how many seconds it raised, and what."""
    begin = time.monotonic()
    with pytest.raises(EPTimeoutError) as error:
        while time.monotonic() < begin + 4 * TIMEOUT_S:
            buffer.dispatch(x, topk)
            torch.cuda.synchronize()
    return time.monotonic() - begin, error.value


def over_a_link_that_dies(rank: int, case: Case, cut: Path) -> tuple[float, str, tuple[int, ...]]:
    buffer, x, topk = warmed_up(rank, case)
    dist.barrier()
    if rank == 0:
        cut.touch()
    dist.barrier()
    took, error = dispatch_until_timeout(buffer, x, topk)
    assert not buffer.is_usable
    dist.barrier()  # the other one is as far
    return took, str(error), error.late_ranks


@pytest.mark.parametrize("path", PATHS)
def test_a_dead_link_is_named_in_time(card, path, tmp_path):
    case = between_hosts(Case(tokens=(90, 41), num_topk=4), 1)
    cut = tmp_path / "cut"
    results = run((2, 1), over_a_link_that_dies, case, cut, card=card(path, cut_file=cut))
    for rank, (took, text, late_ranks) in enumerate(results):
        assert took < TIMEOUT_S + 5
        assert 1 - rank in late_ranks and f"rank {1 - rank}" in text


def beside_a_host_that_stands_still(rank: int, case: Case) -> tuple | None:
    store = dist.distributed_c10d._get_default_store()
    store.set(f"pid/{rank}", str(os.getpid()))
    buffer, x, topk = warmed_up(rank, case)
    dist.barrier()
    torch.cuda.synchronize()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
        return None
    took, error = dispatch_until_timeout(buffer, x, topk)
    os.kill(int(store.get("pid/1")), signal.SIGCONT)
    return took, str(error), error.late_ranks


@pytest.mark.parametrize("path", PATHS)
def test_a_host_that_stands_still_is_named_in_time(card, path):
    case = between_hosts(Case(tokens=(90, 41), num_topk=4), 1)
    (took, text, late_ranks), _ = run(
        (2, 1), beside_a_host_that_stands_still, case, card=card(path)
    )
    assert took < TIMEOUT_S + 5
    assert late_ranks == (1,) and "for rank 1" in text


# ----------------------------------------------------------------------------------------- Megatron


class WaitBeforeCopies(TorchDispatchMode):
    """Wait for the stream before what may copy between a GPU and pageable memory.

    Megatron does not synchronise before it reads a loss, as the tests above do (`softnic.hosts`).
    """

    _COPIES = frozenset({"_local_scalar_dense", "_to_copy", "copy_", "nonzero"})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in self._COPIES:
            torch.cuda.current_stream().synchronize()
        return func(*args, **(kwargs or {}))


def train_example(rank: int, flags: list[str], card: Card | None) -> None:
    """What examples/pretrain_moe.py does once it has joined the job."""
    from ep_comm.pretrain.start import prepare_megatron

    prepare_megatron()
    from ep_comm.pretrain.flags import parse_args
    from ep_comm.pretrain.loop import pretrain

    before = card.counts()["puts"] if card else 0
    with WaitBeforeCopies():
        pretrain(parse_args(flags))
    assert card is None or card.counts()["puts"] > before


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("megatron", "pydantic", "yaml")),
    reason="needs pip install 'ep_comm[megatron]'",
)
@pytest.mark.parametrize("path", PATHS)
def test_the_example_trains_with_experts_on_two_hosts(card, path, tmp_path):
    flags = [*SMALL, "--train-iters", "8"]
    run_dirs = {}

    def train(name: str, dispatcher: str, shape: tuple[int, int], card: Card | None) -> None:
        run_dirs[name] = tmp_path / name
        words = [*flags, "--moe-token-dispatcher", dispatcher, "--run-dir", str(run_dirs[name])]
        over = card if dispatcher == "ep_comm" else None
        run(shape, train_example, words, over, card=card, timeout_s=100)

    train("two hosts", "ep_comm", (2, 1), card(path))
    if NUM_GPUS >= 2:
        train("one host", "ep_comm", (1, 2), None)
    else:  # NCCL wants a GPU for each rank of a host
        train("alltoall", "alltoall", (2, 1), None)
    first, *others = (losses(run_dir) for run_dir in run_dirs.values())
    assert len(first) == 8
    for other in others:
        assert abs(first[1] - other[1]) <= 1e-6
        assert max(abs(first[step] - other[step]) for step in first) <= 1e-4
