"""The backend between nodes, with its kernels run on the CPU: no GPU is needed."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest
import torch
from buffer_cases import check_results, run_case
from capacity_cases import exact_and_roomy, groups_of_one_size
from cases import Case, to_numpy, to_torch
from emulated_nodes import run_emulated_nodes
from fp8_cases import CASE as FP8_CASE
from fp8_cases import check_fp8_results, dispatch_all_ways
from node_cases import PATIENT, case_of
from virtual_nodes import check_sums_of_two, check_wire_bytes, sums_of_few

from ep_comm import Buffer, EPError, EPMismatchError, EPTimeoutError
from ep_comm._native import header
from ep_comm.backends.nvlink import dispatches

SHAPES = [(1, 2), (2, 1), (2, 2), (3, 1), (3, 2), (4, 2), (2, 4)]
QUICK = [(2, 2), (3, 2)]


def run_on_buffer(rank: int, buffer: Buffer, case: Case) -> dict:
    return run_case(rank, case, buffer)


def check_operations(library, shape: tuple[int, int], case: Case, **how) -> None:
    config = case.config(**PATIENT)
    results = run_emulated_nodes(library, *shape, run_on_buffer, config, case, **how)
    check_results(case, results, check_wire_bytes)


@pytest.mark.parametrize("shape", QUICK)
def test_operations(library, shape):
    check_operations(library, shape, case_of(shape))


@pytest.mark.e2e
@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_operations_of_other_shapes(library, shape, carried):
    check_operations(library, shape, case_of(shape), carried=carried)


@pytest.mark.e2e
@pytest.mark.parametrize(
    "changes",
    [
        dict(layout="rank", dtype="fp32"),
        dict(as_routing_map=True, num_topk=7, alignment=16),
        dict(routing="one_expert", layout="rank"),
        dict(routing="last_rank", alignment=1, hidden=136),
        dict(drop=1.0),
        dict(tokens=(0, 0, 0, 0, 0, 3), num_topk=3),
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_kinds_of_input(library, changes):
    check_operations(library, (3, 2), case_of((3, 2), **changes))


@pytest.mark.e2e
@pytest.mark.parametrize("seed", range(20))
def test_random_cases(library, seed):
    rng = np.random.default_rng(seed)
    shape = SHAPES[rng.integers(len(SHAPES))]
    num_ranks = shape[0] * shape[1]
    experts_per_rank = int(rng.choice([1, 2, 8]))
    case = case_of(
        shape,
        tokens=tuple(int(n) for n in rng.choice([0, 1, 31, 70, 100], num_ranks)),
        experts_per_rank=experts_per_rank,
        num_topk=int(min(rng.choice([1, 2, 8]), num_ranks * experts_per_rank)),
        hidden=int(rng.choice([8, 64, 136])),
        dtype=str(rng.choice(["bf16", "fp16", "fp32"])),
        layout=str(rng.choice(["expert", "rank"])),
        routing=str(rng.choice(["uniform", "zipf", "one_expert"])),
        drop=float(rng.choice([0.0, 0.3])),
        seed=seed,
    )
    print(f"case: {case}")
    check_operations(
        library, shape, case,
        network_us=int(rng.choice([0, 300])), delay_us=int(rng.choice([0, 20])),
        num_sms=int(rng.integers(4, 9)),
    )  # fmt: skip


def fp8_on_buffer(rank: int, buffer: Buffer, case: Case) -> dict:
    return dispatch_all_ways(rank, case, buffer)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_fp8(library, layout):
    case = dataclasses.replace(
        FP8_CASE, layout=layout, tokens=(9, 41, 0, 7), hidden=512, ranks_per_node=2
    )
    results = run_emulated_nodes(library, 2, 2, fp8_on_buffer, case.config(**PATIENT), case)
    check_fp8_results(case, results)


def capacity_on_buffer(rank: int, buffer: Buffer, case: Case) -> None:
    exact_and_roomy(rank, case, buffer)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["expert", "rank"])
@pytest.mark.parametrize("shape", [(2, 2), (3, 1)])
def test_outputs_of_a_given_size(library, shape, layout):
    case = case_of(shape, hidden=128, layout=layout)
    run_emulated_nodes(library, *shape, capacity_on_buffer, case.config(**PATIENT), case)


def groups_on_buffer(rank: int, buffer: Buffer, case: Case) -> None:
    groups_of_one_size(rank, case, buffer)


@pytest.mark.slow
def test_groups_of_one_size(library):
    """Some of them are empty."""
    case = case_of((2, 2), tokens=(4, 3, 0, 5), hidden=128, num_topk=2, experts_per_rank=8)
    run_emulated_nodes(library, 2, 2, groups_on_buffer, case.config(**PATIENT), case)


def unwaited_steps(rank: int, buffer: Buffer, case: Case, steps: int) -> list[np.ndarray]:
    """Tokens of each step go to some nodes alone, which change. Rank 1 is late now and then."""
    num_nodes = case.num_ranks // case.node_size
    per_node = case.num_experts // num_nodes
    x = to_torch(case.rows(rank, case.tokens[rank], salt=2))
    outs, handles = [], []
    for step in range(steps):
        if rank == 1 and step % 4 == 1:
            time.sleep(0.3)
        generator = torch.Generator().manual_seed(100 * step + rank)
        topk = torch.stack([
            torch.randperm(per_node * (1 + step % num_nodes), generator=generator)[: case.num_topk]
            for _ in range(case.tokens[rank])
        ])  # fmt: skip
        topk = (topk + per_node * (step // 2)) % case.num_experts
        out = buffer.dispatch(x, topk)
        handles.append(out.handle)
        outs.append(buffer.combine(out.recv_x, out.handle).combined_x)
        if step % 2:  # an older routing again, two of each kind in flight
            again = buffer.dispatch(x, handle=handles[step // 2])
            outs.append(buffer.combine(again.recv_x, handles[step // 2]).combined_x)
    buffer.synchronize()
    return [to_numpy(out) for out in outs]


@pytest.mark.parametrize("shape", [(2, 2), (3, 1), (3, 2)])
@pytest.mark.parametrize("delay_us", [0, 20])
def test_operations_that_nobody_waits_for(library, shape, delay_us):
    tokens = (40, 33, 64, 9, 70, 5)[: shape[0] * shape[1]]
    case = case_of(shape, tokens=tokens, num_topk=2, hidden=64)
    results = run_emulated_nodes(
        library, *shape, unwaited_steps, case.config(**PATIENT), case, 6,
        delay_us=delay_us, network_us=200, unwaited=True,
    )  # fmt: skip
    check_sums_of_two(case, results)


@pytest.mark.parametrize("shape", [(2, 1), (3, 1), (2, 2)])
def test_credits_that_overtake_one_another(library, shape):
    """Who sends nothing sees no credit: the next one may come first, and this one hide it."""
    tokens = (9, 6, 40, 3)[: shape[0] * shape[1]]
    case = case_of(shape, tokens=tokens, num_topk=2, hidden=64, experts_per_rank=2)
    results = run_emulated_nodes(
        library, *shape, sums_of_few, case.config(timeout_s=30), case, 8,
        network_us=500, unwaited=True,
    )  # fmt: skip
    check_sums_of_two(case, results)


def repeated(rank: int, buffer: Buffer, case: Case, steps: int) -> list[list[torch.Tensor]]:
    """One routing again and again, twice the numbers each time. The last rank is given all rows."""
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(case.tokens[rank], case.hidden, generator=generator).bfloat16()
    handle = buffer.dispatch(x, to_torch(case.topk_idx(rank))).handle
    y = torch.randn(handle.num_rows, case.hidden, generator=generator).bfloat16()
    buffer.synchronize()
    rows = [buffer.dispatch(x * 2.0**i, handle=handle).recv_x for i in range(steps)]
    sums = [buffer.combine(y * 2.0**i, handle).combined_x for i in range(steps)]
    buffer.synchronize()
    return [rows, sums]


@pytest.mark.parametrize("shape", [(2, 1), (2, 2)])
def test_who_is_ahead_does_not_write_over_what_is_read(library, shape):
    """Others are done at once with what keeps the last rank, and the owners of tokens, busy."""
    tokens = (90, 10, 70, 1)[: shape[0] * shape[1]]
    case = case_of(shape, tokens=tokens, num_topk=2, hidden=2048, routing="last_rank", drop=0.0)
    results = run_emulated_nodes(
        library, *shape, repeated, case.config(**PATIENT), case, 12,
        carried=False, unwaited=True, delay_us=3000,
    )  # fmt: skip
    for rank, of_rank in enumerate(results):
        for kind in of_rank:
            for i, got in enumerate(kind):
                assert torch.equal(got, kind[0] * 2.0**i), f"operation {i} on rank {rank}"


@pytest.mark.parametrize("shape", [(2, 2), pytest.param((3, 2), marks=pytest.mark.slow)])
def test_flags_before_their_data_give_wrong_results(library, shape):
    """The control: on such a network the same test has to fail."""
    case = case_of(shape, tokens=(64, 40, 70, 30, 35, 41)[: shape[0] * shape[1]], hidden=1024)
    with pytest.raises((AssertionError, EPError)):
        results = run_emulated_nodes(
            library, *shape, run_on_buffer, case.config(timeout_s=30), case,
            early_flags=True, network_us=2000,
        )  # fmt: skip
        check_results(case, results, check_wire_bytes)


def one_does_not_come(rank: int, buffer: Buffer, case: Case) -> str:
    x, topk = inputs(rank, case)
    if rank == 3:
        buffer._session.backend.give_up()
        return ""
    with pytest.raises(EPTimeoutError) as error:
        buffer.dispatch(x, topk)
    return str(error.value)


def inputs(rank: int, case: Case):
    return to_torch(case.rows(rank, case.tokens[rank], salt=2)), to_torch(case.topk_idx(rank))


def test_who_is_late_is_named_with_who_relays(library):
    case = case_of((2, 2))
    texts = run_emulated_nodes(library, 2, 2, one_does_not_come, case.config(timeout_s=2), case)
    assert "waited 2 s for rank 3, 1 (phase: plan)" in texts[0]  # the relay, rank 1, is late too
    assert "waited 2 s for rank 3 (phase: plan)" in texts[1]
    # Rank 3 would also have relayed what rank 1 has sent.
    assert any(f"waited 2 s for rank {late} (phase: plan)" in texts[2] for late in ("3", "1, 3"))


def other_alignment(rank: int, buffer: Buffer, case: Case) -> str:
    x, topk = inputs(rank, case)
    with pytest.raises((EPMismatchError, EPTimeoutError)) as error:
        buffer.dispatch(x, topk, expert_alignment=8 if rank == 2 else 4)
    return str(error.value)


def test_a_disagreement_crosses_nodes(library):
    case = case_of((2, 2))
    texts = run_emulated_nodes(library, 2, 2, other_alignment, case.config(timeout_s=5), case)
    assert any("rank 2 has expert_alignment=8" in text for text in texts[:2])


def blames(rank: int, buffer: Buffer, case: Case, peer: int) -> str:
    """What a rank says of a tag that it did not expect, in a chunk of rows of a peer."""
    memory = buffer._session.backend.memory
    memory._fault.op, memory._fault.field = header.EP_OP_DISPATCH, header.EP_FIELD_CALL
    memory._fault.peer, memory._fault.code = peer, header.EP_FAULT_MISMATCH
    with pytest.raises(EPMismatchError) as error:
        memory.check_fault()
    memory._fault.code = header.EP_FAULT_NONE
    return str(error.value)


@pytest.mark.parametrize("peer", range(4))
def test_whose_tag_it_is_is_said_with_who_relays(library, peer):
    """Peer 2 k + l is rank l of the node k before; its rows come through rank l of this node."""
    case = case_of((2, 2))
    texts = run_emulated_nodes(library, 2, 2, blames, case.config(**PATIENT), case, peer)
    names = {
        1: "rank 1",
        2: "rank 2",  # over the network, to this rank itself
        3: "rank 3 (or rank 1, which relays its rows)",
    }
    if peer in names:
        assert f"rank 0 and {names[peer]} made different dispatch calls" in texts[0]


def other_handle(rank: int, buffer: Buffer, case: Case) -> str:
    """Rank 2 takes the handle of another dispatch, whose call has the same tag."""
    x, topk = inputs(rank, case)
    few, many = [
        buffer.dispatch(x, torch.where(torch.arange(len(x)).view(-1, 1) < most, topk, -1)).handle
        for most in (1, len(x))
    ]
    try:
        buffer.dispatch(x, handle=many if rank == 2 else few)
        buffer.synchronize()
    except (EPMismatchError, EPTimeoutError) as error:
        return str(error)
    return ""


def test_rows_without_entries_are_a_mismatch_where_tags_are_the_same(library, monkeypatch):
    monkeypatch.setattr(dispatches, "tag", lambda *call: 7)
    case = case_of((2, 2), tokens=(40, 50, 60, 30), drop=0.0)
    for _ in range(3):  # rank 2 may find out before its rows have left, and then sends none
        texts = run_emulated_nodes(library, 2, 2, other_handle, case.config(timeout_s=5), case)
        if "waited 5 s for rank 2" not in texts[0]:
            break
    assert "rank 0 and rank 2 made different dispatch calls" in texts[0]


def other_topk(rank: int, buffer: Buffer, case: Case) -> str:
    x, topk = inputs(rank, case)
    with pytest.raises((EPMismatchError, EPTimeoutError)) as error:
        buffer.dispatch(x, topk[:, : 2 if rank == 2 else 4].contiguous())
    return str(error.value)


def test_entries_of_another_topk_are_no_places_in_memory(library):
    """An expert's number that is taken for a slot would be far behind the memory here."""
    case = case_of((2, 2), num_topk=4, experts_per_rank=512, tokens=(9, 5, 20, 7), hidden=4096)
    texts = run_emulated_nodes(library, 2, 2, other_topk, case.config(timeout_s=5), case)
    assert any("rank 2 has num_topk=2" in text for text in texts[:2])
