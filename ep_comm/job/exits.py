"""Ending a job for a reason that the user can mend: one line, one exit code, on every rank."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch.distributed as dist

from ep_comm.errors import EPArgumentError
from ep_comm.job.store import default_store

_EXIT_CODE = 2
_MEETING_S = 10.0
_TOLD, _COME, _GONE = "ep_comm/exit/told", "ep_comm/exit/come", "ep_comm/exit/gone"


class UserError(Exception):
    """The user's request cannot be done. The message names the value, and says what would be right.

    Raise it on every rank, or inside `ep_comm.job.start.agree`: one rank alone takes ten seconds to
    end the job.
    """


@contextmanager
def user_errors_exit() -> Iterator[None]:
    """Turn a `UserError`, or a value that the library refuses, into one line and exit code 2.

    No stack trace is printed. All ranks of a job end, see `exit_together`.
    """
    try:
        yield
    except (UserError, EPArgumentError) as error:
        exit_together(error)


@contextmanager
def needs_extra(name: str) -> Iterator[None]:
    """Turn a failing import of another package into a `UserError` that says how to install it.

    Args:
        name: The extra of ep_comm that has the package.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "ep_comm":
            raise
        raise UserError(f"{error.name} is missing: pip install 'ep_comm[{name}]'") from None


def exit_together(error: Exception) -> NoReturn:
    """End this process with exit code 2, after one line that begins with ``error:``.

    Every rank is to call it with the same error: rank 0 speaks for all. Where only some have it
    (one GPU alone ran out of memory) the others wait for them elsewhere, so after ten seconds the
    first of those speaks, and they end; their launcher ends the others. Before torch.distributed is
    initialised that goes by the ranks of one machine: the others may know nothing of the error.
    """
    if dist.is_initialized():
        if _all_come(error):
            dist.destroy_process_group()
        else:  # in order it would wait for the others
            sys.stdout.flush()
            os._exit(_EXIT_CODE)
    else:
        if os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) != "0":
            # If the first rank has spoken, torchrun ends us meanwhile; srun lets us speak too.
            time.sleep(_MEETING_S)
        _print(error)
    sys.exit(_EXIT_CODE)


def _all_come(error: Exception) -> bool:
    """Return whether all ranks come here. Then rank 0 has spoken, else one of those that do.

    torchrun kills the others as soon as one rank ends, so they meet first: in the store, for a
    barrier could be taken for one that the others are at.
    """
    store, num_ranks = default_store(), dist.get_world_size()
    is_first = dist.get_rank() == 0
    if is_first:
        _print(error)
    try:
        store.add(_TOLD, int(is_first))
        store.add(_COME, 1)
        all_come = _reaches(store, _COME, num_ranks)
        if all_come:
            store.add(_GONE, 1)
            if is_first:  # where it holds the store it has to leave last
                _reaches(store, _GONE, num_ranks)
        elif store.add(_TOLD, 1) == 1:
            _print(error)
        return all_come
    except dist.DistError:  # rank 0 has left without this
        if not is_first:
            _print(error)
        return False


def _reaches(store: dist.Store, key: str, count: int) -> bool:
    deadline = time.monotonic() + _MEETING_S
    while store.add(key, 0) < count:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _print(error: Exception) -> None:
    # Megatron appends the modules that it was building, outermost last.
    text = re.sub(r"( when instantiating \w+)+$", "", str(error))
    print(f"error: {text}", file=sys.stderr, flush=True)
