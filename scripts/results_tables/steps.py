"""Files of ``ep-comm bench train``."""

from __future__ import annotations

from collections.abc import Iterable

from ep_comm.bench.tables import number
from results_tables.names import variant_name
from results_tables.tables import Cell, Document, Page, Table, median_or_none


def _tables(document: Document) -> list[Table]:
    columns = (
        "variant; microbatches; step, ms; min–p90; alltoall ÷ this; of each block; "
        "tokens/s a GPU; peak memory, GiB"
    ).split("; ")
    steps = [
        [
            variant_name(result["variant"]),
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
        times = (
            number(median_or_none(layer[part]), ".2f") for part in ("forward", "backward", "total")
        )
        shown = None if ratio in (None, 1.0) else f"{ratio:.2f}"
        hidden = number(document.get("hidden_share", {}).get(name), ".0%")
        rows.append([variant_name(name), *times, shown, kernels, hidden])
    columns = (
        "MoE layer alone; forward, ms; backward, ms; both; alltoall ÷ this; kernels; combine hidden"
    )
    return [Table(columns.split("; "), rows)] if rows else []


def block(documents: Iterable[Document]) -> Table:
    """How much faster our steps are, the median of the blocks and the worst."""
    rows: list[list[Cell]] = []
    for document in documents:
        config = next(iter(document["configs"].values()))
        model = f"{config['num_layers']} layers of hidden {config['hidden_size']}"
        by_variant: dict[str, dict[int, str]] = {}
        for result in document["results"]:
            if (ratio := _speedup(result)) is not None:
                found = by_variant.setdefault(variant_name(result["variant"]), {})
                found[result["microbatches"]] = f"{ratio} ({result['ratio_worst']:.2f})"
        rows += [
            [f"{model}, {router(document)}: {name}", found.get(1), found.get(8)]
            for name, found in by_variant.items()
        ]
    return Table(["alltoall's step ÷ ours (worst block)", "one microbatch", "eight"], rows)


def router(document: Document) -> str:
    config = next(iter(document["configs"].values()))
    is_balanced = config.get("moe_router_force_load_balancing")
    return "balanced routing" if is_balanced else "an untrained router"


PAGE = Page(
    "training-steps",
    "Training steps: `ep-comm bench train`",
    "[The guide](../performance.md#training-steps) says how they are measured.",
    lambda document: "inspections" in document,
    _tables,
)
