"""A plan as tables and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ep_comm._native import header
from ep_comm.bench.ops.routing import REPLAY
from ep_comm.bench.tables import screen_table
from ep_comm.job import files
from ep_comm.job.environment import surroundings
from ep_comm.plan.facts import FACTS
from ep_comm.plan.model import Operation, Plan, fewest_sms
from ep_comm.plan.sizes import MAX_GPUS

_LABELS = {
    "dispatch, cached": "dispatch, routing known",
    "dispatch, fresh": "dispatch, new routing",
    "combine": "combine",
}
_NOTES = """\
MB: what a GPU sends, and receives; GB/s: of a GPU, over the whole call
with own node: a row for each node of a token, its own too, which is how DeepEP counts
logical: a row for each expert of each token
A model, not a measurement: docs/plan.md has its formula, and how far it was off."""


def headline(plan: Plan) -> str:
    """Return cluster and workload."""
    return f"{plan.cluster.describe()}\n{plan.workload.describe()}"


def render(plan: Plan) -> Group:
    """Return what is printed."""
    return Group(_operations(plan), _resources(plan), _sizes(plan), Text(_NOTES, style="dim"))


def document(plan: Plan) -> dict[str, Any]:
    """Return everything: sizes, bytes, times, memory, and the constants."""
    return {
        "headline": headline(plan).replace("\n", "; "),
        **surroundings(),
        "cluster": asdict(plan.cluster),
        "workload": {
            **asdict(plan.workload),
            "shape": plan.workload.shape._asdict(),
        },
        "copies": plan.copies._asdict(),
        "operations": [_operation(operation) for operation in plan.operations],
        "dispatch_sms": plan.sms._asdict(),
        "chunk_rows": plan.chunks._asdict(),
        "memory": {**plan.memory._asdict(), "output_bytes": plan.output_bytes},
        "facts": [fact._asdict() for fact in FACTS],
    }


def write_json(plan: Plan, path: Path) -> None:
    """Write `document`."""
    files.write_json(path, document(plan))


def _operation(operation: Operation) -> dict[str, Any]:
    return {
        "name": operation.name,
        "us": operation.us,
        "limit": operation.limit,
        "bytes": operation.traffic._asdict(),
        "busy_us": operation.busy_us,
        "exposed_us": operation.exposed_us,
        "fixed_us": operation.fixed_us,
        "gb_per_s": {
            name: operation.gb_per_s(value) for name, value in operation.traffic._asdict().items()
        },
    }


def _operations(plan: Plan) -> Table:
    columns = (
        "", "µs", "limited by", "network MB", "NVLink MB", "network GB/s", "with own node",
        "NVLink GB/s", "logical GB/s",
    )  # fmt: skip
    table = screen_table(headline(plan), columns)
    for operation in plan.operations:
        traffic = operation.traffic
        table.add_row(
            _LABELS[operation.name],
            f"{operation.us:.0f}",
            operation.limit,
            *(f"{value / 1e6:.1f}" for value in (traffic.network, traffic.nvlink)),
            *(
                f"{operation.gb_per_s(value):.0f}" if plan.cluster.num_nodes > 1 else "-"
                for value in (traffic.network, traffic.to_nodes)
            ),
            f"{operation.gb_per_s(traffic.nvlink):.0f}",
            f"{operation.gb_per_s(traffic.to_experts):.0f}",
        )
    return table


def _resources(plan: Plan) -> Table:
    names = list(dict.fromkeys(name for op in plan.operations for name in op.busy_us))
    table = screen_table("busy, µs", ["", *names, "shorter hop exposed", "fixed"])
    for operation in plan.operations:
        busy = (operation.busy_us.get(name) for name in names)
        table.add_row(
            _LABELS[operation.name],
            *("-" if not us else f"{us:.0f}" for us in busy),
            f"{operation.exposed_us:.0f}",
            f"{operation.fixed_us:.0f}",
        )
    return table


def _sizes(plan: Plan) -> Table:
    table = Table.grid(padding=(0, 2))
    for line in _lines(plan):
        table.add_row(*line)
    return table


def _lines(plan: Plan) -> list[tuple[str, str]]:
    copies, cluster, chunks = plan.copies, plan.cluster, plan.chunks
    sms = [f"{count} {name}" for name, count in plan.sms._asdict().items() if count]
    rows = [f"{count} ({name})" for name, count in chunks._asdict().items() if count]
    memory = f"{_gib(plan.memory.nvlink)} GiB for NVLink"
    if cluster.num_nodes > 1:
        memory += f", {_gib(plan.memory.network)} for the network"
    how = "the library's own layout" if plan.memory.is_exact else "by the formula"
    lines = [
        ("copies", f"a token goes to {copies.ranks:.2f} ranks on {copies.nodes:.2f} nodes"),
        *_skew(plan),
        ("SMs", f"{cluster.num_sms}; of a dispatch {', '.join(sms)}"),
        ("", f"fewest that do not limit: {_fewest(plan)}"),
        ("chunks", f"rows of a flag: {', '.join(rows)}"),
        ("memory", f"{memory} ({how}); rows of a dispatch: {_gib(plan.output_bytes)}"),
    ]
    most = header.EP_MAX_NODE_RANKS
    if cluster.num_gpus > most:
        lines.append(("note", f"our kernels take {most} GPUs; the model goes on to {MAX_GPUS}"))
    return lines


def _skew(plan: Plan) -> list[tuple[str, str]]:
    if plan.workload.routing.kind != REPLAY:
        return []
    text = f"the fullest rank gets {plan.copies.fullest_rank:.2f} times the mean"
    if plan.cluster.num_nodes > 1:
        text += f", the fullest node {plan.copies.fullest_node:.2f}"
    return [("skew", f"{text}; bytes and times are the fullest one's")]


def _fewest(plan: Plan) -> str:
    found = ((name, fewest_sms(plan, name)) for name in ("dispatch, cached", "combine"))
    return ", ".join(
        f"{_LABELS[name].split(',')[0]} {'more than all' if sms is None else sms}"
        for name, sms in found
    )


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f}"
