"""The tables of docs/: what scripts/results.py makes of the files that the benchmarks wrote."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
from made_up_comparison import CURVES, begun, compare, make_config
from made_up_low_latency import made_up_run as latencies
from made_up_operations import LIMIT
from made_up_operations import made_up_run as operations
from made_up_overlap import made_up_run as prices
from made_up_train import made_up_run as steps
from rich.console import Console

from ep_comm.bench.low_latency.report import write_json as write_latencies
from ep_comm.bench.ops.report import document, write_json
from ep_comm.bench.overlap.report import write_json as write_prices
from ep_comm.bench.train.report import write_report
from ep_comm.plan.check import compare as compare_with_model

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import results  # noqa: E402 - its folder has come to the path
from results_tables.names import setting_of  # noqa: E402


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The pages and their files, to be changed."""
    root = tmp_path / "checkout"
    shutil.copytree(ROOT / "docs", root / "docs")
    shutil.copy(ROOT / "README.md", root)
    return root


def section(root: Path, page: str, name: str) -> str:
    """What the generated page says of the file `name`."""
    text = results.generate(root)[root / "docs" / "results" / f"{page}.md"]
    return text.split(f"\n## {name}\n")[1].split("\n## ")[0]


def test_pages_are_what_the_files_give():
    assert results.stale() == [], "run scripts/results.py"


def test_a_changed_figure_makes_every_page_that_shows_it_stale(checkout):
    assert results.stale(checkout) == []
    path = checkout / "docs" / "results" / "h200-x4-w1.json"
    path.write_text(path.read_text().replace("517", "5170"))
    stale = {path.relative_to(checkout).as_posix() for path in results.stale(checkout)}
    assert {"README.md", "docs/results/dispatch-and-combine.md"} <= stale


def test_a_page_that_was_edited_by_hand_is_stale(checkout):
    page = checkout / "docs" / "results" / "convergence.md"
    page.write_text(page.read_text().replace("2.479131", "2.479130"))
    assert results.stale(checkout) == [page]


def test_a_file_of_ep_comm_bench(checkout):
    write_json(operations(LIMIT), checkout / "docs" / "results" / "new.json")
    found = section(checkout, "dispatch-and-combine", "new")
    assert (
        "| dispatch, fresh | all | 100 | – | 120 | 119–121 | 1.20 | 125 | 180 | 41 | 51 |" in found
    )
    assert "Source:" not in found and "**Void" not in found


def test_a_file_of_ep_comm_bench_low_latency(checkout):
    write_latencies(latencies(), checkout / "docs" / "results" / "new.json")
    found = section(checkout, "low-latency", "new")
    assert (
        "| dispatch + combine | 7168 | 8 | 8 | all | 40.0 | 60.0 | 120.0 | 1.50 | 39.0 | – | 4.0 |"
        in found
    )
    assert "| NCCL alltoall | 7168 | 8 | – | – | 33.0 | 35.0 | 44.0 | 1.06 |" in found
    assert "| hidden 7168: 8 tokens, room for 128 | 20.0 (24.0) |" in found


def test_a_file_of_ep_comm_bench_overlap(checkout):
    write_prices(prices(), checkout / "docs" / "results" / "new.json")
    found = section(checkout, "overlap", "new")
    row = "dispatch, cached | expert | 4096x4096x7168 | 64 | 222 | 159 | 489 | 170 | 165–177 | 230"
    assert f"| {row} | 0 |" in found
    run = json.loads((checkout / "docs" / "results" / "new.json").read_text())
    table = str(results.overlap.block([run | {"gpus": ["NVIDIA H200"]}]))
    assert "dispatch, cached, rows by expert | 186 | **170** | 237 | – | 230 |" in table
    assert "NCCL alltoall dispatch | – | – | – | 404 | 230 |" in table


def test_latencies_stand_beside_their_floor(checkout):
    write_latencies(latencies(), checkout / "docs" / "results" / "new.json")
    run = json.loads((checkout / "docs" / "results" / "new.json").read_text())
    lines = str(results.low_latency.block([run | {"gpus": ["NVIDIA H200"]}])).splitlines()
    assert lines[0] == (
        "| µs, p50 (p99) | dispatch | combine | combine, own weights | both "
        "| both, general kernel | four phases | NCCL alltoall, one way | floor of both |"
    )
    assert lines[2] == (
        "| 2 × H200, hidden 7168: 8 tokens, room for 8 | 10.0 (15.0) | 30.0 (45.0) | 60.0 (90.0) "
        "| 40.0 (60.0) | 100.0 (150.0) | 150.0 (225.0) | 33.0 (35.0) | 4.0 |"
    )
    assert len(lines) == 2 + 3


def test_a_void_run_says_so(checkout):
    path = checkout / "docs" / "results" / "new.json"
    write_json(operations(LIMIT), path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"void": True}))
    assert "**Void" in section(checkout, "dispatch-and-combine", "new")


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_file_of_ep_comm_bench_train(device, checkout, tmp_path):
    write_report(steps(device=device), tmp_path, Console(file=io.StringIO()))
    shutil.copy(tmp_path / "bench-train.json", checkout / "docs" / "results" / "new.json")
    found = section(checkout, "training-steps", "new")
    assert "| 1 | 11.0 | 9.0–13.0 | 1.10 | 1.20, 1.00 | 5,818 |" in found
    assert "| alltoall | 1 | 12.0 | 11.0–13.0 | – |" in found


def test_a_file_of_ep_comm_compare(checkout, tmp_path):
    config = make_config(tmp_path)
    out = begun(config, CURVES)
    assert compare(config).exit_code == 0
    shutil.copy(out / "report.json", checkout / "docs" / "results" / "new.json")
    found = section(checkout, "convergence", "new")
    assert "| ep_comm | 7 |" in found and "| noise |" in found


@pytest.mark.parametrize("document", [{"headline": "?"}, {"limit": {}, "variants": {}}])
def test_a_file_of_no_kind_is_refused(document, checkout):
    (checkout / "docs" / "results" / "new.json").write_text(json.dumps(document))
    with pytest.raises(SystemExit, match="new.json is of no kind"):
        results.generate(checkout)


@pytest.mark.parametrize("block", ["operations no-such-file", "nothing h200-x4-w1"])
def test_a_block_that_cannot_be_filled_is_refused(block, checkout):
    readme = checkout / "README.md"
    readme.write_text(f"<!-- results: {block} -->\n<!-- end -->\n")
    with pytest.raises(SystemExit, match="no such"):
        results.generate(checkout)


def a_call(case: str, num_sms: int | None, us: float) -> dict:
    return {"case": case, "num_sms": num_sms, "floor_us": 100.0, "samples_us": {"call": [us] * 3}}


def test_operations_stand_beside_every_library_of_the_run():
    settings = {"shape": {"hidden": 7168}, "routing": {"kind": "uniform"}}
    calls = [
        a_call("dispatch, fresh", 0, 120),
        a_call("dispatch, fresh", 24, 150),
        a_call("FP8 dispatch, fresh", 0, 80),
        a_call("dispatch, cached", 0, 110),
        a_call("combine", 0, 105),
        a_call("NCCL alltoall dispatch", None, 480),
        a_call("NCCL alltoall combine", None, 420),
        a_call("Other dispatch, expanded", 24, 240),
        a_call("Other dispatch", 24, 180),
    ]
    run = {"settings": settings, "gpus": ["NVIDIA H200"], "num_ranks": 4, "results": calls}
    lines = str(results.operations.block([run])).splitlines()
    assert lines[0] == (
        "| µs | links alone | ep_comm | ep_comm, 24 SMs | NCCL alltoall "
        "| NCCL alltoall ÷ ep_comm | Other | Other ÷ ep_comm |"
    )
    assert [line.removeprefix("| 4 × H200, hidden 7168: ") for line in lines[2:]] == [
        "dispatch, new routing | 100 | 120 | 150 | 480 | 4.0 × | 180 | 1.5 × |",
        "dispatch, routing known | 100 | 110 | – | – | – | – | – |",
        "combine | 100 | 105 | – | 420 | 4.0 × | – | – |",
    ]


def nodes_run() -> dict:
    """Of `scripts/nodes_bench.py`, two nodes of two ranks."""
    run = document(operations(LIMIT))
    return run | {
        "gpus": ["NVIDIA H200"], "ranks_per_node": 2, "network_gb_per_s": 50.0,
        "one_node": [result | {"case": "combine"} for result in run["results"][:1]],
    }  # fmt: skip


def test_a_file_of_nodes_bench(checkout):
    (checkout / "docs" / "results" / "new.json").write_text(json.dumps(nodes_run()))
    first, second = section(checkout, "dispatch-and-combine", "new").split("| case, as one node |")
    assert "| dispatch, fresh | all |" in first and "| combine | 24 |" in first
    assert second.count("| combine | all |") == 1 and "dispatch" not in second.split("\n\n")[0]
    assert setting_of(nodes_run()) == "2 × 2 × H200, hidden 128, network of 50 GB/s"


def test_the_model_stands_beside_what_was_measured():
    lines = str(results.plan.block([nodes_run()])).splitlines()
    assert lines[0] == "| µs: model (measured) | SMs | dispatch, fresh | combine |"
    assert len(lines) == 4
    assert lines[2].startswith("| 2 × 2 × H200, hidden 128, network of 50 GB/s | all |")
    modelled = {(each.name, each.num_sms): each for each in compare_with_model(nodes_run())}
    found = modelled["combine", 24]
    assert f" {found.model:.0f} (140) −" in lines[3] and f"slack {found.slack:.2f} |" in lines[3]


def test_steps_have_the_median_and_the_worst_block(tmp_path):
    write_report(steps(), tmp_path, Console(file=io.StringIO()))
    run = json.loads((tmp_path / "bench-train.json").read_text())
    assert "| 2 layers of hidden 128, an untrained router: ep_comm | 1.10 (1.00) |" in str(
        results.steps.block([run])
    )
