"""Low-latency operations go on without a rank that is dead or late, bit by bit as the oracle says.

Real processes: one is killed in the middle of a decode loop, another one stopped and continued.
"""

from __future__ import annotations

import re
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from low_latency_calls import DISPATCH, SIZES, TOPK, raised
from low_latency_cases import LowLatencyCase
from mask_cases import (
    FOUR,
    THREE,
    TIMEOUT_S,
    Results,
    check_a_killed_rank,
    check_a_stopped_rank,
    check_steps,
    decode,
    make_buffer,
)
from ranks import run_ranks

from ep_comm import Buffer, EPConfig, EPMismatchError, EPTimeoutError

# ---- A process dies ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "when"),
    [
        (THREE, "before"),
        (THREE, "between"),
        (THREE, "2 ms later"),
        (FOUR, "7 ms later"),
        pytest.param(FOUR, "between", marks=pytest.mark.slow),
        pytest.param(FOUR, "18 ms later", marks=pytest.mark.slow),
    ],
    ids=lambda value: f"{value.num_ranks} ranks" if isinstance(value, LowLatencyCase) else value,
)
def test_a_killed_rank_is_masked_and_the_decode_loop_goes_on(case, when):
    check_a_killed_rank(case, 1 if case is FOUR else 2, when)


# ---- A process is stopped, and goes on later ---------------------------------------------------


@pytest.mark.parametrize(
    "case", [THREE, pytest.param(FOUR, marks=pytest.mark.slow)], ids=["three", "four"]
)
def test_a_stopped_rank_is_masked_and_comes_back(case):
    check_a_stopped_rank(case, 2)


# ---- Calls ---------------------------------------------------------------------------------


def masked_calls(rank: int) -> dict[str, str]:
    """Of three ranks that live all the time; rank 2 is left out, and taken in again."""
    buffer = Buffer(None, EPConfig(**SIX, timeout_s=TIMEOUT_S))
    says: dict[str, str] = {}
    says["itself"] = raised(lambda: buffer.mask_rank(rank))
    says["unknown"] = raised(lambda: buffer.mask_rank(3))
    says["no number"] = raised(lambda: buffer.mask_rank((2,)))
    assert buffer.query_masked() == ()
    out = buffer.low_latency_dispatch(**DISPATCH_SIX)
    split = buffer.low_latency_dispatch(**DISPATCH_SIX, return_recv_hook=True)
    x = torch.ones(4, 512).bfloat16().requires_grad_()
    normal = buffer.dispatch(x, TOPK)
    before = buffer.records.num_operations
    if rank == 2:
        dist.barrier()  # the others have gone on without it
        assert buffer.query_masked() == ()  # it knows nothing yet
        says["masked itself"] = raised(buffer.mask_rank)
        buffer.clear_mask()
    else:
        start = time.monotonic()
        buffer.mask_rank(2)  # nothing has failed
        assert time.monotonic() - start < TIMEOUT_S
        assert buffer.query_masked() == (2,) and buffer.is_usable
        buffer.mask_rank(2)  # is masked already
        y = torch.ones(2, 12, 512).bfloat16()
        says["hook"] = raised(split.hook)
        says["handle"] = raised(
            lambda: buffer.low_latency_combine(y, out.handle.topk_idx, None, out.handle)
        )
        says["normal handle"] = raised(lambda: buffer.combine(normal.recv_x, normal.handle))
        says["cached"] = raised(lambda: buffer.dispatch(x, handle=normal.handle))
        says["backward"] = raised(lambda: normal.recv_x.sum().backward())
        says["dispatch"] = raised(lambda: buffer.dispatch(x, TOPK))
        assert buffer.is_usable and buffer.records.num_operations == before
        again = [buffer.low_latency_dispatch(**DISPATCH_SIX, return_recv_hook=True) for _ in "ab"]
        for each in again:
            each.hook()
        numbers = [record.epoch for record in buffer.records][-2:]
        assert numbers[0] % 2 == 1 and numbers[0] > 4 and numbers[1] == numbers[0] + 1
        assert [each.handle.number for each in again] == numbers
        back = buffer.low_latency_combine(y, again[0].handle.topk_idx, None, again[0].handle)
        there = (SIX_TOPK >= 0) & (SIX_TOPK < 4)
        assert torch.equal(back.combined_x[:, 0].int(), there.sum(1).int())
        dist.barrier()
        time.sleep(0.2)  # rank 2 waits for the others
        buffer.clear_mask()
    assert buffer.query_masked() == () and buffer.is_usable
    out = buffer.low_latency_dispatch(**DISPATCH_SIX)
    y = torch.ones(2, 12, 512).bfloat16()
    back = buffer.low_latency_combine(y, out.handle.topk_idx, None, out.handle)
    assert torch.equal(back.combined_x[:, 0].int(), (SIX_TOPK >= 0).sum(1).int())
    again = buffer.dispatch(x, TOPK)
    again.recv_x.sum().backward()
    buffer.destroy()
    says["destroyed"] = raised(buffer.clear_mask)
    return says


SIX = {**SIZES, "num_experts": 6}
SIX_TOPK = torch.tensor([[0, 5], [1, -1], [2, 4], [3, 1]])
DISPATCH_SIX = {**DISPATCH, "topk_idx": SIX_TOPK, "num_experts": 6}
SAID = {
    "itself": "EPArgumentError: rank 0 cannot mask itself",
    "unknown": "EPArgumentError: mask_rank takes ranks of the group, 0 to 2, got 3",
    "no number": r"EPArgumentError: .* got \(2,\)",
    "hook": "EPStateError: this handle or hook can no longer be used: mask_rank was called since",
    "handle": "EPStateError: this handle or hook can no longer .* begin anew with a dispatch",
    "normal handle": "EPStateError: this handle or hook can no longer",
    "cached": "EPStateError: .*rank 2 is masked",
    "backward": "EPStateError: this handle or hook can no longer",
    "dispatch": "EPStateError: rank 2 is masked, and only low-latency .* call clear_mask on all",
    "destroyed": "EPStateError: the buffer can no longer be used: it was destroyed",
}


def test_what_is_refused_and_what_goes_on():
    ranks = run_ranks(3, masked_calls, fresh=True)
    assert set(ranks[0]) == set(SAID)
    for name, message in SAID.items():
        assert re.match(message, ranks[0][name], re.DOTALL), f"{name}: {ranks[0][name]}"
    assert ranks[2]["masked itself"].startswith("EPStateError: rank 2 itself was masked")


def mask_all_others(rank: int) -> None:
    buffer = Buffer(None, EPConfig(**SIX, timeout_s=TIMEOUT_S))
    check = {**DISPATCH_SIX}
    out = buffer.low_latency_dispatch(**check)
    if rank != 1:
        dist.barrier()
        return
    buffer.mask_rank(0, 2)
    assert buffer.query_masked() == (0, 2)
    out = buffer.low_latency_dispatch(**check)
    assert out.recv_count.tolist() == [1, 1]  # of experts 2 and 3
    y = torch.ones(2, 12, 512).bfloat16()
    back = buffer.low_latency_combine(y, out.handle.topk_idx, None, out.handle)
    assert back.combined_x[:, 0].tolist() == [0, 0, 1, 1]
    buffer.destroy()
    dist.barrier()


def test_one_rank_goes_on_alone():
    run_ranks(3, mask_all_others, fresh=True)


def ranks_disagree(rank: int) -> tuple[str, Results]:
    """Nothing has come of it, and once they agree all goes on."""
    buffer, case = make_buffer(THREE), THREE
    message = ""
    if rank < 2:
        start = time.monotonic()
        with pytest.raises(EPMismatchError) as caught:
            buffer.mask_rank(*((2,), ())[rank])
        assert time.monotonic() - start < 2 * TIMEOUT_S + 2
        message = str(caught.value)
        assert buffer.is_usable and buffer.query_masked() == ()
    dist.barrier()
    results = {0: decode(rank, buffer, case, 0)}
    buffer.mask_rank()  # all come: nobody is masked
    assert buffer.query_masked() == ()
    results[1] = decode(rank, buffer, case, 1)
    return message, results


def test_ranks_that_mask_different_ones_are_told():
    ranks = run_ranks(3, ranks_disagree, fresh=True)
    assert "rank 0 wants rank 2 masked, rank 1 whoever does not come masked" in ranks[0][0]
    assert "rank 1 wants whoever does not come masked, rank 0 rank 2 masked" in ranks[1][0]
    check_steps(THREE, [results for _, results in ranks], 2)


def one_goes_while_masks_change(rank: int) -> None:
    """Between the two meetings of mask_rank: the buffer is as unusable as before, not more."""
    buffer, case = make_buffer(THREE), THREE
    if rank == 2:
        dist.barrier()
        return
    if rank == 1:
        with mock.patch.object(buffer._roster, "meet", side_effect=KeyboardInterrupt):
            with pytest.raises(KeyboardInterrupt):
                buffer.mask_rank(2)
        dist.barrier()
        return
    with pytest.raises(EPTimeoutError, match=r"3 s for rank 1 \(phase: refill\)"):
        buffer.mask_rank(2)
    assert not buffer.is_usable and buffer.query_masked() == (2,)
    assert "mask_rank did not come to its end" in repr(buffer)
    buffer.mask_rank(1)
    assert buffer.query_masked() == (1, 2)
    decode(rank, buffer, case, 0)
    dist.barrier()


def test_a_rank_that_goes_while_masks_change_is_named():
    run_ranks(3, one_goes_while_masks_change, fresh=True)


def refused_buffers(_: int) -> list[str]:
    without = Buffer(None, EPConfig(**{**SIZES, "low_latency_tokens": None}))
    over_nccl = Buffer(None, EPConfig(**SIZES))
    over_nccl._session.backend.transport.backends = {"cuda": "nccl"}
    messages = [raised(without.mask_rank), raised(without.clear_mask), raised(over_nccl.mask_rank)]
    assert over_nccl.is_usable and over_nccl.query_masked() == ()
    return messages


def test_buffers_that_cannot_mask():
    (messages,) = run_ranks(1, refused_buffers)
    assert all("pass EPConfig(low_latency_tokens" in message for message in messages[:2])
    assert messages[2].startswith("EPUnsupportedError: the reference backend masks ranks over gloo")
