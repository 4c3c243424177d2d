"""What several commands share: options, how a job starts and ends, a console for wide tables."""

from __future__ import annotations

from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    import torch  # else --help would wait for it

Preset = Annotated[
    str | None,
    typer.Option(
        help="Sizes not given below; default: W1. W1: 4096 tokens, hidden 7168, top-8 of 256. "
        "W2: 8192 tokens, hidden 2048, top-8 of 128."
    ),
]
Tokens = Annotated[int | None, typer.Option(help="Tokens of each rank.")]
Hidden = Annotated[int | None, typer.Option(help="Elements of a token.")]
Experts = Annotated[int | None, typer.Option(help="Experts over all ranks.")]
Topk = Annotated[int | None, typer.Option(help="Experts of a token.")]
NumGroups = Annotated[
    int | None,
    typer.Option(help="Equal groups of consecutive experts; a token's come from its best groups."),
]
TopkGroups = Annotated[
    int | None, typer.Option(help="How many of these groups a token's experts come from.")
]
Replay = Annotated[
    Path | None,
    typer.Option(
        help="Folder that a training run wrote with --ep-capture-routing: take the experts that "
        "its tokens selected in the last step there, and its sizes. Or the folder of one step."
    ),
]
Fp8Too = Annotated[bool, typer.Option("--fp8", help="FP8 dispatch too.")]
Layout = Annotated[str, typer.Option(help="Order of the rows: expert or rank.")]

_TABLE_WIDTH = 160  # of the widest table: less would cut figures


def start(command: str, *, num_processes: int, needs_gpus: bool = True) -> torch.device:
    """Join the job that torchrun or srun started.

    Args:
        command: As the user types it, behind ``ep-comm``.
        num_processes: A number of them that makes sense, for the error.
        needs_gpus: Whether CPU ranks are refused.

    Returns:
        This rank's device.

    Raises:
        UserError: Nothing has started processes, or they have no GPUs; or as
            `ep_comm.job.start.join`.
    """
    from ep_comm.job.exits import UserError
    from ep_comm.job.start import has_launcher, join

    if not has_launcher():
        raise UserError(
            f"start it with torchrun --nproc_per_node={num_processes} -m ep_comm.cli {command} ..."
        )
    device = join()
    if needs_gpus and device.type == "cpu":
        raise UserError(
            f"{command} needs CUDA GPUs, and torch sees none (ep-comm doctor says more)"
        )
    return device


def leave(num_wrong: int = 0) -> None:
    """Leave the job, when all ranks are done; exit with 1 where results were wrong."""
    import torch.distributed as dist

    dist.barrier()
    dist.destroy_process_group()
    if num_wrong:
        raise typer.Exit(1)


def given_flags(context: typer.Context) -> list[str]:
    """Return the parameters of a command that its user has given, as flags."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return [
        f"--{name.replace('_', '-')}"
        for name, source in sources.items()
        if source is not None and source.name == "COMMANDLINE"
    ]


def wide_console(file: IO[str] | None = None) -> Console:
    """Return a console that cuts no table."""
    return Console(file=file, width=max(Console(file=file).width, _TABLE_WIDTH))
