"""Files of ``ep-comm bench`` and ``scripts/nodes_bench.py``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from statistics import median

from ep_comm.bench.tables import number
from ep_comm.bench.timing import summarize
from results_tables.names import setting_of, sms_text
from results_tables.tables import Cell, Document, Page, Table, median_or_none

_PEER = re.compile(r"(?P<name>(?!FP8).+?) (?P<operation>dispatch|combine)\b")
_FEW_SMS = 24


def _tables(document: Document) -> list[Table]:
    columns = (
        "case; SMs; limit; kernel; call; min–p90; call ÷ limit; back to back; from idle; "
        "host; host, idle; wire GB/s; logical GB/s"
    ).split("; ")
    tables = [Table(columns, [_row(result) for result in document["results"]])]
    if "one_node" in document:  # the same GPUs in the same run, by NVLink alone
        columns = ["case, as one node", *columns[1:]]
        tables.append(Table(columns, [_row(found) for found in document["one_node"]]))
    return tables


def _row(result: Document) -> list[Cell]:
    samples = result["samples_us"]
    times = {name: median_or_none(found) for name, found in samples.items()}
    call = summarize(samples["call"])
    spread = f"{call.min:.0f}–{call.p90:.0f}" if len(samples["call"]) > 1 else None
    rates = (
        result[f"{of}_bytes"] / times["call"] / 1e3 if f"{of}_bytes" in result else None
        for of in ("wire", "logical")
    )
    return [
        result["case"],
        sms_text(result["num_sms"]),
        *(number(us, ".0f") for us in (result["floor_us"], times["kernel"], times["call"])),
        spread,
        number(result["ratio"], ".2f"),
        *(number(times[name], ".0f") for name in ("unaligned", "idle", "host", "host_idle")),
        *(number(rate, ".0f") for rate in rates),
    ]


def block(documents: Iterable[Document]) -> Table:
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
            row: list[Cell] = [
                f"{setting_of(document)}: {says}",
                number(ours[0]["floor_us"], ".0f"),
            ]
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


PAGE = Page(
    "dispatch-and-combine",
    "Dispatch and combine: `ep-comm bench`",
    "Times in µs. [The guide](../performance.md#what-the-columns-are) explains the columns.",
    lambda document: "limit" in document and "prices" not in document,
    _tables,
)
