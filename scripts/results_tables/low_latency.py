"""Files of ``ep-comm bench low-latency``."""

from __future__ import annotations

from collections.abc import Iterable

from ep_comm.bench.tables import number
from results_tables.names import gpu_of, sms_text
from results_tables.tables import Cell, Document, Page, Table

_SIZE = ("hidden", "tokens", "room", "num_sms")
_LATENCIES = {
    "dispatch": "dispatch",
    "combine": "combine",
    "combine, own weights": "combine, own weights",
    "dispatch + combine": "both",
    "dispatch + combine, general kernel": "both, general kernel",
    "four phases": "four phases",
}


def _tables(document: Document) -> list[Table]:
    columns = (
        "operation; hidden; tokens; room; SMs; p50; p99; max; p99 ÷ p50; mean; kernel; floor; "
        "eager p50; eager p99; eager max; wrong"
    ).split("; ")
    operations = Table(columns, [_row(result) for result in document["low_latency"]])
    calls = list(document["host"][0]["times"])
    host: list[list[Cell]] = [
        [_size(found), *(_p50_and_p99(found["times"][call]) for call in calls)]
        for found in document["host"]
    ]
    return [operations, Table(["host, p50 (p99)", *calls], host)]


def _row(result: Document) -> list[Cell]:
    graph, eager, kernel = (result[name] or {} for name in ("graph", "eager", "kernel"))
    tail = graph["p99"] / graph["p50"] if graph else None
    return [
        *(result[name] for name in ("operation", "hidden", "tokens", "room")),
        sms_text(result["num_sms"]),
        *(number(graph.get(name), ".1f") for name in ("p50", "p99", "max")),
        number(tail, ".2f"),
        *(number(us, ".1f") for us in (result["mean_us"], kernel.get("p50"), result["floor_us"])),
        *(number(eager.get(name), ".1f") for name in ("p50", "p99", "max")),
        result["wrong"],
    ]


def block(documents: Iterable[Document]) -> Table:
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
            label = f"{document['num_ranks']} × {gpu_of(document)}, {_size(both)}"
            rows.append([label, *cells, number(both["floor_us"], ".1f")])
    columns = ["µs, p50 (p99)", *_LATENCIES.values(), "NCCL alltoall, one way", "floor of both"]
    return Table(columns, rows)


def _size(found: Document) -> str:
    sms = f", {found['num_sms']} SMs" if found["num_sms"] else ""
    return f"hidden {found['hidden']}: {found['tokens']} tokens, room for {found['room']}{sms}"


def _p50_and_p99(times: Document | None) -> str | None:
    return f"{times['p50']:.1f} ({times['p99']:.1f})" if times else None


PAGE = Page(
    "low-latency",
    "Low latency: `ep-comm bench low-latency`",
    "Times in µs. [The guide](../performance.md#low-latency) explains the columns.",
    lambda document: "low_latency" in document,
    _tables,
)
