"""Files of ``ep-comm bench overlap``."""

from __future__ import annotations

from collections.abc import Iterable

from ep_comm.bench.tables import number
from results_tables.names import setting_of, sms_text
from results_tables.tables import Cell, Document, Page, Table


def _tables(document: Document) -> list[Table]:
    names = ("alone", "links", "beside", "lost")
    if "limit" not in document:  # of an earlier version
        names = ("alone", "beside", "lost")
    columns = ["case", "rows by", "GEMM", "SMs", *names, "min–max", "serial", "wrong"]
    rows: list[list[Cell]] = []
    for price in document["prices"]:
        lost = price["samples_us"]["lost"]
        times = (price[f"{name}_us"] for name in names)
        rows.append(
            [
                price["case"],
                price["layout"],
                price["gemm"],
                sms_text(price["num_sms"]),
                *(number(us, ".0f") for us in times),
                f"{min(lost):.0f}–{max(lost):.0f}",
                number(price["serial_us"], ".0f"),
                price["num_wrong"],
            ]
        )
    return [Table(columns, rows)]


def block(documents: Iterable[Document]) -> Table:
    """GEMM time lost, a row an operation, a column an SM count; the least is bold."""
    rows: dict[str, dict[str, str]] = {}
    counts: dict[str, None] = {}
    for document in documents:
        for price in document["prices"]:
            by = f", rows by {price['layout']}" if price["layout"] else ""
            found = rows.setdefault(f"{setting_of(document)}: {price['case']}{by}", {})
            lost = f"{price['lost_us']:.0f}"
            count = sms_text(price["num_sms"]) or "its own"
            counts[count] = None
            found[count] = f"**{lost}**" if price["is_best"] and price["layout"] else lost
            found["serial"] = f"{price['serial_us']:.0f}"
    columns = [*counts, "serial"]
    cells: list[list[Cell]] = [
        [name, *(found.get(column) for column in columns)] for name, found in rows.items()
    ]
    heads = [f"{count} SMs" if count.isdigit() else count for count in columns]
    return Table(["µs of GEMM time lost", *heads], cells)


PAGE = Page(
    "overlap",
    "Beside GEMMs: `ep-comm bench overlap`",
    "Times in µs. [The guide](../performance.md#beside-gemms) says what they are.",
    lambda document: "prices" in document,
    _tables,
)
