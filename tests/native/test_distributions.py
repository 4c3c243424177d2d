"""What is in the sdist and in the wheel, and what they say of themselves."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("configs", "csrc", "docs", "ep_comm", "examples", "scripts", "tests")
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md")
NOT_SOURCES = shutil.ignore_patterns("*.so", "__pycache__", ".*")

# An nvcc that makes an empty library.
NVCC = """#!/bin/sh
case "$*" in *--dryrun*) exit 0 ;; esac
while [ $# -gt 0 ]; do case $1 in -o) : > "$2" ;; esac; shift; done
"""


def build(what: str, source: Path, into: Path, cuda_home: Path) -> Path:
    code = f"from setuptools import build_meta; build_meta.build_{what}({str(into)!r})"
    env = {**os.environ, "CUDA_HOME": str(cuda_home), "EP_COMM_NVSHMEM_HOME": "none"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=source, env=env, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    (built,) = into.iterdir()
    return built


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout's sources, without what was built in it."""
    folder = tmp_path_factory.mktemp("tree")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=NOT_SOURCES)
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    (folder / "tests" / "native" / "__pycache__").mkdir()
    (folder / "tests" / "native" / "__pycache__" / "test.pyc").touch()
    return folder


@pytest.fixture(scope="module")
def distributions(tree, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist of `tree`, and the wheel that is built from that sdist."""
    folder = tmp_path_factory.mktemp("distributions")
    nvcc = folder / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    sdist = build("sdist", tree, folder / "sdist", folder / "cuda")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return sdist, build("wheel", unpacked, folder / "wheel", folder / "cuda")


def files_of(tree: Path, *folders: str) -> set[str]:
    paths = (path for folder in folders for path in (tree / folder).rglob("*"))
    return {str(path.relative_to(tree)) for path in paths if path.is_file()}


def test_the_sdist_has_all_sources_and_all_tests(tree, distributions):
    with tarfile.open(distributions[0]) as archive:
        names = {member.name.split("/", 1)[-1] for member in archive if member.isfile()}
    expected = {name for name in files_of(tree, *FOLDERS) if not name.endswith(".pyc")}
    assert expected | set(FILES) <= names, (expected | set(FILES)) - names
    added = {name for name in names - expected - set(FILES) if ".egg-info/" not in name}
    assert added <= {"PKG-INFO", "setup.cfg"}


def test_the_wheel_has_the_package_and_no_tests(tree, distributions):
    names = set(zipfile.ZipFile(distributions[1]).namelist())
    expected = files_of(tree, "ep_comm") | {"ep_comm/_native/libep_comm.so"}
    # What `compare` and `bench train` are given: setup.py puts it into the package.
    expected |= {f"ep_comm/pretrain/{name}" for name in files_of(tree, "configs")}
    assert expected <= names, expected - names
    added = names - expected
    assert {name.split("/")[0].rpartition(".")[-1] for name in added} == {"dist-info"}, added


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode())


def test_what_the_wheel_says_of_itself(distributions):
    said = metadata(distributions[1])
    assert said["Description-Content-Type"] == "text/markdown"
    assert said.get_payload().strip() == (ROOT / "README.md").read_text().strip()
    assert said["Keywords"] and said["License-Expression"] == "Apache-2.0"
    assert "Operating System :: POSIX :: Linux" in said.get_all("Classifier")
    assert "-py3-none-linux_" in distributions[1].name  # for any Python, not any machine
