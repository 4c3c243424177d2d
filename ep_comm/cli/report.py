"""``ep-comm report``: one page about a run, or about two."""

from __future__ import annotations

import shlex
from itertools import chain
from pathlib import Path

from rich.console import Console

from ep_comm.job.exits import UserError
from ep_comm.job.files import write_text
from ep_comm.report.findings import find_all
from ep_comm.report.page import render
from ep_comm.report.run import read


def report(folders: list[Path], out: Path | None, console: Console) -> None:
    """Write the page; print its findings, and where it is.

    Args:
        folders: Of one run or two.
        out: The file; None: in the first folder.
        console: Where to print.

    Raises:
        UserError: A folder has no run, or the page cannot be written.
    """
    runs = [read(folder) for folder in folders]
    if len(runs) > 1 and runs[0].name == runs[1].name:
        runs = [run.named(str(run.folder)) for run in runs]
    other = f"-{folders[1].resolve().name}" if len(folders) > 1 else ""
    path = out or folders[0] / f"report{other}.html"
    command = ["ep-comm", "report", *map(str, folders), *(["--out", str(out)] if out else [])]
    found = find_all(runs)
    page = render(runs, found, shlex.join(command))
    try:
        write_text(path, page)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror}; --out names another"
        ) from None
    for run in runs:
        console.print(f"{run.name}: {run.state}", highlight=False, markup=False)
    for each in chain.from_iterable(found):
        console.print(f"* {each.text}", highlight=False, markup=False)
    console.print(f"written to {path}", highlight=False, markup=False)
