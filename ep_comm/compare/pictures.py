"""The losses, and their differences from the reference, as pictures of the page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from ep_comm.compare.plan import EP_COMM, FP8, FP8_ALL, FP8_EXPERTS, REFERENCE, without_seed
from ep_comm.compare.statistics import Run, steps_skipped
from ep_comm.report.document import Cells, Picture
from ep_comm.report.series import Series, even_parts
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

_STYLES: dict[str, dict[str, Any]] = {
    REFERENCE: {"color": COLOURS["ink"], "linestyle": "-", "linewidth": 2.0},
    EP_COMM: {"color": COLOURS["first"], "linestyle": "--", "linewidth": 1.6},
    FP8: {"color": COLOURS["second"], "linestyle": ":", "linewidth": 2.0},
    FP8_EXPERTS: {"color": COLOURS["expert"], "linestyle": "-.", "linewidth": 1.6},
    FP8_ALL: {"color": COLOURS["combine"], "linestyle": ":", "linewidth": 2.0},
}
_NOISE: dict[str, Any] = {"color": COLOURS["muted"], "linestyle": "-", "linewidth": 1.4}
_RESOLUTION = 1e-7  # of a loss in FP32: a logarithmic axis goes no further, equal losses are 0

Shown = Callable[[np.ndarray], np.ndarray]


@styled
def losses(runs: Mapping[str, Run], window: int) -> Picture:
    """Draw training losses, smoothed and as they are, and validation losses."""
    figure, (axes,) = new_figure(1, row_height_in=3.2, is_wide=True, num_named=len(runs))
    for name, run in runs.items():
        _draw(axes, name, name, run.train, run.smoothed)
        axes.plot(list(run.valid), list(run.valid.values()), "o", **_circles(name))
    axes.set_title("loss")
    add_legend(figure, *axes.get_legend_handles_labels())
    _finish(axes)
    ends = ", ".join(f"{name} {run.final_train:.4f}" for name, run in runs.items())
    caption = (
        f"Lines: mean of the last {window} steps; band: least and most of a few single steps; "
        "circles: validation"
    )
    label = f"Lines of the losses over the steps. At the end: {ends}."
    smoothed = {name: run.smoothed for name, run in runs.items()}
    return Picture(to_svg(figure, "losses", label), caption, *_table(smoothed, ".6f"))


@styled
def differences(runs: Mapping[str, Run], window: int) -> Picture:
    """Draw differences from the reference, and their size on a logarithmic axis."""
    reference = runs[REFERENCE]
    others = {name: run for name, run in runs.items() if name != REFERENCE}
    figure, (signed, size) = new_figure(2, row_height_in=2.6, is_wide=True, num_named=len(others))
    raw = {name: run.train - reference.train for name, run in others.items()}
    smoothed = {name: run.smoothed - reference.smoothed for name, run in others.items()}
    shown: list[tuple[Axes, Shown]] = [(signed, np.asarray), (size, np.abs)]
    for name, run in others.items():
        label = f"{name} (noise)" if without_seed(name) == REFERENCE else name
        both = [step for step in run.valid if step in reference.valid]
        valid = np.array([run.valid[step] - reference.valid[step] for step in both])
        for axes, of in shown:
            _draw(axes, name, label, of(raw[name]), of(smoothed[name]))
            axes.plot(both, of(valid), "o", **_circles(name))
    signed.axhline(0, color=COLOURS["ink"], linewidth=0.8)
    signed.set_title(f"Δ loss from {REFERENCE}")
    log_scale(size, linear_below=_RESOLUTION)
    size.set_ylim(bottom=-_RESOLUTION / 5)
    size.set_title(f"|Δ|, logarithmic above {_RESOLUTION:g}")
    skipped = steps_skipped(len(reference.train))
    for axes, _ in shown:
        axes.axvspan(1, skipped + 1, color=COLOURS["line"], alpha=0.5, linewidth=0, zorder=0)
    _scale_to(list(raw.values()), skipped, signed)
    add_legend(figure, *signed.get_legend_handles_labels())
    _finish(size)
    ends = ", ".join(f"{name} {values[-1]:+.2e}" for name, values in smoothed.items())
    caption = (
        f"Lines: of the means of the last {window} steps; band: least and most of a few single "
        "steps; circles: validation; shaded: counts for no difference"
    )
    label = f"Lines of the differences from {REFERENCE} over the steps. At the end: {ends}."
    return Picture(to_svg(figure, "differences", label), caption, *_table(smoothed, "+.3e"))


def _draw(axes: Axes, name: str, label: str, raw: np.ndarray, smoothed: np.ndarray) -> None:
    """Draw a line, and what it is the mean of as a band."""
    steps = np.arange(1, len(raw) + 1)
    line, band = (Series(steps, values).binned(MOST_POINTS) for values in (smoothed, raw))
    style = _style(name)
    axes.fill_between(
        band.steps, band.low, band.high, color=style["color"], alpha=0.18, linewidth=0.5
    )
    axes.plot(line.steps, line.mean, label=label, **style)


def _circles(name: str) -> dict[str, Any]:
    return {"mfc": "none", "ms": 6, "color": _style(name)["color"]}


def _style(name: str) -> dict[str, Any]:
    """Return how a run is drawn: all other seeds of a variant look the same."""
    if name in _STYLES:
        return _STYLES[name]
    variant = without_seed(name)
    return _NOISE if variant == REFERENCE else _STYLES[variant] | {"linewidth": 0.9}


def _scale_to(differences: list[np.ndarray], skipped: int, axes: Axes) -> None:
    """Give the height to the steps that count."""
    shown = np.concatenate([each[skipped:] for each in differences])
    low, high = min(0.0, np.nanmin(shown)), max(0.0, np.nanmax(shown))
    margin = (high - low) / 20 or _RESOLUTION
    axes.set_ylim(low - margin, high + margin)


def _finish(axes: Axes) -> None:
    axes.margins(x=0.01)
    steps_axis(axes)


def _table(lines: Mapping[str, np.ndarray], form: str) -> tuple[list[str], Cells]:
    """Return the last value of each line in parts of the steps."""
    length = max(len(values) for values in lines.values())
    ends = [part.stop for part in even_parts(length, MOST_ROWS)]
    rows = [[str(end), *(format(values[end - 1], form) for values in lines.values())]
            for end in ends]  # fmt: skip
    return ["step", *lines], rows
