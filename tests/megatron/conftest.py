"""The launcher's script, and an end for the processes that have Megatron's groups."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from launch_runs import make_script
from ranks import stop_pool


@pytest.fixture(scope="module", autouse=True)
def megatron_processes() -> Iterator[None]:
    """Megatron's many groups have threads that poll: not beside the tests of other modules."""
    yield
    for pool in ("megatron", "megatron-gpu", "launch", "without-megatron"):
        stop_pool(pool)


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_script(tmp_path_factory.mktemp("clone"))
