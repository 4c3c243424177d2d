"""The end of a buffer: no rank frees memory that another one may still write to."""

from __future__ import annotations

import time
from collections.abc import Sequence

from torch import Tensor

_POLL_S = 1e-3


class Farewell:
    """Ranks tell each other that they write to nobody's memory any more.

    The flags are part of that memory, so that it takes no collective of a group whose other ranks
    may do something else by now.

    Args:
        rank: This GPU's.
        flags_of: The flags [R] int32 of every rank, as mapped here; zero at first.

    Attributes:
        masked: Ranks whose memory is not touched any more.
    """

    def __init__(self, rank: int, flags_of: Sequence[Tensor]) -> None:
        self._rank = rank
        self._flags_of = flags_of
        self.masked: tuple[int, ...] = ()

    def say(self, frees: bool = True) -> None:
        """Tell all ranks, on the current stream.

        Where this one keeps its memory (`frees` is False) the others may free theirs all the same.
        """
        for rank, flags_R in enumerate(self._flags_of):
            if rank not in self.masked:
                flags_R[self._rank].fill_(1)

    def wait(self, timeout_s: float) -> list[int]:
        """Wait until every rank has said it, and return those that have not in time."""
        deadline = time.monotonic() + timeout_s
        while True:
            said_R = self._flags_of[self._rank].tolist()
            late = [rank for rank, said in enumerate(said_R) if not said]
            if not late or time.monotonic() > deadline:
                return late
            time.sleep(_POLL_S)
