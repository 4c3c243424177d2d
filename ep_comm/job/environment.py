"""Versions and devices, as ``bench.json`` keeps them and ``ep-comm doctor`` shows them."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ep_comm.version import __version__

NOT_INSTALLED = "not installed"


def surroundings() -> dict[str, Any]:
    """Return what every report says of its run: when, by which command, with what, and where."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command_line(),
        "commit": commit(),
        "versions": versions(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def command_line() -> str:
    """Return the command as a user types it: ``ep-comm`` where it runs as a module too."""
    program, *arguments = sys.argv
    if Path(program).parts[-2:] == ("cli", "__main__.py"):
        program = "ep-comm"
    return shlex.join([program, *arguments])


def versions() -> dict[str, str]:
    """Return the version of everything that matters here, or `NOT_INSTALLED`."""
    has_nccl = dist.is_nccl_available()
    return {
        "ep_comm": __version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda or NOT_INSTALLED,
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())) if has_nccl else NOT_INSTALLED,
        "megatron-core": package_version("megatron-core"),
        "transformer-engine": package_version("transformer-engine"),
    }


def commit() -> str | None:
    """Return ``git describe`` of the source that runs; None where it is in no repository."""
    command = ["git", "describe", "--always", "--dirty", "--tags"]
    return output_of(command, Path(__file__).parent).strip() or None


def output_of(command: Sequence[str], folder: Path | None = None) -> str:
    """Return what a short command prints; nothing where it is missing or hangs."""
    try:
        return subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=10
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def package_version(name: str) -> str:
    """Return the version of an installed package, or `NOT_INSTALLED`."""
    try:
        return version(name)
    except PackageNotFoundError:
        return NOT_INSTALLED
