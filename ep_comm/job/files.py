"""Folders that one job uses at a time, and files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import tempfile
from pathlib import Path
from typing import Any

from ep_comm.job.exits import UserError

_LOCK_FILE = ".lock"
_held: dict[Path, int] = {}  # locks of this process, until it ends


def lock(file: Path, what: str) -> int:
    """Lock a file, which is made if need be.

    Args:
        file: Its folder exists.
        what: What it stands for, as the user named it.

    Returns:
        A descriptor. The lock is held until it is closed, or its process and all processes that
        inherited it have ended, however they end.

    Raises:
        UserError: It is held. The message has who holds it, as that process introduced itself.
        OSError: It cannot be written, or its file system has no locks.
    """
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise UserError(
                f"{what} is in use by {holder}: wait for it, or choose another folder"
            ) from None
        raise
    introduce(descriptor, f"process {os.getpid()} on {socket.gethostname()}")
    return descriptor


def introduce(descriptor: int, holder: str) -> None:
    """Note who holds a lock, for the message of whoever is refused."""
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, holder.encode(), 0)


def take_folder(folder: Path, flag: str) -> None:
    """Make a folder if need be, and keep other runs out of it as long as this process lives.

    Their files would be mixed. A file system without locks keeps nobody out.

    Args:
        folder: What to take; a process may do so more than once.
        flag: What the user named it with.

    Raises:
        UserError: Nothing can be written there, or another run uses it.
    """
    if folder.resolve() in _held:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{flag} {folder} cannot be written: {error.strerror}") from None
    with contextlib.suppress(OSError):
        _held[folder.resolve()] = lock(folder / _LOCK_FILE, f"{flag} {folder}")


def user_of(folder: Path) -> str | None:
    """Return who uses a folder that `take_folder` took; None where nobody does, or no lock tells.

    A job that would take the folder in the microseconds of the question is refused.
    """
    try:
        with (folder / _LOCK_FILE).open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read(200).decode(errors="replace").strip() or "another process"
    except OSError:
        pass
    return None


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all.

    Raises:
        OSError: It cannot be written, as where the disk is full; nothing is left of it.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        # Not through a link that somebody else may have put there.
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
        with open(os.open(temporary, flags, 0o666), "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all, as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write a document as JSON, as `write_text` does."""
    write_text(path, json.dumps(document, indent=1) + "\n")
