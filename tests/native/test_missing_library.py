"""Where the CUDA library is not there: the message says why, and a machine with GPUs hears it."""

from __future__ import annotations

import sys

import pytest
import torch

from ep_comm import _native


@pytest.fixture(autouse=True)
def fresh_loader():
    _native._load.cache_clear()
    yield
    _native._load.cache_clear()


def test_a_source_tree_that_hides_an_installed_package_says_so(monkeypatch, tmp_path):
    tree, site = tmp_path / "tree", tmp_path / "site"
    installed = site / "ep_comm" / "_native" / "libep_comm.so"
    installed.parent.mkdir(parents=True)
    installed.touch()
    (site / "ep_comm" / "__init__.py").touch()
    (tree / "ep_comm").mkdir(parents=True)
    (tree / "ep_comm" / "__init__.py").touch()
    library = tree / "ep_comm" / "_native" / "libep_comm.so"
    monkeypatch.setattr(_native, "PACKAGE", tree / "ep_comm")
    monkeypatch.setattr(_native, "LIBRARY_PATH", library)
    monkeypatch.setattr(sys, "path", [str(tree), str(site)])
    assert _native.status() == (
        f"{library} was not built: this is the source tree in {tree}; the installed package is in "
        f"{site}/ep_comm. Run from elsewhere, or pip install -e {tree}."
    )
    installed.unlink()  # there it was not built either
    _native._load.cache_clear()
    assert "(no nvcc at install time); the reference backend is what is left" in _native.status()


@pytest.mark.parametrize("has_gpu", [True, False])
def test_a_machine_with_gpus_is_told_at_first_use(monkeypatch, tmp_path, recwarn, has_gpu):
    monkeypatch.setattr(_native, "LIBRARY_PATH", tmp_path / "libep_comm.so")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert _native.load() is None and _native.load() is None
    told = ["runs without its CUDA library" in str(warning.message) for warning in recwarn]
    assert told == ([True] if has_gpu else [])
