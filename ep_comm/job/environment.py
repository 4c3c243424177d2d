"""Versions and devices, as ``bench.json`` keeps them and ``ep-comm doctor`` shows them."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.distributed as dist

from ep_comm.version import __version__

NOT_INSTALLED = "not installed"


def versions() -> dict[str, str]:
    """Return the version of everything that matters here, or `NOT_INSTALLED`."""
    return {
        "ep_comm": __version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda or NOT_INSTALLED,
        "NCCL": _nccl_version(),
        "megatron-core": _package_version("megatron-core"),
        "transformer-engine": _package_version("transformer-engine"),
    }


def gpu_names() -> list[str]:
    """Return the names of this machine's GPUs."""
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def commit() -> str | None:
    """Return ``git describe`` of the source that runs; None where it is in no repository."""
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--tags"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


def _nccl_version() -> str:
    if not dist.is_nccl_available():
        return NOT_INSTALLED
    return ".".join(str(part) for part in torch.cuda.nccl.version())


def _package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return NOT_INSTALLED
