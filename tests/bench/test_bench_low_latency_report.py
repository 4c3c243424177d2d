"""``ep-comm bench low-latency``: its table, its JSON, its plot."""

from __future__ import annotations

import dataclasses
import io
import json
from unittest import mock

import pytest
from made_up_low_latency import FLOORS, OPERATIONS, made_up_run
from rich.console import Console

from ep_comm.bench.low_latency.clocks import Times
from ep_comm.bench.low_latency.floors import Floors
from ep_comm.bench.low_latency.report import headline, render, write_json, write_plot
from ep_comm.bench.low_latency.run import Run
from ep_comm.bench.ops.probe import Limit

SLOW = Floors(limit=Limit(gb_per_s_by_sms={16: 300.0}), one_way_us=0.7)


def text_of(found: Run) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(render(found))
    return console.file.getvalue()  # type: ignore[attr-defined]


def cells_of(text: str, begin: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.strip("│ ").startswith(begin))
    return [cell.strip() for cell in line.strip("│ ").split("│")]


def test_table():
    text = text_of(made_up_run())
    assert "limit 340 GB/s, one way 0.70 µs" in text and "VOID" not in text
    assert cells_of(text, "dispatch + combine ") == [
        *("dispatch + combine", "40.0", "60.0", "120.0", "1.50", "39.0", "-", "4.0", "10.0"),
        *("41.0", "60.0", "120.0", "0"),
    ]
    assert cells_of(text, "NCCL alltoall")[1:4] == ["33.0", "35.0", "44.0"]
    sections = [line.strip("│ ") for line in text.splitlines() if line.startswith("│ 8 tokens")]
    assert [line.split("  ")[0] for line in sections] == [
        *("8 tokens, room for 8", "8 tokens, room for 128", "8 tokens")
    ]
    name = "hidden 7168: 128 tokens, room for 128"
    assert cells_of(text, name) == [name, *["20.0 / 24.0"] * 4]
    assert "one value in 32 ns" in " ".join(text.split()) and "…" not in text


def test_no_figure_is_cut():
    found = made_up_run()
    slow = Times(p50=12345.6, p99=23456.7, max=345678.9, samples=9)
    found.results = [
        dataclasses.replace(
            result, graph=slow, eager=slow, kernel=slow, mean_us=12345.6, wrong=123456
        )
        for result in found.results
    ]
    text = text_of(found)
    assert "…" not in text and "345679" in text and "123456" in text


def test_void_run_says_so(tmp_path):
    found = made_up_run(SLOW)
    assert "VOID: the links carried 300.0 GB/s, below the 320" in headline(found)
    assert "VOID" in text_of(found)
    write_json(found, tmp_path / "run.json")
    assert json.loads((tmp_path / "run.json").read_text())["void"] is True


def test_a_run_without_gpus_has_eager_times_alone():
    text = text_of(made_up_run(None))
    assert cells_of(text, "combine ")[1:] == [*"-----", "30.0", *"--", "31.0", "45.0", "90.0", "0"]
    assert "by the host's clock" in text and "alltoall: all tokens" not in text


def test_json(tmp_path):
    write_json(made_up_run(wrong=2), tmp_path / "run.json")
    document = json.loads((tmp_path / "run.json").read_text())
    assert {"date", "command", "commit", "versions", "gpus"} <= document.keys()
    assert document["floors"]["one_way_us"] == 0.7 and document["void"] is False
    assert document["num_experts"] == 288 and document["settings"]["tokens"] == [8, 128]
    first = document["low_latency"][0]
    assert first["operation"] == "dispatch" and first["graph"]["p99"] == 15
    assert first["wrong"] == 2 and document["num_wrong"] == 2 * 3 * len(OPERATIONS)
    assert document["host"][0]["room"] == 8
    assert document["host"][0]["times"]["hook of combine"]["max"] == 99


@pytest.mark.parametrize("floors", [FLOORS, None], ids=["gpus", "cpu"])
def test_plot(floors, tmp_path):
    found = made_up_run(floors)
    write_plot(found, tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_plot_shows_lines_bands_and_floors():
    from ep_comm.bench.low_latency.report import _plot_line

    axes = mock.Mock()
    line = mock.Mock()
    axes.plot.return_value = (line,)
    results = [r for r in made_up_run().results if r.operation == "dispatch + combine"]
    _plot_line(axes, "dispatch + combine", results)
    lines, floors = axes.plot.call_args_list
    assert lines.args[1] == [40.0] * 3 and floors.args[1] == [4.0] * 3
    assert axes.fill_between.call_args.args[2] == [60.0] * 3
