"""Shared set-up: markers that skip loudly, and the tests' own modules on the path."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    num_gpus = torch.cuda.device_count()
    for item in items:
        needed = 2 if "multi_gpu" in item.keywords else 1 if "gpu" in item.keywords else 0
        if num_gpus < needed:
            item.add_marker(
                pytest.mark.skip(reason=f"needs {needed} GPU(s), this machine has {num_gpus}")
            )
