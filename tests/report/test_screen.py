"""The page of a benchmark: what it prints, cell by cell."""

from __future__ import annotations

import io
import re

import made_up_low_latency
import made_up_operations
import made_up_overlap
import made_up_train
import pytest
from html_page import Page
from rich.console import Console, Group
from rich.table import Table as ScreenTable

from ep_comm.bench.low_latency.report import render as render_low_latency
from ep_comm.bench.ops.report import render as render_ops
from ep_comm.bench.overlap.report import render as render_overlap
from ep_comm.bench.train.report import render as render_train
from ep_comm.report.document import to_html
from ep_comm.report.screen import make_page, write_page

SHOWN = {
    "ops": lambda: render_ops(made_up_operations.made_up_run(made_up_operations.LIMIT)),
    "low-latency": lambda: render_low_latency(made_up_low_latency.made_up_run()),
    "overlap": lambda: render_overlap(made_up_overlap.made_up_run()),
    "train": lambda: render_train(made_up_train.made_up_run()),
}


def printed(shown: Group) -> list[str]:
    """The words of all that is printed."""
    console = Console(file=io.StringIO(), width=400)
    console.print(shown)
    return console.file.getvalue().split()


@pytest.mark.parametrize("name", SHOWN)
def test_it_has_every_word_that_is_printed(name, tmp_path):
    shown = SHOWN[name]()
    page = Page(to_html(make_page(shown, name, tmp_path)))
    assert page.wrong == [] and page.open == []
    words = set(" ".join(page.text).split())
    missing = {word for word in printed(shown) if word not in words}
    assert {word for word in missing if not set(word) <= set("─━┃│┏┓┗┛┡┩├┤└┘┬┴┼╇╈┳┻ ")} == set()
    tables = [part for part in shown.renderables if isinstance(part, ScreenTable)]
    assert len(page.all("table")) == len(tables) >= 1
    assert len(page.all("tr")) == sum(1 + table.row_count for table in tables)
    assert "Failed" not in words


def test_figures_that_do_not_count_are_said_first(tmp_path):
    shown = render_ops(made_up_operations.made_up_run(made_up_operations.SLOW))
    write_page(shown, "Dispatch and combine", tmp_path / "bench.html")
    text = (tmp_path / "bench.html").read_text()
    (finding,) = re.findall(r'<li class="bad">(.*?)</li>', text, re.S)
    assert "VOID: the links carried 319.9 GB/s" in finding
    assert text.index(finding) < text.index("<table")
