"""``ep-comm bench`` with ``low-latency``, ``overlap`` and ``train``."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import IO, Annotated, cast

import typer
from rich.console import Console

from ep_comm.pretrain.variants import VARIANTS

NUM_GROUPS_HELP = "Equal groups of consecutive experts; a token's come from its best groups."
TOPK_GROUPS_HELP = "How many of these groups a token's experts come from."
REPLAY_HELP = (
    "Folder that a training run wrote with --ep-capture-routing: take the experts that its tokens "
    "selected in the last step there, and its sizes. Or the folder of one step."
)
PRESET_HELP = (
    "Sizes not given below; default: W1. W1: 4096 tokens, hidden 7168, top-8 of 256. "
    "W2: 8192 tokens, hidden 2048, top-8 of 128."
)
_TABLE_WIDTH = 160  # of the widest table: less would cut figures

app = typer.Typer(
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback()
def bench(
    context: typer.Context,
    preset: Annotated[str | None, typer.Option(help=PRESET_HELP)] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens of each rank.")] = None,
    hidden: Annotated[int | None, typer.Option(help="Elements of a token.")] = None,
    experts: Annotated[int | None, typer.Option(help="Experts over all ranks.")] = None,
    topk: Annotated[int | None, typer.Option(help="Experts of a token.")] = None,
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
    num_groups: Annotated[int | None, typer.Option(help=NUM_GROUPS_HELP)] = None,
    topk_groups: Annotated[int | None, typer.Option(help=TOPK_GROUPS_HELP)] = None,
    replay: Annotated[Path | None, typer.Option(help=REPLAY_HELP)] = None,
    sms: Annotated[str, typer.Option(help="SM counts, such as 0,24,16; 0 is all.")] = "0",
    fp8: Annotated[bool, typer.Option("--fp8", help="FP8 dispatch too.")] = False,
    layout: Annotated[str, typer.Option(help="Order of the rows: expert or rank.")] = "expert",
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
        for name in context.params:
            source = context.get_parameter_source(name)
            if source is not None and source.name == "COMMANDLINE":
                raise typer.BadParameter(
                    f"--{name.replace('_', '-')} before {context.invoked_subcommand} has no effect"
                )
        return
    # Imported here, so that --help and doctor need not wait for it.
    import torch
    import torch.distributed as dist

    from ep_comm.bench.ops.report import render, write_json, write_plot
    from ep_comm.bench.ops.routing import RoutingSpec
    from ep_comm.bench.ops.run import run
    from ep_comm.bench.ops.settings import Settings, parse_sms, shape_of_flags
    from ep_comm.handle import RowLayout
    from ep_comm.job.exits import UserError, user_errors_exit
    from ep_comm.job.start import has_launcher, join, on_rank_0
    from ep_comm.report.screen import write_page

    with user_errors_exit():
        spec = RoutingSpec.of_flags(routing, num_groups, topk_groups, skew, replay)
        sizes = dict(tokens=tokens, hidden=hidden, experts=experts, topk=topk)
        settings = Settings(
            shape=shape_of_flags(preset, spec, **sizes),
            routing=spec,
            sms=parse_sms(sms),
            fp8=fp8,
            layout=cast(RowLayout, layout),  # check() refuses others
            iters=iters,
        )
        settings.check()
        if not has_launcher():
            raise UserError("start it with torchrun --nproc_per_node=4 -m ep_comm.cli bench ...")
        device = join()
        if device.type == "cpu":
            raise UserError("bench needs CUDA GPUs, and torch sees none (ep-comm doctor says more)")
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
    dist.barrier()
    dist.destroy_process_group()


@app.command("low-latency", short_help="Time the operations for decoding.")
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
    num_groups: Annotated[int | None, typer.Option(help=NUM_GROUPS_HELP)] = None,
    topk_groups: Annotated[int | None, typer.Option(help=TOPK_GROUPS_HELP)] = None,
    replay: Annotated[Path | None, typer.Option(help=REPLAY_HELP)] = None,
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
    from ep_comm.bench.low_latency.settings import (
        BackendName,
        parse_numbers,
        sizes,
    )
    from ep_comm.bench.ops.routing import RoutingSpec
    from ep_comm.job.exits import UserError, user_errors_exit
    from ep_comm.job.start import has_launcher, join, on_rank_0
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
        if not has_launcher():
            raise UserError(
                "start it with torchrun --nproc_per_node=2 -m ep_comm.cli bench low-latency ..."
            )
        device = join()
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
    dist.barrier()
    dist.destroy_process_group()
    if result.num_wrong:
        raise typer.Exit(1)


@app.command(short_help="Say what operations cost the GEMMs that run beside them.")
def overlap(
    preset: Annotated[str | None, typer.Option(help=PRESET_HELP)] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens of each rank.")] = None,
    hidden: Annotated[int | None, typer.Option(help="Elements of a token.")] = None,
    experts: Annotated[int | None, typer.Option(help="Experts over all ranks.")] = None,
    topk: Annotated[int | None, typer.Option(help="Experts of a token.")] = None,
    num_groups: Annotated[int | None, typer.Option(help=NUM_GROUPS_HELP)] = None,
    topk_groups: Annotated[int | None, typer.Option(help=TOPK_GROUPS_HELP)] = None,
    replay: Annotated[Path | None, typer.Option(help=REPLAY_HELP)] = None,
    sms: Annotated[str, typer.Option(help="SM counts; 0 is all.")] = "0,64,48,32,24,16",
    layouts: Annotated[str, typer.Option(help="Orders of the rows, a list of expert and rank.")] = (
        "expert,rank"
    ),
    fp8: Annotated[bool, typer.Option("--fp8", help="FP8 dispatch too.")] = False,
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
    from ep_comm.bench.ops.settings import parse_sms, shape_of_flags, with_flags
    from ep_comm.bench.overlap.report import render, write_json, write_plot, write_prices
    from ep_comm.bench.overlap.run import run
    from ep_comm.bench.overlap.settings import (
        OverlapSettings,
        of_model,
        parse_gemms,
        parse_layouts,
    )
    from ep_comm.job.exits import UserError, user_errors_exit
    from ep_comm.job.start import has_launcher, join, on_rank_0
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
            sms=parse_sms(sms),
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
        if not has_launcher():
            raise UserError(
                "start it with torchrun --nproc_per_node=2 -m ep_comm.cli bench overlap ..."
            )
        device = join()
        if device.type == "cpu":
            raise UserError("bench overlap needs CUDA GPUs, and torch sees none")
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
    dist.barrier()
    dist.destroy_process_group()
    if result.num_wrong:
        raise typer.Exit(1)


@app.command(
    short_help="Time whole training steps with several dispatchers.",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def train(
    context: typer.Context,
    config: Annotated[Path, typer.Option(help="YAML file of ep_comm.pretrain.")],
    variants: Annotated[
        str,
        typer.Option(
            help=f"What to train, out of {', '.join(VARIANTS)}. fp8: FP8 on the wire; fp8-experts: "
            "FP8 GEMMs; fp8-all: both; fp8-direct: both, and rows go into GEMMs as they came; "
            "overlap: weight gradients of experts beside communication; "
            "1f1b: Megatron's overlap of micro-batches; capacity: experts filled up to "
            "--moe-expert-capacity-factor, which is to be given; factor-F: rows for F times an "
            "expert's even share, and no wait for counts; device-counts-F: for a rank's, "
            "whose GEMM takes them from the device."
        ),
    ] = "alltoall,ep_comm,ep_comm-overlap",
    microbatches: Annotated[str, typer.Option(help="Of an optimizer step.")] = "1,8",
    blocks: Annotated[int, typer.Option(help="Visits of each variant.")] = 5,
    steps: Annotated[int, typer.Option(help="Timed steps of a visit, after one that is not.")] = 5,
    warmup: Annotated[int, typer.Option(help="Steps of each before the first visit.")] = 5,
    out: Annotated[Path, typer.Option(help="Folder of figures, page, traces and pictures.")] = Path(
        "runs/bench-train"
    ),
) -> None:
    """Time whole training steps with several dispatchers, interleaved block by block.

    Run by torchrun, one process a GPU. The model is the training example's, fed with random tokens;
    any other --key value goes to its configuration, as in --num-layers 2. Ratios are
    alltoall's time over the variant's (above 1: faster), for FP8 experts alltoall-fp8's.
    """
    import torch.distributed as dist

    from ep_comm.job.exits import UserError, needs_extra, user_errors_exit
    from ep_comm.job.start import agree, has_launcher, on_rank_0
    from ep_comm.report.screen import write_page

    # Whatever the trainings print is progress; the report alone goes to stdout.
    with user_errors_exit(), contextlib.redirect_stdout(sys.stderr), needs_extra("megatron"):
        from ep_comm.bench.train.settings import make_configs, make_train_settings
        from ep_comm.pretrain.start import join, prepare_megatron

        settings = make_train_settings(
            config=config,
            extra=context.args,
            variants=variants,
            microbatches=microbatches,
            blocks=blocks,
            steps=steps,
            warmup=warmup,
        )
        if not has_launcher():
            make_configs(settings, num_ranks=None)  # mistakes, without torchrun
            raise UserError(
                "start it with torchrun --nproc_per_node=N -m ep_comm.cli bench train --config ..."
            )
        device = join()
        configs = agree(lambda: make_configs(settings, dist.get_world_size()))
        on_rank_0(lambda: out.mkdir(parents=True, exist_ok=True))
        prepare_megatron()
        from ep_comm.bench.train.report import render, write_report
        from ep_comm.bench.train.run import run  # imports Megatron: only now

        progress = Console(stderr=True, quiet=dist.get_rank() != 0, soft_wrap=True, highlight=False)
        result = run(settings, configs, device, out, progress.print)
        on_rank_0(lambda: write_report(result, out, wide_console(sys.__stdout__)))
        on_rank_0(lambda: write_page(render(result), "Training steps", out / "bench-train.html"))
    dist.destroy_process_group()


def wide_console(file: IO[str] | None = None) -> Console:
    """Return a console that cuts no table."""
    return Console(file=file, width=max(Console(file=file).width, _TABLE_WIDTH))
