"""The page itself: complete, usable without eyes or network, soon made and small."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from html_page import MOST_BYTES, MOST_S, Page
from made_up_log import write_run
from typer.testing import CliRunner

from ep_comm.cli.app import app
from ep_comm.job.files import take_folder
from ep_comm.report.findings import find_all
from ep_comm.report.page import render
from ep_comm.report.run import read


def page_of(*folders: Path) -> str:
    runs = [read(folder) for folder in folders]
    return render(runs, find_all(runs), "ep-comm report")


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("runs")

    def late(record):
        if record["type"] == "train" and record["iteration"] > 60:
            record.update({"ep/slowest-rank": 3, "ep/wait-share": 0.4})

    first = write_run(folder / "first", 100, late)
    second = write_run(folder / "<b>$x$ & co", 80, seed=2, asked=100, num_layers=12)
    bare = write_run(folder / "bare", 2)
    log = (bare / "log.jsonl").read_text().splitlines(keepends=True)
    bare_line = '{"type": "train", "iteration": 1, "lm loss": 3.5}\n'
    (bare / "log.jsonl").write_text(bare_line + log[-1][:50])
    return {"one": page_of(first), "two": page_of(first, second), "bare": page_of(bare)}


@pytest.mark.parametrize("name", ["one", "two", "bare"])
def test_a_page_is_well_formed_and_stands_alone(texts, name):
    page = Page(texts[name])
    assert page.wrong == [] and page.open == []
    identifiers = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    targets = [link["href"] for link in page.all("a")]
    assert targets and all(t[0] == "#" and t[1:] in identifiers for t in targets)
    for tag in ("link", "script", "img", "iframe"):
        assert page.all(tag) == []
    fetched = re.findall(r'(?:src|href)="(?!#|data:)[^"]*"|url\((?!#)[^)]*\)|@import', texts[name])
    assert fetched == []
    used = set(re.findall(r"url\(#([^)]*)\)|xlink:href=\"#([^\"]*)\"", texts[name]))
    assert {a or b for a, b in used} <= set(identifiers)


@pytest.mark.parametrize("name", ["one", "two", "bare"])
def test_a_page_can_be_heard_and_walked_by_keyboard(texts, name):
    page = Page(texts[name])
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("main")) == len(page.all("header")) == len(page.all("nav")) == 1
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert levels.count(1) == 1 and levels[0] == 1
    assert all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))
    for picture in page.all("svg"):
        assert picture["role"] == "img" and len(picture["aria-label"]) > 20
    assert len(page.all("svg")) <= len(page.all("details"))  # each has its data
    assert all("scope" in cell for cell in page.all("th"))
    regions = [a for _, a in page.elements if a.get("class") == "scroll"]
    assert all(a["tabindex"] == "0" and a["aria-label"] for a in regions)
    assert page.all("a")[0] == {"class": "skip", "href": "#findings"}
    assert ":focus-visible" in texts[name] and "@media print" in texts[name]


def test_colours_are_those_of_the_page(texts):
    dark = re.search(r"@media \(prefers-color-scheme: dark\) \{(.*?)\n\}", texts["one"], re.S)[1]
    light = texts["one"].split("@media")[0]
    used = set(re.findall(r"var\(--([\w-]+)\)", texts["one"]))
    for scheme in (light, dark):
        assert used <= set(re.findall(r"--([\w-]+):", scheme))
    drawings = re.findall(r"<svg.*?</svg>", texts["one"], re.S)
    assert len(drawings) == 9
    for drawing in drawings:
        assert "<text" in drawing  # no glyphs drawn as paths
        assert re.findall(r"#[0-9a-f]{6}", drawing.replace("&#", "")) == []


def test_one_page_says_what_was_found(texts):
    text = " ".join(Page(texts["one"]).text)
    assert "From step 61 on rank 3 was the one" in text
    assert "clocks and temperature" in text and "Finished: step 100 of 100" in text
    assert "moe_router_topk" in text and "NVIDIA H200" in text


def test_two_runs_stand_beside_each_other(texts):
    page = Page(texts["two"])
    text = " ".join(page.text)
    assert "different models: num_layers 16 and 12" in re.sub(r"\s+", " ", text)
    assert "Ended early: step 80 of 100" in text
    assert "<b>$x$" in text and "<b>$x$" not in texts["two"]  # as text, not as a tag
    assert "second ÷ first" in text
    assert len(page.all("svg")) == 4 + 2 * 5


def test_a_log_with_next_to_nothing_has_a_page(texts):
    text = " ".join(Page(texts["bare"]).text)
    assert "Not on record." in text and "cannot be read" in text


def test_a_long_run_is_soon_made_and_small(tmp_path):
    """In seconds of one core: the machine may have other work."""
    folder = write_run(tmp_path / "run", 1000)
    page_of(write_run(tmp_path / "short", 3))  # matplotlib looks for fonts once
    begin = time.process_time()
    text = page_of(folder)
    seconds = time.process_time() - begin
    assert seconds < MOST_S and len(text.encode()) < MOST_BYTES, (seconds, len(text))


def test_no_megatron_is_needed(tmp_path):
    folder = write_run(tmp_path / "run", 20)
    code = """if True:
        import sys
        for name in ("megatron", "ep_comm.pretrain.config", "transformer_engine", "wandb"):
            sys.modules[name] = None
        from ep_comm.cli.main import main
        main()
    """
    result = subprocess.run(
        [sys.executable, "-c", code, "report", str(folder)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert (folder / "report.html").read_text().startswith("<!DOCTYPE html>")


def test_the_command(tmp_path):
    first, second = (write_run(tmp_path / part / "run", 20) for part in ("a", "b"))
    result = CliRunner().invoke(app, ["report", str(first), str(second)])
    assert result.exit_code == 0, result.output
    assert f"written to {first / 'report-run.html'}" in result.output
    assert str(second) in (first / "report-run.html").read_text()  # names that are alike
    take_folder(first, "--run-dir")
    result = CliRunner().invoke(app, ["report", str(first), "--out", str(tmp_path / "page.html")])
    assert "still going" not in result.output  # it has trained its last step
    assert (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere is no folder"),
        (["run", "run", "run"], "3 folders: pass one run, or two"),
        (["run", "--out", "nowhere/page.html"], "nowhere/page.html cannot be written"),
    ],
)
def test_bad_input_is_one_line(arguments, words, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", 3)
    result = CliRunner().invoke(app, ["report", *arguments])
    error = capfd.readouterr().err + result.output
    assert result.exit_code == 2 and error.startswith(f"error: {words}"), error
    assert error.count("\n") == 1
