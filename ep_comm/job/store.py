"""The store of torch.distributed that a job meets in, and what it means that it is gone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from ep_comm.errors import EPStateError


def default_store() -> dist.Store:
    """Return the store of the default process group, which all ranks of the job read and write.

    Raises:
        ValueError: torch.distributed is not initialised.
    """
    return dist.distributed_c10d._get_default_store()  # torch has no public name for it


@contextmanager
def store_errors(rank: int, what: str) -> Iterator[None]:
    """Turn an error of the store into an `EPStateError`: it went with the process that held it.

    Args:
        rank: This process's, for the message.
        what: What was under way, as a sentence that "while" begins.
    """
    try:
        yield
    except dist.DistError as error:
        raise EPStateError(
            f"rank {rank} lost torch.distributed's store while {what}: {error}"
        ) from error
