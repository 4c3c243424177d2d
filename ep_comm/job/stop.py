"""Stopping on SIGTERM, which SLURM sends before it takes a job's nodes away, and on Ctrl-C.

torchrun passes both on.
The step in progress is finished, a checkpoint is written, and the process exits with `EXIT_CODE`.
"""

from __future__ import annotations

import signal

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
