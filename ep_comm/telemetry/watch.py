"""Naming a late rank while it is still waited for.

One daemon thread a process asks the backends of its buffers, once a second, whom they wait for.
They answer from host memory: a call of CUDA could wait for the very kernel that waits.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from typing import NamedTuple, Protocol

_log = logging.getLogger("ep_comm")
_AFTER_S = 30.0
_INTERVAL_S = 1.0


class Wait(NamedTuple):
    """A rank's wait for another one; fields as those of `EPTimeoutError`.

    Attributes:
        rank: None where the transport cannot tell.
    """

    op: str
    phase: str
    epoch: int
    rank: int | None


class Waiting(Protocol):
    """A backend, as far as `watch` needs it."""

    def waits(self) -> list[Wait]:
        """Return whom it waits for at this moment, read from host memory."""


def watch(backend: Waiting, rank: int, timeout_s: float) -> None:
    """Warn of ranks that `backend` has waited for for 30 s, from now on until it is gone.

    Args:
        backend: Held weakly.
        rank: This process's, for the text.
        timeout_s: When the backend gives up; where that comes first nothing is to be said.
    """
    if timeout_s > _AFTER_S:
        _watcher().add(backend, rank, timeout_s)


class _Watcher(threading.Thread):
    def __init__(self) -> None:
        super().__init__(name="ep_comm watch", daemon=True)
        self._lock = threading.Lock()
        self._watched: weakref.WeakKeyDictionary[Waiting, _Watched] = weakref.WeakKeyDictionary()

    def add(self, backend: Waiting, rank: int, timeout_s: float) -> None:
        with self._lock:
            self._watched[backend] = _Watched(rank, timeout_s)

    def run(self) -> None:
        while True:
            time.sleep(_INTERVAL_S)
            with self._lock:
                all_watched = list(self._watched.items())
            backend = watched = None
            for backend, watched in all_watched:
                try:
                    watched.look(backend.waits(), time.monotonic())
                except Exception:  # one backend's fault shall not end the watch over the others
                    _log.exception("cannot tell whom a buffer waits for")
            del all_watched, backend, watched  # or the last backend would live until the next round


class _Watched:
    """The waits that were seen of one backend.

    Args:
        rank: See `watch`.
        timeout_s: See `watch`.
    """

    def __init__(self, rank: int, timeout_s: float) -> None:
        self._rank, self._timeout_s = rank, timeout_s
        self._first_seen: dict[Wait, float] = {}
        self._named: set[Wait] = set()

    def look(self, waits: list[Wait], now: float) -> None:
        """Take in whom the backend waits for, and say what is new of it."""
        for wait, first in self._first_seen.items():
            if wait in self._named and wait not in waits:
                _log.warning("%s came after %.0f s", self._what(wait), now - first)
        self._first_seen = {wait: self._first_seen.get(wait, now) for wait in waits}
        self._named.intersection_update(waits)
        for wait, first in self._first_seen.items():
            if now - first >= _AFTER_S and wait not in self._named:
                self._named.add(wait)
                _log.warning(
                    "%s has not come for %.0f s (phase: %s); rank %d gives up after %g s",
                    self._what(wait),
                    now - first,
                    wait.phase,
                    self._rank,
                    self._timeout_s,
                )

    def _what(self, wait: Wait) -> str:
        late = "an unknown rank" if wait.rank is None else f"rank {wait.rank}"
        return f"{wait.op} #{wait.epoch}: {late}, which rank {self._rank} waits for,"


_the_watcher: _Watcher | None = None


def _watcher() -> _Watcher:
    """Return this process's watcher, and start one where none runs, as after a fork."""
    global _the_watcher
    if _the_watcher is None or not _the_watcher.is_alive():
        _the_watcher = _Watcher()
        _the_watcher.start()
    return _the_watcher
