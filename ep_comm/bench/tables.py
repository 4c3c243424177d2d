"""Tables of reports on the screen, and their cells."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table


def screen_table(title: str, columns: Iterable[str], title_style: str = "bold") -> Table:
    """Return an empty table: names in the first column, numbers in all others.

    Args:
        title: Above the table.
        columns: Their names.
        title_style: As rich takes it.
    """
    first, *others = columns
    table = Table(title=title, title_style=title_style)
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def number(value: float | None, form: str) -> str | None:
    """Return a number as `format` has it; None of None."""
    return None if value is None else format(value, form)


def sms_name(num_sms: int | None) -> str:
    """Return an SM count as tables have it: 0 is all, and None a dash."""
    return "-" if num_sms is None else str(num_sms or "all")


def case_with_sms(case: str, num_sms: int | None) -> str:
    """Return an operation with its SM count, as progress is told."""
    return case if num_sms is None else f"{case}, {sms_name(num_sms)} SMs"
