"""The pictures of a page, each with a sentence for those who do not see it and with its data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter, StrMethodFormatter

from ep_comm.pretrain.log_file import TOKENS_PER_S, TRAIN_LOSS, VALID_LOSS
from ep_comm.report.document import Cells, Picture
from ep_comm.report.run import Run
from ep_comm.report.series import Series
from ep_comm.report.svg import (
    COLOURS,
    MOST_POINTS,
    MOST_ROWS,
    add_legend,
    log_scale,
    new_figure,
    steps_axis,
    styled,
    to_svg,
)

_WIDE_RANGE = 20  # a logarithmic axis from this ratio of largest and median on
RUN_COLOURS = ("first", "second")
_DASHES = ("-", (0, (4, 1.5)))


@dataclass(frozen=True)
class Panel:
    """A row of a picture of lines: one number over the steps, a line for each run.

    Attributes:
        title: What the number is, with its unit.
        of: What gives it.
        form: How numbers are written, see `format`.
        dots: Gives another number, drawn as dots, where there is one.
        is_share: Whether the axis is in percent, from 0.
    """

    title: str
    of: Callable[[Run], Series]
    form: str = ",.4g"
    dots: Callable[[Run], Series] | None = None
    is_share: bool = False


LOSS = (
    Panel(
        "training loss (dots: validation)",
        lambda run: run.series(TRAIN_LOSS),
        ".4f",
        dots=lambda run: run.series(VALID_LOSS, kind="valid"),
    ),
    Panel("gradient norm", lambda run: run.series("grad-norm"), ".3g"),
)
SPEED = (
    Panel("tokens/s, all ranks", lambda run: run.steady(TOKENS_PER_S), ",.0f"),
    Panel("MFU", lambda run: run.steady("mfu"), ".1%", is_share=True),
)
TAILS = (
    Panel("dispatch, p99, ms", lambda run: run.steady("ep/dispatch-ms-p99")),
    Panel("combine, p99, ms", lambda run: run.steady("ep/combine-ms-p99")),
)
EXPOSED = (
    Panel(
        "exposed, part of a step",
        lambda run: run.share("ep/exposed-ms", "iteration-time", scale=1e-3),
        ".1%",
        is_share=True,
    ),
    Panel(
        "waits, part of operations",
        lambda run: run.steady("ep/wait-share"),
        ".1%",
        is_share=True,
    ),
)


@styled
def lines(name: str, panels: Sequence[Panel], runs: Sequence[Run], caption: str) -> Picture | None:
    """Draw numbers over the steps, a row for each; None where no run has any of them."""
    panels = [panel for panel in panels if any(panel.of(run) for run in runs)]
    if not panels:
        return None
    several = len(runs) > 1
    num_named = len(runs) if several else 0
    figure, rows = new_figure(len(panels), row_height_in=1.5, is_wide=True, num_named=num_named)
    for axes, panel in zip(rows, panels, strict=True):
        for i, run in enumerate(runs):
            _draw_line(axes, panel, run, i)
        axes.set_title(panel.title)
        values = np.concatenate([panel.of(run).values for run in runs])
        if panel.is_share:
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        elif values.min() > 0 and values.max() > _WIDE_RANGE * np.median(values):
            log_scale(axes)
        elif panel.form == ",.0f":
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    if several:
        found = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in rows]
        named = {text: line for each in found for line, text in each}
        add_legend(figure, named.values(), named)
    steps_axis(rows[-1])
    every = np.concatenate([panel.of(run).steps for panel in panels for run in runs])
    rows[-1].set_xlim(every.min(), max(every.max(), every.min() + 1))
    columns, cells = _table(panels, runs)
    said = "; ".join(_in_words(panel, run, several) for panel in panels for run in runs)
    return Picture(to_svg(figure, name, f"Lines over the steps. {said}."), caption, columns, cells)


@styled
def split(name: str, run: Run, *, is_wide: bool) -> Picture | None:
    """Draw how a step's time is spent; None where it is not on record."""
    step = run.steady("iteration-time", scale=1e3)
    parts = {op: run.steady(f"ep/{op}-ms") for op in ("dispatch", "combine", "expert")}
    if not step or any(len(part.steps) != len(step.steps) for part in parts.values()):
        return None
    known = sum(part.values for part in parts.values())
    parts["rest"] = Series(step.steps, np.maximum(step.values - known, 0.0))
    binned = {op: part.binned(MOST_POINTS) for op, part in parts.items()}
    figure, (axes,) = new_figure(1, row_height_in=2.0, is_wide=is_wide, num_named=len(binned))
    labels = {"expert": "experts", "rest": "the rest"}
    axes.stackplot(
        _shown(binned["rest"].steps),
        *(_shown(part.mean) for part in binned.values()),
        labels=[labels.get(op, op) for op in binned],
        colors=[COLOURS[op] for op in binned],
        linewidth=0,
    )
    highest = np.percentile(step.binned(MOST_POINTS).mean, 99)
    axes.set_ylim(0, 1.15 * float(highest))  # a few steps may be far longer
    axes.set_xlim(step.steps[0], max(step.steps[-1], step.steps[0] + 1))
    axes.set_title("ms")
    add_legend(figure, *axes.get_legend_handles_labels())
    steps_axis(axes)
    medians = {op: part.median for op, part in parts.items()}
    total = step.median
    said = ", ".join(
        f"{labels.get(op, op)} {value:.4g} ms ({value / total:.0%})"
        for op, value in medians.items()
    )
    rows = [
        [str(last), *(f"{value:.4g}" for value in values)]
        for last, *values in zip(
            parts["rest"].binned(MOST_ROWS).steps,
            *(part.binned(MOST_ROWS).mean for part in parts.values()),
            strict=True,
        )
    ]
    label = f"Stacked areas over the steps. A median step of {total:.4g} ms: {said}."
    columns = ["up to step", *(f"{labels.get(op, op)}, ms" for op in parts)]
    return Picture(to_svg(figure, name, label), f"Median step: {said}.", columns, rows)


def _draw_line(axes: Axes, panel: Panel, run: Run, number: int) -> None:
    series, colour = panel.of(run), COLOURS[RUN_COLOURS[number]]
    if not series:
        return
    bins = series.binned(MOST_POINTS)
    if len(bins.steps) < len(series.steps):
        axes.fill_between(bins.steps, bins.low, bins.high, color=colour, alpha=0.22, linewidth=0)
    marker = "." if len(bins.steps) == 1 else None
    axes.plot(
        bins.steps,
        bins.mean,
        color=colour,
        linestyle=_DASHES[number],
        linewidth=1.5,
        marker=marker,
        label=run.name,
    )
    dots = panel.dots(run).binned(MOST_ROWS) if panel.dots else None
    if dots is not None and len(dots.steps):
        axes.plot(dots.steps, dots.mean, "os"[number], color=colour, markersize=4)


def _table(panels: Sequence[Panel], runs: Sequence[Run]) -> tuple[list[str], Cells]:
    """Return the means of each panel and run over parts of the steps, the same for all."""
    several = len(runs) > 1
    every = [(panel, run, panel.of(run)) for panel in panels for run in runs]
    every += [(panel, run, panel.dots(run)) for panel in panels if panel.dots for run in runs]
    columns = ["up to step"]
    for i, (panel, run, _) in enumerate(every):
        title = "validation loss" if i >= len(panels) * len(runs) else panel.title.split(" (")[0]
        columns.append(f"{title}, {run.name}" if several else title)
    last = max(int(series.steps[-1]) for _, _, series in every if series)
    ends = np.unique(np.linspace(0, last, min(MOST_ROWS, last) + 1).round().astype(int))
    rows = []
    for begin, end in zip(ends[:-1], ends[1:], strict=True):
        means = [_mean_between(series, begin, end) for _, _, series in every]
        cells = [
            "" if mean is None else format(mean, panel.form)
            for (panel, _, _), mean in zip(every, means, strict=True)
        ]
        rows.append([str(end), *cells])
    return columns, rows


def _mean_between(series: Series, begin: int, end: int) -> float | None:
    """Return the mean of the steps after `begin` up to `end`."""
    first, last = np.searchsorted(series.steps, (begin, end), side="right")
    return float(series.values[first:last].mean()) if last > first else None


def _in_words(panel: Panel, run: Run, is_named: bool) -> str:
    series = panel.of(run)
    name = f"{panel.title}{f' of {run.name}' if is_named else ''}"
    if not series:
        return f"{name}: not on record"
    parts = (series.values[:5], series.values[-5:])
    ends = [format(float(part.mean()), panel.form) for part in parts]
    most = (series.values.min(), series.values.max())
    lowest, highest = (format(float(value), panel.form) for value in most)
    return f"{name}: from {ends[0]} to {ends[1]}, between {lowest} and {highest}"


def _shown(values: np.ndarray) -> np.ndarray:
    """Return values that an area can be drawn of: a single one twice."""
    return np.repeat(values, 2) if len(values) == 1 else values
