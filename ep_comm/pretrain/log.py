"""Where a run's numbers go: the screen, ``log.jsonl``, and Weights & Biases if asked for.

`ep_comm.pretrain.log_file` describes and reads ``log.jsonl``.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ep_comm.fault_file import FOLDER_VARIABLE
from ep_comm.job.exits import UserError
from ep_comm.job.files import take_folder
from ep_comm.job.start import agree, on_rank_0
from ep_comm.megatron.balance import COLUMNS, TABLE, LayerBalance
from ep_comm.pretrain.config import PretrainConfig
from ep_comm.pretrain.log_file import (
    BALANCE,
    LOG_FILE,
    TOKENS_PER_S,
    TRAIN_LOSS,
    VALID_LOSS,
    WARNING,
    read_log,
)


def announce(text: str) -> None:
    """Print what takes a while, before there is a `RunLog`; on rank 0."""
    if dist.get_rank() == 0:
        print(f"{text} ...", flush=True)


class RunLog:
    """Takes the same numbers on every rank; rank 0 prints and writes, the last rank runs W&B.

    Use it in a ``with`` statement: it finishes all outputs, also those of a run that fails.
    """

    def __init__(
        self, config: PretrainConfig, versions: dict[str, str], *, first_iteration: int
    ) -> None:
        self._config = config
        on_rank_0(lambda: take_folder(config.log_dir, "--run-dir"))
        os.environ.setdefault(FOLDER_VARIABLE, str(config.log_dir / "faults"))
        start = {
            "type": "start",
            "iteration": first_iteration,
            "dispatcher": config.moe_token_dispatcher,
            "processes": dist.get_world_size(),
            "versions": versions,
            "config": config.model_dump(mode="json"),
        }
        earlier: list[dict[str, Any]] = []
        if config.wandb_project:
            earlier = on_rank_0(lambda: _earlier_records(config, first_iteration))
            start["wandb_run_id"] = on_rank_0(lambda: _wandb_run_id(earlier))
        self._file = self._screen = self._wandb = None
        if dist.get_rank() == 0:
            self._file = _open_log(config.log_dir / LOG_FILE)
            self._screen = _Screen(config, first_iteration)
            self._write(start)
        if config.wandb_project and _is_last_rank():
            self._wandb = _WandB(config, start, earlier)

    def message(self, text: str) -> None:
        """Print a line, on rank 0."""
        if self._screen:
            self._screen.line(text)

    def warning(self, iteration: int, text: str) -> None:
        """Record a warning, and print it so that it is not overlooked, on rank 0."""
        self._write({"type": WARNING, "iteration": iteration, "text": text})
        self.message(f"{'*' * 80}\nWARNING: {text}\n{'*' * 80}")

    def train(self, iteration: int, scalars: dict[str, float]) -> None:
        """Record one training step."""
        self._write({"type": "train", "iteration": iteration, **scalars})
        if self._screen:
            self._screen.step(iteration, scalars, is_shown=self._is_shown(iteration))
        if self._wandb:
            self._wandb.log(iteration, scalars)

    def balance(self, iteration: int, layers: Iterable[LayerBalance]) -> None:
        """Record how tokens were spread in a step, where the screen has a line of it too."""
        if not self._is_shown(iteration):
            return
        rows = [{**layer.row(), "tokens": layer.tokens} for layer in layers]
        self._write({"type": BALANCE, "iteration": iteration, "layers": rows})
        if self._wandb:
            self._wandb.table(iteration, rows)

    def _is_shown(self, iteration: int) -> bool:
        config = self._config
        return iteration % config.log_interval == 0 or iteration == config.train_iters

    def valid(self, iteration: int, loss: float) -> None:
        """Record one validation."""
        scalars = {VALID_LOSS: loss}
        self._write({"type": "valid", "iteration": iteration, **scalars})
        self.message(f"step {iteration}: validation loss {loss:.6f}")
        if self._wandb:
            self._wandb.log(iteration, scalars)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        self.message(f"log: {self._config.log_dir / LOG_FILE}")
        if self._screen:
            self._screen.close()
        if self._file:
            self._file.close()
        if self._wandb:
            self._wandb.close(failed=error_type is not None)

    def _write(self, record: dict[str, Any]) -> None:
        if self._file:
            self._file.write(json.dumps(record) + "\n")


def check_wandb(config: PretrainConfig) -> None:
    """Refuse W&B logging that cannot work; call it on all ranks.

    Raises:
        UserError: The client is not installed, or its folder cannot be written.
    """
    if config.wandb_project:
        agree(lambda: _check_wandb(config) if _is_last_rank() else None)


def _check_wandb(config: PretrainConfig) -> None:
    try:
        from wandb import init  # noqa: F401  (a folder ./wandb of old runs can be imported too)
    except ImportError:
        raise UserError(
            "--wandb-project needs the W&B client: pip install 'ep_comm[wandb]', or leave "
            "--wandb-project out"
        ) from None
    # Where it cannot write, the client would log to a temporary folder.
    folder = _wandb_dir(config) / "wandb"
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        problem = "cannot be written" if existing.is_dir() else "is no folder"
        raise UserError(
            f"W&B's folder {folder} cannot be used: {existing} {problem}; "
            f"--wandb-save-dir chooses another"
        )


def _wandb_dir(config: PretrainConfig) -> Path:
    return config.wandb_save_dir or config.log_dir


def _earlier_records(config: PretrainConfig, first_iteration: int) -> list[dict[str, Any]]:
    """Return what the log tells of the run that is resumed after `first_iteration`."""
    log = config.log_dir / LOG_FILE
    if first_iteration == 0 or not log.exists():
        return []
    return [record for record in read_log(log) if record["iteration"] <= first_iteration]


def _wandb_run_id(earlier: list[dict[str, Any]]) -> str:
    """Return the W&B run that a resumed run goes on with, if its log names one; else a new one."""
    ids = [record["wandb_run_id"] for record in earlier if "wandb_run_id" in record]
    return os.environ.get("WANDB_RUN_ID") or (ids[-1] if ids else secrets.token_hex(4))


def _is_last_rank() -> bool:
    return dist.get_rank() == dist.get_world_size() - 1


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

    def step(self, iteration: int, scalars: dict[str, float], *, is_shown: bool) -> None:
        loss = scalars[TRAIN_LOSS]
        speed = f"{scalars[TOKENS_PER_S]:,.0f} tokens/s"
        status = f"loss {loss:.4f}  {speed}"
        if "mfu" in scalars:
            speed += f"  {scalars['throughput']:.0f} TFLOP/s/GPU  MFU {scalars['mfu']:.1%}"
        self._progress.update(self._task, completed=iteration, status=status + _tails(scalars))
        if not is_shown:
            return
        ep = "  ".join(
            f"{name.removeprefix('ep/')} {value:.2f}"
            for name, value in scalars.items()
            if name.startswith("ep/")
        )
        self.line(
            f"step {iteration}/{self._config.train_iters}  loss {loss:.6f}  "
            f"grad-norm {scalars['grad-norm']:.3f}  lr {scalars['learning-rate']:.2e}  "
            f"{scalars['iteration-time'] * 1e3:.0f} ms  {speed}  {ep}".rstrip()
        )

    def close(self) -> None:
        self._progress.stop()


def _tails(scalars: dict[str, float]) -> str:
    """Return the tails of a step's operations and its slowest rank, where they are known."""
    if "ep/dispatch-ms-p99" not in scalars:
        return ""
    p99s = "/".join(f"{scalars[f'ep/{op}-ms-p99']:.3g}" for op in ("dispatch", "combine"))
    rank = scalars.get("ep/slowest-rank", -1)
    slowest = f"  slowest rank {rank:.0f}" if rank >= 0 else ""
    return f"  dispatch/combine p99 {p99s} ms{slowest}"


class _WandB:
    """Weights & Biases through its client; whatever fails there costs a warning, not the run.

    The client buffers: of a run that is killed, an offline file has little or nothing. So a
    resumed run logs `earlier` steps again, those that W&B does not have, and the latest offline
    file has the whole run.
    """

    def __init__(
        self, config: PretrainConfig, start: dict[str, Any], earlier: list[dict[str, Any]]
    ) -> None:
        self._run: Any = None
        with self._failing_costs_a_warning():
            self._run = self._start(config, start)
            for record in earlier:
                if record["type"] == BALANCE:
                    self.table(record["iteration"], record["layers"])
                elif record["type"] in ("train", "valid"):
                    values = {k: v for k, v in record.items() if k not in ("type", "iteration")}
                    self.log(record["iteration"], values)

    @staticmethod
    def _start(config: PretrainConfig, start: dict[str, Any]) -> Any:
        """Start a run: online if a key is configured and the server answers, else offline."""
        import wandb

        folder = _wandb_dir(config)
        folder.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("WANDB_SILENT", "true")

        def init(mode: Literal["offline"] | None) -> Any:
            return wandb.init(
                project=config.wandb_project,
                name=config.wandb_exp_name or config.log_dir.name,
                entity=config.wandb_entity,
                id=start["wandb_run_id"],
                resume="allow",
                dir=folder,
                # As Megatron-LM has it: every argument a key of its own.
                config={
                    **start["config"],
                    "world_size": start["processes"],
                    "versions": start["versions"],
                },
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

    def table(self, iteration: int, rows: list[dict[str, Any]]) -> None:
        """Log how tokens were spread in a step, a line a layer."""
        with self._failing_costs_a_warning():
            import wandb

            data = [[row[name] for name in COLUMNS] for row in rows]
            self.log(iteration, {TABLE: wandb.Table(columns=list(COLUMNS), data=data)})

    def log(self, iteration: int, scalars: dict[str, Any]) -> None:
        with self._failing_costs_a_warning():
            # A run that was resumed online has steps already, and takes none of them twice.
            if self._run is not None and iteration >= self._run.step:
                self._run.log(scalars, step=iteration)

    def close(self, *, failed: bool) -> None:
        run = self._run
        if run is None:
            return
        with self._failing_costs_a_warning():
            run.finish(exit_code=int(failed))
        if run.offline:
            print(f"W&B run, offline; to upload it: wandb sync {Path(run.dir).parent}", flush=True)

    @contextmanager
    def _failing_costs_a_warning(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the client's failures have no common type
            self._run = None
            text = " ".join(str(error).split())
            print(f"warning: no more W&B logging, training goes on: {text}", file=sys.stderr)
