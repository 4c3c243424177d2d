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

from ep_comm.bench.environment import commit, gpu_names, versions
from ep_comm.bench.timing import Summary, summarize
from ep_comm.bench.train import LAYER_ITERS, METER_STEPS, TrainRun
from ep_comm.bench.train_model import vocabulary
from ep_comm.bench.train_profile import Bar, Profile
from ep_comm.bench.train_statistics import Speedup, hidden_share, speedup
from ep_comm.bench.train_timeline import draw_timelines
from ep_comm.variants import reference_of, serial_of

_BASELINE = """
    bf16 moe_grouped_gemm moe_permute_fusion moe_router_fusion use_distributed_optimizer
    overlap_grad_reduce overlap_param_gather manual_gc
""".split()

_STEP_NOTES = """\
step: the slowest rank's, on the GPU's clock, over all blocks; x: step time of alltoall (of \
alltoall-fp8 for FP8 experts) over the variant's, of the blocks' medians
memory: highest on any rank, torch's and ep_comm's buffers; loss: of the last step, all variants \
see the same tokens"""
_LAYER_NOTES = """\
MoE layer alone: the first one, router to combine, ranks aligned, medians of the slowest rank; x \
as above, of forward + backward
combine: our backward combine's kernels alone, all SMs; hidden: (backward without the overlap - \
backward with it) / combine of the former
dispatch, experts, combine of a step: forward, summed over layers and microbatches, permutation \
and padding included, on the rank where it is longest"""
_HOST_NOTES = """\
one step, and one forward + backward of the layer alone, of rank 0 while torch's profiler records \
(which makes the host slower)
kernels: launched; waits: of the host for the GPU, or for the sizes of a dispatch; host: µs or ms \
of the host without the waits; busy: at least one kernel or copy runs, if only to wait \
for another rank"""


def write_report(run: TrainRun, out: Path, console: Console) -> None:
    """Print the tables, and write ``bench-train.json``, ``steps.png`` and ``overlap.png``."""
    console.print(render(run))
    (out / "bench-train.json").write_text(json.dumps(document(run), indent=1) + "\n")
    draw_steps(run, out / "steps.png")
    timelines = _overlap_timelines(run)
    if timelines:
        title = f"backward of one MoE layer, rank 0 of {run.num_ranks}; {headline(run)}"
        draw_timelines(timelines, title, out / "overlap.png")
    console.print(f"written to {out}", highlight=False)


def headline(run: TrainRun) -> str:
    """The model and the job."""
    config = run.config
    return (
        f"{run.settings.config.stem}: {config.num_layers} layers, hidden {config.hidden_size}, "
        f"{config.num_experts} experts x {config.moe_ffn_hidden_size}, top-{config.moe_router_topk}"
        f", {config.micro_batch_size * config.seq_length} tokens a microbatch, "
        f"EP {config.expert_model_parallel_size} of {run.num_ranks} ranks"
    )


def baseline(run: TrainRun) -> str:
    """What alltoall and the others have in common."""
    values = run.config.model_dump(mode="json")
    switches = ", ".join(
        f"{key} {'on' if values[key] else 'off'}" for key in _BASELINE if key in values
    )
    return (
        f"all variants: {switches}, gradient_accumulation_fusion off, vocabulary "
        f"{vocabulary(run.config)}, CUDA_DEVICE_MAX_CONNECTIONS "
        f"{os.environ.get('CUDA_DEVICE_MAX_CONNECTIONS', 'unset')}"
    )


def render(run: TrainRun) -> Group:
    """What rank 0 prints."""
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
    """Everything: settings, surroundings, figures, and every sample."""
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
        "vocabulary": vocabulary(run.config),
        "configs": {name: config.model_dump(mode="json") for name, config in run.configs.items()},
        "results": [
            _result(run, name, count)
            for count in settings.microbatches
            for name in settings.variants
        ],
        "inspections": {name: asdict(found) for name, found in run.inspections.items()},
        "layer_ratio": {name: _layer_ratio(run, name) for name in settings.variants},
        "hidden_share": {name: _hidden_share(run, name) for name in settings.variants},
        "blocks": [asdict(block) for block in run.blocks],
    }


def draw_steps(run: TrainRun, path: Path) -> None:
    """Median step time, a bar a variant, with its least and its 90th percentile."""
    from matplotlib.figure import Figure  # slow to import

    counts, names = run.settings.microbatches, run.settings.variants
    figure = Figure(figsize=(1.5 + 0.9 * len(names) * len(counts), 4.5), layout="constrained")
    for axes, count in zip(figure.subplots(1, len(counts), squeeze=False)[0], counts, strict=True):
        for i, name in enumerate(names):
            step = _step_ms(run, name, count)
            least_most = [[step.median - step.min], [max(step.p90 - step.median, 0.0)]]
            axes.bar(i, step.median, yerr=least_most, capsize=4, label=name)
            axes.annotate(f"{step.median:.1f}", (i, 0), ha="center", va="bottom", fontsize=8)
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
        axes.set_title(f"{count} microbatch{'es' if count > 1 else ''}", fontsize=9)
        axes.set_ylabel("step, ms: median, min to p90")
    figure.suptitle(headline(run), fontsize=8)
    figure.savefig(path, dpi=150)


# --- figures --------------------------------------------------------------------------------------


def _step_ms(run: TrainRun, name: str, count: int) -> Summary:
    of_blocks = (b.step_ms for b in run.blocks if (b.variant, b.microbatches) == (name, count))
    return summarize(tuple(ms for step_ms in of_blocks for ms in step_ms))


def _speedup(run: TrainRun, name: str, count: int) -> Speedup | None:
    return speedup(run.blocks, name, reference_of(name), count)


def _tokens_per_s(run: TrainRun, name: str, count: int) -> float:
    """Of one GPU."""
    tokens = count * run.config.micro_batch_size * run.config.seq_length
    return 1e3 * tokens / _step_ms(run, name, count).median


def _peak_bytes(run: TrainRun, name: str, count: int) -> int | None:
    peaks = [
        b.peak_bytes
        for b in run.blocks
        if (b.variant, b.microbatches) == (name, count) and b.peak_bytes is not None
    ]
    return max(peaks, default=None)


def _memory_ratio(run: TrainRun, name: str, count: int) -> float | None:
    mine, theirs = (_peak_bytes(run, n, count) for n in (name, reference_of(name)))
    return mine / theirs if mine and theirs else None


def _loss(run: TrainRun, name: str, count: int) -> float:
    """Of the last step of the last block."""
    return [b.loss for b in run.blocks if (b.variant, b.microbatches) == (name, count)][-1]


def _layer_ratio(run: TrainRun, name: str) -> float | None:
    """Layer time of the reference over the variant's."""
    reference = reference_of(name)
    if reference not in run.inspections:
        return None
    theirs, ours = (median(run.inspections[n].layer.total) for n in (reference, name))
    return theirs / ours


def _hidden_share(run: TrainRun, name: str) -> float | None:
    serial = serial_of(name)
    if serial not in run.inspections:
        return None
    apart, overlapped = (run.inspections[n].layer for n in (serial, name))
    return hidden_share(apart.backward, overlapped.backward, apart.combine)


def _overlap_timelines(run: TrainRun) -> dict[str, list[Bar]]:
    """Backwards of the variants with overlap, each after the one without it."""
    pairs = ((serial_of(name), name) for name in run.inspections)
    return {
        name: run.inspections[name].backward_bars
        for pair in pairs
        if all(name in run.inspections and run.inspections[name].backward_bars for name in pair)
        for name in pair
    }


def _result(run: TrainRun, name: str, count: int) -> dict[str, Any]:
    found = _speedup(run, name, count)
    return {
        "variant": name,
        "microbatches": count,
        "step_ms": asdict(_step_ms(run, name, count)),
        "tokens_per_s_per_gpu": _tokens_per_s(run, name, count),
        "reference": reference_of(name),
        "ratio_of_blocks": found and found.of_blocks,
        "ratio_median": found and found.median,
        "ratio_worst": found and found.worst,
        "peak_bytes": _peak_bytes(run, name, count),
        "memory_ratio": _memory_ratio(run, name, count),
        "loss": _loss(run, name, count),
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
         "x memory", "loss"),
    )  # fmt: skip
    for count in run.settings.microbatches:
        for name in run.settings.variants:
            step, found = _step_ms(run, name, count), _speedup(run, name, count)
            peak = _peak_bytes(run, name, count)
            table.add_row(
                *(name, str(count), f"{step.median:.1f}", f"{step.min:.1f}", f"{step.p90:.1f}"),
                f"{_tokens_per_s(run, name, count):,.0f}",
                _show(found and found.median, ".3f"),
                _show(found and found.worst, ".3f"),
                _show(peak and peak / 2**30, ".1f"),
                _show(_memory_ratio(run, name, count), ".3f"),
                f"{_loss(run, name, count):.4f}",
            )
        table.add_section()
    return table


def _layer_table(run: TrainRun) -> Table:
    count = run.settings.microbatches[0]
    table = _table(
        f"MoE layer alone (median of {LAYER_ITERS}), and the MoE layers' forward in a step of "
        f"{count} microbatch(es) (median of {METER_STEPS}); ms",
        ("forward", "backward", "both", "x", "combine", "hidden", "dispatch", "experts", "combine",
         "of the step"),
    )  # fmt: skip
    for name, found in run.inspections.items():
        layer, phases = found.layer, found.phases_ms
        share = sum(phases.values()) / _step_ms(run, name, count).median
        table.add_row(
            name,
            *(f"{median(ms):.3f}" for ms in (layer.forward, layer.backward, layer.total)),
            _show(_layer_ratio(run, name), ".3f"),
            _show(median(layer.combine) if layer.combine else None, ".3f"),
            _show(_hidden_share(run, name), ".0%"),
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
        table.add_row(name, *_step_cells(found.step), *_layer_cells(found))
    return table


def _step_cells(step: Profile) -> list[str]:
    times = (f"{us / 1e3:.1f}" for us in (step.host_us, step.busy_us, step.wall_us))
    return [str(step.kernels), str(step.waits), *times]


def _layer_cells(found: Any) -> list[str]:
    forward, backward = found.layer_forward, found.layer_backward
    return [
        str(forward.kernels + backward.kernels),
        str(forward.waits + backward.waits),
        f"{forward.host_us:.0f}",
        f"{forward.host_us + backward.host_us:.0f}",
        f"{forward.busy_us + backward.busy_us:.0f}",
    ]
