"""``ep-comm explain``: who was late, from the files that ranks leave when a buffer fails."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from ep_comm.job.exits import UserError
from ep_comm.telemetry.explain import (
    Document,
    ExplainError,
    RankStory,
    newest_fault,
    read_document,
    tell,
)


def explain(files: list[Path], console: Console) -> None:
    """Print what the files tell: a table of the ranks, and who was late in words.

    Raises:
        UserError: A file cannot be read, or they do not belong together.
    """
    try:
        story = tell(document for file in files for document in _documents_of(file, console))
    except (ExplainError, OSError) as error:
        raise UserError(str(error)) from None
    table = Table(title=f"{len(story.ranks)} of {story.num_ranks} ranks")
    for name in ("rank", "host", "last complete operation", "ended", "waited for", "in", "error"):
        table.add_column(name)
    for rank, told in story.ranks.items():
        table.add_row(
            f"[bold red]{rank}[/]" if rank in story.culprits else str(rank),
            told.host,
            _last(told),
            "" if told.last_end_ago_s is None else f"{told.last_end_ago_s:.1f} s before",
            ", ".join(map(str, told.late_ranks)),
            told.waits_in,
            told.error["type"],
        )
    console.print(table)
    for sentence in story.sentences:
        console.print(sentence, markup=False, highlight=False)


def _last(told: RankStory) -> str:
    if told.operations is None:
        return "not known: the GPU could not be read"
    last = told.last
    return "none" if last is None else f"{last['op']} #{last['epoch']}"


def _documents_of(path: Path, console: Console) -> list[Document]:
    """Read a file, or those of a folder's last fault."""
    if not path.is_dir():
        return [read_document(path)]
    found, num_faults = newest_fault(map(read_document, sorted(path.glob("*-rank*.json"))))
    if not found:
        raise UserError(f"{path} has no files that ep_comm has left")
    if num_faults > 1:
        console.print(
            f"{path} has {num_faults} faults: this is the last one. Name the files of another.",
            markup=False,
            highlight=False,
        )
    return found
