"""What a rank leaves on disk when its buffer fails: its last operations, for ``ep-comm explain``.

The folder is ``EP_COMM_FAULTS``; where that is not set, one of the user's own under the system's
temporary files.
"""

from __future__ import annotations

import logging
import math
import os
import re
import socket
import stat
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from ep_comm.backends.base import Backend
from ep_comm.errors import EPMismatchError, EPTimeoutError
from ep_comm.job.files import write_json
from ep_comm.job.store import store_errors
from ep_comm.telemetry.explain import FORMAT
from ep_comm.telemetry.records import OpRecord

FOLDER_VARIABLE = "EP_COMM_FAULTS"
NUM_OPERATIONS = 200
# A GPU that does not come to rest keeps its records.
_READ_S = 5.0

_RUN = re.compile("[0-9a-f]{16}")

_log = logging.getLogger("ep_comm")


class Identity(NamedTuple):
    """Whose operations they are; files of a fault have the same run and buffer.

    Attributes:
        run: Of the job, drawn at random.
        buffer: Name of the buffer, the same on its ranks.
        rank: In the buffer's group.
        num_ranks: Of the group.
    """

    run: str
    buffer: str
    rank: int
    num_ranks: int


def run_name(store: dist.Store, rank: int) -> str:
    """Return the job's name, for an `Identity`; the first rank that asks draws it.

    Args:
        store: Of the job.
        rank: This process's, for an error.

    Raises:
        EPMismatchError: What the store has is no such name.
        EPStateError: The store is gone.
    """
    with store_errors(rank, "it asked for the run's name"):
        said = store.compare_set("ep_comm/run", "", os.urandom(8).hex())
    run = said.decode(errors="replace") if isinstance(said, bytes) else said
    if not _RUN.fullmatch(run):  # it becomes part of a file's name
        raise EPMismatchError(f"another rank says that the run's name is {run!r}")
    return run


def leave(identity: Identity, backend: Backend, error: BaseException) -> Path | None:
    """Write this rank's last operations; None, and a warning, where that fails.

    Args:
        identity: This rank's.
        backend: It has failed.
        error: What it failed with.
    """
    try:
        folder = _folder()
        name = f"{identity.run}-{identity.buffer.rpartition('/')[2]}-rank{identity.rank}.json"
        path = folder / name
        write_json(path, _document(identity, backend, error))
    except Exception as failure:  # the fault itself is what the caller has to hear of
        _log.warning("cannot keep the last operations of rank %d: %s", identity.rank, failure)
        return None
    return path


def _folder() -> Path:
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        folder = Path(named)
        folder.mkdir(parents=True, exist_ok=True)
        return folder.resolve()
    folder = Path(tempfile.gettempdir()) / f"ep_comm-faults-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise OSError(f"{folder} is not a folder that only this user can write to")
    return folder


def _document(identity: Identity, backend: Backend, error: BaseException) -> dict[str, Any]:
    now = time.monotonic()
    late = error.late_ranks if isinstance(error, EPTimeoutError) else ()
    # Whoever interrupts the process does not want to wait for its GPU.
    records = _read_records(backend) if isinstance(error, Exception) else None
    return {
        "format": FORMAT,
        **identity._asdict(),
        "host": socket.gethostname(),
        "process": os.getpid(),
        "backend": backend.describe(),
        "time": time.time(),
        "error": {
            "type": type(error).__name__,
            "text": str(error),
            "late_ranks": list(late),
            "op": getattr(error, "op", None),
            "epoch": getattr(error, "epoch", None),
            "phase": getattr(error, "phase", None),
            "waited_s": getattr(error, "timeout_s", None),
        },
        "operations": None if records is None else _operations(records, now),
    }


def _read_records(backend: Backend) -> list[OpRecord] | None:
    """Return the last records; None where the GPU does not come to rest, or has failed itself."""
    found: list[list[OpRecord]] = []

    def read() -> None:
        recorder = backend.recorder
        try:
            found.append(recorder.since(max(0, recorder.num_operations - NUM_OPERATIONS)))
        except RuntimeError as error:
            _log.warning("cannot read the records of the last operations: %s", error)

    reader = threading.Thread(target=read, name="ep_comm records", daemon=True)
    reader.start()
    reader.join(_READ_S)
    return found[0] if found else None


def _operations(records: Iterable[OpRecord], now: float) -> list[dict[str, Any]]:
    """Return what is known of operations, oldest first.

    A GPU's record of one that did not end is empty, or still that of one long before.
    """
    last: Counter[str] = Counter()
    found = []
    for record in records:
        is_done = record.epoch > last[record.op]
        last[record.op] = record.epoch if is_done else last[record.op] + 1
        found.append(
            {
                "op": record.op,
                "epoch": last[record.op],
                "place": record.place,
                "is_backward": record.is_backward,
                "called_ago_s": _number(now - record.called_s),
                "seconds": _number(record.seconds) if is_done else None,
                "rows_to_rank": list(record.rows_to_rank) if is_done else [],
                "rows_from_rank": list(record.rows_from_rank) if is_done else [],
                "wait_s_by_rank": [_number(wait) for wait in record.wait_s_by_rank if is_done],
            }
        )
    return found


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
