"""Shared set-up: markers that skip loudly, and the tests' own modules on the path."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
# Their modules import each other by name, also in processes of their own (`ranks`).
FOLDERS = [TESTS, *sorted({path.parent for path in TESTS.glob("*/test_*.py")})]
sys.path[:0] = [str(folder) for folder in FOLDERS]

from ids import id_of  # noqa: E402 - needs the path


def pytest_make_parametrize_id(val: object, argname: str) -> str:
    return id_of(argname, val)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    num_gpus = torch.cuda.device_count()
    # Debian puts daemons where not every user's PATH leads.
    slurm = shutil.which("slurmctld", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    for item in items:
        if "slurm" in item.keywords and slurm is None:
            reason = "needs slurmctld (scripts/slurm/local_cluster.sh install)"
            item.add_marker(pytest.mark.skip(reason=reason))
        needed = 2 if "multi_gpu" in item.keywords else 1 if "gpu" in item.keywords else 0
        if num_gpus < needed:
            item.add_marker(
                pytest.mark.skip(reason=f"needs {needed} GPU(s), this machine has {num_gpus}")
            )
