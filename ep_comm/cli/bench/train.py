"""``ep-comm bench train``."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ep_comm.cli.common import wide_console
from ep_comm.pretrain.variants import VARIANTS


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
            "whose GEMM takes them from the device; graphs: what precedes the dispatch in CUDA "
            "graphs, with a capacity the whole layer."
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
        from ep_comm.bench.train.report import render, write_figures, write_report
        from ep_comm.bench.train.results import TrainRun
        from ep_comm.bench.train.run import run  # imports Megatron: only now

        progress = Console(stderr=True, quiet=dist.get_rank() != 0, soft_wrap=True, highlight=False)

        def save(found: TrainRun) -> None:
            on_rank_0(lambda: write_figures(found, out))

        result = run(settings, configs, device, out, progress.print, save)
        on_rank_0(lambda: write_report(result, out, wide_console(sys.__stdout__)))
        on_rank_0(lambda: write_page(render(result), "Training steps", out / "bench-train.html"))
    dist.destroy_process_group()
