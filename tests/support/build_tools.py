"""Compilers and what looks into libraries; setup.py with an nvcc of the test's own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from setuptools.dist import Distribution


def tool(name: str, nvcc: Path | None = None) -> str:
    folders = [str(nvcc.resolve().parent)] if nvcc else []
    # Where nvidia-cuda-cuobjdump puts it, which is among the packages for tests.
    folders += [f"{path}/nvidia/cu13/bin" for path in sys.path if Path(path).is_dir()]
    found = shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))
    if found is None:
        pytest.skip(f"no {name} on this machine")
    return found


def output_of(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def build_command(setup_module, build_lib: Path):
    command = setup_module.BuildNative(Distribution({"ext_modules": [setup_module.LIBRARY]}))
    command.build_lib = str(build_lib)
    command.ensure_finalized()
    return command


def fake_nvcc(monkeypatch, home: Path, script: str) -> None:
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\n{script}\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(home))
