"""Runs of examples/pretrain_moe.py: two processes, no GPU.

`torchrun` starts it as users do. `train` is for tests of what a run computes: it costs a third.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
CONFIGS = ROOT / "configs"
sys.path.insert(0, str(EXAMPLES))

from ranks import run_ranks  # noqa: E402

from ep_comm.pretrain.log_file import LOG_FILE, read_log  # noqa: E402

TINY = ["--config", str(CONFIGS / "tiny-cpu.yaml")]
TINY_STEPS = 30  # of its 60
# Smaller still, for tests that do not look at tiny-cpu's own losses. The decay is fixed, so that
# runs of different length share their first steps.
SMALL = [*TINY, "--num-layers", "1", "--seq-length", "64", "--micro-batch-size", "2"]
SMALL += ["--global-batch-size", "8", "--lr-decay-iters", "20", "--eval-iters", "1"]

NEW = dict(fresh=True, pool="training")  # of `run_ranks`: processes of a run's own, with Megatron


def environment() -> dict[str, str]:
    """No GPU, and no W&B settings of whoever runs the tests."""
    return {
        **{key: value for key, value in os.environ.items() if not key.startswith("WANDB")},
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }


def torchrun(
    *flags: object,
    processes: int = 2,
    timeout: float = 300,
    script: Path = EXAMPLES / "pretrain_moe.py",
    meanwhile: Callable[[subprocess.Popen], object] = lambda process: None,
) -> SimpleNamespace:
    """Run the example; returns its exit code, output and duration.

    `meanwhile` is called with torchrun's process as soon as that has been started.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(processes), str(script)]
    start = time.monotonic()
    process = subprocess.Popen(
        [*command, *map(str, flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
        start_new_session=True,  # so that a hanging run can be ended with all its processes
    )
    try:
        meanwhile(process)
        output, _ = process.communicate(timeout=timeout)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return SimpleNamespace(code=process.returncode, output=output, seconds=time.monotonic() - start)


def train(run_dir: Path, *flags: object, processes: int = 2) -> dict[int, float]:
    """Run the example to its end, in processes of its own; returns the loss of each step."""
    words = [str(flag) for flag in (*flags, "--run-dir", run_dir)]
    run_ranks(processes, pretrain, words, **NEW)
    return losses(run_dir)


def pretrain(rank: int, flags: list[str]) -> None:
    """What the example does once it has joined the job."""
    variables = environment()
    os.environ.clear()
    os.environ.update(variables)
    from ep_comm.pretrain.start import prepare_megatron

    prepare_megatron()
    from ep_comm.pretrain.flags import parse_args
    from ep_comm.pretrain.loop import pretrain as train_on_all_ranks

    train_on_all_ranks(parse_args(flags))


def refused(*flags: object, processes: int = 2) -> SimpleNamespace:
    """Run the example where it ends all ranks with one line; returns the line, and its output."""
    results = run_ranks(processes, end_of_pretrain, [str(flag) for flag in flags], **NEW)
    said = "".join(said for _, said, _ in results)
    assert [code for code, _, _ in results] == [2] * processes, said
    (error,) = re.findall(r"^error: .*$", said, flags=re.MULTILINE)
    assert "Traceback" not in said, said
    return SimpleNamespace(error=error, output="".join(output for _, _, output in results))


def end_of_pretrain(rank: int, flags: list[str]) -> tuple[object, str, str]:
    """Exit code, what it says to stderr, and to stdout."""
    from ep_comm.job.exits import user_errors_exit

    said, output = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(output):
        try:
            with user_errors_exit():
                pretrain(rank, flags)
        except SystemExit as end:
            return end.code, said.getvalue(), output.getvalue()
    return None, said.getvalue(), output.getvalue()


def losses(run_dir: Path) -> dict[int, float]:
    return {r["iteration"]: r["lm loss"] for r in records(run_dir, "train")}


def wait_for_step(run_dir: Path, step: int, *, timeout: float = 300) -> None:
    """Wait until the run has logged `step`."""
    end = time.monotonic() + timeout
    while not (run_dir / LOG_FILE).exists() or max(losses(run_dir), default=0) < step:
        assert time.monotonic() < end, f"no step {step} within {timeout} s"
        time.sleep(0.02)


def records(run_dir: Path, kind: str) -> list[dict]:
    return [r for r in read_log(run_dir / LOG_FILE) if r["type"] == kind]


def wandb_records(folder: Path) -> dict[str, list[dict]]:
    """Records of an offline W&B run by type, as the client's own reader prints them."""
    (path,) = folder.glob("run-*.wandb")
    output = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)],
        env={**environment(), "WANDB_ERROR_REPORTING": "false"},
        stdout=subprocess.PIPE,
        check=True,
    ).stdout
    found: dict[str, list[dict]] = defaultdict(list)
    for line in output.splitlines():
        record = json.loads(line)
        found[record["type"]].append(record[record["type"]])
    return found


def assert_refused(result: SimpleNamespace, *words: str) -> None:
    """One line that says what is wrong, exit code 2, soon, and no stack trace of ours.

    torchrun's own report of the failed ranks, which ends in a stack trace, may only follow.
    """
    assert result.code != 0
    ours, report = re.split(r"^.*failed \(exitcode", result.output, maxsplit=1, flags=re.MULTILINE)
    errors = re.findall(r"^error: .*$", ours, flags=re.MULTILINE)
    assert len(errors) == 1, result.output
    for word in words:
        assert word in errors[0]
    assert "Traceback" not in ours, result.output
    assert not re.search(r"^error: ", report, flags=re.MULTILINE), result.output
    assert str(ROOT / "ep_comm" / "pretrain") not in result.output  # no frame of a stack trace
    # torchrun lists the rank that ended first last, and ends those still running (-15, SIGTERM).
    *others, first = re.findall(r"exitcode\s*: (-?\d+)", report)
    assert first == "2" and set(others) <= {"2", "-15"}, result.output
    assert result.seconds < 120


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
