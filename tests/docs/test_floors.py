"""Who imports whom: the floors, of which pyproject.toml has the contract, and test modules."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import ep_comm

importlinter = pytest.importorskip("importlinter.api")

ROOT = Path(__file__).parents[2]


def floors() -> list[list[str]]:
    """Names of modules, from the top floor down."""
    contracts = importlinter.read_configuration(str(ROOT / "pyproject.toml"))["contracts_options"]
    (contract,) = (each for each in contracts if each["name"] == "floors")
    return [re.findall(r"ep_comm\.(\w+)", layer) for layer in contract["layers"]]


def test_the_package_lists_them_in_order():
    """A line for each floor, with all of its names."""
    lines = iter(re.findall(r"^    (.*)$", ep_comm.__doc__ or "", re.M))
    for names in floors():
        assert any(set(names) <= set(re.findall(r"\w+", line)) for line in lines), names


def test_the_page_says_where_each_is():
    page = (ROOT / "docs" / "architecture.md").read_text().partition("\n## ")[0]
    named = set(re.findall(r"`ep_comm/(\w+)(?:\.py|/)`", page))
    assert named - {"__init__"} == {name for names in floors() for name in names}


def test_no_test_module_imports_another():
    """What several of them use stands in tests/support."""
    importing = re.compile(r"^ *(?:from|import) test_\w+", re.M)
    tests = sorted((ROOT / "tests").rglob("*.py"))
    assert tests and [path.name for path in tests if importing.search(path.read_text())] == []
