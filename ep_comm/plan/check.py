"""The model beside what was measured: by a benchmark of ours, or by others."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from ep_comm.bench.ops.routing import RoutingSpec
from ep_comm.bench.ops.settings import Shape
from ep_comm.bench.tables import number, screen_table, sms_name
from ep_comm.job.exits import UserError
from ep_comm.plan import facts
from ep_comm.plan.model import Operation, make_plan
from ep_comm.plan.sizes import Cluster, Workload

Document = dict[str, Any]

# Cases of a benchmark that the model has: whether rows are FP8, and the operation.
_CASES = {
    "dispatch, fresh": (False, "dispatch, fresh"),
    "dispatch, cached": (False, "dispatch, cached"),
    "combine": (False, "combine"),
    "FP8 dispatch, fresh": (True, "dispatch, fresh"),
    "FP8 dispatch, cached": (True, "dispatch, cached"),
}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A figure that was measured, and the model's.

    Attributes:
        setting: Of others: what ran where; else nothing.
        name: The operation.
        num_sms: SMs; 0 is all.
        unit: Of both figures.
        model: The model's.
        measured: What was measured.
        limit: What limits it, by the model.
        slack: Of two hops: what the measured time has beyond the longer one, as a share of the
            shorter one.
    """

    setting: str
    name: str
    num_sms: int
    unit: str
    model: float
    measured: float
    limit: str
    slack: float | None = None

    @property
    def deviation(self) -> float:
        """How much more the model has; negative where it has less."""
        return self.model / self.measured - 1


def read(path: Path) -> Document:
    """Return a file that can be compared.

    Raises:
        UserError: It cannot be read, or is of no kind that the model has figures for.
    """
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--check {path}: {error}") from None
    if not (isinstance(document, dict) and ("published" in document or _is_bench(document))):
        raise UserError(
            f"--check {path} is neither of ep-comm bench or scripts/nodes_bench.py nor a file with "
            '"published" figures'
        )
    return document


def compare(document: Document) -> list[Comparison]:
    """Return a comparison for each figure that the model has too.

    Args:
        document: What ``ep-comm bench`` or ``scripts/nodes_bench.py --json`` wrote, where the rate
            of the links was measured in the same run; or one with "published" figures.

    Raises:
        UserError: The file lacks something, or has what no plan can have.
    """
    try:
        return _with_published(document) if "published" in document else _with_bench(document)
    except (KeyError, TypeError) as error:
        raise UserError(f"the file cannot be compared: {error!r}") from None


def render(document: Document, title: str) -> Table:
    """Return `compare` as a table."""
    columns = ["", "SMs", "unit", "model", "measured", "deviation", "limited by", "slack"]
    table = screen_table(title, columns)
    for found in compare(document):
        table.add_row(
            f"{found.setting}: {found.name}" if found.setting else found.name,
            sms_name(found.num_sms),
            found.unit,
            f"{found.model:.0f}",
            f"{found.measured:.0f}",
            f"{found.deviation:+.0%}",
            found.limit,
            number(found.slack, ".2f") or "-",
        )
    return table


def _is_bench(document: Document) -> bool:
    return all(name in document for name in ("results", "limit", "num_ranks", "settings"))


def _with_bench(document: Document) -> list[Comparison]:
    num_ranks, settings = document["num_ranks"], document["settings"]
    routing = RoutingSpec.of_json(settings["routing"])
    if routing.kind == "zipf":
        raise UserError("the file cannot be compared: a plan has no zipf routing")
    per_node = document.get("ranks_per_node") or num_ranks
    # The links' and the throttle's rates are what was reached, not nominal ones.
    cluster = Cluster(
        num_nodes=num_ranks // per_node,
        gpus_per_node=per_node,
        nvlink_gb_per_s=document["limit"]["gb_per_s"],
        nvlink_share=1,
        nic_gb_per_s=document.get("network_gb_per_s") or float("inf"),
        nic_share=1,
        nic_latency_us=facts.NVLINK_LATENCY.value,
        nvlink_is_network=per_node < num_ranks,
    )

    def operation(num_sms: int, is_fp8: bool, name: str) -> Operation:
        plan = make_plan(
            dataclasses.replace(cluster, num_sms=num_sms or facts.GPU_SMS),
            Workload(
                shape=Shape(**settings["shape"]),
                routing=routing,
                fp8=is_fp8,
                layout=settings["layout"],
            ),
        )
        return plan.operation(name)

    found = []
    for result in document["results"]:
        if result["case"] in _CASES and result["num_sms"] is not None:
            modelled = operation(result["num_sms"], *_CASES[result["case"]])
            measured = median(result["samples_us"]["call"])
            found.append(
                Comparison(
                    setting="",
                    name=result["case"],
                    num_sms=result["num_sms"],
                    unit="µs",
                    model=modelled.us,
                    measured=measured,
                    limit=modelled.limit,
                    slack=_slack(modelled, measured),
                )
            )
    return found


def _slack(modelled: Operation, measured_us: float) -> float | None:
    shorter, longer = sorted((modelled.busy_us["network"], modelled.busy_us["NVLink"]))
    return (measured_us - longer) / shorter if shorter else None


def _with_published(document: Document) -> list[Comparison]:
    """GB/s, as DeepEP counts: a row for each node of a token over the time of the call."""
    found = []
    for figure in document["published"]:
        cluster = Cluster(**figure["cluster"])
        workload = Workload(
            shape=Shape(**figure["shape"]),
            routing=RoutingSpec.of_json(figure["routing"]),
            fp8=figure["fp8"],
            layout="rank",
        )
        for name, case in (("dispatch", "dispatch, cached"), ("combine", "combine")):
            modelled = make_plan(cluster, workload).operation(case)
            found.append(
                Comparison(
                    setting=figure["name"],
                    name=name,
                    num_sms=figure["num_sms"],
                    unit="GB/s",
                    model=modelled.gb_per_s(modelled.traffic.to_nodes),
                    measured=figure[f"{name}_gb_per_s"],
                    limit=modelled.limit,
                )
            )
    return found
