"""Stopping on the signals that end a job in good order.

SLURM sends SIGTERM before it takes a job's nodes away, or what ``--signal`` asks for, SIGUSR1 as a
rule. A terminal sends SIGINT for Ctrl-C, and SIGHUP when it is closed. torchrun passes all but
SIGUSR1 on; that one ends torchrun itself.
The step in progress is finished, a checkpoint is written, and the process exits with `EXIT_CODE`.
"""

from __future__ import annotations

import signal

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: not done, try again
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class StopRequest:
    """Whether one of these signals has reached this process since this was made.

    From then on they do nothing else: SLURM, a terminal and torchrun all send them, to each process
    of a job and more than once, while the last checkpoint is being written. Until then they end the
    process, which has nothing to lose yet. One that is ignored stays ignored, as under nohup.
    """

    def __init__(self) -> None:
        self.received = False
        for each in _SIGNALS:
            if signal.getsignal(each) != signal.SIG_IGN:
                signal.signal(each, self._receive)

    def _receive(self, *_: object) -> None:
        self.received = True
