#!/usr/bin/env python3
"""Write the tables of docs/results/ and of the guides from the JSON files in docs/results/.

    python scripts/results.py            # after a JSON file was added or replaced
    python scripts/results.py --check    # exit code 1 where a page is not what the files give

A file is what ``ep-comm bench`` (bench.json), ``ep-comm bench low-latency``
(bench-low-latency.json), ``ep-comm bench overlap`` (bench-overlap.json), ``ep-comm bench train``
(bench-train.json), ``ep-comm compare`` (report.json) or ``scripts/nodes_bench.py --json`` wrote,
under a name of its own; or figures that others published; or a plain table of a run by hand: title,
machine, columns and rows. Files of one kind become one page, a section each. A guide shows figures
between two comments::

    <!-- results: operations h200-x4-w1 h200-x8-w1-groups -->
    <!-- end -->

``operations`` sets dispatch and combine beside the other libraries of the same run, ``latency`` has
low-latency operations in CUDA graphs beside their floor, ``overlap`` has the GEMM time that
operations cost, ``steps`` lists how much faster training steps are, ``plan`` sets the model of
``ep-comm plan`` beside what a file has. ``results_tables/`` has a module for each kind of file.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from results_tables import convergence, low_latency, operations, overlap, plan, steps
from results_tables.tables import Document, Page, Section, Table

ROOT = Path(__file__).resolve().parent.parent

_BLOCK = re.compile(r"(<!-- results: (\w+) ([\w\- ]+?) -->\n).*?(<!-- end -->)", re.S)

PAGES = [
    operations.PAGE,
    low_latency.PAGE,
    overlap.PAGE,
    steps.PAGE,
    convergence.PAGE,
    plan.PAGE,
    Page(
        "other",
        "Faults, costs, runs by hand, and figures of others",
        "Files that bring their own tables.",
        lambda document: "tables" in document,
        lambda document: [Table(table["columns"], table["rows"]) for table in document["tables"]],
    ),
]
BLOCKS = {
    "operations": operations.block,
    "latency": low_latency.block,
    "overlap": overlap.block,
    "steps": steps.block,
    "plan": plan.block,
}


def generate(root: Path = ROOT) -> dict[Path, str]:
    """Return what every page with figures has to be, by its path.

    Raises:
        SystemExit: A file is of no known kind, or a block names one that is not there.
    """
    folder = root / "docs" / "results"
    files = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    templates = Environment(loader=FileSystemLoader(folder), trim_blocks=True, lstrip_blocks=True)
    template = templates.get_template("page.md.jinja")
    for name, document in files.items():
        if sum(page.takes(document) for page in PAGES) != 1:
            sys.exit(f"error: docs/results/{name}.json is of no kind that scripts/results.py knows")
    pages = {}
    for page in PAGES:
        sections = [
            Section(name, _title(document), page.tables(document), document)
            for name, document in files.items()
            if page.takes(document)
        ]  # fmt: skip
        if not sections:
            continue
        pages[folder / f"{page.name}.md"] = (
            template.render(page=page, sections=sections).rstrip() + "\n"
        )
    for path in [root / "README.md", *sorted((root / "docs").glob("*.md"))]:
        text = path.read_text()
        if _BLOCK.search(text):
            pages[path] = _BLOCK.sub(lambda match: _fill(match, files), text)
    return pages


def _title(document: Document) -> str:
    title = document.get("title") or document["headline"]
    return f"{title}; {steps.router(document)}" if "configs" in document else title


def _fill(match: re.Match[str], files: dict[str, Document]) -> str:
    begin, kind, names, end = match.groups()
    unknown = [name for name in names.split() if name not in files]
    if kind not in BLOCKS or unknown:
        sys.exit(f"error: {begin.strip()}: no such kind of block, or no such file in docs/results")
    return f"{begin}{BLOCKS[kind](files[name] for name in names.split())}\n{end}"


def stale(root: Path = ROOT) -> list[Path]:
    """Return pages that are not what the files give."""
    return [
        path for path, text in generate(root).items()
        if not path.exists() or path.read_text() != text
    ]  # fmt: skip


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description="Write the tables of docs/.")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a page is stale")
    if parser.parse_args().check:
        names = (str(path.relative_to(ROOT)) for path in stale())
        sys.exit("\n".join(f"error: {name}: run scripts/results.py" for name in names) or 0)
    for path, text in generate().items():
        path.write_text(text)


if __name__ == "__main__":
    main()
