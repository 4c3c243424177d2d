"""How far the trainings are, for the user: bars on a terminal, lines elsewhere."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ep_comm.compare.plan import Plan
from ep_comm.pretrain.log_file import TOKENS_PER_S, TRAIN_LOSS

_LINES = 10  # of a run, where there is no terminal


def _status(step: dict[str, Any]) -> str:
    return f"loss {step[TRAIN_LOSS]:.4f}  {step[TOKENS_PER_S]:,.0f} tokens/s"


class Display:
    """Bars or lines on a console without markup. Use it in a ``with`` statement."""

    def __init__(self, console: Console, plan: Plan) -> None:
        self._console, self._steps = console, plan.steps
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks = {
            name: self._progress.add_task(name, total=plan.steps, start=False, status="")
            for name in plan.variants
        }
        self._printed = 0

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, variant: str, step: int) -> None:
        """Show that a run starts, or goes on after `step`."""
        self._progress.start_task(self._tasks[variant])
        self._progress.update(self._tasks[variant], completed=step, status="starting")
        self._printed = step
        begins = "begins; its first step takes a while"
        self._console.print(
            f"{variant}: " + (f"going on, it had reached step {step}" if step else begins)
        )

    def follow(self, variant: str, records: list[dict[str, Any]]) -> None:
        """Show the latest training step. Lines are of the same steps for every run."""
        steps = [r for r in records if r["type"] == "train"]
        if not steps:
            return
        bar = self._tasks[variant]
        self._progress.update(bar, completed=steps[-1]["iteration"], status=_status(steps[-1]))
        if self._console.is_terminal:
            return
        interval = max(self._steps // _LINES, 1)
        for step in steps:
            done = step["iteration"]
            due = done % interval == 0 or done == self._steps
            if due and done > self._printed:
                self._printed = done
                self._console.print(f"{variant}: step {done}/{self._steps}  {_status(step)}")

    def finish(self, variant: str, *, before: bool) -> None:
        """Show that a run is finished, now or `before`."""
        self._progress.update(self._tasks[variant], completed=self._steps, status="finished")
        self._progress.stop_task(self._tasks[variant])
        if before:
            self._console.print(f"{variant}: finished before")
