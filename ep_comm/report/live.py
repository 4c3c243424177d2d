"""A run in a terminal, while it is going."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ep_comm.job.exits import UserError
from ep_comm.pretrain.log_file import TOKENS_PER_S, TRAIN_LOSS
from ep_comm.report.findings import Finding, find
from ep_comm.report.run import Run, read

_INTERVAL_S = 2.0
_REST = 10  # a long log is read less often: so many times the seconds of reading lie between
_LAST_STEPS = 8
_SILENT = 10  # typical steps, and at least so many seconds, without a new one
# Column, scalar, how it is written, and what it is multiplied with.
_COLUMNS: tuple[tuple[str, str, str, float], ...] = (
    ("loss", TRAIN_LOSS, ".4f", 1),
    ("grad\nnorm", "grad-norm", ".3g", 1),
    ("ms", "iteration-time", ",.0f", 1e3),
    ("tokens/s", TOKENS_PER_S, ",.0f", 1),
    ("MFU", "mfu", ".1%", 1),
    ("dispatch\np99, ms", "ep/dispatch-ms-p99", ".3g", 1),
    ("combine\np99, ms", "ep/combine-ms-p99", ".3g", 1),
    ("waits", "ep/wait-share", ".0%", 1),
    ("slowest\nrank", "ep/slowest-rank", ".0f", 1),
    ("fullest\nrank", "ep/imbalance-rank", ".2f", 1),
)


def watch(folder: Path, console: Console) -> None:
    """Show a run until it has trained its last step, or until Ctrl-C.

    Where the console is no terminal it is shown once.

    Raises:
        UserError: There is no such folder; or, shown once, there is no step in it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder")
    if not console.is_terminal:
        console.print(view(read(folder), time.time()))
        return
    with Live(console=console, auto_refresh=False) as live:
        try:
            while True:
                begin = time.monotonic()
                shown, is_finished = _look(folder)
                live.update(shown, refresh=True)
                if is_finished:
                    return
                time.sleep(max(_INTERVAL_S, _REST * (time.monotonic() - begin)))
        except KeyboardInterrupt:
            return


def view(run: Run, now: float) -> RenderableType:
    """Return what is shown of a run.

    Args:
        run: As it is.
        now: Seconds of the epoch.
    """
    return Group(_heading(run, now), _table(run), *map(_line, find(run)))


def _look(folder: Path) -> tuple[RenderableType, bool]:
    try:
        run = read(folder)
    except UserError as error:  # it begins only now
        return Text(f"waiting: {error} (Ctrl-C: leave)", style="dim"), False
    return view(run, time.time()), run.is_finished


def _heading(run: Run, now: float) -> Text:
    text = Text(f"{run.name}: ", style="bold")
    text.append(run.progress, style="not bold")
    step_s = run.steady("iteration-time").last(0.2).median
    if run.is_finished:
        return text.append(", finished", style="green")
    if run.asked_steps and step_s == step_s:
        text.append(f", {_duration((run.asked_steps - run.steps) * step_s)} left", style="not bold")
    silent_s = now - run.written.timestamp()
    if silent_s > max(_SILENT, _SILENT * step_s):
        who = run.user or "no process that we see is at it"
        text.append(f"; nothing new for {_duration(silent_s)}: {who}", style="bold red")
    return text


def _table(run: Run) -> Table:
    steps = run.last_steps(_LAST_STEPS)
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("step", justify="right", no_wrap=True)
    columns = [column for column in _COLUMNS if any(column[1] in step for step in steps)]
    for name, *_ in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for step in steps:
        cells = [_cell(step, name, form, scale) for _, name, form, scale in columns]
        table.add_row(str(step["iteration"]), *cells)
    return table


def _cell(step: dict[str, Any], name: str, form: str, scale: float) -> str:
    value = step.get(name)
    if value is None or (name == "ep/slowest-rank" and value < 0):
        return "–"
    return format(scale * value, form)


def _line(finding: Finding) -> Text:
    style = {"bad": "bold red", "look": "yellow"}.get(finding.level, "dim")
    return Text.assemble(("* ", style), finding.text)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"
