"""A folder that one job uses at a time."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path


class InUse(Exception):
    """Another process holds the lock; the message says which, as it introduced itself."""


def lock(file: Path) -> int:
    """Lock a file, which is made if need be.

    Returns:
        A descriptor. The lock is held until it is closed, or its process and all processes that
        inherited it have ended, however they end.

    Raises:
        InUse: It is held.
        OSError: It cannot be written, or its file system has no locks.
    """
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(descriptor, 200).decode(errors="replace").strip()
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise InUse(holder or "another process") from None
        raise
    introduce(descriptor, f"process {os.getpid()} on {socket.gethostname()}")
    return descriptor


def introduce(descriptor: int, holder: str) -> None:
    """Note who holds a lock, for the message of whoever is refused."""
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, holder.encode(), 0)
