"""An installed wheel, far from the checkout: its commands, its configurations, a comparison."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("megatron.core")
pytest.importorskip("pydantic")
pytest.importorskip("setuptools", minversion="77")

from example_runs import ROOT, environment  # noqa: E402
from made_up_log import write_run  # noqa: E402

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's content. It is built from a copy of the sources, without nvcc."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    not_sources = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("ep_comm", "configs", "csrc"):
        shutil.copytree(ROOT / name, source / name, ignore=not_sources)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    hidden = (ROOT / "setup.py").read_text().replace('"/usr/local/cuda"', '"/nowhere"')
    (source / "setup.py").write_text(hidden)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source)]
    bare = {**os.environ, "CUDA_HOME": "/nowhere", "PATH": "/nowhere"}
    subprocess.run(build, cwd=folder, env=bare, check=True, capture_output=True)
    (wheel,) = folder.glob("*-none-any.whl")
    install = [*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    return folder / "site"


def ep_comm(site: Path, *arguments: object) -> subprocess.CompletedProcess:
    """Run the command in the wheel's parent folder, where no checkout is in sight."""
    return subprocess.run(
        [sys.executable, "-m", "ep_comm.cli", *map(str, arguments)],
        cwd=site.parent,
        env={**environment(), "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_the_wheel_is_what_runs(site):
    code = """if True:
        from ep_comm.pretrain import config_files
        print(config_files.__file__, config_files.find_config(config_files.Path("tiny-cpu")))
    """
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=site.parent,
        env={**environment(), "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    package = site / "ep_comm" / "pretrain"
    expected = [str(package / "config_files.py"), str(package / "configs" / "tiny-cpu.yaml")]
    assert result.stdout.split() == expected, result.stderr


def test_bench_train_is_there(site):
    result = ep_comm(site, "bench", "train", "--help")
    assert result.returncode == 0 and "--variants" in result.stdout
    result = ep_comm(site, "bench", "train", "--config", "configs/tiny-cpu.yaml")
    assert result.returncode == 2 and "start it with torchrun" in result.stderr


def test_a_report_has_its_template(site):
    folder = write_run(site.parent / "run", 20)
    result = ep_comm(site, "report", folder)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "<svg" in (folder / "report.html").read_text()


def test_compare_with_a_shipped_configuration(site):
    flags = ("--config", "configs/tiny-cpu.yaml", "--steps", 2, "--eval-iters", 1)
    result = ep_comm(site, "compare", *flags, "--variants", "alltoall,deepep")
    assert result.returncode == 0, result.stdout + result.stderr
    (report,) = site.parent.glob("runs/*/report.json")
    assert json.loads(report.read_text())["steps"] == 2
