"""Ranks that go on agree who does not: through a store, bounded, and on one thing only."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist

from ep_comm import EPMismatchError, EPStateError, EPTimeoutError
from ep_comm.job.roster import Roster

TIMEOUT_S = 0.4


def roster(store: dist.Store, rank: int, num_ranks: int = 3) -> Roster:
    return Roster(store, "ep_comm/x/1", rank, num_ranks, TIMEOUT_S)


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """What each call returned or raised; they run in threads."""
    with ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(call) for call in calls]
        return [future.exception() or future.result() for future in futures]


def agree(member: Roster, masked: tuple[int, ...] | None, answer: int = 0) -> Callable[[], Any]:
    return lambda: member.agree("clear_mask" if masked == () else "mask_rank", masked, answer)


def test_those_that_go_on_exchange_their_answers_and_wait_for_nobody_else():
    members = [roster(dist.HashStore(), 0)]
    start = time.monotonic()
    assert members[0].agree("mask_rank", (1, 2), 7) == [7]
    store = dist.HashStore()
    members = [roster(store, r) for r in range(3)]
    assert at_once(agree(members[0], (1,), 5), agree(members[2], (1,), 8)) == [[5, 8]] * 2
    assert at_once(*(lambda m=m: m.meet("mask_rank") for m in members[::2])) == [None, None]
    assert time.monotonic() - start < TIMEOUT_S
    assert [member.masked for member in members] == [(1,), (), (1,)]
    assert [member.latest() for member in members] == [(1,)] * 3
    # One more, then all again.
    assert members[0].agree("mask_rank", (1, 2), 9) == [9]
    assert at_once(*(agree(m, (), r) for r, m in enumerate(members))) == [[0, 1, 2]] * 3
    assert [member.latest() for member in members] == [()] * 3


def test_without_ranks_those_that_come_go_on():
    store = dist.HashStore()
    members = [roster(store, r, 4) for r in range(4)]
    start = time.monotonic()
    came = at_once(*(agree(members[r], None, r) for r in (0, 1, 3)))
    assert came == [[0, 1, 3]] * 3 and members[3].masked == (2,)
    assert 2 * TIMEOUT_S <= time.monotonic() - start < 4 * TIMEOUT_S
    # Rank 2 is no longer waited for.
    start = time.monotonic()
    came = at_once(*(agree(members[r], None, r) for r in (0, 1, 3)))
    assert came == [[0, 1, 3]] * 3 and members[3].masked == (2,)
    assert time.monotonic() - start < TIMEOUT_S


def test_a_rank_that_comes_too_late_is_told():
    store = dist.HashStore()
    first, late = roster(store, 0, 2), roster(store, 1, 2)
    assert first.agree("mask_rank", None, 3) == [3]
    for wanted in (None, (0,)):
        with pytest.raises(EPStateError, match="rank 1 itself was masked .* call clear_mask"):
            late.agree("mask_rank", wanted, 4)
    assert late.masked == () and late.latest() == (1,)
    assert at_once(agree(first, (), 3), agree(late, (), 4)) == [[3, 4]] * 2


class SlowStore(dist.HashStore):
    """Before a rank's decision arrives another one's does."""

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        super().compare_set(key, expected, "[1, [0]]")
        return super().compare_set(key, expected, desired)


def test_only_one_rank_decides():
    """Of two whose waits run out at once, each alone to its mind."""
    member = roster(SlowStore(), 0, 2)
    with pytest.raises(EPStateError, match="rank 0 itself was masked"):
        member.agree("mask_rank", None, 1)
    assert member.latest() == (0,)


def test_ranks_that_want_different_ones_are_told_on_both_sides():
    store = dist.HashStore()
    members = [roster(store, r, 4) for r in range(4)]
    for wanted, says in (((3,), "rank 3 masked"), (None, "whoever does not come masked")):
        start = time.monotonic()
        told = at_once(agree(members[0], (2,)), agree(members[1], wanted))
        assert time.monotonic() - start < 4 * TIMEOUT_S
        assert all(isinstance(error, EPMismatchError) for error in told), told
        assert f"rank 0 wants rank 2 masked, rank 1 {says}" in str(told[0])
        assert f"rank 1 wants {says}, rank 0 rank 2 masked" in str(told[1])
        assert members[0].latest() == ()
    # What they said then is in nobody's way.
    came = at_once(*(agree(members[r], (2,), r) for r in (0, 1, 3)))
    assert came == [[0, 1, 3]] * 3


def test_a_rank_that_is_missing_is_named_and_its_word_is_not_believed():
    store = dist.HashStore()
    members = [roster(store, r) for r in range(3)]
    with pytest.raises(EPTimeoutError) as caught:
        members[0].agree("mask_rank", (2,), 0)
    assert (caught.value.late_ranks, caught.value.phase) == ((1,), "meeting")
    assert str(caught.value).startswith("mask_rank #1: rank 0 waited 0.8 s for rank 1 (phase: ")
    assert "Call it again on all ranks that are to go on" in str(caught.value)
    with pytest.raises(EPTimeoutError, match="for rank 0"):  # which has left
        members[1].agree("mask_rank", (2,), 1)
    assert at_once(agree(members[0], (2,), 0), agree(members[1], (2,), 1)) == [[0, 1]] * 2
    with pytest.raises(EPTimeoutError, match=r"rank 0 waited 0.4 s for rank 1 \(phase: refill\)"):
        members[0].meet("mask_rank")
    assert members[0].agree("mask_rank", (1, 2), 0) == [0]


class LostStore(dist.HashStore):
    def check(self, keys: list[str]) -> bool:
        raise dist.DistNetworkError("Connection reset by peer")


def test_a_store_that_is_gone():
    member = roster(LostStore(), 0)
    for call in (agree(member, None), member.latest, lambda: member.meet("mask_rank")):
        with pytest.raises(EPStateError, match="rank 0 lost torch.distributed's store"):
            call()
