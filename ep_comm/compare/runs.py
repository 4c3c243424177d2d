"""Training the variants, one after another, as child processes that can be stopped and resumed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ep_comm.compare.directory import Directory
from ep_comm.compare.plan import Plan
from ep_comm.job.files import introduce
from ep_comm.pretrain.log_file import LOG_FILE, latest_iteration

OUTPUT_FILE = "output.log"
_POLL_S = 0.5
_GRACE_S = 90  # for a checkpoint on the way out; torchrun gives its processes 30 s of it
_LAST_LINES = 20
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Of whoever calls: they would make all runs one.
_WANDB_OF_ONE_RUN = ("WANDB_RUN_ID", "WANDB_NAME", "WANDB_RESUME")

Record = dict[str, Any]


class RunFailed(Exception):
    """A training ended before its last step. Carries the end of what it printed."""


class Interrupted(BaseException):
    """A signal asked the comparison to stop.

    Attributes:
        signum: The signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


@contextmanager
def interruptible() -> Iterator[None]:
    """Turn Ctrl-C, SIGTERM and a lost terminal into `Interrupted`."""

    def interrupt(signum: int, _: object) -> None:
        # Stopping takes a while, and is not itself to be interrupted.
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise Interrupted(signum)

    before = {each: signal.getsignal(each) for each in _SIGNALS}
    for each in _SIGNALS:
        signal.signal(each, interrupt)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def last_step(directory: Directory, variant: str) -> int:
    """Return the last step that a run to be resumed had trained; 0 without a checkpoint."""
    if latest_iteration(directory.run_dir(variant) / "checkpoints") is None:
        return 0
    steps = (r["iteration"] for r in directory.log(variant) if r["type"] == "train")
    return max(steps, default=0)


def is_finished(records: list[Record], plan: Plan) -> bool:
    """Return whether a run has trained its last step, and validated after it if it validates."""
    kind = "valid" if plan.settings["eval_iters"] else "train"
    return any(r["type"] == kind and r["iteration"] == plan.steps for r in records)


def train(
    plan: Plan,
    directory: Directory,
    variant: str,
    lock: int,
    follow: Callable[[list[Record]], None],
) -> None:
    """Train `variant` to its end, from its latest checkpoint if there is one.

    Args:
        plan: What is compared.
        directory: Where.
        variant: Which of it.
        lock: Descriptor of the folder's lock, which the training holds as long as it lives.
        follow: Given the run's records whenever there are new ones.

    Raises:
        RunFailed: It ended early.
        Interrupted: A signal came. The training was stopped.
    """
    run_dir = directory.run_dir(variant)
    run_dir.mkdir(exist_ok=True)
    checkpoints = run_dir / "checkpoints"
    if latest_iteration(checkpoints) is None:
        shutil.rmtree(checkpoints, ignore_errors=True)  # of a run killed before its first one
    command = plan.command(variant, run_dir, resume=checkpoints.exists())
    output = run_dir / OUTPUT_FILE
    with output.open("ab") as file:
        begin = file.tell()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=_environment(plan, directory, variant),
            start_new_session=True,  # Ctrl-C is for us, and we pass it on
            pass_fds=[lock],
        )
    try:
        introduce(lock, f"process {os.getpid()}, or by the training {process.pid} it started")
        size = 0
        while process.poll() is None:
            time.sleep(_POLL_S)
            size = _follow(directory, variant, follow, size)
    except BaseException:
        _stop(process)
        raise
    _follow(directory, variant, follow, size)
    if process.returncode or not is_finished(directory.log(variant), plan):
        raise RunFailed(_why(output, begin, process.returncode))


def discard_checkpoints(directory: Directory, variant: str) -> None:
    """Free the space that a finished run no longer needs."""
    shutil.rmtree(directory.run_dir(variant) / "checkpoints", ignore_errors=True)


def _follow(
    directory: Directory, variant: str, follow: Callable[[list[Record]], None], size: int
) -> int:
    """Show what the log has gained since it had `size` bytes; return its size."""
    path = directory.run_dir(variant) / LOG_FILE
    now = path.stat().st_size if path.exists() else 0
    if now != size:
        follow(directory.log(variant))
    return now


def _stop(process: subprocess.Popen) -> None:
    process.terminate()  # torchrun passes it on
    try:
        process.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _environment(plan: Plan, directory: Directory, variant: str) -> dict[str, str]:
    environment = {k: v for k, v in os.environ.items() if k not in _WANDB_OF_ONE_RUN}
    tags = [*filter(None, environment.get("WANDB_TAGS", "").split(",")), "compare", variant]
    environment["WANDB_TAGS"] = ",".join(tags)
    environment["WANDB_RUN_GROUP"] = directory.group
    environment.setdefault("WANDB_JOB_TYPE", "train")
    if plan.processes > 1:
        environment.setdefault("OMP_NUM_THREADS", "1")  # torchrun's default, without its warning
    return environment


def _why(output: Path, begin: int, code: int) -> str:
    """Return the run's own error if it printed one, else its last lines."""
    with output.open("rb") as file:
        file.seek(begin)
        lines = file.read().decode(errors="replace").splitlines()
    ours = [line for line in lines if line.startswith("error: ")]
    shown = ours or lines[-_LAST_LINES:]
    outcome = f"ended with code {code}" if code else "ended before its last step"
    return "\n".join([f"{outcome}; {output} has all it printed:", *shown])
