"""Stopping on SIGTERM, which SLURM sends before it takes a job's nodes away, and on Ctrl-C.

torchrun passes both on.
The step in progress is finished, a checkpoint is written, and the process exits with `EXIT_CODE`.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: not done, try again
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Whether SIGTERM or SIGINT has reached this process since this was made.

    From then on they do nothing else: SLURM, a terminal and torchrun all send them, to each process
    of a job and more than once, while the last checkpoint is being written. Until then they end the
    process, which has nothing to lose yet.
    """

    def __init__(self) -> None:
        self.received = False
        for each in _SIGNALS:
            signal.signal(each, self._receive)

    def _receive(self, *_: object) -> None:
        self.received = True


@contextmanager
def shielded_children() -> Iterator[None]:
    """Processes that are started inside never get these signals, which SLURM and a terminal send to
    all of a job.

    For those that the last checkpoint needs. Programs that handle SIGTERM (W&B's service) get it
    nevertheless.
    """
    # Started now, since on its start multiprocessing lets SIGTERM through again.
    resource_tracker.ensure_running()
    # Blocked and not ignored: one that comes meanwhile reaches this process afterwards.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
