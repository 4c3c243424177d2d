"""Measured and published figures beside the model of ``ep-comm plan``."""

from __future__ import annotations

from collections.abc import Iterable

from ep_comm.plan.check import compare
from results_tables.names import setting_of, sms_text
from results_tables.tables import Cell, Document, Page, Table


def block(documents: Iterable[Document]) -> Table:
    """The model beside what was measured, a row a setting and number of SMs."""
    found: dict[tuple[str, int], dict[str, str]] = {}
    units: dict[str, None] = {}
    for document in documents:
        setting = ""
        if "published" not in document:
            by_rank = ", rows by rank" if document["settings"]["layout"] == "rank" else ""
            setting = f"{setting_of(document)}{by_rank}"
        for each in compare(document):
            row = found.setdefault((each.setting or setting, each.num_sms), {})
            slack = "" if each.slack is None else f", slack {each.slack:.2f}"
            deviation = f"{each.deviation:+.0%}".replace("-", "−").replace("%", " %")
            row[each.name] = f"{each.model:.0f} ({each.measured:.0f}) {deviation}{slack}"
            units[each.unit] = None
    names = list(dict.fromkeys(name for row in found.values() for name in row))
    rows: list[list[Cell]] = [
        [setting, sms_text(sms), *(row.get(name) for name in names)]
        for (setting, sms), row in found.items()
    ]
    return Table([f"{' or '.join(units)}: model (measured)", "SMs", *names], rows)


PAGE = Page(
    "plan",
    "Published figures beside the model: `ep-comm plan`",
    "[The guide](../plan.md) states the model and says how it is compared.",
    lambda document: "published" in document,
    lambda document: [block([document])],
)
