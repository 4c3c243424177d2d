"""The table itself: what it points to is there, and the page says the same."""

from __future__ import annotations

import ast
from pathlib import Path

from acts import ACTS, OTHERWISE
from table import FAULTS, OTHERS, write_page

TESTS = Path(__file__).resolve().parents[1]
PAGE = TESTS.parent / "docs" / "reliability.md"


def names_of_tests(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_test_of_the_table_is_there():
    for other in OTHERS:
        file, _, name = other.test.partition("::")
        assert name in names_of_tests(TESTS / file), other


def test_every_fault_has_its_act():
    assert {fault.what for fault in FAULTS} == {*ACTS, *OTHERWISE, "makes another Buffer"}
    assert len({str(fault) for fault in FAULTS}) == len(FAULTS)
    assert sum(fault.culprit is not None for fault in FAULTS) >= 30


def test_ci_has_one_of_each_kind():
    """Of disagreements one will do: they are found in the same place."""
    kinds = {fault.what for fault in FAULTS if fault.over == "gloo" and fault.what in ACTS}
    assert {fault.what for fault in FAULTS if fault.in_ci} == kinds | {"dispatches other rows"}


def test_the_page_says_the_same():
    """Else: python tests/faults/table.py docs/reliability.md."""
    text = PAGE.read_text()
    assert "is killed" in text and write_page(text) == text
