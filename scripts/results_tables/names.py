"""What the tables call runs, SM counts and variants."""

from __future__ import annotations

import re

from ep_comm.bench.ops.routing import RoutingSpec
from ep_comm.bench.tables import sms_name
from results_tables.tables import Document


def sms_text(num_sms: int | None) -> str | None:
    return None if num_sms is None else sms_name(num_sms)


def variant_name(name: str) -> str:
    """Older runs call our dispatcher by the value of Megatron's flag."""
    return re.sub(r"^deepep", "ep_comm", name)


def setting_of(document: Document) -> str:
    settings = document["settings"]
    routing = RoutingSpec.of_json(settings["routing"])
    groups = f", experts in {routing.describe()}" if routing.kind == "group-limited" else ""
    hidden = settings["shape"]["hidden"]
    rate = document.get("network_gb_per_s")
    network = f", network of {rate:g} GB/s" if rate else ""
    return f"{_ranks_of(document)} × {gpu_of(document)}, hidden {hidden}{groups}{network}"


def _ranks_of(document: Document) -> str:
    """Where they are parts of one host, nodes and the ranks of each."""
    ranks = document["num_ranks"]
    per_node = document.get("ranks_per_node", ranks)
    return str(ranks) if per_node == ranks else f"{ranks // per_node} × {per_node}"


def gpu_of(document: Document) -> str:
    return document["gpus"][0].removeprefix("NVIDIA ") if document["gpus"] else "CPU ranks"
