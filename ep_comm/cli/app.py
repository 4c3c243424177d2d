"""The commands of ``ep-comm``, as typer takes them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer
from rich.console import Console

from ep_comm.cli import bench, plan
from ep_comm.version import __version__

app = typer.Typer(
    help="Measure dispatch and combine, plan them for a cluster, compare trainings with other "
    "dispatchers; make a page of a run; say what this machine has, and who was late in a run that "
    "failed.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def version(
    wanted: Annotated[
        bool, typer.Option("--version", is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Print the version, where it is asked for."""
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.command(short_help="Say what this machine has; try the network between hosts.")
def doctor(
    network: Annotated[
        bool,
        typer.Option(
            "--network",
            help="Send messages between hosts, check and time them. Start it on each host by "
            "torchrun or srun, one process a GPU.",
        ),
    ] = False,
    backend: Annotated[
        str, typer.Option(help="With --network: what sends, nodes or reference.")
    ] = "nodes",
    ranks_per_node: Annotated[
        int | None,
        typer.Option(help="With --network: take so many ranks for a node, to try it out.", min=1),
    ] = None,
    timeout: Annotated[
        float, typer.Option(help="With --network: bound of every wait, in seconds.", min=0.1)
    ] = 30.0,
) -> None:
    """Show versions, GPUs, links, settings, and which backend will be used and why.

    With --network it exits with 1 if messages were wrong or missing, 2 if none could be sent.
    """
    if not network:
        from ep_comm.cli.doctor import diagnose

        typer.echo(diagnose())
        return
    import torch.distributed as dist

    from ep_comm.cli.network import BACKENDS, check
    from ep_comm.config import BackendName
    from ep_comm.job.exits import UserError, user_errors_exit

    with user_errors_exit():
        if backend not in BACKENDS:
            raise UserError(f"--backend {backend!r} is none of {', '.join(BACKENDS)}")
        is_sound = check(cast(BackendName, backend), ranks_per_node, timeout)
    dist.destroy_process_group()
    raise typer.Exit(0 if is_sound else 1)


app.add_typer(bench.app, name="bench", short_help="Time dispatch and combine, and trainings.")
app.command("plan", epilog=plan.EXAMPLE, short_help="Say what a cluster would take.")(plan.plan)


@app.command(
    short_help="Train with several dispatchers, and compare the losses.",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
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
        str,
        typer.Option(
            help="What to train; alltoall is what the others are compared with. -seedN behind any "
            "(N = 2, 3, ...) changes the seed of the weights: of alltoall that is the noise."
        ),
    ] = "alltoall,alltoall-seed2,ep_comm,ep_comm-fp8",
    tolerance_noise: Annotated[
        float, typer.Option(min=0, help="Allowed of ep_comm, in units of the noise between seeds.")
    ] = 1.0,
    tolerance_fp8: Annotated[
        float, typer.Option(min=0, help="Allowed of an FP8 wire, relative to the BF16 wire's loss.")
    ] = 0.005,
    wandb_project: Annotated[
        str | None, typer.Option(help="W&B project; all runs go into one group of it.")
    ] = None,
    script: Annotated[
        Path | None, typer.Option(help="Training script; default: ep_comm.pretrain.")
    ] = None,
) -> None:
    """Train the same model with several dispatchers, and report how far the losses differ.

    Any other --key value goes to the training script. Interrupted, the same command goes on where
    it was. Exits with 1 if a training fails, 2 if it cannot be done, 3 if a difference is outside
    of its tolerance.
    """
    from ep_comm.cli import compare as command
    from ep_comm.compare.plan import make_plan
    from ep_comm.compare.statistics import Tolerances
    from ep_comm.job.exits import user_errors_exit

    with user_errors_exit():
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
            Console(markup=False, highlight=False, soft_wrap=True),
        )
    raise typer.Exit(code)


@app.command(short_help="Make one page of a run, or of two beside each other.")
def report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN_DIR [OTHER_RUN_DIR]",
            help="--run-dir of a run, or of two, with log.jsonl.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="The page; default: report.html in RUN_DIR, of two runs report-OTHER_RUN_DIR.html."
        ),
    ] = None,
) -> None:
    """Make one HTML page that says how a training run went, and what to do about it.

    The run is one of examples/pretrain_moe.py, and may still be going. The page needs no network.
    docs/report.md says how to read it.
    """
    from ep_comm.job.exits import UserError, needs_extra, user_errors_exit

    with user_errors_exit():
        if len(folders) > 2:
            raise UserError(f"{len(folders)} folders: pass one run, or two to set side by side")
        with needs_extra("cli"):
            from ep_comm.cli import report as command
        command.report(folders, out, Console(soft_wrap=True))


@app.command(short_help="Show a training run while it is going.")
def watch(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN_DIR", help="--run-dir of the run, with log.jsonl.")
    ],
) -> None:
    """Show the last steps of a training run, 99th percentiles, the slowest rank, what stands out.

    It goes on until the last step, or Ctrl-C. Where the output is no terminal it shows them once.
    """
    from ep_comm.job.exits import user_errors_exit
    from ep_comm.report import live

    with user_errors_exit():
        live.watch(folder, Console(highlight=False))


@app.command(short_help="Say which rank was late, after a failure.")
def explain(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="Those that the ranks' errors name; or their folder, for the last failure."
        ),
    ],
) -> None:
    """Say which rank was late, from the files that ranks leave when a buffer fails.

    The files are of one run and one buffer. docs/recorder.md says where they are.
    """
    from ep_comm.cli import explain as command
    from ep_comm.job.exits import user_errors_exit

    with user_errors_exit():
        command.explain(files, Console(soft_wrap=True))


@app.command(short_help="Show a trace: in figures, beside torch's profiler, as a picture.")
def trace(
    file: Annotated[Path, typer.Argument(help="What Buffer.write_trace wrote.")],
    profiles: Annotated[
        list[Path] | None,
        typer.Argument(help="What torch's profiler exported on some of the ranks; .gz too."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Write one trace of all files, for Perfetto or Chrome; .gz: packed."),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Draw it: a PNG file with a lane for each rank.")
    ] = None,
    window_ms: Annotated[
        tuple[float, float] | None, typer.Option(help="Draw from here to there, in ms.")
    ] = None,
) -> None:
    """Say what ranks did and whom they waited for.

    With files of torch's profiler it also says how much of the communication no matrix product hid.
    docs/recorder.md says how to write these files.
    """
    from ep_comm.cli import trace as command
    from ep_comm.job.exits import user_errors_exit

    with user_errors_exit():
        command.trace(file, profiles or [], out, picture, window_ms, Console(soft_wrap=True))
