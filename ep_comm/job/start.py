"""Joining the job that torchrun started, and failing together: one line, one exit code."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from ep_comm.errors import EPArgumentError
from ep_comm.job.exits import exit_together


class UserError(Exception):
    """What the user asked for cannot be done. Raised on every rank of the job."""


@contextmanager
def user_errors_exit() -> Iterator[None]:
    """What the user asked for and cannot have (`UserError`, or a value that the library refuses)
    ends every rank with exit code 2, after one line that says why."""
    try:
        yield
    except (UserError, EPArgumentError) as error:
        exit_together(error)


def on_rank_0(action: Callable[[], object]) -> None:
    """Call `action` on rank 0 only; an `OSError` there is a `UserError` everywhere."""
    outcome: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except OSError as error:
            outcome = [str(error)]
    dist.broadcast_object_list(outcome)
    if outcome[0] is not None:
        raise UserError(outcome[0])


def join() -> torch.device:
    """Join the process group of torchrun's job; gives this rank's GPU.

    Raises:
        UserError: There is no job, or not a GPU for each of its processes.
    """
    if "RANK" not in os.environ or "LOCAL_RANK" not in os.environ:
        raise UserError("start it with torchrun --nproc_per_node=4 -m ep_comm.cli bench ...")
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        raise UserError("bench needs CUDA GPUs, and torch sees none (ep-comm doctor says more)")
    processes, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if processes > gpus:
        dist.init_process_group("gloo")
        raise UserError(
            f"{processes} processes for {gpus} GPUs: pass torchrun --nproc_per_node={gpus}"
        )
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", timeout=timedelta(minutes=5))
    return device
