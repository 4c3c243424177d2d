"""Shared set-up: ids, and markers that skip loudly. The path is set in pyproject.toml."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from ids import id_of
from shared_gpu import shared

# Tests make buffers fail, and each leaves a file.
os.environ.setdefault("EP_COMM_FAULTS", tempfile.mkdtemp(prefix="ep_comm-tests-"))

COMPILE = ("emulation", "softnic")  # folders of tests that share what they have compiled
SLURM = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults-json", type=Path, help="write here what came of each fault by force")
    parser.addoption(
        "--share-gpu",
        type=int,
        metavar="N",
        help="let one GPU pass for N (shared_gpu.py)",
    )


def pytest_configure(config: pytest.Config) -> None:
    if num_gpus := config.getoption("--share-gpu"):
        stack = contextlib.ExitStack()
        stack.enter_context(shared(num_gpus, config.getoption("numprocesses", None) or 1))
        config.add_cleanup(stack.close)


def pytest_make_parametrize_id(val: object, argname: str) -> str:
    return id_of(argname, val)


@pytest.hookimpl(tryfirst=True)  # or pytest-xdist has looked for groups before
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    num_gpus = torch.cuda.device_count()
    # Debian puts daemons where not every user's PATH leads.
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    no_slurm = [program for program in SLURM if shutil.which(program, path=path) is None]
    for item in items:
        # With --dist loadgroup a process has all tests of a file, and of a folder that compiles.
        shares = item.path.parent if item.path.parent.name in COMPILE else item.path
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(shares.stem))
        if "slurm" in item.keywords and no_slurm:
            skip(item, f"needs {', '.join(no_slurm)} (scripts/slurm/local_cluster.sh install)")
        needed = 2 if "multi_gpu" in item.keywords else 1 if "gpu" in item.keywords else 0
        if num_gpus < needed:
            # Not always what the machine has: there are builds of torch without CUDA.
            skip(item, f"needs {needed} GPU(s), torch {torch.__version__} sees {num_gpus}")
        if "own_gpus" in item.keywords and item.config.getoption("--share-gpu"):
            skip(item, "needs GPUs that are not parts of one")


def skip(item: pytest.Item, reason: str) -> None:
    """Skip `item` for this reason, whatever the test's own conditions are."""
    item.add_marker(pytest.mark.skipif(True, reason=reason), append=False)
