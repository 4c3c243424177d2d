"""Where a run's numbers go: the screen, ``log.jsonl``, and Weights & Biases if asked for.

``log.jsonl`` has one JSON object a line, floats in full precision:

- ``{"type": "start", "iteration": i, "config": ..., "versions": ..., ...}`` whenever the run is
  started or resumed after step i; it makes any earlier records beyond step i void;
- ``{"type": "train", "iteration": i, "lm loss": ..., ...}`` for each step;
- ``{"type": "valid", "iteration": i, "lm loss validation": ...}`` for each validation.

Names are Megatron-LM's. ``throughput`` is tokens per second over all ranks (Megatron's is TFLOP/s
per GPU), ``iteration-time`` seconds, ``ep/*`` what `ep_comm.megatron.MoEMeter` says.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from moe_config import PretrainConfig
from moe_launch import UserError, on_rank_0
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LOG_FILE = "log.jsonl"


class RunLog:
    """Takes the same numbers on every rank; rank 0 prints and writes, the last rank runs W&B.

    Use it in a ``with`` statement: it finishes all outputs, also those of a run that fails.
    """

    def __init__(
        self, config: PretrainConfig, versions: dict[str, str], *, first_iteration: int
    ) -> None:
        self._config = config
        on_rank_0(lambda: _make_run_dir(config.run_dir))
        start = {
            "type": "start",
            "iteration": first_iteration,
            "dispatcher": config.moe_token_dispatcher,
            "processes": dist.get_world_size(),
            "versions": versions,
            "config": config.model_dump(mode="json"),
        }
        self._file = self._screen = self._wandb = None
        if dist.get_rank() == 0:
            self._file = _open_log(config.run_dir / LOG_FILE)
            self._screen = _Screen(config, first_iteration)
            self._write(start)
        if config.wandb_project and dist.get_rank() == dist.get_world_size() - 1:
            self._wandb = _WandB(config, start)

    def message(self, text: str) -> None:
        """Print a line, on rank 0."""
        if self._screen:
            self._screen.line(text)

    def train(self, iteration: int, scalars: dict[str, float]) -> None:
        """Record one training step."""
        self._write({"type": "train", "iteration": iteration, **scalars})
        if self._screen:
            self._screen.step(iteration, scalars)
        if self._wandb:
            self._wandb.log(iteration, scalars)

    def valid(self, iteration: int, loss: float) -> None:
        """Record one validation."""
        scalars = {"lm loss validation": loss}
        self._write({"type": "valid", "iteration": iteration, **scalars})
        self.message(f"step {iteration}: validation loss {loss:.6f}")
        if self._wandb:
            self._wandb.log(iteration, scalars)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        self.message(f"log: {self._config.run_dir / LOG_FILE}")
        if self._screen:
            self._screen.close()
        if self._file:
            self._file.close()
        if self._wandb:
            self._wandb.close(failed=error_type is not None)

    def _write(self, record: dict[str, Any]) -> None:
        if self._file:
            self._file.write(json.dumps(record) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The valid records of a ``log.jsonl``, in order of their steps.

    Raises:
        OSError: It cannot be read.
    """
    records: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # the run was killed while it wrote this line
        if record["type"] == "start":
            records = [r for r in records if r["iteration"] <= record["iteration"]]
            if record["iteration"] == 0:
                records = []
        records.append(record)
    return records


def _make_run_dir(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create --run-dir {run_dir}: {error.strerror}") from None


def _open_log(path: Path) -> Any:
    unfinished = path.exists() and not path.read_bytes().endswith(b"\n")
    file = path.open("a", encoding="utf-8", buffering=1)  # whole lines reach the disk at once
    if unfinished:
        file.write("\n")
    return file


class _Screen:
    """A progress bar on a terminal, plain lines elsewhere."""

    def __init__(self, config: PretrainConfig, first_iteration: int) -> None:
        self._config = config
        self._console = Console(highlight=False, soft_wrap=True)
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task(
            "training", total=config.train_iters, completed=first_iteration, status=""
        )
        self._progress.start()

    def line(self, text: str) -> None:
        self._console.print(text, markup=False)

    def step(self, iteration: int, scalars: dict[str, float]) -> None:
        loss, rate = scalars["lm loss"], scalars["throughput"]
        status = f"loss {loss:.4f}  {rate:,.0f} tokens/s"
        self._progress.update(self._task, completed=iteration, status=status)
        if iteration % self._config.log_interval and iteration != self._config.train_iters:
            return
        ep = "  ".join(
            f"{name.removeprefix('ep/')} {value:.2f}"
            for name, value in scalars.items()
            if name.startswith("ep/")
        )
        self.line(
            f"step {iteration}/{self._config.train_iters}  loss {loss:.6f}  "
            f"grad-norm {scalars['grad-norm']:.3f}  lr {scalars['learning-rate']:.2e}  "
            f"{scalars['iteration-time'] * 1e3:.0f} ms  {rate:,.0f} tokens/s  {ep}".rstrip()
        )

    def close(self) -> None:
        self._progress.stop()


class _WandB:
    """Weights & Biases through its client; whatever fails there costs a warning, not the run."""

    def __init__(self, config: PretrainConfig, start: dict[str, Any]) -> None:
        self._run = None
        try:
            self._run = self._start(config, start)
        except Exception as error:  # the client's failures have no common type
            self._warn(error)

    @staticmethod
    def _start(config: PretrainConfig, start: dict[str, Any]) -> Any:
        """A run that is online if a key is configured and the server answers, else offline."""
        import wandb

        folder = config.wandb_save_dir or config.run_dir
        folder.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("WANDB_SILENT", "true")

        def init(mode: str | None) -> Any:
            return wandb.init(
                project=config.wandb_project,
                name=config.wandb_exp_name or config.run_dir.name,
                entity=config.wandb_entity,
                dir=folder,
                config=start,
                mode=mode,
                settings=wandb.Settings(init_timeout=30),
            )

        try:
            if "WANDB_MODE" in os.environ or wandb.login(prompt=False):
                return init(None)
        except Exception as error:
            text = " ".join(str(error).split())
            print(f"warning: W&B does not answer, logging offline: {text}", file=sys.stderr)
        return init("offline")

    def log(self, iteration: int, scalars: dict[str, float]) -> None:
        self._call(lambda: self._run.log(scalars, step=iteration))

    def close(self, *, failed: bool) -> None:
        self._call(lambda: self._run.finish(exit_code=int(failed)))

    def _call(self, action: Any) -> None:
        if self._run is None:
            return
        try:
            action()
        except Exception as error:
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        self._run = None
        text = " ".join(str(error).split())
        print(f"warning: no more W&B logging, training goes on: {text}", file=sys.stderr)
