"""A run of ``ep-comm bench train`` as tables, as JSON and as pictures."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterable
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from ep_comm.bench.train.profile import Bar, Profile
from ep_comm.bench.train.results import TrainRun
from ep_comm.bench.train.timeline import draw_timelines
from ep_comm.job.environment import commit, gpu_names, versions
from ep_comm.pretrain.variants import reference_of, serial_of

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
alltoall-fp8 for FP8 experts) over the variant's, of the blocks' medians
memory: highest on any rank, torch's and ep_comm's buffers; allocs: torch asked the driver for \
memory in the timed steps (that is slow: more than a few want more --warmup); loss: of the last \
step, all variants see the same tokens"""
_LAYER_NOTES = """\
MoE layer alone: the first one, router to combine, ranks aligned, medians of the slowest rank; x \
as above, of forward + backward
combine alone: our backward combine's kernels, all SMs; hidden: what the backward gains, in that \
unit, by weight gradients beside the combine instead of behind it, the median of pairs of passes
dispatch, experts, combine of a step: forward, summed over layers and microbatches, permutation \
and padding included, on the rank where it is longest"""
_HOST_NOTES = """\
one step, and one forward + backward of the layer alone, of rank 0 while torch's profiler records \
(which makes the host slower)
kernels: launched; waits: of the host for the GPU, or for the sizes of a dispatch; host: µs or ms \
of the host without the waits; busy: at least one kernel or copy runs, if only to wait \
for another rank"""


def write_report(run: TrainRun, out: Path, console: Console) -> None:
    """Write ``bench-train.json``, ``steps.png`` and ``overlap.png``, and print the tables."""
    (out / "bench-train.json").write_text(json.dumps(document(run), indent=1) + "\n")
    console.print(render(run))
    draw_steps(run, out / "steps.png")
    timelines = _overlap_timelines(run)
    if timelines:
        title = f"backward of one MoE layer, rank 0 of {run.num_ranks}; {headline(run)}"
        draw_timelines(timelines, title, out / "overlap.png")
    console.print(f"written to {out}", highlight=False)


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
    known = [f"{name} {version}" for name, version in versions().items()]
    surroundings = f"{', '.join(known)}; commit {commit() or 'none'}"
    return Group(
        _step_table(run),
        Text(_STEP_NOTES, style="dim"),
        _layer_table(run),
        Text(_LAYER_NOTES, style="dim"),
        _host_table(run) if run.device == "cuda" else Text("host costs: there is no GPU"),
        Text(_HOST_NOTES if run.device == "cuda" else "", style="dim"),
        Text(baseline(run)),
        Text(surroundings),
    )


def document(run: TrainRun) -> dict[str, Any]:
    """Return everything: settings, surroundings, figures, and every sample."""
    settings = run.settings
    return {
        "headline": headline(run),
        "baseline": baseline(run),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "commit": commit(),
        "versions": versions(),
        "gpus": gpu_names(),
        "device": run.device,
        "num_ranks": run.num_ranks,
        "settings": {**asdict(settings), "config": str(settings.config)},
        "vocab_size": run.vocab_size,
        "configs": run.configs,
        "results": [
            _result(run, name, count)
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
            step = run.step_ms(name, count)
            least_most = [[step.median - step.min], [max(step.p90 - step.median, 0.0)]]
            axes.bar(i, step.median, yerr=least_most, capsize=4, label=name)
            axes.annotate(f"{step.median:.1f}", (i, 0), ha="center", va="bottom", fontsize=8)
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


def _result(run: TrainRun, name: str, count: int) -> dict[str, Any]:
    found = run.speedup(name, count)
    return {
        "variant": name,
        "microbatches": count,
        "step_ms": asdict(run.step_ms(name, count)),
        "tokens_per_s_per_gpu": run.tokens_per_s(name, count),
        "reference": reference_of(name),
        "ratio_of_blocks": found and found.of_blocks,
        "ratio_median": found and found.median,
        "ratio_worst": found and found.worst,
        "peak_bytes": run.peak_bytes(name, count),
        "memory_ratio": run.memory_ratio(name, count),
        "num_allocations": run.num_allocations(name, count),
        "loss": run.loss(name, count),
    }


# --- tables ---------------------------------------------------------------------------------------


def _table(title: str, columns: Iterable[str]) -> Table:
    table = Table(title=title, title_style="bold")
    table.add_column("variant", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _show(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def _step_table(run: TrainRun) -> Table:
    table = _table(
        headline(run),
        ("microbatches", "step ms", "min", "p90", "tokens/s/GPU", "x", "worst block", "GiB",
         "x memory", "allocs", "loss"),
    )  # fmt: skip
    for count in run.settings.microbatches:
        for name in run.settings.variants:
            step, found = run.step_ms(name, count), run.speedup(name, count)
            peak = run.peak_bytes(name, count)
            table.add_row(
                *(name, str(count), f"{step.median:.1f}", f"{step.min:.1f}", f"{step.p90:.1f}"),
                f"{run.tokens_per_s(name, count):,.0f}",
                _show(found.median if found else None, ".3f"),
                _show(found.worst if found else None, ".3f"),
                _show(peak and peak / 2**30, ".1f"),
                _show(run.memory_ratio(name, count), ".3f"),
                _show(run.num_allocations(name, count), "d"),
                f"{run.loss(name, count):.4f}",
            )
        table.add_section()
    return table


def _layer_table(run: TrainRun) -> Table:
    count = run.settings.microbatches[0]
    table = _table(
        f"MoE layer alone | forward of the MoE layers in a step of {count} microbatch(es); ms",
        ("forward", "backward", "both", "x", "combine alone", "hidden", "dispatch", "experts",
         "combine", "of the step"),
    )  # fmt: skip
    for name, found in run.inspections.items():
        layer, phases = found.layer, found.phases_ms
        share = sum(phases.values()) / run.step_ms(name, count).median
        table.add_row(
            name,
            *(f"{median(ms):.3f}" for ms in (layer.forward, layer.backward, layer.total)),
            _show(run.layer_ratio(name), ".3f"),
            _show(median(layer.combine) if layer.combine else None, ".3f"),
            _show(run.hidden_share(name), ".0%"),
            *(f"{phases[phase]:.2f}" for phase in ("dispatch", "expert", "combine")),
            f"{share:.0%}",
        )
    return table


def _host_table(run: TrainRun) -> Table:
    table = _table(
        f"host and GPU, a step of {run.settings.microbatches[0]} microbatch(es) | an MoE layer",
        ("kernels", "waits", "host ms", "busy ms", "wall ms", "kernels", "waits", "host µs forward",
         "host µs both", "busy µs"),
    )  # fmt: skip
    for name, found in run.inspections.items():
        if found.step and found.layer_forward and found.layer_backward:
            layer = _layer_cells(found.layer_forward, found.layer_backward)
            table.add_row(name, *_step_cells(found.step), *layer)
    return table


def _step_cells(step: Profile) -> list[str]:
    times = (f"{us / 1e3:.1f}" for us in (step.host_us, step.busy_us, step.wall_us))
    return [str(step.kernels), str(step.waits), *times]


def _layer_cells(forward: Profile, backward: Profile) -> list[str]:
    return [
        str(forward.kernels + backward.kernels),
        str(forward.waits + backward.waits),
        f"{forward.host_us:.0f}",
        f"{forward.host_us + backward.host_us:.0f}",
        f"{forward.busy_us + backward.busy_us:.0f}",
    ]
