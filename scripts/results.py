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
``ep-comm plan`` beside what a file has.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from jinja2 import Environment, FileSystemLoader

from ep_comm.bench.ops.routing import RoutingSpec
from ep_comm.bench.tables import markdown_table, number, sms_name
from ep_comm.bench.timing import summarize
from ep_comm.compare.statistics import standard_error
from ep_comm.plan.check import compare

ROOT = Path(__file__).resolve().parent.parent

Document = dict[str, Any]
Cell = str | float | None

_BLOCK = re.compile(r"(<!-- results: (\w+) ([\w\- ]+?) -->\n).*?(<!-- end -->)", re.S)
_PEER = re.compile(r"(?P<name>(?!FP8).+?) (?P<operation>dispatch|combine)\b")
_FEW_SMS = 24


@dataclass(frozen=True)
class Table:
    """Columns and rows. A cell is text, a number that is shown as it is, or None."""

    columns: list[str]
    rows: list[list[Cell]]

    def __str__(self) -> str:
        """As Markdown, without the columns that are empty; the first one left, the others right."""
        kept = [
            i
            for i in range(len(self.columns))
            if i == 0 or any(row[i] is not None for row in self.rows)
        ]
        columns, *rows = [[line[i] for i in kept] for line in (self.columns, *self.rows)]
        return "\n".join(markdown_table([str(name) for name in columns], rows))


@dataclass(frozen=True)
class Section:
    """One file on a page: its name without .json, what was run, and the figures."""

    name: str
    title: str
    tables: list[Table]
    document: Document


@dataclass(frozen=True)
class Page:
    """A generated page: which files it takes, and what it shows of each."""

    name: str
    title: str
    introduction: str
    takes: Callable[[Document], bool]
    tables: Callable[[Document], list[Table]]


def _median(samples: list[float]) -> float | None:
    return median(samples) if samples else None


def _sms(num_sms: int | None) -> str | None:
    return None if num_sms is None else sms_name(num_sms)


def _variant(name: str) -> str:
    """Older runs call our dispatcher by the value of Megatron's flag."""
    return re.sub(r"^deepep", "ep_comm", name)


# --- ep-comm bench --------------------------------------------------------------------------------


def _operation_tables(document: Document) -> list[Table]:
    columns = (
        "case; SMs; limit; kernel; call; min–p90; call ÷ limit; back to back; from idle; "
        "host; host, idle; wire GB/s; logical GB/s"
    ).split("; ")
    tables = [Table(columns, [_operation_row(result) for result in document["results"]])]
    if "one_node" in document:  # the same GPUs in the same run, by NVLink alone
        columns = ["case, as one node", *columns[1:]]
        tables.append(Table(columns, [_operation_row(found) for found in document["one_node"]]))
    return tables


def _operation_row(result: Document) -> list[Cell]:
    samples = result["samples_us"]
    times = {name: _median(found) for name, found in samples.items()}
    call = summarize(samples["call"])
    spread = f"{call.min:.0f}–{call.p90:.0f}" if len(samples["call"]) > 1 else None
    rates = (
        result[f"{of}_bytes"] / times["call"] / 1e3 if f"{of}_bytes" in result else None
        for of in ("wire", "logical")
    )
    return [
        result["case"],
        _sms(result["num_sms"]),
        *(number(us, ".0f") for us in (result["floor_us"], times["kernel"], times["call"])),
        spread,
        number(result["ratio"], ".2f"),
        *(number(times[name], ".0f") for name in ("unaligned", "idle", "host", "host_idle")),
        *(number(rate, ".0f") for rate in rates),
    ]


def _operations(documents: Iterable[Document]) -> Table:
    """Our calls, all SMs and few, beside the limit and the other libraries of the same run."""
    documents = list(documents)
    peers = list(dict.fromkeys(peer for doc in documents for peer, _ in _peer_calls(doc)))
    rows = []
    for document in documents:
        theirs = _peer_calls(document)
        for case, says in (
            ("dispatch, fresh", "dispatch, new routing"),
            ("dispatch, cached", "dispatch, routing known"),
            ("combine", "combine"),
        ):
            ours = {
                result["num_sms"]: result
                for result in document["results"]
                if result["case"] == case
            }
            calls = {sms: _call(ours[sms]) for sms in (0, _FEW_SMS) if sms in ours}
            row: list[Cell] = [f"{_setting(document)}: {says}", number(ours[0]["floor_us"], ".0f")]
            row += [number(calls[0], ".0f"), number(calls.get(_FEW_SMS), ".0f")]
            for peer in peers:
                call = None if "known" in says else theirs.get((peer, case.split(",")[0]))
                row += [number(call, ".0f"), None if call is None else f"{call / calls[0]:.1f} ×"]
            rows.append(row)
    columns = ["µs", "links alone", "ep_comm", f"ep_comm, {_FEW_SMS} SMs"]
    return Table(columns + [c for peer in peers for c in (peer, f"{peer} ÷ ep_comm")], rows)


def _peer_calls(document: Document) -> dict[tuple[str, str], float]:
    """Median call of each (library, operation) that is not ours; the fastest where it has many."""
    found: dict[tuple[str, str], float] = {}
    for result in document["results"]:
        if match := _PEER.match(result["case"]):
            key, call = (match["name"], match["operation"]), _call(result)
            found[key] = min(call, found.get(key, call))
    return found


def _call(result: Document) -> float:
    return median(result["samples_us"]["call"])


def _setting(document: Document) -> str:
    settings = document["settings"]
    routing = RoutingSpec.of_json(settings["routing"])
    groups = f", experts in {routing.describe()}" if routing.kind == "group-limited" else ""
    hidden = settings["shape"]["hidden"]
    rate = document.get("network_gb_per_s")
    network = f", network of {rate:g} GB/s" if rate else ""
    return f"{_ranks(document)} × {_gpu(document)}, hidden {hidden}{groups}{network}"


def _ranks(document: Document) -> str:
    """Where they are parts of one host, nodes and the ranks of each."""
    ranks = document["num_ranks"]
    per_node = document.get("ranks_per_node", ranks)
    return str(ranks) if per_node == ranks else f"{ranks // per_node} × {per_node}"


def _gpu(document: Document) -> str:
    return document["gpus"][0].removeprefix("NVIDIA ") if document["gpus"] else "CPU ranks"


# --- ep-comm bench low-latency --------------------------------------------------------------------

_SIZE = ("hidden", "tokens", "room", "num_sms")
_LATENCIES = {
    "dispatch": "dispatch",
    "combine": "combine",
    "combine, own weights": "combine, own weights",
    "dispatch + combine": "both",
    "dispatch + combine, general kernel": "both, general kernel",
    "four phases": "four phases",
}


def _latency_tables(document: Document) -> list[Table]:
    columns = (
        "operation; hidden; tokens; room; SMs; p50; p99; max; p99 ÷ p50; mean; kernel; floor; "
        "eager p50; eager p99; eager max; wrong"
    ).split("; ")
    operations = Table(columns, [_latency_row(result) for result in document["low_latency"]])
    calls = list(document["host"][0]["times"])
    host: list[list[Cell]] = [
        [_size(found), *(_p50_and_p99(found["times"][call]) for call in calls)]
        for found in document["host"]
    ]
    return [operations, Table(["host, p50 (p99)", *calls], host)]


def _latency_row(result: Document) -> list[Cell]:
    graph, eager, kernel = (result[name] or {} for name in ("graph", "eager", "kernel"))
    tail = graph["p99"] / graph["p50"] if graph else None
    return [
        *(result[name] for name in ("operation", "hidden", "tokens", "room")),
        _sms(result["num_sms"]),
        *(number(graph.get(name), ".1f") for name in ("p50", "p99", "max")),
        number(tail, ".2f"),
        *(number(us, ".1f") for us in (result["mean_us"], kernel.get("p50"), result["floor_us"])),
        *(number(eager.get(name), ".1f") for name in ("p50", "p99", "max")),
        result["wrong"],
    ]


def _latency(documents: Iterable[Document]) -> Table:
    """A row a size: median and 99th percentile in CUDA graphs, and the floor of both operations."""
    rows: list[list[Cell]] = []
    for document in documents:
        by_size: dict[tuple, Document] = {}
        for result in document["low_latency"]:
            size = tuple(result[name] for name in _SIZE)
            by_size.setdefault(size, {})[result["operation"]] = result
        for size, results in by_size.items():
            hidden, tokens, room, _ = size
            if room is None:
                continue
            (peer,) = by_size[hidden, tokens, None, None].values()
            both = results["dispatch + combine"]
            shown = [*(results.get(name) for name in _LATENCIES), peer]
            cells = [_p50_and_p99(found["graph"]) if found else None for found in shown]
            label = f"{document['num_ranks']} × {_gpu(document)}, {_size(both)}"
            rows.append([label, *cells, number(both["floor_us"], ".1f")])
    columns = ["µs, p50 (p99)", *_LATENCIES.values(), "NCCL alltoall, one way", "floor of both"]
    return Table(columns, rows)


def _size(found: Document) -> str:
    sms = f", {found['num_sms']} SMs" if found["num_sms"] else ""
    return f"hidden {found['hidden']}: {found['tokens']} tokens, room for {found['room']}{sms}"


def _p50_and_p99(times: Document | None) -> str | None:
    return f"{times['p50']:.1f} ({times['p99']:.1f})" if times else None


# --- ep-comm bench overlap ------------------------------------------------------------------------


def _price_tables(document: Document) -> list[Table]:
    columns = "case; rows by; GEMM; SMs; alone; beside; lost; min–max; serial; wrong".split("; ")
    rows: list[list[Cell]] = []
    for price in document["prices"]:
        lost = price["samples_us"]["lost"]
        times = (price[f"{name}_us"] for name in ("alone", "beside", "lost"))
        rows.append(
            [
                price["case"],
                price["layout"],
                price["gemm"],
                _sms(price["num_sms"]),
                *(number(us, ".0f") for us in times),
                f"{min(lost):.0f}–{max(lost):.0f}",
                number(price["serial_us"], ".0f"),
                price["num_wrong"],
            ]
        )
    return [Table(columns, rows)]


def _prices(documents: Iterable[Document]) -> Table:
    """GEMM time lost, a row an operation, a column an SM count; the least is bold."""
    rows: dict[str, dict[str, str]] = {}
    counts: dict[str, None] = {}
    for document in documents:
        for price in document["prices"]:
            by = f", rows by {price['layout']}" if price["layout"] else ""
            found = rows.setdefault(f"{_setting(document)}: {price['case']}{by}", {})
            lost = f"{price['lost_us']:.0f}"
            count = _sms(price["num_sms"]) or "its own"
            counts[count] = None
            found[count] = f"**{lost}**" if price["is_best"] and price["layout"] else lost
            found["serial"] = f"{price['serial_us']:.0f}"
    columns = [*counts, "serial"]
    cells: list[list[Cell]] = [
        [name, *(found.get(column) for column in columns)] for name, found in rows.items()
    ]
    heads = [f"{count} SMs" if count.isdigit() else count for count in columns]
    return Table(["µs of GEMM time lost", *heads], cells)


# --- ep-comm bench train --------------------------------------------------------------------------


def _step_tables(document: Document) -> list[Table]:
    columns = (
        "variant; microbatches; step, ms; min–p90; alltoall ÷ this; of each block; "
        "tokens/s a GPU; peak memory, GiB"
    ).split("; ")
    steps = [
        [
            _variant(result["variant"]),
            result["microbatches"],
            number(result["step_ms"]["median"], ".1f"),
            f"{result['step_ms']['min']:.1f}–{result['step_ms']['p90']:.1f}",
            _speedup(result),
            ", ".join(f"{ratio:.2f}" for ratio in result["ratio_of_blocks"] or []) or None,
            number(result["tokens_per_s_per_gpu"], ",.0f"),
            number(result["peak_bytes"] and result["peak_bytes"] / 2**30, ".1f"),
        ]
        for result in document["results"]
    ]
    return [Table(columns, steps), *_layer_tables(document)]


def _speedup(result: Document) -> str | None:
    """None of the reference itself."""
    of_blocks = result["ratio_of_blocks"]
    return None if not of_blocks or set(of_blocks) == {1.0} else f"{result['ratio_median']:.2f}"


def _layer_tables(document: Document) -> list[Table]:
    rows: list[list[Cell]] = []
    for name, found in document["inspections"].items():
        layer, ratio = found["layer"], document["layer_ratio"][name]
        passes = [found.get("layer_forward"), found.get("layer_backward")]
        kernels = sum(each["kernels"] for each in passes) if all(passes) else layer.get("kernels")
        times = (number(_median(layer[part]), ".2f") for part in ("forward", "backward", "total"))
        shown = None if ratio in (None, 1.0) else f"{ratio:.2f}"
        hidden = number(document.get("hidden_share", {}).get(name), ".0%")
        rows.append([_variant(name), *times, shown, kernels, hidden])
    columns = (
        "MoE layer alone; forward, ms; backward, ms; both; alltoall ÷ this; kernels; combine hidden"
    )
    return [Table(columns.split("; "), rows)] if rows else []


def _steps(documents: Iterable[Document]) -> Table:
    """How much faster our steps are, the median of the blocks and the worst."""
    rows: list[list[Cell]] = []
    for document in documents:
        config = next(iter(document["configs"].values()))
        model = f"{config['num_layers']} layers of hidden {config['hidden_size']}"
        by_variant: dict[str, dict[int, str]] = {}
        for result in document["results"]:
            if (ratio := _speedup(result)) is not None:
                found = by_variant.setdefault(_variant(result["variant"]), {})
                found[result["microbatches"]] = f"{ratio} ({result['ratio_worst']:.2f})"
        rows += [
            [f"{model}, {_router(document)}: {name}", found.get(1), found.get(8)]
            for name, found in by_variant.items()
        ]
    return Table(["alltoall's step ÷ ours (worst block)", "one microbatch", "eight"], rows)


def _router(document: Document) -> str:
    config = next(iter(document["configs"].values()))
    is_balanced = config.get("moe_router_force_load_balancing")
    return "balanced routing" if is_balanced else "an untrained router"


def _title(document: Document) -> str:
    title = document.get("title") or document["headline"]
    return f"{title}; {_router(document)}" if "configs" in document else title


# --- ep-comm compare ------------------------------------------------------------------------------


def _convergence_tables(document: Document) -> list[Table]:
    columns = (
        "variant; seed; train loss; validation loss; largest |Δ|; mean |Δ|; mean |Δ| / noise; "
        "validation |Δ|; mean Δ from all alltoall; tokens/s; MiB sent/step; verdict"
    ).split("; ")
    noise = document["noise"]
    rows: list[list[Cell]] = []
    for name, variant in document["variants"].items():
        found = variant["difference"] or dict.fromkeys(("largest", "mean", "final_valid"))
        share = found["mean"] / noise["mean"] if noise and found["mean"] is not None else None
        rows.append(
            [
                _variant(name),
                variant["seed"],
                *(number(variant[f"final_{of}_loss"], ".6f") for of in ("train", "valid")),
                *(_difference(found[key]) for key in ("largest", "mean")),
                number(share, ".2g"),
                _difference(found["final_valid"]),
                number(variant["offset"], "+.3f"),
                number(variant["tokens_per_s"], ",.0f"),
                number(variant["wire_mib"], ".2f"),
                variant["verdict"],
            ]
        )
    return [Table(columns, rows), *_pair_tables(document["pairs"])]


def _difference(value: float | None) -> str | None:
    return "0" if value == 0 else number(value, ".2e")


def _pair_tables(pairs: Document) -> list[Table]:
    """Nothing where no variant has two pairs."""
    columns = "pairs of the same seed; loss; seeds; relative Δ of each; mean ± standard error"
    rows: list[list[Cell]] = []
    for name, found in pairs.items():
        for of, says in (("train", "training"), ("valid", "validation")):
            each = found[f"final_{of}"]
            if len(each) > 1:
                label = f"{_variant(name)} against {_variant(found['counterpart'])}"
                seeds = ", ".join(map(str, found["seeds"]))
                shown = ", ".join(f"{value:+.2%}" for value in each)
                mean = f"{fmean(each):+.2%} ± {standard_error(each):.2%}"
                rows.append([label, says, seeds, shown, mean])
    return [Table(columns.split("; "), rows)] if rows else []


# --- ep-comm plan ---------------------------------------------------------------------------------


def _plan(documents: Iterable[Document]) -> Table:
    """The model beside what was measured, a row a setting and number of SMs."""
    found: dict[tuple[str, int], dict[str, str]] = {}
    units: dict[str, None] = {}
    for document in documents:
        setting = ""
        if "published" not in document:
            by_rank = ", rows by rank" if document["settings"]["layout"] == "rank" else ""
            setting = f"{_setting(document)}{by_rank}"
        for each in compare(document):
            row = found.setdefault((each.setting or setting, each.num_sms), {})
            slack = "" if each.slack is None else f", slack {each.slack:.2f}"
            deviation = f"{each.deviation:+.0%}".replace("-", "−").replace("%", " %")
            row[each.name] = f"{each.model:.0f} ({each.measured:.0f}) {deviation}{slack}"
            units[each.unit] = None
    names = list(dict.fromkeys(name for row in found.values() for name in row))
    rows: list[list[Cell]] = [
        [setting, _sms(sms), *(row.get(name) for name in names)]
        for (setting, sms), row in found.items()
    ]
    return Table([f"{' or '.join(units)}: model (measured)", "SMs", *names], rows)


# --- pages ----------------------------------------------------------------------------------------

PAGES = [
    Page(
        "dispatch-and-combine",
        "Dispatch and combine: `ep-comm bench`",
        "Times in µs. [The guide](../performance.md#what-the-columns-are) explains the columns.",
        lambda document: "limit" in document,
        _operation_tables,
    ),
    Page(
        "low-latency",
        "Low latency: `ep-comm bench low-latency`",
        "Times in µs. [The guide](../performance.md#low-latency) explains the columns.",
        lambda document: "low_latency" in document,
        _latency_tables,
    ),
    Page(
        "overlap",
        "Beside GEMMs: `ep-comm bench overlap`",
        "Times in µs. [The guide](../performance.md#beside-gemms) says what they are.",
        lambda document: "prices" in document,
        _price_tables,
    ),
    Page(
        "training-steps",
        "Training steps: `ep-comm bench train`",
        "[The guide](../performance.md#training-steps) says how they are measured.",
        lambda document: "inspections" in document,
        _step_tables,
    ),
    Page(
        "convergence",
        "Losses: `ep-comm compare`",
        "[The guide](../convergence.md) says how runs are compared and how to read it.",
        lambda document: "variants" in document,
        _convergence_tables,
    ),
    Page(
        "plan",
        "Published figures beside the model: `ep-comm plan`",
        "[The guide](../plan.md) states the model and says how it is compared.",
        lambda document: "published" in document,
        lambda document: [_plan([document])],
    ),
    Page(
        "other",
        "Runs by hand, and figures of others",
        "No tool of this repository wrote these files.",
        lambda document: "tables" in document,
        lambda document: [Table(table["columns"], table["rows"]) for table in document["tables"]],
    ),
]
BLOCKS = {
    "operations": _operations,
    "latency": _latency,
    "overlap": _prices,
    "steps": _steps,
    "plan": _plan,
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
