"""A page: what it is made of, and its renderer. It knows nothing of what is reported.

A `Page` has sections, and a section has blocks. `to_html` makes one file of it that needs nothing
else, `to_markdown` the same words and tables for a pull request.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from ep_comm import markdown
from ep_comm.version import __version__

Cells = list[list[str]]
Level = Literal["bad", "look", "good", "note"]
LEVELS: dict[Level, str] = {
    "bad": "Failed or in doubt",
    "look": "Worth a look",
    "good": "As it should be",
    "note": "To be known",
}


class Finding(NamedTuple):
    """One thing that stands out.

    Attributes:
        level: "bad": it failed, or its result is in doubt; "look": it costs time or quality;
            "good": nothing is to be done; "note": to be known when reading the page.
        text: What was found.
        todo: What to do; may be empty.
        section: Anchor of the part of the page that shows it.
    """

    level: Level
    text: str
    todo: str
    section: str


@dataclass(frozen=True)
class Findings:
    """What stands out."""

    found: Sequence[Finding]


@dataclass(frozen=True)
class Text:
    """A paragraph, with code in backticks."""

    text: str


@dataclass(frozen=True)
class Heading:
    """A heading inside of a section."""

    text: str


@dataclass(frozen=True)
class Items:
    """A list of sentences."""

    sentences: Sequence[str]


@dataclass(frozen=True)
class Code:
    """A command."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        columns: Their names.
        rows: Cells as text: names in the first column.
        label: What a screen reader says.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    label: str


@dataclass(frozen=True)
class Picture:
    """A picture.

    Attributes:
        svg: The drawing.
        caption: Under it.
        columns: Names of the columns of its data.
        rows: Its data, with fewer steps where there are many.
    """

    svg: str
    caption: str
    columns: list[str]
    rows: Cells


@dataclass(frozen=True)
class Folded:
    """Blocks that a reader opens."""

    summary: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Beside:
    """Columns of blocks."""

    columns: Sequence[Sequence[Block]]


Block = Findings | Text | Heading | Items | Code | Table | Picture | Folded | Beside


class Section(NamedTuple):
    """A part of a page.

    Attributes:
        anchor: Its identifier.
        title: Its heading.
        blocks: What it has.
    """

    anchor: str
    title: str
    blocks: Sequence[Block]


class Line(NamedTuple):
    """A line under the title.

    Attributes:
        text: What it says.
        name: Before it, in bold; may be empty.
        swatch: Number of the colour and dashes that its lines have in pictures; 0: none.
    """

    text: str
    name: str = ""
    swatch: int = 0


@dataclass(frozen=True)
class Page:
    """A page.

    Attributes:
        title: Its heading.
        tool: What made it, such as "ep-comm report".
        lines: Under the title.
        sections: What it has; the first one is where a reader begins.
        sources: The folders that it tells of.
        command: That makes it.
    """

    title: str
    tool: str
    lines: Sequence[Line]
    sections: Sequence[Section]
    sources: Sequence[Path]
    command: str


def to_html(page: Page) -> str:
    """Return the page as one HTML file, which needs no other."""
    environment = Environment(
        loader=PackageLoader("ep_comm.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["code"] = _code
    environment.filters["sentence"] = _sentence
    environment.filters["kind"] = lambda block: type(block).__name__
    return environment.get_template("page.html.jinja").render(
        page=page,
        titles={section.anchor: section.title for section in page.sections},
        levels=LEVELS,
        css=Markup((Path(__file__).parent / "page.css").read_text()),
        version=__version__,
    )


def to_markdown(page: Page) -> str:
    """Return its words and tables as Markdown. Pictures are left to the HTML page."""
    lines = [f"## {page.title}", ""]
    for line in page.lines:
        lines += [f"**{line.name}**: {line.text}" if line.name else line.text, ""]
    for section in page.sections:
        found = [each for block in section.blocks for each in _markdown(block)]
        if found:
            lines += [f"### {section.title}", "", *found]
    return "\n".join(lines).rstrip("\n") + "\n"


def _markdown(block: Block) -> list[str]:
    """Return the lines of a block with an empty one behind them; none of what has no words."""
    match block:
        case Findings(found):
            texts = (f"{each.text} {_sentence(each.todo)}".strip() for each in found)
            levels = (LEVELS[each.level] for each in found)
            pairs = zip(levels, texts, strict=True)
            return [*(f"* **{level}.** {_escaped(text)}" for level, text in pairs), ""]
        case Text(text):
            return [_escaped(text), ""]
        case Heading(text):
            return [f"#### {text}", ""]
        case Items(sentences):
            return [*(f"* {_escaped(sentence)}" for sentence in sentences), ""]
        case Code(text):
            return ["```bash", text, "```", ""]
        case Table(columns, rows):
            return [*markdown.table(columns, rows, of_numbers=True), ""]
        case Folded(_, blocks):
            return [line for each in blocks for line in _markdown(each)]
        case Beside(columns):
            return [line for column in columns for each in column for line in _markdown(each)]
        case _:
            return []


def _escaped(text: str) -> str:
    """Return text in which Markdown takes nothing for a tag."""
    return text.replace("<", "\\<")


def _code(text: str) -> Markup:
    """Return text as HTML, with `code` in backticks."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _sentence(text: str) -> str:
    """Return text with a capital at its begin and a full stop at its end."""
    stop = "" if not text or text.endswith((".", "?", "!")) else "."
    return f"{text[:1].upper()}{text[1:]}{stop}"
