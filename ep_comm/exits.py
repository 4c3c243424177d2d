"""Ending a job for a reason that the user can mend: one line, one exit code, on every rank."""

from __future__ import annotations

import os
import sys
import time
from typing import NoReturn

import torch.distributed as dist

USER_ERROR_EXIT_CODE = 2
_MEETING_S = 10.0
_COME, _GONE, _SPEAKER = "ep_comm/exit/come", "ep_comm/exit/gone", "ep_comm/exit/speaker"


def exit_together(error: Exception) -> NoReturn:
    """End this process with `USER_ERROR_EXIT_CODE`, after one line that begins with ``error:``.

    Every rank is to call it with the same error: rank 0 speaks for all. Where only some have it
    (one GPU alone ran out of memory) the others wait for them elsewhere, so after ten seconds the
    first of those speaks, and they end; their launcher ends the others.
    """
    if dist.is_initialized():
        if _is_told_by_all(error):
            dist.destroy_process_group()
        else:  # in order it would wait for the others
            sys.stdout.flush()
            os._exit(USER_ERROR_EXIT_CODE)
    # Other machines may know nothing of this: the first rank of each speaks.
    elif all(os.environ.get(name, "0") == "0" for name in ("LOCAL_RANK", "SLURM_LOCALID")):
        _say(error)
    else:
        time.sleep(_MEETING_S)  # torchrun does not let it last that long, srun does
    sys.exit(USER_ERROR_EXIT_CODE)


def _is_told_by_all(error: Exception) -> bool:
    """Whether all ranks come here, too; then rank 0 has spoken, else one of those that do.

    torchrun kills the others as soon as one rank ends, so they meet first: in the store, for a
    barrier could be taken for one that the others are at.
    """
    store = dist.distributed_c10d._get_default_store()
    rank, others = dist.get_rank(), dist.get_world_size() - 1
    is_first = rank == 0
    if is_first:
        _say(error)
    try:
        if is_first:
            store.set(_SPEAKER, "0")
        store.add(_COME, 1)
        if not _reaches(store, _COME, others + 1):
            if not is_first and store.compare_set(_SPEAKER, "", str(rank)) == str(rank).encode():
                _say(error)
            return False
        # Where rank 0 holds the store it has to leave last.
        if is_first:
            _reaches(store, _GONE, others)
        else:
            store.add(_GONE, 1)
    except dist.DistError:  # rank 0 has left without this
        if not is_first:
            _say(error)
        return False
    return True


def _reaches(store: dist.Store, key: str, count: int) -> bool:
    deadline = time.monotonic() + _MEETING_S
    while store.add(key, 0) < count:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _say(error: Exception) -> None:
    print(f"error: {error}", file=sys.stderr, flush=True)
