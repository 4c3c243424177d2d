"""Ranks that are forked from a launcher, a fifth of a second a group: hundreds of them may die.

The launcher is a process of its own that has imported everything and has no threads. It reaps what
its ranks leave behind, so a process that outlives its rank is found::

    outcomes = run_forked(3, my_function, argument)   # my_function(rank, argument) on three ranks
"""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing as mp
import multiprocessing.connection
import os
import pickle
import select
import signal
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

_PR_SET_CHILD_SUBREAPER = 36
_GROUP_TIMEOUT_S = 60.0
_launcher: tuple[mp.process.BaseProcess, multiprocessing.connection.Connection] | None = None


class Outcome(NamedTuple):
    """How one rank ended.

    Attributes:
        how: "done", "raised", "hung", or "signal 9".
        value: What it returned; or the traceback.
        seconds: From its start to its end.
    """

    how: str
    value: Any
    seconds: float


class Orphans(Exception):
    """Processes have outlived their ranks."""


def run_forked(
    num_ranks: int, function: Callable[..., Any], *args: Any, timeout_s: float = 60.0
) -> list[Outcome]:
    """Run ``function(rank, *args)`` on ranks of a gloo group; how each ended, in rank order.

    A rank that has not ended after `timeout_s` is killed, and has "hung".

    Raises:
        Orphans: A process of a rank is still there when all ranks have ended.
    """
    global _launcher
    if _launcher is None:
        mine, theirs = mp.Pipe()
        process = mp.get_context("forkserver").Process(target=_launch, args=(theirs,))
        process.start()
        theirs.close()
        _launcher = process, mine
    _launcher[1].send((num_ranks, function, args, timeout_s))
    answer = _launcher[1].recv()
    if isinstance(answer, BaseException):
        raise answer
    return answer


@atexit.register
def _end() -> None:
    if _launcher is not None:
        _launcher[1].close()
        _launcher[0].join(5)
        _launcher[0].kill()


def _launch(pipe: multiprocessing.connection.Connection) -> None:
    import ep_comm.buffer  # noqa: F401 - once, not in every rank

    torch.set_num_threads(1)
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    while True:
        try:
            num_ranks, function, args, timeout_s = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(_run(num_ranks, function, args, timeout_s))
        except Exception as error:
            pipe.send(error)


def _run(num_ranks: int, function: Callable, args: tuple, timeout_s: float) -> list[Outcome]:
    start = time.monotonic()
    held, hold = os.pipe()
    holder, port = _hold_store(held, hold)
    ends, pids = [], []
    for rank in range(num_ranks):
        mine, theirs = os.pipe()
        pid = os.fork()
        if pid == 0:
            for other in (mine, hold, *ends):
                os.close(other)
            _be_rank(rank, num_ranks, port, theirs, function, args)
        os.close(theirs)
        ends.append(mine)
        pids.append(pid)
    outcomes = _outcomes(pids, ends, start, start + timeout_s)
    os.close(hold)
    os.close(held)
    os.waitpid(holder, 0)
    if left := _reap_others():
        raise Orphans(f"processes {left} have outlived their ranks")
    return outcomes


def _hold_store(held: int, hold: int) -> tuple[int, int]:
    """Fork a process that has the ranks' store until `hold` is closed, as torchrun's agent does.

    Whichever rank dies: the store goes on, whole.
    """
    mine, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(hold)
        store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        os.write(theirs, str(store.port).encode())
        os.read(held, 1)
        os._exit(0)
    os.close(theirs)
    port = int(os.read(mine, 16))
    os.close(mine)
    return pid, port


def _be_rank(
    rank: int, num_ranks: int, port: int, pipe: int, function: Callable, args: tuple
) -> None:
    """Run the function in this fork, and end it without what an interpreter does at its end."""
    try:
        os.environ["MASTER_PORT"] = str(port)
        dist.init_process_group(
            "gloo",
            store=dist.TCPStore("localhost", port, is_master=False),
            rank=rank,
            world_size=num_ranks,
            timeout=timedelta(seconds=_GROUP_TIMEOUT_S),
        )
        answer = ("done", function(rank, *args))
    except BaseException:
        answer = ("raised", traceback.format_exc())
    with os.fdopen(pipe, "wb") as file:
        file.write(pickle.dumps(answer))
    os._exit(0)


def _outcomes(pids: list[int], ends: list[int], start: float, deadline: float) -> list[Outcome]:
    """Wait for all ranks together: each has ended when nobody holds its pipe any more."""
    said = {end: b"" for end in ends}
    ended_s: dict[int, float] = {}
    while len(ended_s) < len(ends):
        left = deadline - time.monotonic()
        ready, _, _ = select.select(
            [end for end in ends if end not in ended_s], [], [], max(0, left)
        )
        if not ready:
            break
        for end in ready:
            data = os.read(end, 1 << 16)
            said[end] += data
            if not data:
                ended_s[end] = time.monotonic() - start
    outcomes = []
    for pid, end in zip(pids, ends, strict=True):
        hung = end not in ended_s
        if hung:
            os.kill(pid, signal.SIGCONT)
            os.kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.close(end)
        how, value = pickle.loads(said[end]) if said[end] else (f"signal {-code}", None)
        outcomes.append(Outcome("hung" if hung else how, value, ended_s.get(end, float("inf"))))
    return outcomes


def _reap_others() -> list[int]:
    """Return processes that ranks have left to their reaper, this process; and end them."""
    left = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it has just ended
            continue
        if int(parent) == os.getpid():
            pid = int(stat.parent.name)
            if state != "Z":
                left.append(pid)
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return left
