"""``ep-comm bench`` itself: dispatch and combine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer
from rich.console import Console

from ep_comm.cli.common import (
    Experts,
    Fp8Too,
    Hidden,
    Layout,
    NumGroups,
    Preset,
    Replay,
    Tokens,
    Topk,
    TopkGroups,
    given_flags,
    leave,
    start,
    wide_console,
)


def bench(
    context: typer.Context,
    preset: Preset = None,
    tokens: Tokens = None,
    hidden: Hidden = None,
    experts: Experts = None,
    topk: Topk = None,
    routing: Annotated[
        str | None,
        typer.Option(
            help="uniform, group-limited or zipf; default: uniform, or group-limited by the flags "
            "below."
        ),
    ] = None,
    skew: Annotated[
        float | None, typer.Option(help="With zipf: exponent of the popularity; default: 1.2.")
    ] = None,
    num_groups: NumGroups = None,
    topk_groups: TopkGroups = None,
    replay: Replay = None,
    sms: Annotated[str, typer.Option(help="SM counts, such as 0,24,16; 0 is all.")] = "0",
    fp8: Fp8Too = False,
    layout: Layout = "expert",
    iters: Annotated[int, typer.Option(help="Samples of each time.")] = 20,
    out: Annotated[Path, typer.Option(help="Folder of bench.json, page and picture.")] = Path(
        "runs/bench"
    ),
) -> None:
    """Time dispatch and combine against the limit of the links and NCCL's alltoall.

    Run by torchrun, one process a GPU. The tables say VOID where the links carried too little for
    the figures to count. The subcommand low-latency times the operations for decoding, overlap
    says what operations cost the GEMMs beside them, and train times whole training steps.
    """
    if context.invoked_subcommand is not None:
        for flag in given_flags(context):
            raise typer.BadParameter(f"{flag} before {context.invoked_subcommand} has no effect")
        return
    # Imported here, so that --help and doctor need not wait for it.
    import torch
    import torch.distributed as dist

    from ep_comm.bench.ops.report import render, write_json, write_plot
    from ep_comm.bench.ops.routing import RoutingSpec
    from ep_comm.bench.ops.run import run
    from ep_comm.bench.ops.settings import Settings, parse_numbers, shape_of_flags
    from ep_comm.handle import RowLayout
    from ep_comm.job.exits import user_errors_exit
    from ep_comm.job.start import on_rank_0
    from ep_comm.report.screen import write_page

    with user_errors_exit():
        spec = RoutingSpec.of_flags(routing, num_groups, topk_groups, skew, replay)
        sizes = dict(tokens=tokens, hidden=hidden, experts=experts, topk=topk)
        settings = Settings(
            shape=shape_of_flags(preset, spec, **sizes),
            routing=spec,
            sms=parse_numbers("--sms", sms),
            fp8=fp8,
            layout=cast(RowLayout, layout),  # check() refuses others
            iters=iters,
        )
        settings.check()
        device = start("bench", num_processes=4)
        available_sms = torch.cuda.get_device_properties(device).multi_processor_count
        settings.check_job(dist.get_world_size(), available_sms)
        on_rank_0(lambda: out.mkdir(parents=True, exist_ok=True))
        progress = Console(stderr=True, quiet=dist.get_rank() != 0)
        result = run(settings, device, progress.print)

        def report() -> None:
            console = wide_console()
            console.print(render(result))
            write_json(result, out / "bench.json")
            write_page(render(result), "Dispatch and combine", out / "bench.html")
            if len(settings.sms) > 1:
                write_plot(result, available_sms, out / "bench.png")
            console.print(f"written to {out}", highlight=False)

        on_rank_0(report)
    leave()
