"""Faults of whole training runs: each ends in good order, and says what to do."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("megatron.core")
pytest.importorskip("pydantic")

from example_runs import (  # noqa: E402
    EXAMPLES,
    NEW,
    SMALL,
    assert_refused,
    environment,
    losses,
    pretrain,
    torchrun,
    train,
    wait_for_step,
)
from free_port import free_port
from ranks import RankFailure, run_ranks  # noqa: E402

from ep_comm.job.stop import EXIT_CODE  # noqa: E402

pytestmark = pytest.mark.e2e
LATEST = "latest_checkpointed_iteration.txt"
VICTIM = 1


# ---- Signals -----------------------------------------------------------------------------------


def signalled(rank: int, flags: list[str], signum: int) -> int:
    """Train; one rank gets the signal in its second step. Returns the exit code."""
    from ep_comm.pretrain.start import prepare_megatron

    prepare_megatron()
    from ep_comm.pretrain import loop

    original, steps = loop.train_step, iter(range(1, 100))

    def train_step(*args):
        if next(steps) == 2 and rank == VICTIM:
            os.kill(os.getpid(), signum)
        return original(*args)

    loop.train_step = train_step
    with pytest.raises(SystemExit) as caught:
        pretrain(rank, flags)
    return caught.value.code


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGHUP"])
def test_a_signal_to_one_rank_saves_and_ends_all(name, tmp_path):
    save = tmp_path / "save"
    flags = [*SMALL, "--train-iters", "50", "--save", save, "--run-dir", tmp_path / "run"]
    words = [str(flag) for flag in flags]
    codes = run_ranks(2, signalled, words, getattr(signal, name), **NEW)
    assert codes == [EXIT_CODE, EXIT_CODE]
    assert (save / LATEST).read_text() == "2\n"


# ---- The disk ----------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Has room for one checkpoint of 9 MiB, not for two."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=13m", "tmpfs", disk])
    if made.returncode:
        pytest.skip("needs root, to mount a small disk")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_keeps_the_checkpoint_before(small_disk, tmp_path):
    save = small_disk / "save"
    flags = [*SMALL, "--train-iters", "3", "--save", save, "--run-dir", tmp_path / "run"]
    result = torchrun(*flags, "--save-interval", "1")
    assert_refused(result, f"--save {save} cannot be written: ", "0 of 13 MiB are free there")
    assert (save / LATEST).read_text() == "1\n"
    assert sorted(path.name for path in save.glob("iter_*")) == ["iter_0000001"]
    assert len(losses(tmp_path / "run")) == 2
    shutil.copytree(save, tmp_path / "roomy")  # from where the run goes on
    load = ["--load", tmp_path / "roomy", "--train-iters", "2"]
    assert list(train(tmp_path / "again", *SMALL, *load)) == [2]


@pytest.mark.parametrize("damaged", [".metadata", "__0_0.distcp", "common.pt"])
@pytest.mark.parametrize("how", ["cut", "overwritten", "missing"])
def test_a_damaged_file_of_a_checkpoint(damaged, how, tmp_path, checkpoint):
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    path = copy / "iter_0000001" / damaged
    content = path.read_bytes()
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "overwritten":
        path.write_bytes(os.urandom(1000) + content[1000:])
    else:
        path.unlink()
    with pytest.raises(RankFailure) as failure:
        train(tmp_path / "run", *SMALL, "--train-iters", "2", "--load", copy)
    error = f"ep_comm.job.exits.UserError: checkpoint {path.parent} cannot be read: "
    assert str(failure.value).count(error) == 2, failure.value  # on both ranks
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    train(folder / "run", *SMALL, "--train-iters", "1", "--save", folder / "save")
    return folder / "save"


# ---- Ranks that fail, or differ ----------------------------------------------------------------

# One rank fails in the forward pass of its third step.
FAILING = f"""if __name__ == "__main__":
    import os, signal, sys
    sys.path.insert(0, {str(EXAMPLES)!r})
    import torch
    from ep_comm.megatron import cpu
    cpu.enable()
    from megatron.core.transformer.moe.experts import SequentialMLP
    forward, calls = SequentialMLP.forward, iter(range(100))
    def failing(self, *args):
        if next(calls) == 2 and os.environ["RANK"] == "{VICTIM}":
            if os.environ["HOW"] == "raises":
                raise ValueError("an expert of this rank")
            if os.environ["HOW"] == "memory":
                torch.empty(2**50, dtype=torch.uint8)
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(self, *args)
    SequentialMLP.forward = failing
    from pretrain_moe import main
    main()
"""


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("raises", "ValueError: an expert of this rank"),
        ("memory", "can't allocate memory"),
        ("killed", "Signal 9 (SIGKILL)"),
    ],
)
def test_a_rank_that_fails_in_its_forward_ends_the_run(how, words, tmp_path, monkeypatch):
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    monkeypatch.setenv("HOW", how)
    flags = [*SMALL, "--train-iters", "9", "--moe-token-dispatcher", "ep_comm"]
    result = torchrun(*flags, "--ep-timeout", "5", "--run-dir", tmp_path / "run", script=script)
    assert result.code == 1 and words in result.output, result.output
    root = result.output.partition("Root Cause (first observed failure)")[2]
    assert f"rank      : {VICTIM} " in root, result.output
    assert 1 <= len(losses(tmp_path / "run")) < 9
    assert not left_of(str(script))


DIFFERS = f"""if __name__ == "__main__":
    import os, sys
    sys.path.insert(0, {str(EXAMPLES)!r})
    own = "alltoall" if os.environ["RANK"] == "{VICTIM}" else "ep_comm"
    sys.argv += ["--moe-token-dispatcher", own]
    from pretrain_moe import main
    main()
"""


def test_a_rank_with_another_dispatcher_is_named(tmp_path):
    script = tmp_path / "differs.py"
    script.write_text(DIFFERS)
    flags = [*SMALL, "--train-iters", "2", "--ep-timeout", "5", "--run-dir", tmp_path / "run"]
    result = torchrun(*flags, script=script)
    assert result.code == 1
    assert f"rank 0 waited 5 s for rank {VICTIM} (phase: make a Buffer)" in result.output
    assert not left_of(str(script))


# ---- Two jobs with one port --------------------------------------------------------------------


def tasks(port: int, step: int, flags: list[object]) -> list[subprocess.Popen]:
    """What ``srun --ntasks=2`` starts."""
    found = []
    for rank in range(2):
        slurm = {
            "SLURM_JOB_ID": "70123", "SLURM_STEP_ID": step, "SLURM_PROCID": rank,
            "SLURM_LOCALID": rank, "SLURM_NODEID": 0, "SLURM_STEP_NUM_NODES": 1,
            "SLURM_STEP_NUM_TASKS": 2, "SLURM_STEP_TASKS_PER_NODE": "2", "MASTER_PORT": port,
        }  # fmt: skip
        found.append(
            subprocess.Popen(
                [sys.executable, EXAMPLES / "pretrain_moe.py", *map(str, flags)],
                env={**environment(), **{name: str(value) for name, value in slurm.items()}},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return found


def test_a_second_job_on_a_port_leaves_the_first_alone(tmp_path):
    port = free_port()
    flags = [*SMALL, "--run-dir"]
    first = tasks(port, 0, [*flags, tmp_path / "first", "--train-iters", 150])
    with ended(first):
        wait_for_step(tmp_path / "first", 1)
        second = tasks(port, 1, [*flags, tmp_path / "second", "--train-iters", 2])
        with ended(second):
            outputs = [process.communicate(timeout=120)[0] for process in second]
        assert [process.returncode for process in second] == [2, 2], outputs
        assert f"error: cannot meet at MASTER_PORT {port} of localhost: " in outputs[0]
        assert (
            f"MASTER_PORT {port} of localhost belongs to step 0 of SLURM's job 70123, and this is "
            "step 1 of SLURM's job 70123: give this job another MASTER_PORT"
        ) in outputs[1]
        outputs = [process.communicate(timeout=240)[0] for process in first]
        assert [process.returncode for process in first] == [0, 0], outputs
    assert len(losses(tmp_path / "first")) == 150 and not (tmp_path / "second").exists()


@contextlib.contextmanager
def ended(processes: list[subprocess.Popen]) -> Iterator[None]:
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def left_of(word: str) -> list[str]:
    """Command lines of processes that have this word."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if word in line:
                found.append(line)
    return found
