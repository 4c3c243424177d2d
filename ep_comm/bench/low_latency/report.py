"""A run as tables, as JSON and as a picture."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ep_comm.bench.low_latency.clocks import HOST_CALLS, Times
from ep_comm.bench.low_latency.run import Result, Run
from ep_comm.bench.low_latency.settings import Point
from ep_comm.bench.low_latency.works import BUSY_NS, REPEATS
from ep_comm.bench.tables import number, screen_table
from ep_comm.job import files
from ep_comm.job.environment import surroundings

_NOTES = f"""\
times in µs, of the slowest rank each; p99: 99 % of the samples are no longer
in a CUDA graph: {REPEATS} operations in a row, replayed without ever aligning the ranks; from the \
end of the operation before to its own, by the GPU's clock (one value in {{step}} ns)
mean: a round by CUDA events around many replays, what lies between them included; kernel: median, \
from the kernel's begin to its end
phases: {BUSY_NS // 1000} µs of other work between; one launch behind another is in each
eager: the same calls, the queue filled while the GPUs were kept busy; alltoall: means of {REPEATS}
floor: a word's one-way time for each hop, and the bytes of the busiest link at the rate of pushes
alltoall: all tokens to every rank in BF16, one way: what a graph of fixed sizes can do
wrong: rows on all ranks that were not bit for bit what they must be, after replays and calls"""
_HOST_NOTES = "host: until the call returns, the GPU's queue being filled; slowest rank's p50 / p99"
_CPU_NOTES = f"""\
times in µs by the host's clock, of the slowest rank; eager: a round of {REPEATS} in a row
wrong: rows on all ranks that were not bit for bit what they must be
host: until the call returns; slowest rank's p50 / p99"""
_PLOTTED = ("dispatch", "combine", "dispatch + combine", "NCCL alltoall", "gloo alltoall")


def headline(run: Run) -> str:
    """Return sizes and floors; of a void run, that it is void and why."""
    settings = run.settings
    text = (
        f"{run.num_ranks} ranks, top-{settings.topk} of {run.num_experts}, "
        f"{settings.routing.describe()}, "
        f"{'FP8' if settings.fp8 else 'BF16'} dispatch, BF16 combine, {settings.replays} replays"
    )
    if run.floors is None:
        return f"{text}; CPU ranks, {run.backend}"
    one_way = "" if is_void(run) else f", one way {run.floors.one_way_us:.2f} µs"
    return f"{text}; {run.floors.limit.describe()}{one_way}"


def is_void(run: Run) -> bool:
    """Whether something held the links up, so that no figure of the run counts."""
    return run.floors is not None and run.floors.limit.is_void


def render(run: Run) -> Group:
    """Return what rank 0 prints."""
    tables: list[RenderableType] = [_operations(run, hidden) for hidden in run.settings.hidden]
    if run.floors is None:
        return Group(*tables, _host(run), Text(_CPU_NOTES, style="dim"))
    notes = _NOTES.format(step=run.step_ns)
    return Group(
        *tables, Text(notes, style="dim"), _host(run), Text(_HOST_NOTES, style="dim"),
        Text(run.backend, style="dim"),
    )  # fmt: skip


def write_json(run: Run, path: Path) -> None:
    """Write everything: settings, surroundings, floors, and every figure in µs."""
    floors: dict[str, Any] = {}
    if run.floors is not None:
        floors = {"one_way_us": run.floors.one_way_us, **run.floors.limit.document()}
    document = {
        "headline": headline(run),
        "void": is_void(run),
        **surroundings(),
        "num_ranks": run.num_ranks,
        "num_experts": run.num_experts,
        "settings": asdict(run.settings),
        "backend": run.backend,
        "floors": floors,
        "clock_step_ns": run.step_ns,
        "operations_in_a_row": REPEATS,
        "low_latency": [asdict(result) for result in run.results],
        "host": [{**asdict(found.point), "times": _as_dicts(found.times)} for found in run.host],
        "num_wrong": run.num_wrong,
    }
    files.write_json(path, document)


def write_plot(run: Run, path: Path) -> None:
    """Draw times over tokens, a panel a hidden size: p50, p99 as a band, floors dashed."""
    from matplotlib.figure import Figure  # slow to import, and seldom needed

    sizes = run.settings.hidden
    figure = Figure(figsize=(1 + 5.5 * len(sizes), 5), layout="constrained")
    for i, hidden in enumerate(sizes):
        axes = figure.add_subplot(1, len(sizes), 1 + i)
        for operation in _PLOTTED:
            results = [
                result
                for result in run.results
                if result.hidden == hidden
                and result.operation == operation
                and result.room in (None, result.tokens)
                and result.num_sms in (None, run.settings.num_sms[0])
                and _best(result) is not None
            ]
            _plot_line(axes, operation, sorted(results, key=lambda result: result.tokens))
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        tokens = sorted(run.settings.tokens)
        axes.set_xticks(tokens, [str(count) for count in tokens])
        axes.minorticks_off()
        axes.set_xlabel("tokens of each rank")
        axes.set_ylabel("µs: p50, band to p99 (dashed: floor)")
        axes.set_title(f"hidden {hidden}", fontsize=9)
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3, which="both")
    figure.suptitle(headline(run), fontsize=9, color="red" if is_void(run) else "black")
    figure.savefig(path, dpi=150)


def _best(result: Result) -> Times | None:
    return result.graph or result.eager


def _plot_line(axes: Any, operation: str, results: list[Result]) -> None:
    if not results:
        return
    tokens = [result.tokens for result in results]
    times = [found for found in map(_best, results) if found is not None]
    p50, p99 = [each.p50 for each in times], [each.p99 for each in times]
    (line,) = axes.plot(tokens, p50, marker="o", label=operation)
    axes.fill_between(tokens, p50, p99, color=line.get_color(), alpha=0.2)
    floors = [result.floor_us for result in results]
    if None not in floors:
        axes.plot(tokens, floors, color=line.get_color(), linestyle="--", linewidth=1)


def _operations(run: Run, hidden: int) -> Table:
    columns = (
        "operation", "p50", "p99", "max", "p99/p50", "mean", "kernel", "floor", "x floor",
        "eager p50", "p99", "max", "wrong",
    )  # fmt: skip
    title = f"hidden {hidden}: {headline(run)}"
    table = screen_table(title, columns, "bold red" if is_void(run) or run.num_wrong else "bold")
    last = ""
    for result in run.results:
        if result.hidden != hidden:
            continue
        if (size := _size(result)) != last:
            table.add_section()
            table.add_row(size, style="bold")
        last = size
        table.add_row(result.operation, *(cell or "-" for cell in _cells(result)))
    return table


def _size(found: Result | Point) -> str:
    room = "" if found.room is None else f", room for {found.room}"
    sms = f", {found.num_sms} SMs" if found.num_sms else ""
    return f"{found.tokens} token{'s' * (found.tokens > 1)}{room}{sms}"


def _cells(result: Result) -> Iterable[str | None]:
    graph, eager, floor_us = result.graph, result.eager, result.floor_us
    best = _best(result)
    yield from _three(graph)
    yield None if graph is None or graph.p50 <= 0 else f"{graph.p99 / graph.p50:.2f}"
    yield _us(result.mean_us)
    yield None if result.kernel is None else _us(result.kernel.p50)
    yield _us(floor_us)
    yield None if floor_us is None or best is None else f"{best.p50 / floor_us:.1f}"
    yield from _three(eager)
    yield number(result.wrong, "d")


def _three(times: Times | None) -> tuple[str | None, ...]:
    return (None,) * 3 if times is None else tuple(map(_us, (times.p50, times.p99, times.max)))


def _us(value: float | None) -> str | None:
    return number(value, ".1f" if value is None or value < 1000 else ".0f")


def _host(run: Run) -> Table:
    table = screen_table("host, µs: p50 / p99", ("size", *HOST_CALLS))
    for found in run.host:
        cells = (f"{_us(each.p50)} / {_us(each.p99)}" for each in found.times.values())
        table.add_row(f"hidden {found.point.hidden}: {_size(found.point)}", *cells)
    return table


def _as_dicts(times: dict[str, Times]) -> dict[str, dict[str, float]]:
    return {name: asdict(each) for name, each in times.items()}
