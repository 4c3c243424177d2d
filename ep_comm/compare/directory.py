"""The folder of a comparison: what it was begun with, and that only one command uses it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from ep_comm.compare.plan import Plan
from ep_comm.job.exits import UserError
from ep_comm.job.files import lock, write_json
from ep_comm.pretrain.log_file import LOG_FILE, read_log

PLAN_FILE = "plan.json"
_LOCK_FILE = "lock"


class Directory:
    """Paths of a comparison.

    Attributes:
        path: The folder.
        group: W&B group of its runs.
    """

    def __init__(self, path: Path, plan: Plan) -> None:
        """Begin a comparison here, or go on with it; hold `locked` meanwhile.

        Raises:
            UserError: Another comparison was begun here.
        """
        self.path = path
        here = plan.identity
        there = self._read_plan()
        if there is not None and self._has_losses():
            differences = [
                f"{key} is {there['begun_with'].get(key)} there and {here.get(key)} here"
                for key in here | there["begun_with"]
                if here.get(key) != there["begun_with"].get(key)
            ]
            if differences:
                raise UserError(
                    f"{path} holds another comparison: {'; '.join(differences)}. Choose another "
                    f"--out, or delete it"
                )
            self.group = there["group"]
            return
        date = datetime.now().strftime("%Y%m%d-%H%M%S")
        name = f"compare-{plan.config.stem}-{date}"
        self.group = os.environ.get("WANDB_RUN_GROUP", name)
        write_json(path / PLAN_FILE, {"group": self.group, "begun_with": here})

    def run_dir(self, variant: str) -> Path:
        """Return the folder of one run's logs and checkpoints."""
        return self.path / variant

    def log(self, variant: str) -> list[dict[str, Any]]:
        """Return the records of one run so far; none if it was not begun."""
        path = self.run_dir(variant) / LOG_FILE
        return read_log(path) if path.exists() else []

    def _has_losses(self) -> bool:
        logs = self.path.glob(f"*/{LOG_FILE}")
        return any(r["type"] == "train" for log in logs for r in read_log(log))

    def _read_plan(self) -> dict[str, Any] | None:
        path = self.path / PLAN_FILE
        try:
            plan = json.loads(path.read_text())
            plan["begun_with"], plan["group"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} cannot be read: {error}") from None
        return plan


@contextmanager
def locked(path: Path) -> Iterator[int]:
    """Make the folder if need be, and be the only one to use it.

    Yields:
        A file descriptor. Processes that inherit it keep the folder locked too.

    Raises:
        UserError: It cannot be used: it is in use, holds other things or cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        strangers = [file.name for file in path.iterdir() if file.name != _LOCK_FILE]
        if strangers and not (path / PLAN_FILE).exists():
            raise UserError(f"--out {path} holds other things ({min(strangers)})")
        descriptor = lock(path / _LOCK_FILE, f"--out {path}")
    except OSError as error:
        raise UserError(f"--out {path} cannot be used: {error.strerror}") from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)
