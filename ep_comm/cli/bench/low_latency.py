"""``ep-comm bench low-latency``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer
from rich.console import Console

from ep_comm.cli.common import (
    NumGroups,
    Replay,
    TopkGroups,
    leave,
    start,
    wide_console,
)


def low_latency(
    tokens: Annotated[
        str | None, typer.Option(help="Tokens of each rank; default: 1,8,32,128,256.")
    ] = None,
    hidden: Annotated[
        str | None, typer.Option(help="Elements of a token; default: 7168. A list too.")
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Hidden 2048, 4096 and 7168: three times as long.")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="8 and 128 tokens, 100 replays: half a minute.")
    ] = False,
    topk: Annotated[int | None, typer.Option(help="Experts of a token; default: 8.")] = None,
    experts: Annotated[
        int | None,
        typer.Option(help="Over all ranks; rounded up to a multiple of them; default: 288."),
    ] = None,
    num_groups: NumGroups = None,
    topk_groups: TopkGroups = None,
    replay: Replay = None,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Dispatch BF16 rows, not FP8. Combine is BF16.")
    ] = False,
    num_sms: Annotated[str, typer.Option(help="SM counts, such as 0,32; 0 is all.")] = "0",
    replays: Annotated[
        int | None,
        typer.Option(help="Of each CUDA graph, of 20 operations; default: 500. 10000 for tails."),
    ] = None,
    backend: Annotated[
        str,
        typer.Option(
            help="nvlink; nodes: the kernels between hosts, with NVLink for a network; or "
            "reference: the host's time, of CPU ranks."
        ),
    ] = "nvlink",
    out: Annotated[
        Path, typer.Option(help="Folder of bench-low-latency.json, page and picture.")
    ] = Path("runs/bench-low-latency"),
) -> None:
    """Time low-latency dispatch and combine against what the links can do, and NCCL's alltoall.

    Run by torchrun, one process a GPU: median, 99th percentile and maximum in CUDA graphs and in
    eager calls, fused and phase by phase, and the host's time of each call. Every size is measured
    with room for just its tokens, and for 128. Results are checked in the same run: exits with 1
    if a row is wrong.
    """
    import torch
    import torch.distributed as dist

    from ep_comm.bench.low_latency.report import render, write_json, write_plot
    from ep_comm.bench.low_latency.run import Run, run
    from ep_comm.bench.low_latency.settings import BackendName, sizes
    from ep_comm.bench.ops.routing import RoutingSpec
    from ep_comm.bench.ops.settings import parse_numbers
    from ep_comm.job.exits import user_errors_exit
    from ep_comm.job.start import on_rank_0
    from ep_comm.report.screen import write_page

    with user_errors_exit():
        settings = sizes(
            tokens=None if tokens is None else parse_numbers("--tokens", tokens),
            hidden=None if hidden is None else parse_numbers("--hidden", hidden),
            replays=replays,
            full=full,
            quick=quick,
            topk=topk,
            experts=experts,
            routing=RoutingSpec.of_flags(None, num_groups, topk_groups, replay=replay),
            fp8=not bf16,
            num_sms=parse_numbers("--num-sms", num_sms),
            backend=cast(BackendName, backend),  # check() refuses others
        )
        settings.check()
        device = start("bench low-latency", num_processes=2, needs_gpus=False)
        available_sms = None
        if device.type == "cuda":
            available_sms = torch.cuda.get_device_properties(device).multi_processor_count
        settings.check_job(dist.get_world_size(), available_sms)
        on_rank_0(lambda: out.mkdir(parents=True, exist_ok=True))
        is_first = dist.get_rank() == 0
        progress = Console(stderr=True, quiet=not is_first)

        def save(found: Run) -> None:
            if is_first:
                write_json(found, out / "bench-low-latency.json")

        result = run(settings, device, progress.print, save)

        def report() -> None:
            console = wide_console()
            console.print(render(result))
            write_plot(result, out / "bench-low-latency.png")
            title = "Low-latency dispatch and combine"
            write_page(render(result), title, out / "bench-low-latency.html")
            console.print(f"written to {out}", highlight=False)

        on_rank_0(report)
    leave(result.num_wrong)
