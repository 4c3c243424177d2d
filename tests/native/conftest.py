"""The CUDA library for tests, and setup.py, which builds it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import setuptools

from ep_comm import _native

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def setup_module(monkeypatch):
    """setup.py as a module, its call of setup() left out."""
    monkeypatch.setattr(setuptools, "setup", lambda **kwargs: None)
    spec = importlib.util.spec_from_file_location("ep_comm_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def nvcc(setup_module) -> Path:
    found = setup_module.find_nvcc()
    if found is None:
        pytest.skip("CUDA library NOT tested: no nvcc on this machine")
    return Path(found)


@pytest.fixture
def library(nvcc) -> _native.NativeLibrary:
    """The loaded library. Where there is nvcc, that it is not built is a failure."""
    loaded = _native.load()
    assert loaded is not None, _native.status()
    return loaded
