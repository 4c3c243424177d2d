"""Where the ranks of a group meet before they have a way of their own to communicate.

They leave what they have to say in torch.distributed's store. So a meeting works the same for every
process group, is bounded, and knows who is missing; a collective would hang until the group's own
timeout, and NCCL's then ends the process.
"""

from __future__ import annotations

import hashlib
import pickle
from collections import Counter
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist

from ep_comm.errors import SAME_CALLS, EPMismatchError, EPStateError, EPTimeoutError

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
        what_for: Must be the same on all ranks: what the meeting is about, for errors.
        answer: Anything that pickle takes.
        timeout_s: Bound of the wait.
        op: What an `EPTimeoutError` calls it.

    Raises:
        EPTimeoutError: Names the ranks that have not come.
        EPMismatchError: A rank came for something else.
        EPStateError: The store is gone, and with it the process that held it.
    """
    ranks = tuple(dist.get_process_group_ranks(group))
    rank, number = dist.get_rank(group), _num_held[ranks] + 1
    members = hashlib.sha256(repr(ranks).encode()).hexdigest()[:16]
    name = f"ep_comm/{members}/{number}"
    keys = [f"{name}/{r}" for r in range(len(ranks))]
    store = dist.distributed_c10d._get_default_store()
    try:
        store.set(keys[rank], pickle.dumps((what_for, answer)))
        missing = _missing(store, keys, timeout_s)
        if missing:
            store.delete_key(keys[rank])  # whoever comes later is not to believe us there
            raise EPTimeoutError(
                op=op,
                phase=what_for,
                rank=rank,
                late_ranks=missing,
                epoch=0,
                timeout_s=timeout_s,
            )
        said = [pickle.loads(store.get(key)) for key in keys]
        # All that are here have read what was said before.
        store.delete_key(f"ep_comm/{members}/{number - 1}/{rank}")
    except dist.DistError as error:
        raise EPStateError(
            f"rank {rank} lost torch.distributed's store while it waited for other ranks "
            f"({what_for}): {error}"
        ) from error
    _num_held[ranks] = number
    for other, (theirs, _) in enumerate(said):
        if theirs != what_for:
            raise EPMismatchError(
                f"ranks disagree: rank {rank} has come to {what_for}, rank {other} to {theirs}. "
                f"{SAME_CALLS}"
            )
    return Meeting(name, number, [answer for _, answer in said])


def _missing(store: dist.Store, keys: list[str], timeout_s: float) -> tuple[int, ...]:
    """The ranks whose keys do not come in time."""
    try:
        store.wait(keys, timedelta(seconds=timeout_s))
    except dist.DistNetworkError:
        raise
    except RuntimeError:
        # DistStoreError, or what the store at hand raises after a timeout.
        return tuple(rank for rank, key in enumerate(keys) if not store.check([key]))
    return ()
