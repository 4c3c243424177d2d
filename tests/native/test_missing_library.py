"""Where the CUDA library is not there: the message says why, and a machine with GPUs hears it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ep_comm import _native


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A source tree in which nothing was built, and beside it "site", where something was."""
    without_libraries = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(_native.PACKAGE, tmp_path / "tree" / "ep_comm", ignore=without_libraries)
    installed = tmp_path / "site" / "ep_comm"
    (installed / "_native").mkdir(parents=True)
    (installed / "__init__.py").touch()
    (installed / "_native" / "libep_comm.so").touch()
    return tmp_path / "tree"


def status_in(tree: Path) -> str:
    code = "from ep_comm import _native; print(_native.status())"
    path = os.pathsep.join([str(tree), str(tree.parent / "site")])
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": path},
        check=True,
        capture_output=True,
        text=True,
    )
    return result.stdout.strip()


def test_a_source_tree_that_hides_an_installed_package_says_so(tree):
    site = tree.parent / "site"
    assert status_in(tree) == (
        f"{tree}/ep_comm/_native/libep_comm.so was not built: this is the source tree in {tree}; "
        f"the installed package is in {site}/ep_comm. Run from elsewhere, or pip install -e {tree}."
    )
    (site / "ep_comm" / "_native" / "libep_comm.so").unlink()  # there it was not built either
    assert "(no nvcc at install time); the reference backend is what is left" in status_in(tree)


@pytest.mark.parametrize("has_gpu", [True, False])
def test_a_machine_with_gpus_is_told_at_first_use(monkeypatch, tmp_path, recwarn, has_gpu):
    monkeypatch.setattr(_native, "LIBRARY_PATH", tmp_path / "libep_comm.so")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    _native._load.cache_clear()
    try:
        assert _native.load() is None and _native.load() is None
    finally:
        _native._load.cache_clear()
    told = ["runs without its CUDA library" in str(warning.message) for warning in recwarn]
    assert told == ([True] if has_gpu else [])
