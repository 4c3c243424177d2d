"""Markdown: tables, and pages with tables that are made from the code."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

Tables = Mapping[str, Callable[[], list[str]]]  # what makes each table, by its name


def table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, of_numbers: bool = False
) -> list[str]:
    """Return the lines of a table.

    Args:
        columns: Their names.
        rows: A cell is shown as `str` has it, and None as a dash.
        of_numbers: Whether all columns but the first are numbers, which stand to the right.
    """
    rule = "---:" if of_numbers else "---"
    header = columns, ["---", *[rule] * (len(columns) - 1)]
    return [f"| {' | '.join(map(_escaped, cells))} |" for cells in (*header, *rows)]


def with_tables(page: str, tables: Tables) -> str:
    """Return the text of a page with its tables made anew.

    Each stands between the comments ``<!-- table: NAME -->`` and ``<!-- end -->``.

    Raises:
        KeyError: The page has a place for a table that there is not.
    """
    return re.sub(
        r"(?<=<!-- table: )(\w+) -->\n.*?<!-- end -->",
        lambda found: "\n".join([f"{found[1]} -->", *tables[found[1]](), "<!-- end -->"]),
        page,
        flags=re.DOTALL,
    )


def renew_page(tables: Tables) -> None:
    """Make the tables of the page anew that the command line names."""
    path = Path(sys.argv[1])
    path.write_text(with_tables(path.read_text(), tables))


def _escaped(cell: object) -> str:
    return "–" if cell is None else str(cell).replace("|", "\\|")
