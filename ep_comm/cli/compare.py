"""What ``ep-comm compare`` does, from the checked plan to the exit code."""

from __future__ import annotations

import functools
import shlex
import sys
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ep_comm.compare.directory import Directory, locked
from ep_comm.compare.plan import Plan
from ep_comm.compare.progress import Display
from ep_comm.compare.report import PAGE, write_report
from ep_comm.compare.runs import (
    Interrupted,
    RunFailed,
    discard_checkpoints,
    interruptible,
    is_finished,
    last_step,
    train,
)
from ep_comm.compare.statistics import Tolerances, read_run
from ep_comm.job.exits import UserError

PASSED, RUN_FAILED, OUTSIDE_TOLERANCES = 0, 1, 3  # 2: a user's error


def compare(plan: Plan, out: Path, tolerances: Tolerances, console: Console) -> int:
    """Train what is not trained yet, and report.

    Args:
        plan: What to compare.
        out: Folder of the report, the logs and, until a run is finished, its checkpoints.
        tolerances: What a variant may differ by.
        console: Where progress and outcome are shown.

    Returns:
        Exit code: `PASSED`, `RUN_FAILED`, `OUTSIDE_TOLERANCES`, or 128 and the number of the
        signal that interrupted it.

    Raises:
        UserError: `out` is in use, or holds another comparison; there is no data to train with.
    """
    with locked(out) as lock:
        directory = Directory(out, plan)
        asked = (*plan.variants, *plan.skipped)
        finished = {name for name in asked if is_finished(directory.log(name), plan)}
        plan = plan.with_trained(finished & plan.skipped.keys())
        left = [name for name in plan.variants if name not in finished]
        if left and plan.missing_data:
            raise UserError(
                f"data_path {plan.missing_data[0]}: no such file, and {left[0]} is still to be "
                "trained"
            )
        for note in plan.notes:
            console.print(note)
        for name, reason in plan.skipped.items():
            console.print(f"{name} is skipped: {reason}")
        try:
            with interruptible(), Display(console, plan) as display:
                for variant in plan.variants:
                    if variant in left:
                        display.begin(variant, last_step(directory, variant))
                        follow = functools.partial(display.follow, variant)
                        train(plan, directory, variant, lock, follow)
                    discard_checkpoints(directory, variant)
                    display.finish(variant, before=variant in finished)
        except Interrupted as interrupt:
            console.print(f"interrupted ({interrupt}): the same command goes on from here")
            return 128 + interrupt.signum
        except RunFailed as failure:
            print(f"error: {variant} {failure}", file=sys.stderr)
            return RUN_FAILED
        runs = {name: read_run(directory.log(name), plan.steps) for name in plan.variants}
        document = write_report(plan, directory, runs, tolerances)
    console.print(_table(document), soft_wrap=False)
    _say_where(plan, directory, console)
    return OUTSIDE_TOLERANCES if document["passed"] is False else PASSED


def _table(document: dict[str, Any]) -> Table:
    # It fits into 80 columns, with names like ep_comm-fp8-experts-seed2.
    table = Table(title=document["title"], box=box.SIMPLE_HEAD, collapse_padding=True)
    table.add_column("variant", no_wrap=True)
    for name in ("train\nloss", "valid.\nloss", "largest\n|Δ|", "mean\n|Δ|", "tokens\n/s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", min_width=10, overflow="fold")
    for name, variant in document["variants"].items():
        found, valid = variant["difference"], variant["final_valid_loss"]
        table.add_row(
            name,
            f"{variant['final_train_loss']:.4f}",
            "–" if valid is None else f"{valid:.4f}",
            "–" if found is None else f"{found['largest']:.1e}",
            "–" if found is None else f"{found['mean']:.1e}",
            f"{variant['tokens_per_s'] / 1e3:.3g}k",
            variant["verdict"],
        )
    return table


def _say_where(plan: Plan, directory: Directory, console: Console) -> None:
    """Say where the report is, and how its W&B runs are uploaded."""
    console.print(f"report: {directory.path / PAGE}; for a pull request: report.md there")
    if not plan.settings["wandb_project"]:
        return
    offline = [folder for name in plan.variants for folder in _offline_run(plan, directory, name)]
    if offline:
        console.print(f"W&B runs, offline; to upload them:\nwandb sync {shlex.join(offline)}")
    else:
        console.print(f"W&B: project {plan.settings['wandb_project']}, group {directory.group}")


def _offline_run(plan: Plan, directory: Directory, variant: str) -> list[str]:
    """Return the folder of a variant's W&B run if that is offline; the latest has all steps."""
    ids = [r["wandb_run_id"] for r in directory.log(variant) if "wandb_run_id" in r]
    parent = Path(plan.settings["wandb_save_dir"] or directory.run_dir(variant)) / "wandb"
    return sorted(map(str, parent.glob(f"offline-run-*-{ids[-1]}")))[-1:] if ids else []
