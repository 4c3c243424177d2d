"""Links and names of files in the pages lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOP = ("configs", "csrc", "docs", "ep_comm", "examples", "scripts", "tests")
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("csrc/*.md"))
)
FILES = [path.relative_to(ROOT).as_posix() for top in TOP for path in (ROOT / top).rglob("*")] + [
    path.name for path in ROOT.iterdir()
]

_LINK = re.compile(r"\]\(([^)\s]+)\)")
_PATH = re.compile(rf"(?<![\w/.@-])(?:{'|'.join(TOP)})/[\w./*-]*[\w*/]")
_SUFFIX = "py|cu|cuh|h|sh|md|yaml|sbatch|jinja|npz|png"
_NAME = re.compile(rf"`(?!runs/)([\w./-]+\.(?:{_SUFFIX}))`")
_FENCE = re.compile(r"^```.*?^```", re.S | re.M)
_HEADING = re.compile(r"^#+ +(.*)$", re.M)
# Of Megatron-LM, or what the reader or a run writes.
ELSEWHERE = {"pretrain_gpt.py", "test_token_dispatcher.py", "moe.py"}
WRITTEN_BY_RUNS = {
    "report.md",
    "bench.png",
    "steps.png",
    "overlap.png",
}


def anchors(page: Path) -> set[str]:
    """What a link to a heading of the page may say, as GitHub makes it."""
    headings = _HEADING.findall(_FENCE.sub("", page.read_text()))
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}


def broken_links(root: Path, page: str) -> list[str]:
    """Relative links to a file or a heading that is not there."""
    broken = []
    for target in _LINK.findall(_FENCE.sub("", (root / page).read_text())):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = (root / page).parent / name if name else root / page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(target)
    return broken


def unknown_names(text: str) -> list[str]:
    """Names of files that no file has."""
    paths = (name.rstrip("/") for name in _PATH.findall(text) if "*" not in name)
    unknown = [path for path in paths if path not in FILES]
    names = set(_NAME.findall(text)) - ELSEWHERE - WRITTEN_BY_RUNS
    return unknown + [n for n in names if not any(f"/{file}".endswith(f"/{n}") for file in FILES)]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    assert broken_links(ROOT, page) == []


# docs/status.md names what is to come.
@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/status.md"])
def test_named_files_exist(page):
    assert unknown_names((ROOT / page).read_text()) == []


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("[a](b.md) and [c](#no-such-heading)", ["b.md", "#no-such-heading"]),
        ("# One `thing`, two\n[a](#one-thing-two) [b](page.md#one-thing-two) [c](https://x.y)", []),
        ("```\n# no heading\n[a](b.md)\n```\n[d](#no-heading)", ["#no-heading"]),
    ],
    ids=["missing", "there", "fenced"],
)
def test_broken_links_are_found(text, broken, tmp_path):
    (tmp_path / "page.md").write_text(text)
    assert broken_links(tmp_path, "page.md") == broken


def test_unknown_names_are_found():
    assert unknown_names("run scripts/nothing.sh, then scripts/test.sh") == ["scripts/nothing.sh"]
    assert unknown_names("`nowhere.py` imports `ep_comm/buffer.py` and `buffer.py`") == [
        "nowhere.py"
    ]
    assert unknown_names("`scripts/` has `pretrain_gpt.py`, docs/results/*.json") == []


@pytest.mark.parametrize("page", PAGES)
def test_which_package_registry_is_used_is_up_to_the_reader(page):
    assert "index-url" not in (ROOT / page).read_text()
