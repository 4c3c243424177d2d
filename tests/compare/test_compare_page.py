"""The page of a comparison: complete, usable without eyes or network; and as Markdown."""

from __future__ import annotations

import re

import pytest
from html_page import MOST_BYTES, Page
from made_up_comparison import comparison_page

from ep_comm.report.document import to_html, to_markdown


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return to_html(comparison_page(tmp_path_factory.mktemp("comparison")))


def test_it_is_well_formed_and_stands_alone(text):
    page = Page(text)
    assert page.wrong == [] and page.open == []
    identifiers = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    targets = [link["href"] for link in page.all("a")]
    assert targets and all(t[0] == "#" and t[1:] in identifiers for t in targets)
    for tag in ("link", "script", "img", "iframe"):
        assert page.all(tag) == []
    assert re.findall(r'(?:src|href)="(?!#|data:)[^"]*"|url\((?!#)[^)]*\)|@import', text) == []


def test_it_can_be_heard_and_walked_by_keyboard(text):
    page = Page(text)
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert levels.count(1) == 1 and levels[0] == 1
    assert all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))
    pictures = page.all("svg")
    assert len(pictures) == 2 and len(page.all("details")) == 2  # each has its data
    assert all(each["role"] == "img" and "alltoall" in each["aria-label"] for each in pictures)
    assert all("scope" in cell for cell in page.all("th"))
    regions = [a for _, a in page.elements if a.get("class") == "scroll"]
    assert all(a["tabindex"] == "0" and a["aria-label"] for a in regions)
    assert page.all("a")[0] == {"class": "skip", "href": "#outcome"}


def test_colours_are_those_of_the_page(text):
    light = text.split("@media")[0]
    dark = re.search(r"@media \(prefers-color-scheme: dark\) \{(.*?)\n\}", text, re.S)[1]
    used = set(re.findall(r"var\(--([\w-]+)\)", text))
    for scheme in (light, dark):
        assert used <= set(re.findall(r"--([\w-]+):", scheme))
    for drawing in re.findall(r"<svg.*?</svg>", text, re.S):
        assert re.findall(r"#[0-9a-f]{6}", drawing.replace("&#", "")) == []


def test_a_long_comparison_is_small(tmp_path):
    assert len(to_html(comparison_page(tmp_path, steps=20_000)).encode()) < MOST_BYTES


def test_equal_losses_have_no_picture_of_differences(tmp_path):
    text = to_html(comparison_page(tmp_path, equal=True))
    assert text.count("<svg") == 1 and "there are no differences to draw" in text


def test_markdown_has_the_words_and_the_tables(tmp_path):
    page = comparison_page(tmp_path)
    markdown, html = to_markdown(page), Page(to_html(page))
    words = re.sub(r"\s+", " ", " ".join(html.text))
    cells = [
        cell
        for line in markdown.splitlines()
        if line.startswith("|")
        for cell in line.strip("| ").split(" | ")
    ]
    assert len(cells) > 100
    for cell in cells:
        if not set(cell) <= set("-: "):
            assert cell.replace("\\|", "|") in words
    assert "<svg" not in markdown and "\\<GPU> computes" in markdown
