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
from ep_comm.job import codec
from ep_comm.job.exits import UserError
from ep_comm.job.ranks import job_name, rank_variables, whole
from ep_comm.topology import backend_by_device_type

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
        UserError: There are more processes on this machine than GPUs; or the port where they are to
            meet is another job's.
    """
    if not torch.cuda.is_available():
        _init_process_group("gloo", timeout)
        return torch.device("cpu")
    processes, gpus = whole(os.environ, "LOCAL_WORLD_SIZE"), torch.cuda.device_count()
    if processes > gpus:
        raise UserError(
            f"{processes} processes for {gpus} GPUs: start one for each "
            f"(torchrun --nproc_per_node={gpus}, srun --ntasks-per-node={gpus}), let each of "
            f"them see all GPUs (srun --gpu-bind=none without --gpus-per-task), or hide the "
            f"GPUs (CUDA_VISIBLE_DEVICES=)"
        )
    device = torch.device("cuda", whole(os.environ, "LOCAL_RANK"))
    torch.cuda.set_device(device)
    _init_process_group("nccl", timeout)
    return device


def _init_process_group(backend: str, timeout: timedelta) -> None:
    """Meet in a store of this job alone: in another's, ranks would take its ranks for their own."""
    place = f"MASTER_PORT {os.environ.get('MASTER_PORT')} of {os.environ.get('MASTER_ADDR')}"
    advice = "give this job another MASTER_PORT (torchrun --master-port)"
    job = job_name(os.environ)
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        whole(os.environ, name)
    try:
        store, rank, num_ranks = next(dist.rendezvous("env://", timeout=timeout))
        first = store.compare_set("ep_comm/job", "", job)
    except dist.DistNetworkError as error:
        raise UserError(f"cannot meet at {place}: {error}; {advice}") from None
    first = first.decode() if isinstance(first, bytes) else first
    if first != job:
        raise UserError(f"{place} belongs to {first}, and this is {job}: {advice}")
    store.set_timeout(timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks, timeout=timeout)


def agree(action: Callable[[], T]) -> T:
    """Call `action` on every rank and return its result, or raise `UserError` on every rank.

    An action that may fail on some ranks only must not communicate.
    """
    result, error = None, None
    try:
        result = action()
    except (UserError, EPError, OSError) as e:
        error = str(e)
    for message in _all_gather(error):
        if message is not None:
            raise UserError(message)
    return cast(T, result)


def on_rank_0(action: Callable[[], T]) -> T:
    """Call `action` on rank 0 only and return its result on every rank; fails as `agree` does.

    The result is something that `codec.dumps` takes.
    """
    result = agree(lambda: action() if dist.get_rank() == 0 else None)
    return cast(T, codec.loads(_broadcast(codec.dumps(result))))


def _all_gather(word: str | None) -> list[str | None]:
    """Return the word of each rank, by rank."""
    mine = codec.dumps(word)
    sizes = [torch.empty_like(_numbers([0])) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, _numbers([len(mine)]))
    longest = max(int(size) for size in sizes)
    texts = [torch.empty_like(_bytes(bytes(longest))) for _ in sizes]
    dist.all_gather(texts, _bytes(mine.ljust(longest)))  # JSON may end in spaces
    return [codec.loads(text.cpu().numpy().tobytes()) for text in texts]


def _broadcast(mine: bytes) -> bytes:
    """Return the bytes of rank 0."""
    size = _numbers([len(mine)])
    dist.broadcast(size, 0)
    text = _bytes(mine if dist.get_rank() == 0 else bytes(int(size)))
    dist.broadcast(text, 0)
    return text.cpu().numpy().tobytes()


def _numbers(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device=_device())


def _bytes(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(_device())


def _device() -> torch.device:
    """Return where the job's group takes tensors from."""
    group = dist.group.WORLD
    assert group is not None  # joined
    on_gpu = "cpu" not in backend_by_device_type(group)
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
