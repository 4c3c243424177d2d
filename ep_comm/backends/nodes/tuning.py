"""How the kernels between nodes divide SMs. Not measured yet."""

from __future__ import annotations

import functools
from typing import NamedTuple

MIN_SMS = 4  # one for each kind of block


class DispatchSplit(NamedTuple):
    """SMs of a dispatch, a block each: stages fill shared memory. All have room at once.

    Attributes:
        gather: That send to the network.
        push: That push waves; of a new dispatch the first two.
        push_later: Of a new dispatch, that push the waves from the third on.
        expand: That expand.
    """

    gather: int
    push: int
    push_later: int
    expand: int

    @property
    def total(self) -> int:
        """Blocks of the operation."""
        return sum(self)


@functools.cache
def split_dispatch(num_sms: int, num_nodes: int, in_parts: bool) -> DispatchSplit:
    """Return how a dispatch divides its SMs; `in_parts` where the host waits between two launches.

    Only then are later waves pushed by blocks of their own.
    """
    gather = max(1, min(8, num_sms // 6)) if num_nodes > 1 else 0
    push = max(1, min(16, num_sms // 4))
    push_later = push if in_parts and num_nodes > 2 else 0
    return DispatchSplit(gather, push, push_later, num_sms - gather - push - push_later)
