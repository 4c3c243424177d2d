"""The folders of a run, which no other run may use meanwhile: their files would be mixed."""

from __future__ import annotations

from pathlib import Path

from ep_comm.job.exits import UserError
from ep_comm.job.lock import InUse, lock

_LOCK_FILE = ".lock"
_held: dict[Path, int] = {}  # until this process ends


def lock_folder(folder: Path, flag: str) -> None:
    """Keep other runs out of a folder as long as this process lives.

    A file system without locks keeps nobody out.

    Args:
        folder: It exists.
        flag: What the user named it with.

    Raises:
        UserError: Another run is there.
    """
    if folder.resolve() in _held:
        return
    try:
        _held[folder.resolve()] = lock(folder / _LOCK_FILE)
    except InUse as holder:
        raise UserError(
            f"{flag} {folder} is in use by {holder}: wait for it, or choose another folder"
        ) from None
    except OSError:
        pass
