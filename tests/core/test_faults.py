"""A rank that is late, dead, or does something else: the others say so in time, by name."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist
from ranks import RankFailure, run_ranks

from ep_comm import (
    Buffer,
    EPConfig,
    EPError,
    EPMismatchError,
    EPRoutingError,
    EPStateError,
    EPTimeoutError,
    EPTooManyTokensError,
)
from ep_comm.job.meeting import meet

SIZES = dict(num_experts=12, hidden=16, max_tokens_per_rank=8, num_topk=2, dtype=torch.float32)
X = torch.ones(5, 16)
TOPK = torch.tensor([[0, 11], [4, 5], [1, -1], [8, 2], [3, 7]])
_kept: list[Buffer] = []


def some_ranks_stay_away(rank: int, absent: tuple[int, ...], timeout_s: float) -> str | None:
    meet(dist.group.WORLD, "begin", None, 60.0)  # or they may come too late for a buffer
    buffer = Buffer(None, EPConfig(**SIZES, timeout_s=timeout_s))
    handle = buffer.dispatch(X, TOPK).handle
    dist.barrier()
    if rank in absent:
        _kept.append(buffer)  # neither it nor its process ends before the others have
        return None
    start = time.monotonic()
    with pytest.raises(EPTimeoutError) as caught:
        buffer.dispatch(X, handle=handle)
    assert time.monotonic() - start < timeout_s + 15
    error = caught.value
    assert (error.op, error.phase, error.rank) == ("dispatch", "header", rank)
    with pytest.raises(EPStateError, match="waited"):
        buffer.dispatch(X, handle=handle)

    present = [r for r in range(dist.get_world_size()) if r not in absent]
    group = dist.new_group(present, use_local_synchronization=True)
    fresh = Buffer(group, EPConfig(**SIZES, timeout_s=20))
    out = fresh.dispatch(X, TOPK)
    valid = (TOPK >= 0).sum(1)[:, None]
    assert torch.equal(fresh.combine(out.recv_x, out.handle).combined_x, valid * X)
    return str(error)


def test_absent_rank_is_named_and_the_others_go_on():
    messages = run_ranks(3, some_ranks_stay_away, (2,), 2.0, fresh=True)
    for rank in (0, 1):
        assert f"rank {rank} waited 2 s for rank 2" in messages[rank]


@pytest.mark.slow
def test_two_absent_ranks_are_both_named():
    messages = run_ranks(4, some_ranks_stay_away, (1, 3), 2.0, fresh=True)
    for rank in (0, 2):
        assert "for rank 1, 3" in messages[rank]


def one_rank_has_too_many_tokens(rank: int, device: str, backend: str, capacity=None) -> str:
    """All ranks say so, at once, and the buffer goes on where the host has waited."""
    x, topk = X.to(device), TOPK.to(device)
    buffer = Buffer(None, EPConfig(**SIZES, timeout_s=60, backend=backend))
    start = time.monotonic()
    with pytest.raises(EPTooManyTokensError) as caught:
        if rank == 1:
            x_TH, topk_TK = x.new_ones(9, 16), topk.new_zeros(9, 1)
        else:
            x_TH, topk_TK = x, topk[:, :1].contiguous()
        buffer.dispatch(x_TH, topk_TK, num_worst_tokens=capacity)
        torch.cuda.synchronize()
        buffer.dispatch(x_TH, topk_TK)  # nobody waited: said now
    assert time.monotonic() - start < 30
    assert max(caught.value.num_tokens) == 9 and len(caught.value.num_tokens) > 1
    if backend == "nvlink" and capacity:
        assert not buffer.is_usable
        return str(caught.value)
    out = buffer.dispatch(x, topk)
    valid = (topk >= 0).sum(1)[:, None]
    assert torch.equal(buffer.combine(out.recv_x, out.handle).combined_x, valid * x)
    return str(caught.value)


def test_too_many_tokens_on_one_rank_are_named_on_all():
    for message in run_ranks(3, one_rank_has_too_many_tokens, "cpu", "reference"):
        assert "rank 1 dispatches 9 tokens, more than the 8" in message
        assert "raise EPConfig(max_tokens_per_rank=...)" in message


@pytest.mark.multi_gpu
@pytest.mark.parametrize("capacity", [None, 64], ids=["new", "no host wait"])
def test_too_many_tokens_on_one_gpu_are_named_on_all(capacity):
    for message in run_ranks(
        2, one_rank_has_too_many_tokens, "cuda", "nvlink", capacity, backend="nccl"
    ):
        assert "rank 1 dispatches 9 tokens, more than the 8" in message


def a_gpu_stays_away(rank: int, how: str, timeout_s: float) -> str | None:
    """The same over NVLink: kernels give up by themselves, and the next host call raises."""
    absent = dist.get_world_size() - 1
    x, topk = X.cuda(), TOPK.cuda()
    buffer = Buffer(None, EPConfig(**SIZES, timeout_s=timeout_s, backend="nvlink"))
    out = buffer.dispatch(x.clone().requires_grad_(), topk)
    buffer.synchronize()
    dist.barrier()
    if rank == absent:
        time.sleep(timeout_s + 8)
        return None
    start = time.monotonic()
    with pytest.raises(EPTimeoutError) as caught:
        if how == "cached":
            buffer.dispatch(x, handle=out.handle)
            torch.cuda.synchronize()
            buffer.combine(out.recv_x, out.handle)
        elif how == "no host wait":  # the combine is launched before anybody knows
            late = buffer.dispatch(x, topk, num_worst_tokens=100)
            buffer.combine(late.recv_x, late.handle)
            torch.cuda.synchronize()
            buffer.combine(late.recv_x, late.handle)
        elif how == "backward":  # which nobody waits for
            out.recv_x.sum().backward()
            buffer.synchronize()
        else:
            buffer.dispatch(x, topk)
    assert time.monotonic() - start < timeout_s + 5
    assert caught.value.op == ("combine" if how == "backward" else "dispatch")
    assert caught.value.phase == ("rows" if how in ("cached", "backward") else "plan")
    with pytest.raises(EPStateError, match="waited"):
        buffer.combine(out.recv_x, out.handle)
    torch.cuda.synchronize()  # no trap: the process and its GPU go on

    group = dist.new_group(list(range(absent)), use_local_synchronization=True)
    fresh = Buffer(group, EPConfig(**SIZES, timeout_s=20, backend="nvlink"))
    out = fresh.dispatch(x, topk)
    valid = (topk >= 0).sum(1)[:, None]
    assert torch.equal(fresh.combine(out.recv_x, out.handle).combined_x, valid * x)
    return str(caught.value)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("how", ["new", "cached", "no host wait", "backward"])
def test_absent_gpu_is_named_and_the_others_go_on(how):
    num_ranks = 3 if torch.cuda.device_count() >= 3 else 2
    messages = run_ranks(num_ranks, a_gpu_stays_away, how, 2.0, fresh=True, backend="nccl")
    for rank in range(num_ranks - 1):
        assert f"rank {rank} waited 2 s for rank {num_ranks - 1}" in messages[rank]


def one_rank_destroys_late(rank: int, how: str) -> None:
    """No other rank hangs, and none frees what the late one may still write to."""
    x, topk = X.cuda(), TOPK.cuda()
    buffer = Buffer(None, EPConfig(**SIZES, timeout_s=3, backend="nvlink"))
    out = buffer.dispatch(x, topk)
    buffer.synchronize()
    dist.barrier()
    start = time.monotonic()
    if rank == 1 and how == "failed":
        with pytest.raises(TypeError), buffer._session.operation():
            raise TypeError("of the host, which the other ranks do not know of")
        buffer.destroy()
        assert time.monotonic() - start < 2
    elif rank == 1:
        time.sleep(5)
        buffer.combine(out.recv_x, out.handle)  # writes to the others
        with pytest.raises(EPTimeoutError):
            buffer.synchronize()
        buffer.destroy()
    elif how == "failed":
        buffer.destroy()
        assert time.monotonic() - start < 2
    else:
        with pytest.warns(match="keeps the memory of its buffer: rank 1 did not destroy its own"):
            buffer.destroy()
        assert 2 < time.monotonic() - start < 5
    dist.barrier()
    torch.cuda.synchronize()
    again = Buffer(None, EPConfig(**SIZES, timeout_s=20, backend="nvlink"))
    assert torch.equal(again.dispatch(x, topk).recv_x, out.recv_x)
    again.destroy()


@pytest.mark.multi_gpu
@pytest.mark.parametrize("how", ["failed", "late"])
def test_destroy_waits_for_a_late_gpu_only_so_long(how):
    run_ranks(2, one_rank_destroys_late, how, fresh=True, backend="nccl")


def gpus_disagree(rank: int) -> str:
    x, topk = X.cuda(), TOPK.cuda()
    buffer = Buffer(None, EPConfig(**SIZES, timeout_s=10, backend="nvlink"))
    with pytest.raises(EPMismatchError) as caught:
        buffer.dispatch(x, topk, expert_alignment=16 if rank else 8)
    return str(caught.value)


@pytest.mark.multi_gpu
def test_disagreement_is_raised_on_all_gpus():
    for rank, message in enumerate(run_ranks(2, gpus_disagree, fresh=True, backend="nccl")):
        mine, theirs = ("16", "8") if rank else ("8", "16")
        assert f"rank {rank} has expert_alignment={mine}" in message
        assert f"rank {1 - rank} has expert_alignment={theirs}" in message


def gpus_make_different_calls(rank: int, what: str) -> str:
    x, topk = X.cuda(), TOPK.cuda()
    buffer = Buffer(None, EPConfig(**SIZES, timeout_s=10, backend="nvlink"))
    one, two = buffer.dispatch(x, topk), buffer.dispatch(x, topk)
    with pytest.raises(EPMismatchError) as caught:
        if what == "handle":
            buffer.combine(one.recv_x, (two if rank else one).handle)
        elif what == "dtype":
            buffer.dispatch(x.bfloat16() if rank else x, handle=one.handle)
        else:
            weights = torch.ones(topk.shape, device="cuda") if rank else None
            buffer.dispatch(x, topk_weights=weights, handle=one.handle)
        torch.cuda.synchronize()
        buffer.dispatch(x, topk)
    return str(caught.value)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("what", ["handle", "dtype", "weights"])
def test_different_calls_are_raised_on_all_gpus(what):
    messages = run_ranks(2, gpus_make_different_calls, what, fresh=True, backend="nccl")
    op = "combine" if what == "handle" else "dispatch"
    for rank, message in enumerate(messages):
        assert f"rank {rank} and rank {1 - rank} made different {op} calls" in message


def bad_routing_on_a_gpu(rank: int) -> str | None:
    """Found by a kernel: the rank that made the mistake raises, and nobody is left waiting."""
    x, topk = X.cuda(), TOPK.cuda()
    buffer = Buffer(None, EPConfig(**SIZES, timeout_s=10, backend="nvlink"))
    bad = torch.where(topk == 4, 12, topk)
    message = None
    if rank == 0:
        with pytest.raises(EPRoutingError) as caught:
            buffer.dispatch(x, bad)
        message = str(caught.value)
    else:
        buffer.dispatch(x, topk)
    out = buffer.dispatch(x, topk)
    valid = (topk >= 0).sum(1)[:, None]
    assert torch.equal(buffer.combine(out.recv_x, out.handle).combined_x, valid * x)
    return message


@pytest.mark.multi_gpu
def test_bad_routing_on_a_gpu_is_raised_there():
    message, _ = run_ranks(2, bad_routing_on_a_gpu, backend="nccl")
    assert "token 1, k 0 is 12" in message


def one_rank_dies(rank: int) -> str:
    buffer = Buffer(None, EPConfig(**SIZES, timeout_s=60))
    dist.barrier()
    if rank == 1:
        os._exit(1)
    start = time.monotonic()
    with pytest.raises(EPError) as caught:
        buffer.dispatch(X, TOPK)
    assert time.monotonic() - start < 30
    return str(caught.value)


def test_dead_rank_ends_the_wait():
    with pytest.raises(RankFailure) as failure:
        run_ranks(3, one_rank_dies, fresh=True)
    # The dead rank is the only one that failed: the others raised what they should.
    assert str(failure.value).startswith("rank 1:")
    assert "rank 0:" not in str(failure.value) and "rank 2:" not in str(failure.value)


def ranks_disagree(rank: int, what: str) -> str:
    changes = {"hidden": 32} if (what, rank) == ("config", 1) else {}
    with pytest.raises(EPMismatchError) as caught:
        buffer = Buffer(None, EPConfig(**{**SIZES, **changes}, timeout_s=20))
        if what == "alignment":
            buffer.dispatch(X, TOPK, expert_alignment=16 if rank else 8)
        out = buffer.dispatch(X, TOPK)
        if what == "operation":
            if rank == 1:
                buffer.combine(out.recv_x, out.handle)
            else:
                buffer.dispatch(X, handle=out.handle)
        if what == "dtype":
            buffer.dispatch(X.bfloat16() if rank else X, handle=out.handle)
        if what == "weights":
            weights = torch.ones(TOPK.shape) if rank else None
            buffer.dispatch(X, topk_weights=weights, handle=out.handle)
        if what == "handle":
            other = buffer.dispatch(X, TOPK)
            buffer.combine(out.recv_x, (other if rank else out).handle)
    return str(caught.value)


@pytest.mark.parametrize(
    ("what", "rank0", "rank1"),
    [
        ("config", "hidden=16", "hidden=32"),
        ("alignment", "expert_alignment=8", "expert_alignment=16"),
        ("operation", "op=dispatch", "op=combine"),
        ("dtype", "dtype=torch.float32", "dtype=torch.bfloat16"),
        ("weights", "has_weights=0", "has_weights=1"),
        ("handle", "routing_epoch=1", "routing_epoch=2"),
    ],
)
def test_disagreement_is_raised_on_both_sides(what, rank0, rank1):
    messages = run_ranks(2, ranks_disagree, what, fresh=True)
    assert f"rank 0 has {rank0}" in messages[0] and f"rank 1 has {rank1}" in messages[0]
    assert f"rank 1 has {rank1}" in messages[1] and f"rank 0 has {rank0}" in messages[1]
