"""``ep-comm plan``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, cast

import typer

from ep_comm.cli.common import (
    Experts,
    Hidden,
    Layout,
    NumGroups,
    Preset,
    Replay,
    Tokens,
    Topk,
    TopkGroups,
    given_flags,
    wide_console,
)
from ep_comm.plan import facts

EXAMPLE = (
    "DeepSeek-V3 on 8 nodes of 8 H200s with 400 Gb/s each: ep-comm plan --nodes 8 --fp8 "
    "--num-groups 8 --topk-groups 4 --plot plan.png"
)


def plan(
    context: typer.Context,
    nodes: Annotated[int, typer.Option(help="Nodes that the experts are spread over.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs of a node: 1 to 8.")] = 8,
    nvlink_gb_per_s: Annotated[
        float, typer.Option(help="NVLink's nominal rate of a GPU, one way: 450 for Hopper.")
    ] = facts.NVLINK_GB_PER_S,
    nic_gb_per_s: Annotated[
        float, typer.Option(help="Nominal rate of a GPU's network card, one way: 50 for 400 Gb/s.")
    ] = facts.NIC_GB_PER_S,
    nvlink_latency_us: Annotated[
        float, typer.Option(help="What a flag takes over NVLink.")
    ] = facts.NVLINK_LATENCY.value,
    nic_latency_us: Annotated[
        float, typer.Option(help="What a message and its flag take over the network.")
    ] = facts.NIC_LATENCY.value,
    sms: Annotated[
        int, typer.Option(help="SMs of an operation: 132 is all of a Hopper.")
    ] = facts.GPU_SMS,
    preset: Preset = None,
    tokens: Tokens = None,
    hidden: Hidden = None,
    experts: Experts = None,
    topk: Topk = None,
    num_groups: NumGroups = None,
    topk_groups: TopkGroups = None,
    replay: Replay = None,
    fp8: Annotated[bool, typer.Option("--fp8", help="FP8 dispatch; combine is BF16.")] = False,
    layout: Layout = "expert",
    json: Annotated[Path | None, typer.Option(help="File for all of it as JSON.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="File for a picture of 1 node to 1024 GPUs, such as x.png.")
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option(
            help="Compare the model with this file instead: JSON of ep-comm bench or "
            "scripts/nodes_bench.py, or published figures. No other flag goes with it."
        ),
    ] = None,
) -> None:
    """Say what dispatch and combine will take on a cluster: bytes, times, limits, memory.

    It needs no GPU and measures nothing: it is a simple model. docs/plan.md states it, and how far
    it was off. Rates are of one GPU and one way. GB/s are 10^9 bytes a second.
    """
    from ep_comm.bench.ops.routing import RoutingSpec
    from ep_comm.bench.ops.settings import shape_of_flags
    from ep_comm.handle import RowLayout
    from ep_comm.job.exits import UserError, user_errors_exit
    from ep_comm.plan import check as comparison
    from ep_comm.plan.curves import write_plot
    from ep_comm.plan.model import make_plan
    from ep_comm.plan.report import render, write_json
    from ep_comm.plan.sizes import Cluster, Workload

    console = wide_console()
    with user_errors_exit():
        if check is not None:
            for flag in given_flags(context):
                if flag != "--check":
                    raise UserError(f"{flag} has no effect with --check")
            console.print(comparison.render(comparison.read(check), check.name))
            return
        cluster = Cluster(
            num_nodes=nodes,
            gpus_per_node=gpus_per_node,
            nvlink_gb_per_s=nvlink_gb_per_s,
            nic_gb_per_s=nic_gb_per_s,
            nvlink_latency_us=nvlink_latency_us,
            nic_latency_us=nic_latency_us,
            num_sms=sms,
        )
        spec = RoutingSpec.of_flags(None, num_groups, topk_groups, replay=replay)
        sizes = dict(tokens=tokens, hidden=hidden, experts=experts, topk=topk)
        workload = Workload(
            shape=shape_of_flags(preset, spec, **sizes),
            routing=spec,
            fp8=fp8,
            layout=cast(RowLayout, layout),  # check() refuses others
        )
        cluster.check()
        workload.check(cluster)
        found = make_plan(cluster, workload)
        console.print(render(found))
        writers = ((json, partial(write_json, found)), (plot, partial(write_plot, found)))
        for path, write in writers:
            if path is not None:
                try:
                    write(path)
                except (OSError, ValueError) as error:  # of a suffix that matplotlib does not know
                    raise UserError(f"{path} cannot be written: {error}") from None
