"""Where the ranks of a group meet before they have a way of their own to communicate.

They leave what they have to say in torch.distributed's store. So a meeting works the same for every
process group, is bounded, and knows who is missing; a collective would hang until the group's own
timeout, and NCCL's then ends the process.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist

from ep_comm.errors import SAME_CALLS, EPMismatchError, EPTimeoutError
from ep_comm.job import codec
from ep_comm.job.store import default_store, store_errors

_LEFT = b"left"
_POLL_S = 0.05
# Meetings so far of the same global ranks. Only one that all came to counts.
_num_held: Counter[tuple[int, ...]] = Counter()


class Meeting(NamedTuple):
    """What came of one.

    Attributes:
        name: The same on all ranks, and of no other meeting.
        number: Counts the meetings of these ranks, from 1.
        answers: What each rank had to say, by group rank.
    """

    name: str
    number: int
    answers: list[Any]


def meet(
    group: dist.ProcessGroup, what_for: str, answer: object, timeout_s: float, op: str = "create"
) -> Meeting:
    """Wait for all ranks of `group`, and exchange an answer each. Collective.

    Args:
        group: Who meets.
        what_for: Must be the same on all ranks: what the meeting is about, for errors.
        answer: Anything that `codec.dumps` takes.
        timeout_s: Bound of the wait.
        op: What an `EPTimeoutError` calls it.

    Raises:
        EPTimeoutError: Names the ranks that have not come.
        EPMismatchError: A rank came for something else, or with another version of ep_comm.
        EPStateError: The store is gone, and with it the process that held it.
    """
    ranks = tuple(dist.get_process_group_ranks(group))
    rank, number = dist.get_rank(group), _num_held[ranks] + 1
    members = hashlib.sha256(repr(ranks).encode()).hexdigest()[:16]
    name = f"ep_comm/{members}/{number}"
    keys = [f"{name}/{r}" for r in range(len(ranks))]
    store = default_store()
    with store_errors(rank, f"it waited for other ranks ({what_for})"):
        store.set(keys[rank], codec.dumps((what_for, answer)).decode())
        values, late_ranks = values_of(store, keys, timeout_s)
        if late_ranks:
            # Whoever comes later is not to believe us there.
            store.set(keys[rank], _LEFT)  # type: ignore[arg-type]  # bytes too
            raise EPTimeoutError(
                op=op,
                phase=what_for,
                rank=rank,
                late_ranks=late_ranks,
                epoch=number,
                timeout_s=timeout_s,
            )
        said = [_read(value, other, rank, what_for) for other, value in enumerate(values)]
        # All that are here have read what was said before.
        store.delete_key(f"ep_comm/{members}/{number - 1}/{rank}")
    _num_held[ranks] = number
    for other, (theirs, _) in enumerate(said):
        if theirs != what_for:
            raise EPMismatchError(
                f"ranks disagree: rank {rank} has come to {what_for}, rank {other} to {theirs}. "
                f"{SAME_CALLS}"
            )
    return Meeting(name, number, [answer for _, answer in said])


def _read(value: bytes, other: int, rank: int, what_for: str) -> tuple[str, Any]:
    try:
        theirs, answer = codec.loads(value)
    except ValueError as error:
        raise EPMismatchError(
            f"rank {rank} ({what_for}) cannot read what rank {other} says: {error}. Every rank "
            "must run the same version of ep_comm."
        ) from None
    return theirs, answer


def values_of(
    store: dist.Store, keys: list[str], timeout_s: float
) -> tuple[list[bytes], tuple[int, ...]]:
    """Return the values of all keys, one a rank, or the ranks to blame that there are none in time.

    A rank that has given up is not here, but it is to blame only where all others are.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        left = max(deadline - time.monotonic(), 1e-3)
        try:
            store.wait(keys, timedelta(seconds=left))
        except dist.DistNetworkError:
            raise
        except RuntimeError:  # DistStoreError, or what the store at hand raises after a timeout
            missing = tuple(rank for rank, key in enumerate(keys) if not store.check([key]))
            if missing:
                return [], missing
            # The last one has come since.
        values = [store.get(key) for key in keys]
        gone = tuple(rank for rank, value in enumerate(values) if value == _LEFT)
        if not gone or time.monotonic() > deadline:
            return values, gone
        time.sleep(_POLL_S)
