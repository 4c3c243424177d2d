"""What the pages of docs/results/ are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

from ep_comm import markdown

Document = dict[str, Any]
Cell = str | float | None


@dataclass(frozen=True)
class Table:
    """Columns and rows. A cell is text, a number that is shown as it is, or None."""

    columns: list[str]
    rows: list[list[Cell]]

    def __str__(self) -> str:
        """As Markdown, without the columns that are empty; the first one left, the others right."""
        kept = [
            i
            for i in range(len(self.columns))
            if i == 0 or any(row[i] is not None for row in self.rows)
        ]
        columns, *rows = [[line[i] for i in kept] for line in (self.columns, *self.rows)]
        return "\n".join(markdown.table([str(name) for name in columns], rows, of_numbers=True))


@dataclass(frozen=True)
class Section:
    """One file on a page: its name without .json, what was run, and the figures."""

    name: str
    title: str
    tables: list[Table]
    document: Document


@dataclass(frozen=True)
class Page:
    """A generated page: which files it takes, and what it shows of each."""

    name: str
    title: str
    introduction: str
    takes: Callable[[Document], bool]
    tables: Callable[[Document], list[Table]]


def median_or_none(samples: list[float]) -> float | None:
    """The median; None of no samples."""
    return median(samples) if samples else None
