"""Processes: joining the job, and failing together.

A mistake that only one rank can see (rank 0 reads the data) must stop the other ranks too, at once
and with one message. `agree` turns it into the same `UserError` everywhere.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from ep_comm.errors import EPArgumentError, EPError
from ep_comm.job.exits import exit_together
from ep_comm.megatron import cpu

T = TypeVar("T")


class UserError(Exception):
    """What the user asked for cannot be done; the message names the value and what would be right.

    Raise it on every rank, or inside `agree`: one rank alone takes ten seconds to end the job.
    """


def init_process_group() -> None:
    """Join the job that torchrun or srun started, over NCCL if there are GPUs, else over gloo.

    Raises:
        UserError: There are more processes on this machine than GPUs.
    """
    # Megatron's overlap of communication and computation counts on this order of launches.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if torch.cuda.is_available():
        processes, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if processes > gpus:
            raise UserError(
                f"{processes} processes for {gpus} GPUs: start one for each "
                f"(torchrun --nproc_per_node={gpus}, srun --ntasks-per-node={gpus}), let each of "
                f"them see all GPUs (srun --gpu-bind=none without --gpus-per-task), or hide the "
                f"GPUs (CUDA_VISIBLE_DEVICES=)"
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=10))


def prepare_megatron() -> None:
    """Call it before the first import of Megatron; where there is no GPU it runs on the CPU then.

    Each rank would warn of each optional package that Megatron misses, and of each torch function
    that it should no longer use: they keep quiet.
    """
    warnings.filterwarnings("ignore", module="megatron")
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("megatron").setLevel(logging.ERROR)
    cpu.enable()


def agree(action: Callable[[], T]) -> T:
    """Call `action` on every rank and return its result, or raise `UserError` on every rank.

    An action that may fail on some ranks only must not communicate.
    """
    result, error = None, None
    try:
        result = action()
    except (UserError, EPError, OSError) as e:
        error = str(e)
    errors = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for message in errors:
        if message is not None:
            raise UserError(message)
    return result


def on_rank_0(action: Callable[[], T]) -> T:
    """Call `action` on rank 0 only and return its result on every rank; fails as `agree` does."""
    result = [agree(lambda: action() if dist.get_rank() == 0 else None)]
    dist.broadcast_object_list(result)
    return result[0]


@contextmanager
def user_errors_exit() -> Iterator[None]:
    """End the process with one line and code 2 on a user's error, instead of a stack trace."""
    try:
        yield
    except (UserError, EPArgumentError) as error:
        exit_together(error)
