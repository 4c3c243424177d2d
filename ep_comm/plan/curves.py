"""Plans of one node to 1024 GPUs, as a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ep_comm._native import header
from ep_comm.bench.ops.routing import REPLAY, RoutingSpec
from ep_comm.job.exits import UserError
from ep_comm.plan.model import Plan, make_plan
from ep_comm.plan.sizes import MAX_GPUS, Cluster, Workload

_COLORS = {
    "dispatch": "tab:blue",
    "combine": "tab:red",
    "nodes": "tab:orange",
    "ranks": "tab:green",
}


def curve(cluster: Cluster, workload: Workload, routing: RoutingSpec) -> list[Plan]:
    """Return plans of 1, 2, 4, ... nodes of `cluster`, to 1024 GPUs.

    Beyond as many GPUs as there are experts each GPU has one. Numbers of nodes that cannot share
    the experts, or the groups, evenly are left out.

    Raises:
        UserError: None can.
    """
    plans = []
    num_nodes = 1 if cluster.gpus_per_node > 1 else 2
    while (num_gpus := num_nodes * cluster.gpus_per_node) <= MAX_GPUS:
        experts = max(workload.shape.experts, num_gpus)
        fits = experts % num_gpus == 0
        if routing.kind == REPLAY:  # it has experts of its own
            fits = fits and experts == workload.shape.experts
        if routing.kind == "group-limited":
            fits = fits and experts % routing.num_groups == 0
        if fits:
            sizes = dataclasses.replace(
                workload, shape=workload.shape._replace(experts=experts), routing=routing
            )
            plans.append(make_plan(dataclasses.replace(cluster, num_nodes=num_nodes), sizes))
        num_nodes *= 2
    if not plans:
        raise UserError(
            f"--plot: no 1, 2, 4, ... nodes of --gpus-per-node {cluster.gpus_per_node} can share "
            f"--experts {workload.shape.experts} evenly"
        )
    return plans


def write_plot(plan: Plan, path: Path) -> None:
    """Draw times, copies and memory over GPUs: of the workload's routing, and of a uniform one.

    Raises:
        OSError: The file cannot be written.
    """
    from matplotlib.figure import Figure  # slow to import, and seldom needed

    cluster, workload = plan.cluster, plan.workload
    routings = list(dict.fromkeys([RoutingSpec(), workload.routing]))
    curves = [curve(cluster, workload, routing) for routing in routings]
    figure = Figure(figsize=(13, 5), layout="constrained")
    times, copies, memory = figure.subplots(1, 3)
    for plans, routing, style in zip(curves, routings, ("-", "--"), strict=False):
        label = f", {routing.describe()}" if len(routings) > 1 else ""
        gpus = [plan.cluster.num_gpus for plan in plans]
        for name, at in (("dispatch", 0), ("combine", 2)):
            ms = [plan.operations[at].us / 1e3 for plan in plans]
            (line,) = times.plot(gpus, ms, style, color=_COLORS[name], label=name + label)
            is_network = [plan.operations[at].limit == "network" for plan in plans]
            for x, y, filled in zip(gpus, ms, is_network, strict=True):
                face = line.get_color() if filled else "white"
                times.plot(x, y, "o", color=line.get_color(), markerfacecolor=face, markersize=5)
        for name, of_plan in (
            ("ranks", [plan.copies.ranks for plan in plans]),
            ("nodes", [plan.copies.nodes for plan in plans]),
        ):
            copies.plot(gpus, of_plan, style, marker="o", ms=3, color=_COLORS[name],
                        label=name + label)  # fmt: skip
    plans = curves[0]
    gpus = [plan.cluster.num_gpus for plan in plans]
    parts = [[plan.memory.nvlink / 2**30 for plan in plans]]
    parts.append([plan.memory.network / 2**30 for plan in plans])
    memory.stackplot(gpus, *parts, labels=["NVLink", "network"],
                     colors=["tab:green", "tab:orange"], alpha=0.6)  # fmt: skip
    times.set_ylabel("ms of a call (filled: the network limits)")
    times.set_ylim(bottom=0)
    copies.set_ylabel("distinct ranks and nodes of a token")
    copies.set_ylim(bottom=0)
    memory.set_ylabel("GiB of a buffer on each GPU")
    for axes in (times, copies, memory):
        _over_gpus(axes, gpus)
    experts = workload.shape.experts
    more = f"; beyond {experts} GPUs one expert each" if gpus[-1] > experts else ""
    tokens, hidden, _, topk = workload.shape
    shape = f"{tokens} tokens x {hidden}, top-{topk} of {experts}"
    figure.suptitle(
        f"Modelled, not measured: {_per_node(cluster)}\n"
        f"{shape}{more}; {'FP8' if workload.fp8 else 'BF16'} dispatch, BF16 combine",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)


def _per_node(cluster: Cluster) -> str:
    return (
        f"nodes of {cluster.gpus_per_node} GPUs, NVLink {cluster.nvlink_gb_per_s:g}, network "
        f"{cluster.nic_gb_per_s:g} GB/s, {cluster.num_sms} SMs"
    )


def _over_gpus(axes, gpus: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(gpus, [str(count) for count in gpus])
    axes.minorticks_off()
    axes.set_xlabel("GPUs")
    if gpus[-1] > header.EP_MAX_NODE_RANKS:
        most = header.EP_MAX_NODE_RANKS
        axes.axvline(
            most, color="gray", linestyle=":", linewidth=1, label="the most our kernels take"
        )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
