"""Where a chain of waits began, as far as the ranks that gave up have told each other.

A rank that has waited in vain for another one stops, and whoever waits for it names it, which is no
culprit. So each leaves in torch.distributed's store whom it had waited for.
"""

from __future__ import annotations

import json
import logging
import threading
import time

import torch.distributed as dist

_GRACE_S = 0.25  # the late rank may be about to give up itself: its wait began next to this one
_BOUND_S = 2.0  # the store may stand still, too

_log = logging.getLogger("ep_comm")


class Blame:
    """What the ranks of one buffer say when they give up.

    Args:
        store: Where they say it; of this buffer alone, and of these ranks as they are masked now.
        rank: This process's, in the buffer's group.
        num_ranks: Of the group.
    """

    def __init__(self, store: dist.Store, rank: int, num_ranks: int) -> None:
        self._store = store
        self._rank = rank
        self._num_ranks = num_ranks

    def trace(self, late_ranks: tuple[int, ...]) -> tuple[int, ...]:
        """Say that this rank gives up, and ask whom the ranks had waited for that it waited for.

        It takes a quarter of a second where it asks, and two at most.

        Args:
            late_ranks: Those that this rank has waited for; none where it has failed by itself.

        Returns:
            The ranks at which the waiting began, ascending: `late_ranks` themselves where these
            have said nothing, or have waited for this rank.
        """
        found = late_ranks

        def say_and_ask() -> None:
            nonlocal found
            try:
                self._store.set(self._key(self._rank), json.dumps(late_ranks))
                if late_ranks:
                    time.sleep(_GRACE_S)
                    found = self._origins(late_ranks) or late_ranks
            except RuntimeError as error:  # DistError, or what the store at hand raises
                _log.warning("rank %d cannot ask the store who was late: %s", self._rank, error)

        asking = threading.Thread(target=say_and_ask, name="ep_comm blame", daemon=True)
        asking.start()
        asking.join(_BOUND_S)
        return found

    def _origins(self, late_ranks: tuple[int, ...]) -> tuple[int, ...]:
        """Return the ranks behind `late_ranks` that have not waited for anybody."""
        open_ranks, seen, origins = [*late_ranks], {self._rank}, set()
        while open_ranks:
            rank = open_ranks.pop()
            if rank in seen:
                continue
            seen.add(rank)
            behind = self._word(rank)
            open_ranks += behind
            if not behind:
                origins.add(rank)
        return tuple(sorted(origins))

    def _word(self, rank: int) -> list[int]:
        """Return whom a rank has waited for; nobody where it has not given up, or by itself."""
        if not self._store.check([self._key(rank)]):
            return []
        try:
            said = json.loads(self._store.get(self._key(rank)))
        except (ValueError, RecursionError):
            return []
        if not isinstance(said, list):
            return []
        return [r for r in said if type(r) is int and 0 <= r < self._num_ranks]

    def _key(self, rank: int) -> str:
        return f"gave up/{rank}"
