"""A run as a table, as JSON and as a picture."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.text import Text

from ep_comm.bench.ops.run import Result, Run
from ep_comm.bench.tables import screen_table, sms_name
from ep_comm.bench.timing import UNALIGNED_CALLS, summarize
from ep_comm.job import files
from ep_comm.job.environment import surroundings

_NOTES = f"""\
times in µs, the slowest rank's median. call: public call, aligned ranks, with its min and p90
kernel: from the first kernel's begin to the last one's end; unaligned: one of {UNALIGNED_CALLS} \
calls back to back; idle: the call after host and GPU were idle
host: until the call returns to the host, the queue being filled or (idle) empty
wire: remote payload and scales, busiest link; logical: a row for each expert of each token
x limit: call against the time in which the limit carries one copy of a row a rank"""


def headline(run: Run) -> str:
    """Return sizes and limit; of a void run, that it is void and why."""
    shape, settings = run.settings.shape, run.settings
    return (
        f"{run.num_ranks} ranks, {shape.tokens} tokens x {shape.hidden}, top-{shape.topk} of "
        f"{shape.experts}, {settings.routing.describe()}, {settings.layout}-major; "
        f"{run.limit.describe()}"
    )


def floor_us(run: Run, result: Result) -> float:
    """Return the least time of a result's work at the run's limit, in µs."""
    return run.limit.floor_us(result.floor_bytes)


def ratio(run: Run, result: Result) -> float:
    """Return the median call over its floor; at the limit it is 1."""
    return summarize(result.samples.call).median / floor_us(run, result)


def gb_per_s(num_bytes: float, us: float) -> float:
    """10^9 bytes a second."""
    return num_bytes / us / 1e3


def render(run: Run) -> Group:
    """Return what rank 0 prints."""
    columns = (
        "case", "SMs", "kernel", "call", "min", "p90", "unaligned", "idle", "host", "host idle",
        "wire GB/s", "logical GB/s", "x limit",
    )  # fmt: skip
    table = screen_table(headline(run), columns, "bold red" if run.limit.is_void else "bold")
    for result in run.results:
        table.add_row(result.case, *_cells(run, result))
    routing = (
        f"routing: largest over mean {run.rank_imbalance:.3f} of tokens a rank, "
        f"{run.expert_imbalance:.3f} an expert; {run.backend}, "
        f"{run.buffer_bytes / 2**20:.0f} MiB beyond outputs"
    )
    return Group(table, Text(routing), Text(_NOTES, style="dim"))


def document(run: Run) -> dict[str, Any]:
    """Return everything: settings, surroundings, and every sample in µs."""
    return {
        "headline": headline(run),
        "void": run.limit.is_void,
        **surroundings(),
        "num_ranks": run.num_ranks,
        "settings": {**asdict(run.settings), "shape": run.settings.shape._asdict()},
        "backend": run.backend,
        "buffer_bytes": run.buffer_bytes,
        "limit": run.limit.document(),
        "imbalance": {"rank": run.rank_imbalance, "expert": run.expert_imbalance},
        "results": [
            {
                "case": result.case,
                "num_sms": result.num_sms,
                "wire_bytes": result.wire_bytes,
                "floor_bytes": result.floor_bytes,
                "logical_bytes": result.logical_bytes,
                "floor_us": floor_us(run, result),
                "ratio": ratio(run, result),
                "samples_us": asdict(result.samples),
            }
            for result in run.results
        ],
    }


def write_json(run: Run, path: Path) -> None:
    """Write `document`."""
    files.write_json(path, document(run))


def write_plot(run: Run, available_sms: int, path: Path) -> None:
    """Draw the time of the call against SMs, a line a case, each with its floor."""
    from matplotlib.figure import Figure  # slow to import, and seldom needed

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    swept = [result for result in run.results if result.num_sms is not None]
    for case in dict.fromkeys(result.case for result in swept):
        points = sorted(
            (result.num_sms or available_sms, summarize(result.samples.call).median)
            for result in swept
            if result.case == case
        )
        (line,) = axes.plot(*zip(*points, strict=True), marker="o", label=case)
        floor = next(floor_us(run, result) for result in swept if result.case == case)
        axes.axhline(floor, color=line.get_color(), linestyle=":", linewidth=1)
    axes.set_xscale("log", base=2)
    counts = sorted({count or available_sms for count in run.settings.sms})
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("SMs that an operation may occupy")
    axes.set_ylabel("median public call, µs (dotted: at the limit of the links)")
    axes.set_title(headline(run), fontsize=9, color="red" if run.limit.is_void else "black")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def _cells(run: Run, result: Result) -> list[str]:
    samples = result.samples
    call = summarize(samples.call)
    kernel, median, *others = (
        f"{summarize(times).median:.0f}" if times else "-"
        for times in (
            samples.kernel,
            samples.call,
            samples.unaligned,
            samples.idle,
            samples.host,
            samples.host_idle,
        )
    )
    sms = sms_name(result.num_sms)
    return [
        sms,
        kernel,
        median,
        f"{call.min:.0f}",
        f"{call.p90:.0f}",
        *others,
        f"{gb_per_s(result.wire_bytes, call.median):.0f}",
        f"{gb_per_s(result.logical_bytes, call.median):.0f}",
        f"{ratio(run, result):.2f}",
    ]
