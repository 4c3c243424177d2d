"""Joining a job, and failing together in it.

A mistake that only one rank can see (rank 0 reads the data) must stop the other ranks too, at once
and with one message. `agree` turns it into the same `UserError` everywhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from ep_comm.errors import EPError
from ep_comm.job.exits import UserError
from ep_comm.job.ranks import rank_variables

T = TypeVar("T")


def has_launcher() -> bool:
    """Return whether torchrun or srun started this process.

    torch.distributed finds srun's ranks from then on as it does torchrun's.
    """
    os.environ.update(rank_variables(os.environ))
    return "RANK" in os.environ and "LOCAL_RANK" in os.environ


def join(timeout: timedelta = timedelta(minutes=10)) -> torch.device:
    """Join the job that torchrun or srun started: over NCCL if there are GPUs, else over gloo.

    Args:
        timeout: Bound of the wait for the other processes, and of the group's own operations.

    Returns:
        This rank's device: its GPU, or the CPU where torch sees no GPU.

    Raises:
        UserError: There are more processes on this machine than GPUs.
    """
    if not torch.cuda.is_available():
        dist.init_process_group("gloo", timeout=timeout)
        return torch.device("cpu")
    processes, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if processes > gpus:
        raise UserError(
            f"{processes} processes for {gpus} GPUs: start one for each "
            f"(torchrun --nproc_per_node={gpus}, srun --ntasks-per-node={gpus}), let each of "
            f"them see all GPUs (srun --gpu-bind=none without --gpus-per-task), or hide the "
            f"GPUs (CUDA_VISIBLE_DEVICES=)"
        )
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", timeout=timeout)
    return device


def agree(action: Callable[[], T]) -> T:
    """Call `action` on every rank and return its result, or raise `UserError` on every rank.

    An action that may fail on some ranks only must not communicate.
    """
    result, error = None, None
    try:
        result = action()
    except (UserError, EPError, OSError) as e:
        error = str(e)
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for message in errors:
        if message is not None:
            raise UserError(message)
    return cast(T, result)


def on_rank_0(action: Callable[[], T]) -> T:
    """Call `action` on rank 0 only and return its result on every rank; fails as `agree` does."""
    result = [agree(lambda: action() if dist.get_rank() == 0 else None)]
    dist.broadcast_object_list(result)
    return cast(T, result[0])
