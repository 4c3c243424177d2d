"""The table of what to do: one source for the guide and for reports."""

from __future__ import annotations

from pathlib import Path

from ep_comm.markdown import with_tables
from ep_comm.telemetry.advice import TABLES

PAGE = Path(__file__).parents[2] / "docs" / "recorder.md"


def test_the_page_has_the_current_table():
    """If not: python -m ep_comm.telemetry.advice docs/recorder.md."""
    page = PAGE.read_text()
    assert "<!-- table: scalars -->" in page and with_tables(page, TABLES) == page


def test_an_old_table_is_replaced():
    page = PAGE.read_text()
    assert with_tables(page.replace("payload that left a rank", "weather"), TABLES) == page
