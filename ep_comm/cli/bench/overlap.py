"""``ep-comm bench overlap``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ep_comm.cli.common import (
    Experts,
    Fp8Too,
    Hidden,
    NumGroups,
    Preset,
    Replay,
    Tokens,
    Topk,
    TopkGroups,
    leave,
    start,
    wide_console,
)


def overlap(
    preset: Preset = None,
    tokens: Tokens = None,
    hidden: Hidden = None,
    experts: Experts = None,
    topk: Topk = None,
    num_groups: NumGroups = None,
    topk_groups: TopkGroups = None,
    replay: Replay = None,
    sms: Annotated[str, typer.Option(help="SM counts; 0 is all.")] = "0,64,48,32,24,16",
    layouts: Annotated[str, typer.Option(help="Orders of the rows, a list of expert and rank.")] = (
        "expert,rank"
    ),
    fp8: Fp8Too = False,
    gemm: Annotated[
        str, typer.Option(help="Dense GEMMs to run beside, MxNxK, comma-separated.")
    ] = "4096x4096x7168",
    model: Annotated[
        Path | None,
        typer.Option(
            help="YAML file of ep_comm.pretrain: its sizes instead of the preset's, and "
            "Transformer Engine's grouped GEMM of its experts beside."
        ),
    ] = None,
    runs: Annotated[int, typer.Option(help="Runs of each operation.")] = 5,
    wire: Annotated[str, typer.Option(help="What moves rows: sm (kernels) or copy-engine.")] = "sm",
    write: Annotated[
        Path | None,
        typer.Option(
            help="File of prices to write or renew: an operation's new SM counts replace its old "
            "ones. With EP_COMM_PRICES=FILE asynchronous operations choose SMs by it."
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder of bench-overlap.json, page and picture.")
    ] = Path("runs/bench-overlap"),
) -> None:
    """Say how much GEMM time a dispatch or a combine costs when it runs beside GEMMs.

    Run by torchrun, one process a GPU. GEMMs run on one stream all along, operations back to back
    on another one; what the GEMMs lose is divided by the number of operations. The tables also
    have the operation alone, and serial: between GEMMs, with the whole GPU. Results are checked in
    the same run: exits with 1 if a row is wrong.
    """
    import torch
    import torch.distributed as dist

    from ep_comm.backends.nvlink import prices
    from ep_comm.bench.ops.routing import RoutingSpec
    from ep_comm.bench.ops.settings import parse_numbers, shape_of_flags, with_flags
    from ep_comm.bench.overlap.report import render, write_json, write_plot, write_prices
    from ep_comm.bench.overlap.run import run
    from ep_comm.bench.overlap.settings import (
        OverlapSettings,
        of_model,
        parse_gemms,
        parse_layouts,
    )
    from ep_comm.job.exits import UserError, user_errors_exit
    from ep_comm.job.start import on_rank_0
    from ep_comm.report.screen import write_page

    with user_errors_exit():
        spec = RoutingSpec.of_flags(None, num_groups, topk_groups, replay=replay)
        sizes = dict(tokens=tokens, hidden=hidden, experts=experts, topk=topk)
        if model is None:
            shape, expert_shape = shape_of_flags(preset, spec, **sizes), None
        else:
            shape, expert_shape = of_model(model)
            shape = with_flags(shape, **sizes)
        settings = OverlapSettings(
            shape=shape,
            routing=spec,
            sms=parse_numbers("--sms", sms),
            layouts=parse_layouts(layouts),
            fp8=fp8,
            gemms=parse_gemms(gemm),
            experts=expert_shape,
            runs=runs,
            wire=wire,  # type: ignore[arg-type]  # checked next
        )
        settings.check()
        if write is not None and wire != "sm":
            raise UserError(f"--write: prices are those of wire sm, not of {wire}")
        device = start("bench overlap", num_processes=2)
        gpu = torch.cuda.get_device_properties(device)
        settings.check_job(dist.get_world_size(), gpu.multi_processor_count)
        if write is not None and write.exists():
            prices.read(write).check_machine(gpu.name, gpu.multi_processor_count, "this machine")
        on_rank_0(lambda: out.mkdir(parents=True, exist_ok=True))
        progress = Console(stderr=True, quiet=dist.get_rank() != 0, highlight=False)
        result = run(settings, device, progress.print)

        def report() -> None:
            console = wide_console()
            console.print(render(result))
            write_json(result, out / "bench-overlap.json")
            write_plot(result, out / "bench-overlap.png")
            write_page(render(result), "GEMMs beside operations", out / "bench-overlap.html")
            if write is not None:
                write_prices(result, gpu.name, write)
            console.print(f"written to {out}", highlight=False)

        on_rank_0(report)
    leave(result.num_wrong)
