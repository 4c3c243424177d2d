"""Signals that end a run in good order."""

from __future__ import annotations

import os
import signal

import pytest
from ranks import run_ranks

from ep_comm.job.stop import StopRequest

SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")


def receive(_: int, name: str) -> list[bool]:
    signum = getattr(signal, name)
    signal.signal(signum, signal.SIG_DFL)  # whoever runs the tests may ignore it, as nohup does
    stop = StopRequest()
    found = [stop.received]
    for _ in range(2):  # a second one is not the end of the process
        os.kill(os.getpid(), signum)
        found.append(stop.received)
    return found


@pytest.mark.parametrize("name", SIGNALS)
def test_each_is_a_request_and_no_end(name):
    assert run_ranks(1, receive, name, pool="signals") == [[False, True, True]]


def receive_ignored(_: int) -> bool:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    stop = StopRequest()
    os.kill(os.getpid(), signal.SIGHUP)
    return stop.received


def test_what_is_ignored_stays_ignored():
    assert run_ranks(1, receive_ignored, fresh=True) == [False]
