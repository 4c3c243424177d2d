"""Ending a job for a reason that the user can mend: one line, one exit code, on every rank."""

from __future__ import annotations

import os
import sys
import time
from typing import NoReturn

import torch.distributed as dist

USER_ERROR_EXIT_CODE = 2
_MEETING, _MEETING_S = "ep_comm/exit", 10.0


def exit_together(error: Exception) -> NoReturn:
    """End this process with `USER_ERROR_EXIT_CODE`, after one line that begins with ``error:``.

    Every rank is to call it with the same error: rank 0 speaks for all. Where only one has it (its
    GPU alone ran out of memory) the others wait for it elsewhere, so after ten seconds it speaks
    for itself and ends, and its launcher ends the others.
    """
    is_in_group = dist.is_initialized()
    # Before the group exists, other machines may know nothing of this: the first rank of each.
    names = ["RANK"] if is_in_group else ["LOCAL_RANK", "SLURM_LOCALID"]
    speaks = all(os.environ.get(name, "0") == "0" for name in names)
    if speaks:
        _say(error)
    # torchrun kills the others as soon as one rank ends: that one has to speak first.
    if is_in_group:
        if not _all_come():
            if not speaks:
                _say(error)
            os._exit(USER_ERROR_EXIT_CODE)  # in order it would wait for the others
        dist.destroy_process_group()
    elif not speaks:
        time.sleep(_MEETING_S)  # torchrun does not let it last that long, srun does
    sys.exit(USER_ERROR_EXIT_CODE)


def _all_come() -> bool:
    """Meet the other ranks, by the store: a barrier could be taken for one that they are at."""
    store = dist.distributed_c10d._get_default_store()
    deadline = time.monotonic() + _MEETING_S
    try:
        store.add(_MEETING, 1)
        while store.add(_MEETING, 0) < dist.get_world_size():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
    except dist.DistError:
        pass  # rank 0, which holds the store where torchrun does not, has spoken and gone
    return True


def _say(error: Exception) -> None:
    print(f"error: {error}", file=sys.stderr, flush=True)
