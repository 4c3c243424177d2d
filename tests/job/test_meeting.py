"""Where ranks meet before they have a buffer: bounded, and who is missing is named."""

from __future__ import annotations

import time

import pytest
import torch.distributed as dist
from ranks import run_ranks

from ep_comm import Buffer, EPConfig, EPMismatchError, EPTimeoutError
from ep_comm.job.meeting import meet, values_of

CONFIG = EPConfig(num_experts=6, hidden=8, max_tokens_per_rank=8, num_topk=2, timeout_s=2)


def exchange(rank: int) -> list:
    first = meet(None, "begin", {"rank": rank}, 10.0)
    second = meet(None, "go on", rank, 10.0)
    assert second.number == first.number + 1 and first.name != second.name
    return [first.answers, second.answers]


def test_answers_come_in_rank_order():
    for first, second in run_ranks(3, exchange):
        assert first == [{"rank": 0}, {"rank": 1}, {"rank": 2}] and second == [0, 1, 2]


def come_late(rank: int) -> str | None:
    """Who was given up by the others meets them at the next try, and not a rank that has left."""
    if rank == 2:
        time.sleep(6)
        with pytest.raises(EPTimeoutError, match="for rank 0, 1"):
            Buffer(None, CONFIG)
        dist.barrier()
        Buffer(None, CONFIG)
        return None
    start = time.monotonic()
    with pytest.raises(EPTimeoutError) as caught:
        Buffer(None, CONFIG)
    assert time.monotonic() - start > 1.5
    dist.barrier()
    Buffer(None, CONFIG)
    return str(caught.value)


def test_a_rank_that_makes_no_buffer_is_named():
    for rank, message in enumerate(run_ranks(3, come_late, fresh=True)[:2]):
        assert f"rank {rank} waited 2 s for rank 2 (phase: make a Buffer)" in message


def come_for_another_reason(rank: int) -> str:
    with pytest.raises(EPMismatchError) as caught:
        meet(None, "make a Buffer" if rank else "find its size", None, 5.0)
    return str(caught.value)


def test_a_rank_that_comes_for_another_reason():
    messages = run_ranks(2, come_for_another_reason, fresh=True)
    assert "rank 0 has come to find its size, rank 1 to make a Buffer" in messages[0]


def subgroups(rank: int) -> list:
    """Groups of different ranks meet apart, and count apart."""
    pair = dist.new_group([rank // 2 * 2, rank // 2 * 2 + 1], use_local_synchronization=True)
    return [meet(pair, "begin", rank, 10.0).answers, meet(None, "begin", rank, 10.0).answers]


def test_groups_meet_apart():
    for rank, (mine, all_ranks) in enumerate(run_ranks(4, subgroups)):
        assert mine == ([2, 3] if rank > 1 else [0, 1]) and all_ranks == [0, 1, 2, 3]


class StoreOfALateRank(dist.HashStore):
    """Its wait runs out, and then the last key is there all the same."""

    def wait(self, keys, timeout) -> None:
        self.set(keys[-1], b"late")
        raise RuntimeError("wait timeout")


def test_a_rank_that_comes_as_the_wait_runs_out_has_come():
    store = StoreOfALateRank()
    store.set("a/0", b"here")
    assert values_of(store, ["a/0", "a/1"], 0.1) == ([b"here", b"late"], ())
