"""Scripts, layers and copies of Megatron that the launcher refuses by name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from example_runs import ROOT, assert_refused, environment
from launch_runs import need_megatron, run
from ranks import run_ranks

from ep_comm.job.exits import UserError
from ep_comm.megatron.launch import main as launch
from ep_comm.megatron.versions import SUPPORTED, is_supported

need_megatron()


def test_what_layers_refuse_ends_all_ranks_with_one_line(script, tmp_path):
    result = run(
        script, "--moe-token-dispatcher", "deepep", "--ep-fp8-dispatch", "--save", tmp_path
    )
    assert_refused(result, "hidden 32 is not a multiple")
    assert "when instantiating" not in result.output  # Megatron's addition
    assert not list(tmp_path.iterdir())


def test_other_scripts_may_neither_step_nor_end(script):
    other = script.with_name("other.py")
    other.write_text(
        "import torch\n"
        "try:\n"
        "    torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]).step()\n"
        "except Exception as error:\n"
        "    print('no step:', error)\n"
    )
    process = subprocess.run(
        [sys.executable, "-m", "ep_comm.megatron.launch", other, "--moe-token-dispatcher=deepep"],
        env=environment(),
        capture_output=True,
        text=True,
    )
    message = f"{other} never called Megatron's argument parser"
    assert f"no step: {message}" in process.stdout
    assert process.returncode == 2
    (line,) = (line for line in process.stderr.splitlines() if line.startswith("error: "))
    assert message in line and "Traceback" not in process.stderr


def test_a_missing_script_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["launch", str(tmp_path / "pretrain.py"), "--lr", "1"])
    with pytest.raises(SystemExit) as exit:
        launch.main()
    assert exit.value.code == 2
    assert f"error: there is no script {tmp_path}" in capsys.readouterr().err


def make_clone(folder: Path, *packages: str, version: str = "0.19.0") -> Path:
    for package in packages:
        (folder / "megatron" / package).mkdir(parents=True)
        (folder / "megatron" / package / "__init__.py").touch()
        info = f"__version__ = {version!r}\n"
        (folder / "megatron" / package / "package_info.py").write_text(info)
    return folder


def check_megatron(rank: int, path: tuple[Path, ...], pythonpath: tuple[Path, ...]) -> str:
    """The version that a script in ``path[0]`` finds, or why it is refused."""
    saved = list(sys.path)
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, pythonpath))
    sys.path[:] = [str(folder) for folder in (*path[:1], *pythonpath, *path[1:])]
    try:
        return launch._check_megatron(path[0] / "pretrain.py")
    except UserError as error:
        return str(error)
    finally:
        sys.path[:] = saved
        del os.environ["PYTHONPATH"]
        sys.modules.pop("megatron", None)


def test_exactly_one_whole_megatron_of_a_known_version_is_accepted(tmp_path):
    both = ("core", "training")
    clone = make_clone(tmp_path / "clone", *both, version="0.20.0rc1+git")
    other = make_clone(tmp_path / "other", *both)
    wheel = make_clone(tmp_path / "wheel", "core")
    training = make_clone(tmp_path / "training", "training")
    old = make_clone(tmp_path / "old", *both, version="0.15.3")
    new = make_clone(tmp_path / "new", *both, version="0.21.0")
    tools = tmp_path / "tools"

    def check(*path: Path, pythonpath: tuple[Path, ...] = ()) -> str:
        (answer,) = run_ranks(1, check_megatron, path, pythonpath, pool="without-megatron")
        return answer

    assert check(clone) == check(clone, wheel) == check(clone, pythonpath=(clone,))
    assert check(clone) == check(tools, pythonpath=(clone,)) == "0.20.0rc1+git"
    assert "there is no megatron.core" in check(tools)
    assert "there is no megatron.training" in check(wheel)
    for unknown, version in ((old, "0.15.3"), (new, "0.21.0")):
        assert f"Megatron {version} in {unknown / 'megatron'} is not supported" in check(unknown)
    assert ">=0.16.1,<0.21" in check(old)
    mixed = check(training, wheel)
    assert "two copies of megatron are mixed" in mixed
    assert str(wheel) in mixed and str(training) in mixed
    elsewhere = check(clone, pythonpath=(other,))
    assert f"PYTHONPATH names {other}" in elsewhere and str(clone) in elsewhere


def test_the_supported_range_is_the_one_that_is_installed():
    assert f'"megatron-core{SUPPORTED}"' in (ROOT / "pyproject.toml").read_text()
    assert f"megatron-core `{SUPPORTED}`" in (ROOT / "docs" / "megatron.md").read_text()
    assert [is_supported(v) for v in ("0.16.0", "0.16.1", "0.19.2", "0.20.0.dev1", "0.21.0")] == [
        False, True, True, True, False,
    ]  # fmt: skip
