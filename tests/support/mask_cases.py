"""Decode loops in which a rank dies or stands still, for any backend."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import wait_for_stream
from low_latency_calls import TOPK
from low_latency_cases import (
    Inputs,
    LowLatencyCase,
    check_results,
    combine,
    dispatch,
    run_case,
)
from ranks import run_ranks

from ep_comm import Buffer, EPStateError, EPTimeoutError
from ep_comm.job.meeting import meet
from ep_comm.job.store import default_store

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
    store = default_store()
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


def one_rank_is_late(rank: int, buffer: Buffer, case: LowLatencyCase, late: int) -> Results:
    """Its kernels write while those of the others run without it; then it comes back."""
    store = buffer._roster._store
    results = {step: decode(rank, buffer, case, step) for step in range(4)}

    def wait_for(key: str) -> None:
        store.wait([key], timedelta(seconds=30))

    given = Inputs.of_case(of_step(case, 4), rank, case.device)
    if rank == late:
        wait_for("the others go on")
        out = dispatch(buffer, of_step(case, 4), given)
        with pytest.raises(EPTimeoutError) as caught:
            if case.split:
                out.hook()
            combine(buffer, case, given, out.handle)
            buffer.synchronize()
        assert late not in caught.value.late_ranks
        assert buffer.query_masked() == (late,)
        with pytest.raises(EPStateError, match=f"rank {late} itself was masked"):
            buffer.mask_rank()
        store.set("comes back", "1")
    else:
        out = dispatch(buffer, of_step(case, 4), given)
        with pytest.raises(EPTimeoutError) as caught:
            if case.split:
                out.hook()
            buffer.synchronize()
        assert caught.value.late_ranks == (late,)
        buffer.mask_rank(late)
        with pytest.raises(EPStateError, match="this handle or hook can no longer be used"):
            combine(buffer, case, given, out.handle)
        for step in range(4, 24):
            results[step] = decode(rank, buffer, case, step)
            if step == 6:
                store.set("the others go on", "1")
        wait_for("comes back")
    buffer.clear_mask()
    for step in range(24, 30):
        results[step] = decode(rank, buffer, case, step)
    x = torch.ones(2, case.hidden, dtype=torch.bfloat16, device=case.device)
    topk = torch.tensor([[0], [case.num_experts - 1]], device=case.device)
    wait_for_stream()
    sent = buffer.dispatch(x, topk)
    assert (buffer.combine(sent.recv_x, sent.handle).combined_x == 1).all()
    return results


def ranks_go_one_by_one(rank: int, buffer: Buffer, case: LowLatencyCase) -> Results:
    """Nothing has failed: each is masked while it waits for all to come back."""
    results: Results = {}
    num_ranks = case.num_ranks
    for gone in range(num_ranks):
        if rank >= num_ranks - gone:
            break
        if gone:
            buffer.mask_rank(num_ranks - gone)
        for step in range(3 * gone, 3 * gone + 3):
            results[step] = decode(rank, buffer, case, step)
    store = buffer._roster._store
    if rank == 0:
        store.set("alone", "1")
    store.wait(["alone"], timedelta(seconds=30))
    buffer.clear_mask()
    for step in range(3 * num_ranks, 3 * num_ranks + 3):
        results[step] = decode(rank, buffer, case, step)
    return results


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


def decode_while_one_is_stopped(rank: int, case: LowLatencyCase, victim: int) -> Results:
    """It is masked, finds out, and comes back; all go on from where rank 0 is then.

    The others count the steps that they take without it, so as to go to meet it after the same one.
    """
    store = default_store()
    store.set(f"pid/{rank}", str(os.getpid()))
    pid = int(store.get(f"pid/{victim}"))
    buffer = make_buffer(case)
    topk_idx = TOPK[:2].to(case.device)
    ones = torch.ones(2, case.hidden, dtype=torch.bfloat16, device=case.device)
    first = buffer.dispatch(ones, topk_idx)
    results: Results = {}
    step, num_without, was_cleared = 0, 0, False

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
                store.set("all at", str(num_without + 2))
            is_set = not was_cleared and store.check(["all at"])
            if is_set and num_without == int(store.get("all at")):
                if rank == 0:
                    store.set("go on at", str(step))
                come_back()
                was_cleared = True
        try:
            results[step] = decode(rank, buffer, case, step)
            step += 1
            if buffer.query_masked():
                num_without += 1
                if step == NUM_STEPS - 8:
                    step -= 1  # until the victim is there
        except EPTimeoutError as error:
            if rank == victim:
                assert rank not in error.late_ranks and error.late_ranks
                assert buffer.query_masked() == (rank,)  # so the others have masked it
                with pytest.raises(EPStateError, match=f"rank {rank} itself was masked"):
                    buffer.mask_rank(*error.late_ranks)
                store.set("found out", "1")
                step = int(store.get("go on at"))
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
