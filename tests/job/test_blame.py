"""Ranks that give up tell each other whom they had waited for: the last of a chain is named."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from ep_comm.job.blame import Blame


def trace_all(
    late: dict[int, tuple[int, ...]], after_s: dict[int, float] | None = None
) -> dict[int, tuple[int, ...]]:
    """What each of four ranks finds, that gives up with `late`, `after_s` seconds later than 0."""
    store = dist.HashStore()

    def give_up(rank: int) -> tuple[int, ...]:
        time.sleep((after_s or {}).get(rank, 0.0))
        return Blame(store, rank, 4).trace(late[rank])

    with ThreadPoolExecutor(4) as pool:
        return dict(zip(late, pool.map(give_up, late), strict=True))


@pytest.mark.parametrize(
    ("late", "origins"),
    [
        ({0: (3,), 1: (3,)}, {0: (3,), 1: (3,)}),
        ({0: (1,), 1: (2,), 2: (3,)}, {0: (3,), 1: (3,), 2: (3,)}),
        ({0: (1, 2), 1: (3,)}, {0: (2, 3), 1: (3,)}),
        ({0: (1,), 1: ()}, {0: (1,), 1: ()}),
        ({0: (1,), 1: (0,)}, {0: (1,), 1: (0,)}),
        ({0: (1,), 1: (2,), 2: (1,)}, {0: (1,), 1: (2,), 2: (1,)}),
    ],
    ids=["dead", "chain", "two", "failed by itself", "each other", "circle"],
)
def test_a_chain_of_waits_ends_at_those_that_waited_for_nobody(late, origins):
    assert trace_all(late) == origins


def test_a_rank_that_gives_up_a_little_later_is_heard():
    assert trace_all({0: (1,), 1: (2,)}, after_s={1: 0.1}) == {0: (2,), 1: (2,)}


@pytest.mark.parametrize("word", ["[1", '"2"', "[true]", "[7]", "[-1]", "[" * 100_000])
def test_what_others_say_is_checked(word):
    store = dist.HashStore()
    store.set("gave up/1", word)
    assert Blame(store, 0, 4).trace((1,)) == (1,)


class Still(dist.HashStore):
    """A store whose holder stands still."""

    def set(self, *_: object) -> None:
        time.sleep(60)


class Gone(dist.HashStore):
    """A store whose holder has ended."""

    def set(self, *_: object) -> None:
        raise dist.DistNetworkError("Connection reset by peer")


def test_a_store_that_does_not_answer_is_not_waited_for(caplog):
    start = time.monotonic()
    assert Blame(Still(), 0, 4).trace((1,)) == (1,)
    assert time.monotonic() - start < 4
    assert Blame(Gone(), 0, 4).trace((1,)) == (1,)
    assert "Connection reset by peer" in caplog.text
