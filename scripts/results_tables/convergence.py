"""Files of ``ep-comm compare``."""

from __future__ import annotations

from statistics import fmean

from ep_comm.bench.tables import number
from ep_comm.compare.statistics import standard_error
from results_tables.names import variant_name
from results_tables.tables import Cell, Document, Page, Table


def _tables(document: Document) -> list[Table]:
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
                variant_name(name),
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
                label = f"{variant_name(name)} against {variant_name(found['counterpart'])}"
                seeds = ", ".join(map(str, found["seeds"]))
                shown = ", ".join(f"{value:+.2%}" for value in each)
                mean = f"{fmean(each):+.2%} ± {standard_error(each):.2%}"
                rows.append([label, says, seeds, shown, mean])
    return [Table(columns.split("; "), rows)] if rows else []


PAGE = Page(
    "convergence",
    "Losses: `ep-comm compare`",
    "[The guide](../convergence.md) says how runs are compared and how to read it.",
    lambda document: "variants" in document,
    _tables,
)
