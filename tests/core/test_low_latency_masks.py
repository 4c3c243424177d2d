"""Low-latency operations go on without a rank that is dead or late, bit by bit as the oracle says.

Real processes: one is killed in the middle of a decode loop, another one stopped and continued.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from low_latency_cases import Inputs, LowLatencyCase, check_results, dispatch, run_case
from ranks import run_ranks
from test_low_latency_refusals import DISPATCH, SIZES, TOPK, raised

from ep_comm import Buffer, EPConfig, EPMismatchError, EPStateError, EPTimeoutError
from ep_comm.job.meeting import meet

TIMEOUT_S = 3.0
THREE = LowLatencyCase(tokens=(7, 5, 9), num_topk=4, experts_per_rank=3, drop=0.1)
FOUR = LowLatencyCase(
    tokens=(6, 0, 11, 8),
    num_topk=4,
    hidden=512,
    scales="ue8m0",
    weights_with="combine",
    split=True,
)
NUM_STEPS, DIES_AT = 24, 9
Results = dict[int, tuple[tuple[int, ...], dict[str, Any]]]  # by step: who was masked, what came


def make_buffer(case: LowLatencyCase) -> Buffer:
    meet(dist.group.WORLD, "begin", None, 60.0)  # or making it may take longer
    return Buffer(None, case.config(timeout_s=TIMEOUT_S))


def of_step(case: LowLatencyCase, step: int) -> LowLatencyCase:
    return replace(case, seed=step)


def decode(rank: int, buffer: Buffer, case: LowLatencyCase, step: int) -> Any:
    """What is in `Results`."""
    results = run_case(rank, buffer, of_step(case, step), case.device)
    buffer.synchronize()  # over NVLink a later call raises an operation's error
    return buffer.query_masked(), results


def agreed_step(rank: int, step: int, ranks: list[int], number: int) -> int:
    """The step that all of `ranks` can go on with: one of them may have ended another one."""
    store = dist.distributed_c10d._get_default_store()
    store.set(f"step/{number}/{rank}", str(step))
    return min(int(store.get(f"step/{number}/{r}")) for r in ranks)


def check_steps(case: LowLatencyCase, ranks: list[Results | None], num_steps: int) -> list:
    """Every step of the ranks that have a result, against the oracle. Returns the masks."""
    there = [results for results in ranks if results is not None]
    masks = []
    for step in range(num_steps):
        masked = {results[step][0] for results in there if step in results}
        assert len(masked) == 1, f"step {step}: {masked}"
        masks.append(masked.pop())
        of_ranks = [results and results.get(step, (None, None))[1] for results in ranks]
        check_results(of_step(case, step), of_ranks, masked=masks[-1])
    return masks


# ---- A process dies ------------------------------------------------------------------------


def decode_until_one_dies(rank: int, case: LowLatencyCase, victim: int, when: str) -> Results:
    buffer = make_buffer(case)
    results: Results = {}
    step, num_masks = 0, 0
    while step < NUM_STEPS:
        if rank == victim and step == DIES_AT:
            if when == "between":
                given = of_step(case, step)
                dispatch(buffer, given, Inputs.of_case(given, rank, case.device))
            if when.endswith("ms later"):  # wherever it is by then
                delay_s = int(when.split()[0]) / 1000
                threading.Timer(delay_s, os.kill, (os.getpid(), signal.SIGKILL)).start()
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        try:
            results[step] = decode(rank, buffer, case, step)
            step += 1
        except EPTimeoutError:
            start = time.monotonic()
            assert not buffer.is_usable
            # Who waited for one that had given up names that one too: but all know who came.
            buffer.mask_rank(*((victim,) if when == "before" else ()))
            assert time.monotonic() - start < 3 * TIMEOUT_S + 2
            assert buffer.is_usable and buffer.query_masked() == (victim,)
            num_masks += 1
            others = [r for r in range(case.num_ranks) if r != victim]
            step = agreed_step(rank, step, others, num_masks)
    assert num_masks == 1
    start = time.monotonic()
    buffer.destroy()
    assert time.monotonic() - start < 1
    return results


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


def check_a_killed_rank(
    case: LowLatencyCase, victim: int, when: str, backend: str = "gloo"
) -> None:
    ranks = run_ranks(
        case.num_ranks, decode_until_one_dies, case, victim, when,
        fresh=True, dying=(victim,), backend=backend,
    )  # fmt: skip
    assert ranks[victim] is None
    masks = check_steps(case, ranks, NUM_STEPS)
    dies_at = masks.index((victim,))
    assert masks == [()] * dies_at + [(victim,)] * (NUM_STEPS - dies_at)
    assert dies_at == DIES_AT or when.endswith("ms later")


# ---- A process is stopped, and goes on later ---------------------------------------------------


def decode_while_one_is_stopped(rank: int, case: LowLatencyCase, victim: int) -> Results:
    """It is masked, finds out, and comes back; all go on from a step that rank 0 chooses."""
    store = dist.distributed_c10d._get_default_store()
    store.set(f"pid/{rank}", str(os.getpid()))
    pid = int(store.get(f"pid/{victim}"))
    buffer = make_buffer(case)
    topk_idx = TOPK[:2].to(case.device)
    ones = torch.ones(2, case.hidden, dtype=torch.bfloat16, device=case.device)
    first = buffer.dispatch(ones, topk_idx)
    results: Results = {}
    step, was_cleared = 0, False

    def come_back() -> None:
        meet(dist.group.WORLD, "come back", None, 60.0)  # the others have steps to take before
        start = time.monotonic()
        buffer.clear_mask()
        assert time.monotonic() - start < 2 * TIMEOUT_S + 2
        assert buffer.query_masked() == () and buffer.is_usable

    while step < NUM_STEPS:
        if rank == 0 and step == 5:
            os.kill(pid, signal.SIGSTOP)
        if rank == 0 and step == 9 and buffer.query_masked():
            os.kill(pid, signal.SIGCONT)
        if buffer.query_masked():  # so the victim is not stopped while it holds the store
            if rank == 0 and store.check(["found out"]) and not store.check(["all at"]):
                store.set("all at", str(step + 2))
            if not was_cleared and store.check(["all at"]) and step == int(store.get("all at")):
                come_back()
                was_cleared = True
        try:
            results[step] = decode(rank, buffer, case, step)
            step += 1
            if buffer.query_masked() and step == NUM_STEPS - 8:
                step -= 1  # until the victim is there
        except EPTimeoutError as error:
            if rank == victim:
                assert rank not in error.late_ranks and error.late_ranks
                assert buffer.query_masked() == (rank,)  # so the others have masked it
                with pytest.raises(EPStateError, match=f"rank {rank} itself was masked"):
                    buffer.mask_rank(*error.late_ranks)
                store.set("found out", "1")
                step = int(store.get("all at"))
                come_back()
                was_cleared = True
                continue
            buffer.mask_rank()
            assert buffer.query_masked() == (victim,)
            others = [r for r in range(case.num_ranks) if r != victim]
            step = agreed_step(rank, step, others, 1)
    with pytest.raises(EPStateError, match="_mask was called|mask_rank was called"):
        buffer.combine(first.recv_x, first.handle)
    out = buffer.dispatch(ones, topk_idx)  # normal operations work too
    back = buffer.combine(out.recv_x, out.handle).combined_x
    assert torch.equal(back, (topk_idx >= 0).sum(1)[:, None] * ones)
    buffer.destroy()
    return results


@pytest.mark.parametrize(
    "case", [THREE, pytest.param(FOUR, marks=pytest.mark.slow)], ids=["three", "four"]
)
def test_a_stopped_rank_is_masked_and_comes_back(case):
    check_a_stopped_rank(case, 2)


def check_a_stopped_rank(case: LowLatencyCase, victim: int, backend: str = "gloo") -> None:
    ranks = run_ranks(
        case.num_ranks, decode_while_one_is_stopped, case, victim, fresh=True, backend=backend
    )
    of_victim = ranks[victim]
    masks = [ranks[0][step][0] for step in range(NUM_STEPS)]
    gone, back = masks.index((victim,)), len(masks) - masks[::-1].index((victim,))
    assert masks == [()] * gone + [(victim,)] * (back - gone) + [()] * (NUM_STEPS - back)
    assert gone in (4, 5)  # where some rank still was when rank 0 began step 5
    assert 9 < back < NUM_STEPS and set(of_victim) >= {*range(gone - 1), *range(back, NUM_STEPS)}
    for step in range(gone, back):  # what it still had of the step that the others gave up
        of_victim.pop(step, None)
    check_steps(case, ranks, NUM_STEPS)


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
