"""A run of ``ep-comm bench train`` as tables, as JSON and as pictures."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from ep_comm.bench.tables import number, screen_table
from ep_comm.bench.train.profile import Bar
from ep_comm.bench.train.results import TrainRun
from ep_comm.bench.train.timeline import draw_timelines
from ep_comm.job.environment import commit, surroundings, versions
from ep_comm.job.files import write_json
from ep_comm.pretrain.variants import serial_of

_BASELINE = """
    bf16 moe_grouped_gemm moe_permute_fusion moe_router_fusion moe_router_force_load_balancing
    gradient_accumulation_fusion use_distributed_optimizer overlap_grad_reduce overlap_param_gather
    manual_gc
""".split()
_ENVIRONMENT = """
    CUDA_DEVICE_MAX_CONNECTIONS NVTE_USE_CUTLASS_GROUPED_GEMM PYTORCH_CUDA_ALLOC_CONF
""".split()

_STEP_NOTES = """\
step: the slowest rank's, on the GPU's clock, over all blocks; x: step time of alltoall (of \
alltoall-fp8 for FP8 experts, alltoall-capacity with a capacity, and of the faster one of alltoall \
and alltoall-1f1b for ep_comm-1f1b) over the variant's, of the blocks' medians
memory: highest on any rank, torch's and ep_comm's buffers; allocs: torch asked the driver for \
memory in the timed steps (that is slow: more than a few want more --warmup); loss: of the last \
step, all variants see the same tokens"""
_LAYER_NOTES = """\
MoE layer alone: the first one, router to combine, ranks aligned, medians of the slowest rank; x \
as above, of forward + backward
combine alone: our backward combine's kernels, all SMs; hidden: what the backward gains, in that \
unit, by weight gradients beside the combine instead of behind it, the median of pairs of passes
dispatch, experts, combine of a step: forward, summed over layers and microbatches, permutation \
and padding included, on the rank where it is longest; dropped: of the experts that tokens \
selected, by their capacity"""
_HOST_NOTES = """\
one step, and one forward + backward of the layer alone, of rank 0 while torch's profiler records \
(which makes the host slower)
kernels: launched; waits: of the host for the GPU, or for the sizes of a dispatch; host: µs or ms \
of the host without the waits; busy: at least one kernel or copy runs, if only to wait \
for another rank; EP: tokens are on their way, by ours or by NCCL's messages, of any micro-batch; \
exposed: the part of it in which no matrix product runs"""


def write_report(run: TrainRun, out: Path, console: Console) -> None:
    """Write `write_figures`, ``steps.png`` and ``overlap.png``, and print the tables."""
    write_figures(run, out)
    console.print(render(run))
    draw_steps(run, out / "steps.png")
    timelines = _overlap_timelines(run)
    if timelines:
        title = f"backward of one MoE layer, rank 0 of {run.num_ranks}; {headline(run)}"
        draw_timelines(timelines, title, out / "overlap.png")
    console.print(f"written to {out}", highlight=False)


def write_figures(run: TrainRun, out: Path) -> None:
    """Write ``bench-train.json``, of an unfinished run too, whose blocks are complete."""
    write_json(out / "bench-train.json", document(run))


def headline(run: TrainRun) -> str:
    """Return the model and the job in a line."""
    config = run.config
    return (
        f"{run.settings.config.stem}: {config['num_layers']} layers, "
        f"hidden {config['hidden_size']}, {config['num_experts']} experts x "
        f"{config['moe_ffn_hidden_size']}, top-{config['moe_router_topk']}, "
        f"{config['micro_batch_size'] * config['seq_length']} tokens a microbatch, "
        f"EP {config['expert_model_parallel_size']} of {run.num_ranks} ranks"
    )


def baseline(run: TrainRun) -> str:
    """Return what alltoall and the others have in common."""
    config = run.config
    switches = ", ".join(
        f"{key} {'on' if config[key] else 'off'}" for key in _BASELINE if key in config
    )
    environment = ", ".join(f"{name} {os.environ.get(name, 'unset')}" for name in _ENVIRONMENT)
    cpus = len(os.sched_getaffinity(0))
    return (
        f"all variants: {switches}, vocabulary {run.vocab_size}, {environment}, a rank may run on "
        f"{cpus} of {os.cpu_count()} CPUs"
    )


def render(run: TrainRun) -> Group:
    """Return what rank 0 prints."""
    known = ", ".join(f"{name} {version}" for name, version in versions().items())
    return Group(
        _step_table(run),
        Text(_STEP_NOTES, style="dim"),
        _layer_table(run),
        Text(_LAYER_NOTES, style="dim"),
        _host_table(run) if run.device == "cuda" else Text("host costs: there is no GPU"),
        Text(_HOST_NOTES if run.device == "cuda" else "", style="dim"),
        Text(baseline(run)),
        Text(f"{known}; commit {commit() or 'none'}"),
    )


def document(run: TrainRun) -> dict[str, Any]:
    """Return everything: settings, surroundings, figures, and every sample."""
    settings = run.settings
    return {
        "headline": headline(run),
        "baseline": baseline(run),
        **surroundings(),
        "device": run.device,
        "num_ranks": run.num_ranks,
        "settings": {**asdict(settings), "config": str(settings.config)},
        "vocab_size": run.vocab_size,
        "configs": run.configs,
        "results": [
            run.figures(name, count)
            for count in settings.microbatches
            for name in settings.variants
        ],
        "inspections": {name: asdict(found) for name, found in run.inspections.items()},
        "layer_ratio": {name: run.layer_ratio(name) for name in settings.variants},
        "hidden_share": {name: run.hidden_share(name) for name in settings.variants},
        "blocks": [asdict(block) for block in run.blocks],
    }


def draw_steps(run: TrainRun, path: Path) -> None:
    """Draw the median step time, a bar a variant, with its least and its 90th percentile."""
    from matplotlib.figure import Figure  # slow to import

    counts, names = run.settings.microbatches, run.settings.variants
    figure = Figure(figsize=(1.5 + 0.9 * len(names) * len(counts), 4.5), layout="constrained")
    for axes, count in zip(figure.subplots(1, len(counts), squeeze=False)[0], counts, strict=True):
        for i, name in enumerate(names):
            ms, least, p90 = run.figures(name, count)["step_ms"].values()
            axes.bar(i, ms, yerr=[[ms - least], [max(p90 - ms, 0.0)]], capsize=4, label=name)
            axes.annotate(f"{ms:.1f}", (i, 0), ha="center", va="bottom", fontsize=8)
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
        axes.set_title(f"{count} microbatch{'es' if count > 1 else ''}", fontsize=9)
        axes.set_ylabel("step, ms: median, min to p90")
    figure.suptitle(headline(run), fontsize=8)
    figure.savefig(path, dpi=150)


def _overlap_timelines(run: TrainRun) -> dict[str, tuple[Bar, ...]]:
    """Return backwards of the variants with overlap, each after the one without it."""
    known = {name: found.backward_bars for name, found in run.inspections.items()}
    timelines: dict[str, tuple[Bar, ...]] = {}
    for name, bars in known.items():
        serial = serial_of(name)
        if serial is not None and bars and known.get(serial):
            timelines |= {serial: known[serial], name: bars}
    return timelines


# --- tables ---------------------------------------------------------------------------------------


def _show(value: float | None, form: str) -> str:
    return number(value, form) or "-"


def _step_table(run: TrainRun) -> Table:
    table = screen_table(
        headline(run),
        ("variant", "microbatches", "step ms", "min", "p90", "tokens/s/GPU", "x", "worst block",
         "GiB", "x memory", "allocs", "loss"),
    )  # fmt: skip
    for count in run.settings.microbatches:
        for name in run.settings.variants:
            found = run.figures(name, count)
            peak = found["peak_bytes"]
            table.add_row(
                *(name, str(count), *(f"{ms:.1f}" for ms in found["step_ms"].values())),
                f"{found['tokens_per_s_per_gpu']:,.0f}",
                *(_show(found[f"ratio_{which}"], ".3f") for which in ("median", "worst")),
                _show(peak and peak / 2**30, ".1f"),
                *(_show(found["memory_ratio"], ".3f"), _show(found["num_allocations"], "d")),
                f"{found['loss']:.4f}",
            )
        table.add_section()
    return table


def _layer_table(run: TrainRun) -> Table:
    count = run.settings.microbatches[0]
    table = screen_table(
        f"MoE layer alone | forward of the MoE layers in a step of {count} microbatch(es); ms",
        ("variant", "forward", "backward", "both", "x", "combine alone", "hidden", "dispatch",
         "experts", "combine", "of the step", "dropped"),
    )  # fmt: skip
    for name, found in run.inspections.items():
        layer, phases = found.layer, found.phases_ms
        step_ms = run.figures(name, count)["step_ms"]["median"]
        table.add_row(
            name,
            *(f"{median(ms):.3f}" for ms in (layer.forward, layer.backward, layer.total)),
            _show(run.layer_ratio(name), ".3f"),
            _show(median(layer.combine) if layer.combine else None, ".3f"),
            _show(run.hidden_share(name), ".0%"),
            *(_show(phases.get(phase), ".2f") for phase in ("dispatch", "expert", "combine")),
            _show(sum(phases.values()) / step_ms if phases else None, ".0%"),
            _show(found.dropped, ".2%"),
        )
    return table


def _host_table(run: TrainRun) -> Table:
    table = screen_table(
        f"host and GPU, a step of {run.settings.microbatches[0]} microbatch(es) | an MoE layer",
        ("variant", "kernels", "waits", "host ms", "busy ms", "wall ms", "EP ms", "exposed",
         "kernels", "waits", "host µs forward", "host µs both", "busy µs"),
    )  # fmt: skip
    for name, found in run.inspections.items():
        step, forward, backward = found.step, found.layer_forward, found.layer_backward
        if step and forward and backward:
            table.add_row(
                *(name, str(step.kernels), str(step.waits)),
                *(f"{us / 1e3:.1f}" for us in (step.host_us, step.busy_us, step.wall_us)),
                f"{step.communication_us / 1e3:.1f}",
                _show(
                    step.exposed_us / step.communication_us if step.communication_us else None,
                    ".0%",
                ),
                *(str(forward.kernels + backward.kernels), str(forward.waits + backward.waits)),
                f"{forward.host_us:.0f}",
                f"{forward.host_us + backward.host_us:.0f}",
                f"{forward.busy_us + backward.busy_us:.0f}",
            )
    return table
