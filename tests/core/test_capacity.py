"""Dispatch with `num_worst_tokens`: an output of given size, counts on the device, no host wait."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from capacity_cases import GRAPH_CASE, captured, exact_and_roomy, groups_of_one_size, inputs_of
from cases import Case, assert_same, finished, to_numpy, to_torch
from ranks import run_ranks
from virtual_ranks import run_virtual_ranks

from ep_comm import Buffer, EPArgumentError, EPOverflowError, fp8

GROUPS = Case(tokens=(9, 0, 12), hidden=128, num_topk=2, experts_per_rank=6, drop=0.3)
SMALL_GROUP = 4
FULL = Case(tokens=(40, 0, 70), hidden=128, num_topk=3, experts_per_rank=3, drop=0.3)
FULL_GROUP = 25  # each rank has an expert that more tokens come to
CASES = [
    Case(tokens=(9, 0, 12), hidden=128, num_topk=3, alignment=8, drop=0.2),
    Case(tokens=(9, 4), hidden=128, num_topk=3, layout="rank", dtype="fp32"),
    Case(tokens=(20, 11), hidden=128, num_topk=4, alignment=16, routing="zipf"),
]


def too_small(rank: int, case: Case, buffer: Buffer | None = None) -> dict[str, np.ndarray]:
    """Rows beyond are dropped, said once, and the buffer goes on."""
    buffer = buffer or Buffer(None, case.config())
    x, topk, probs, how = inputs_of(case, rank)
    usual = buffer.dispatch(x, topk, probs, **how)
    needed = usual.handle.num_rows
    capacity = max(needed // 2, 1)
    out = buffer.dispatch(x, topk, probs, **how, num_worst_tokens=capacity)
    finished(out.recv_x)
    if needed > capacity:
        with pytest.raises(EPOverflowError) as caught:
            if case.layout == "rank":  # whatever comes next
                buffer.synchronize()
            else:
                buffer.combine(out.recv_x, out.handle)
        assert (caught.value.num_rows, caught.value.capacity) == (needed, capacity)
        assert_same(to_numpy(out.recv_x), to_numpy(usual.recv_x[:capacity]), "what fitted")
    summed = buffer.combine(out.recv_x, out.handle, out.recv_topk_weights)
    after = buffer.dispatch(x, topk, probs, **how)
    assert_same(to_numpy(after.recv_x), to_numpy(usual.recv_x), "the dispatch after it")
    return dict(
        rows=to_numpy(out.recv_x),
        probs=to_numpy(out.recv_topk_weights),
        combined=to_numpy(summed.combined_x),
        combined_probs=to_numpy(summed.combined_topk_weights),
        tokens=to_numpy(out.handle.device_tokens_per_expert) if case.layout == "expert" else None,
    )


def group_too_small(rank: int, case: Case, buffer: Buffer | None = None) -> None:
    """More tokens for an expert than its rows: said by the next call, which starts nothing."""
    buffer = buffer or Buffer(None, case.config())
    x, topk, probs, _ = inputs_of(case, rank)
    usual = buffer.dispatch(x, topk, probs, expert_alignment=1)
    fullest = int(usual.handle.tokens_per_expert.max())
    out = buffer.dispatch(x, topk, probs, expert_capacity=SMALL_GROUP)
    finished(out.recv_x)
    if fullest > SMALL_GROUP:
        with pytest.raises(EPOverflowError):
            buffer.dispatch(x, topk, probs, expert_capacity=sum(case.tokens))
    again = buffer.dispatch(x, topk, probs, expert_capacity=sum(case.tokens))
    finished(again.recv_x)
    assert torch.equal(again.handle.tokens_per_expert, usual.handle.tokens_per_expert)


def full_groups(rank: int, case: Case, buffer: Buffer | None = None) -> dict[str, np.ndarray]:
    """A group drops its last tokens and no other group's, and what was dropped is counted.

    Rows that were dropped are missing in combine, and their probabilities have no gradient.
    """
    buffer = buffer or Buffer(None, case.config())
    x, topk, probs, _ = inputs_of(case, rank)
    num_experts, capacity = case.experts_per_rank, FULL_GROUP
    usual = buffer.dispatch(x, topk, probs, expert_alignment=1)
    came = usual.handle.tokens_per_expert
    stats = torch.zeros(2, num_experts, dtype=torch.int32, device=x.device)
    x.requires_grad_()
    probs.requires_grad_()
    how = dict(expert_capacity=capacity, overflow_stats=stats)
    out = buffer.dispatch(x, topk, probs, **how)
    finished(out.recv_x)
    offsets = out.handle.device_expert_offsets.cpu().tolist()
    assert offsets == [capacity * e for e in range(num_experts + 1)]
    assert torch.equal(out.handle.device_tokens_per_expert.cpu().long(), came.clamp(max=capacity))
    rows, weights, first = to_numpy(out.recv_x), to_numpy(out.recv_topk_weights), 0
    for e, tokens in enumerate(came.tolist()):
        kept, group = min(tokens, capacity), slice(e * capacity, (e + 1) * capacity)
        usual_group = slice(first, first + kept)
        assert_same(rows[group][:kept], to_numpy(usual.recv_x)[usual_group], "rows")
        assert_same(weights[group][:kept], to_numpy(usual.recv_topk_weights)[usual_group], "probs")
        assert not rows[group][kept:].any() and not weights[group][kept:].any()
        first += tokens
    y = to_torch(case.rows(rank, out.handle.num_rows, salt=4), case.device)
    combined, sent_back, _ = buffer.combine(y, out.handle, out.recv_topk_weights)
    finished(combined)
    again = buffer.dispatch(x, topk_weights=probs, handle=out.handle)
    assert_same(to_numpy(again.recv_x), rows, "cached dispatch")
    dropped = (came - capacity).clamp(min=0)
    finished(again.recv_x)
    assert torch.equal(stats.cpu().long(), torch.stack([dropped, came]))  # cached: not once more
    assert dropped.any()
    buffer.dispatch(x[:0], topk[:0], probs[:0], **how)  # nothing raises; the most stays
    finished(again.recv_x)
    assert torch.equal(stats.cpu().long(), torch.stack([dropped, came]))
    (out.recv_x.float().sum() + out.recv_topk_weights.sum()).backward()
    finished(x.grad)
    return dict(
        combined=to_numpy(combined),
        probs=to_numpy(sent_back),
        grad=to_numpy(x.grad),
        grad_probs=to_numpy(probs.grad),
    )


def rows_counted(rank: int, case: Case, buffer: Buffer | None = None) -> None:
    """With rows for all experts together the last ones have too few, and nothing is raised."""
    buffer = buffer or Buffer(None, case.config())
    x, topk, probs, _ = inputs_of(case, rank)
    usual = buffer.dispatch(x, topk, probs, expert_alignment=8)
    came = usual.handle.tokens_per_expert
    firsts = [0, *usual.handle.padded_tokens_per_expert.cumsum(0).tolist()]
    finished(usual.recv_x)
    for rows in (firsts[-1] + 5, firsts[-2] + 3, firsts[1] - 1):
        stats = torch.zeros(2, case.experts_per_rank, dtype=torch.int32, device=x.device)
        how = dict(expert_alignment=8, num_worst_tokens=rows, overflow_stats=stats)
        out = buffer.dispatch(x, topk, probs, **how)
        finished(out.recv_x)
        buffer.synchronize()
        kept = [
            min(tokens, max(0, rows - first))
            for tokens, first in zip(came.tolist(), firsts[:-1], strict=True)
        ]
        assert stats[0].tolist() == (came - torch.tensor(kept)).tolist()
        assert stats[1].tolist() == came.tolist()
        assert out.handle.device_tokens_per_expert.tolist() == kept
        fitting = min(rows, firsts[-1])
        assert_same(to_numpy(out.recv_x)[:fitting], to_numpy(usual.recv_x)[:fitting], "rows")


def test_rows_of_all_experts_together_are_counted():
    run_ranks(FULL.num_ranks, rows_counted, FULL)


@pytest.mark.gpu
def test_rows_of_all_experts_together_are_counted_on_a_gpu():
    gpu = on_gpu(FULL)
    run_virtual_ranks(gpu.num_ranks, on_buffer, gpu.config(), rows_counted, gpu)


def kept_probs(case: Case, rank: int, grad_probs: np.ndarray) -> None:
    """The gradient of a probability is 1 where its row had room, by a count over all tokens."""
    all_topk = [case.topk_idx(source) for source in range(case.num_ranks)]
    seen = np.zeros(case.num_experts, dtype=int)
    for source, topk in enumerate(all_topk):
        wanted = np.zeros(topk.shape, dtype=np.float32)
        for t, experts in enumerate(topk):
            for k, expert in enumerate(experts):
                if expert >= 0:
                    wanted[t, k] = seen[expert] < FULL_GROUP
                    seen[expert] += 1
        if source == rank:
            assert_same(grad_probs, wanted, f"gradients of probabilities on rank {rank}")


def next_after_overflow(rank: int, case: Case, how: str, buffer: Buffer | None = None) -> None:
    """The call that says it has started nothing: the same call then does what it should."""
    buffer = buffer or Buffer(None, case.config())
    x, topk, probs, arguments = inputs_of(case, rank)
    usual = buffer.dispatch(x, topk, probs, **arguments)
    out = buffer.dispatch(x, topk, probs, **arguments, num_worst_tokens=1)
    finished(out.recv_x)

    def call():
        if how == "cached":
            return buffer.dispatch(x, topk_weights=probs, handle=usual.handle)
        room = dict(num_worst_tokens=usual.handle.num_rows) if how == "no host wait" else {}
        return buffer.dispatch(x, topk, probs, **arguments, **room)

    operations = buffer.records.num_operations
    with pytest.raises(EPOverflowError) as caught:
        call()
    assert (caught.value.num_rows, caught.value.capacity) == (usual.handle.num_rows, 1)
    assert buffer.records.num_operations == operations
    again = call()
    assert_same(to_numpy(again.recv_x), to_numpy(usual.recv_x), "rows")
    summed = [buffer.combine(o.recv_x, o.handle).combined_x for o in (again, usual)]
    assert_same(to_numpy(summed[0]), to_numpy(summed[1]), "combined")


def on_gpu(case: Case) -> Case:
    return Case(**{**vars(case), "device": "cuda", "backend": "nvlink"})


@pytest.mark.parametrize("case", CASES)
def test_room_for_all(case):
    run_ranks(case.num_ranks, exact_and_roomy, case)


def test_groups_of_one_size():
    run_ranks(GROUPS.num_ranks, groups_of_one_size, GROUPS)


def test_a_group_with_too_many_tokens():
    run_ranks(GROUPS.num_ranks, group_too_small, GROUPS)


def test_full_groups_drop_their_own_last_tokens():
    for rank, result in enumerate(run_ranks(FULL.num_ranks, full_groups, FULL)):
        kept_probs(FULL, rank, result["grad_probs"])


def refused_stats(rank: int) -> None:
    buffer = Buffer(None, GROUPS.config())
    x, topk, probs, _ = inputs_of(GROUPS, rank)
    stats = torch.zeros(2, GROUPS.experts_per_rank, dtype=torch.int32)
    needs = "overflow_stats needs expert_capacity or num_worst_tokens, the expert layout, and a new"
    with pytest.raises(EPArgumentError, match=needs):
        buffer.dispatch(x, topk, probs, overflow_stats=stats)
    with pytest.raises(EPArgumentError, match=needs):
        buffer.dispatch(x, topk, layout="rank", num_worst_tokens=9, overflow_stats=stats)
    for wrong in (stats[:1], stats.long(), torch.zeros(5, 2, dtype=torch.int32)):
        with pytest.raises(EPArgumentError, match="overflow_stats must be"):
            buffer.dispatch(x, topk, probs, expert_capacity=4, overflow_stats=wrong)
    handle = buffer.dispatch(x, topk, probs, expert_capacity=sum(GROUPS.tokens)).handle
    with pytest.raises(EPArgumentError, match=needs):
        buffer.dispatch(x, topk_weights=probs, handle=handle, overflow_stats=stats)


def test_stats_that_do_not_fit():
    run_ranks(GROUPS.num_ranks, refused_stats)


@pytest.mark.gpu
def test_full_groups_on_a_gpu_are_as_on_cpu():
    expected = run_ranks(FULL.num_ranks, full_groups, FULL)
    gpu = on_gpu(FULL)
    results = run_virtual_ranks(gpu.num_ranks, on_buffer, gpu.config(), full_groups, gpu)
    for rank, (got, want) in enumerate(zip(results, expected, strict=True)):
        for name in want:
            assert_same(got[name], want[name], f"{name} on rank {rank}")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "function", [groups_of_one_size, group_too_small], ids=["enough", "too-small"]
)
def test_groups_of_one_size_on_a_gpu(function):
    case = on_gpu(GROUPS)
    run_virtual_ranks(case.num_ranks, on_buffer, case.config(), function, case)


@pytest.mark.parametrize("case", CASES)
def test_overflow_is_said_once(case):
    run_ranks(case.num_ranks, too_small, case)


def on_buffer(rank: int, buffer: Buffer, function, case: Case, *args: object):
    return function(rank, case, *args, buffer=buffer)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_room_for_all_on_a_gpu(case):
    case = on_gpu(case)
    run_virtual_ranks(case.num_ranks, on_buffer, case.config(), exact_and_roomy, case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_overflow_on_a_gpu_is_as_on_cpu(case):
    expected = run_ranks(case.num_ranks, too_small, case)
    gpu = on_gpu(case)
    results = run_virtual_ranks(case.num_ranks, on_buffer, gpu.config(), too_small, gpu)
    for rank, (got, want) in enumerate(zip(results, expected, strict=True)):
        for name in got:
            if want[name] is not None:
                assert_same(got[name], want[name], f"{name} on rank {rank}")


@pytest.mark.parametrize("how", ["new", "cached", "no host wait"])
def test_a_dispatch_after_an_overflow(how):
    run_ranks(2, next_after_overflow, CASES[2], how)


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["new", "cached", "no host wait"])
def test_a_dispatch_after_an_overflow_on_a_gpu(how):
    case = on_gpu(CASES[2])
    run_virtual_ranks(2, on_buffer, case.config(), next_after_overflow, case, how)


def captured_on_a_gpu_each(rank: int, case: Case) -> None:
    with torch.cuda.stream(torch.cuda.Stream()):
        captured(rank, None, case)


@pytest.mark.gpu
def test_graph_on_one_gpu():
    case = Case(**{**vars(GRAPH_CASE), "tokens": (40,)})
    run_ranks(1, captured_on_a_gpu_each, case, backend="nccl")


@pytest.mark.multi_gpu
def test_graph_on_gpus():
    run_ranks(2, captured_on_a_gpu_each, GRAPH_CASE, backend="nccl")


def refusals(rank: int) -> None:
    case = CASES[0]
    buffer = Buffer(None, case.config())
    x, topk, _, _ = inputs_of(case, rank)
    for bad in (0, -3, 1.5, True, 2**31):
        with pytest.raises(EPArgumentError, match="num_worst_tokens must be"):
            buffer.dispatch(x, topk, num_worst_tokens=bad)
    for bad in (0, -3, 1.5, True):
        with pytest.raises(EPArgumentError, match="expert_capacity must be"):
            buffer.dispatch(x, topk, expert_capacity=bad)
    with pytest.raises(EPArgumentError, match="not for 'rank'"):
        buffer.dispatch(x, topk, expert_capacity=8, layout="rank")
    for other in ("expert_alignment", "num_worst_tokens"):
        with pytest.raises(EPArgumentError, match=f"says what {other} would"):
            buffer.dispatch(x, topk, expert_capacity=8, **{other: 8})
    with pytest.raises(EPArgumentError, match="num_worst_tokens must be"):
        buffer.dispatch(x, topk, expert_capacity=2**30)
    handle = buffer.dispatch(x, topk).handle
    with pytest.raises(EPArgumentError, match="so is expert_capacity"):
        buffer.dispatch(x, handle=handle, expert_capacity=8)
    with pytest.raises(EPArgumentError, match="num_worst_tokens is that of the handle"):
        buffer.dispatch(x, handle=handle, num_worst_tokens=100)
    with pytest.raises(EPArgumentError, match="multiple of 4, got 2"):
        buffer.dispatch(
            x, topk, expert_alignment=2, wire_dtype=fp8.FP8_DTYPE, recv_dtype=fp8.FP8_DTYPE
        )
    for bad in (1, 2.0, True):
        with pytest.raises(EPArgumentError, match="num_sms must be at least 2"):
            buffer.set_num_sms(bad)


def test_refusals():
    run_ranks(3, refusals)
