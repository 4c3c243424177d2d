"""What a benchmark prints, as a page: the same tables, the same notes."""

from __future__ import annotations

from pathlib import Path

from rich.console import Group
from rich.table import Table as ScreenTable
from rich.text import Text as ScreenText

from ep_comm.job.environment import surroundings
from ep_comm.job.files import write_text
from ep_comm.report.document import (
    Block,
    Code,
    Finding,
    Findings,
    Items,
    Line,
    Page,
    Section,
    Table,
    Text,
    to_html,
)


def write_page(shown: Group, title: str, path: Path) -> None:
    """Write the page of a benchmark.

    Args:
        shown: What is printed: tables, and notes behind them.
        title: Of the page.
        path: The file.
    """
    write_text(path, to_html(make_page(shown, title, path.parent)))


def make_page(shown: Group, title: str, folder: Path) -> Page:
    """Return the page of what is printed, which has at least one table.

    A table whose title is red has figures that do not count: the page begins with that.
    """
    before: list[Block] = []
    sections: list[tuple[str, list[Block]]] = []
    doubtful: list[Finding] = []
    for part in shown.renderables:
        if isinstance(part, ScreenTable):
            heading = str(part.title or "Figures")
            if "red" in str(part.title_style):
                doubtful.append(Finding("bad", heading, "", f"part-{len(sections) + 1}"))
            sections.append((heading, [_table(part, heading)]))
        elif isinstance(part, ScreenText) and part.plain:
            lines = part.plain.splitlines()
            to = sections[-1][1] if sections else before
            to.append(Items(lines) if len(lines) > 1 else Text(part.plain))
    if doubtful:
        before.insert(0, Findings(doubtful))
    if before:
        sections[0][1][:0] = before
    machine = surroundings()
    where = ", ".join(machine["gpus"][:1]) or "CPU"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return Page(
        title=title,
        tool="ep-comm bench",
        lines=[Line(f"{machine['date']}; {where}; {versions}.")],
        sections=[
            *(
                Section(f"part-{i}", heading, parts)
                for i, (heading, parts) in enumerate(sections, 1)
            ),
            Section("command", "Command", [Code(machine["command"])]),
        ],
        sources=[folder],
        command=machine["command"],
    )


def _table(shown: ScreenTable, label: str) -> Table:
    columns = [str(column.header) for column in shown.columns]
    rows = zip(*(map(str, column.cells) for column in shown.columns), strict=True)
    return Table(columns, [list(row) for row in rows], label)
