"""The ``ep-comm`` command: ``ep-comm bench``, ``ep-comm compare`` and ``ep-comm doctor``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

try:
    import typer
    from rich.console import Console
except ImportError as error:
    raise SystemExit(f"error: {error.name} is missing: pip install 'ep_comm[cli]'") from None

VOID_EXIT_CODE = 4
_TABLE_WIDTH = 140  # where the output is no terminal

app = typer.Typer(
    help="Measure dispatch and combine, compare trainings with other dispatchers, and say what "
    "this machine has for them.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.command()
def bench(
    preset: Annotated[str, typer.Option(help="W1 or W2: sizes not given below.")] = "W1",
    tokens: Annotated[int | None, typer.Option(help="Tokens of each rank.")] = None,
    hidden: Annotated[int | None, typer.Option(help="Elements of a token.")] = None,
    experts: Annotated[int | None, typer.Option(help="Experts over all ranks.")] = None,
    topk: Annotated[int | None, typer.Option(help="Experts of a token.")] = None,
    routing: Annotated[str, typer.Option(help="uniform, group-limited or zipf.")] = "uniform",
    skew: Annotated[float, typer.Option(help="Of zipf: exponent of the popularity.")] = 1.2,
    groups: Annotated[int, typer.Option(help="Of group-limited: groups of experts.")] = 8,
    group_topk: Annotated[int, typer.Option(help="Of group-limited: groups of a token.")] = 4,
    sms: Annotated[str, typer.Option(help="SM counts, such as 0,24,16; 0 is all.")] = "0",
    fp8: Annotated[bool, typer.Option("--fp8", help="FP8 dispatch too.")] = False,
    layout: Annotated[str, typer.Option(help="Order of the rows: expert or rank.")] = "expert",
    iters: Annotated[int, typer.Option(help="Samples of each time.")] = 20,
    out: Annotated[Path, typer.Option(help="Folder of bench.json and the picture.")] = Path(
        "runs/bench"
    ),
) -> None:
    """Time dispatch and combine against the limit of the links and NCCL's alltoall.

    Run by torchrun, one process a GPU. Exits with 4 where the links carried too little for the
    figures to count.
    """
    # Imported here, so that --help and doctor need not wait for it.
    import torch
    import torch.distributed as dist

    from ep_comm.bench.launch import UserError, joined_job, on_rank_0
    from ep_comm.bench.report import render, write_json, write_plot
    from ep_comm.bench.routing import RoutingSpec
    from ep_comm.bench.run import run
    from ep_comm.bench.settings import PRESETS, Settings, parse_sms

    with joined_job() as device:
        if preset not in PRESETS:
            raise UserError(f"--preset {preset!r} is none of {', '.join(PRESETS)}")
        sizes = dict(tokens=tokens, hidden=hidden, experts=experts, topk=topk)
        settings = Settings(
            shape=PRESETS[preset]._replace(
                **{name: size for name, size in sizes.items() if size is not None}
            ),
            routing=RoutingSpec(kind=routing, skew=skew, num_groups=groups, group_topk=group_topk),
            sms=parse_sms(sms),
            fp8=fp8,
            layout=layout,
            iters=iters,
        )
        available_sms = torch.cuda.get_device_properties(device).multi_processor_count
        settings.check(dist.get_world_size(), available_sms)
        on_rank_0(lambda: out.mkdir(parents=True, exist_ok=True))
        is_first = dist.get_rank() == 0
        progress = Console(stderr=True, quiet=not is_first)
        result = run(settings, device, progress.print)

        def report() -> None:
            console = Console()
            if not console.is_terminal:
                console = Console(width=_TABLE_WIDTH)
            console.print(render(result))
            write_json(result, out / "bench.json")
            if len(settings.sms) > 1:
                write_plot(result, available_sms, out / "bench.png")
            console.print(f"written to {out}", highlight=False)

        on_rank_0(report)
    if result.limit.is_void:
        raise typer.Exit(VOID_EXIT_CODE)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def compare(
    context: typer.Context,
    config: Annotated[Path, typer.Option(help="YAML file of the training script.")],
    steps: Annotated[int | None, typer.Option(help="Steps; default: train_iters.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the report; default: runs/compare-CONFIG.")
    ] = None,
    nproc_per_node: Annotated[
        int | None, typer.Option(help="Processes; default: expert_model_parallel_size.")
    ] = None,
    variants: Annotated[
        str, typer.Option(help="What to train; alltoall is what the others are compared with.")
    ] = "alltoall,alltoall-seed2,deepep,deepep-fp8",
    tolerance_noise: Annotated[
        float, typer.Option(min=0, help="Allowed of deepep, in units of the two-seed noise.")
    ] = 1.0,
    tolerance_fp8: Annotated[
        float, typer.Option(min=0, help="Allowed of an FP8 wire, relative to the BF16 wire's loss.")
    ] = 0.005,
    wandb_project: Annotated[
        str | None, typer.Option(help="W&B project; all runs go into one group of it.")
    ] = None,
    script: Annotated[
        Path | None, typer.Option(help="Default: examples/pretrain_moe.py of CONFIG's checkout.")
    ] = None,
) -> None:
    """Train the same model with several dispatchers, and report how far the losses differ.

    Any other --key value goes to the training script. Interrupted, the same command goes on where
    it was. Exits with 1 if a training fails, 2 if it cannot be done, 3 if a difference is outside
    of its tolerance.
    """
    from ep_comm.compare import command
    from ep_comm.compare.plan import CompareError, make_plan
    from ep_comm.compare.statistics import Tolerances

    try:
        plan = make_plan(
            config=config,
            steps=steps,
            processes=nproc_per_node,
            variants=variants,
            script=script,
            wandb_project=wandb_project,
            extra=context.args,
        )
        code = command.compare(
            plan,
            out or Path("runs", f"compare-{config.stem}"),
            Tolerances(noise=tolerance_noise, fp8=tolerance_fp8),
            Console(),
            command=shlex.join(["ep-comm", *sys.argv[1:]]),
        )
    except CompareError as error:
        print(f"error: {error}", file=sys.stderr)
        code = command.USER_ERROR
    raise typer.Exit(code)


@app.command()
def doctor() -> None:
    """Versions, GPUs, links, settings, and which backend will be used and why."""
    from ep_comm.bench.doctor import diagnose

    Console().print(diagnose())


def main() -> None:
    """Entry point of the command."""
    app()


if __name__ == "__main__":
    main()
