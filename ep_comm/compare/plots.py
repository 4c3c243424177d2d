"""The losses, and their differences from the reference, as pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ep_comm.compare.plan import EP_COMM, FP8, FP8_ALL, FP8_EXPERTS, REFERENCE, without_seed
from ep_comm.compare.statistics import Run, steps_skipped

_STYLES: dict[str, dict[str, Any]] = {
    REFERENCE: {"color": "black", "linestyle": "-", "linewidth": 2.2},
    EP_COMM: {"color": "tab:blue", "linestyle": "--", "linewidth": 1.6},
    FP8: {"color": "tab:red", "linestyle": ":", "linewidth": 2.0},
    FP8_EXPERTS: {"color": "tab:green", "linestyle": "-.", "linewidth": 1.6},
    FP8_ALL: {"color": "tab:orange", "linestyle": ":", "linewidth": 2.0},
}
_NOISE: dict[str, Any] = {"color": "0.55", "linestyle": "-", "linewidth": 1.6}
_RESOLUTION = 1e-7  # of a loss in FP32: a logarithmic axis goes no further, equal losses are 0
_RAW: dict[str, Any] = {"linestyle": "-", "linewidth": 0.7, "alpha": 0.25}


def plot_losses(runs: Mapping[str, Run], window: int, title: str, path: Path) -> None:
    """Draw training losses, smoothed and as they are, and validation losses."""
    figure, axes = _figure(title, rows=1)
    for name, run in runs.items():
        steps = np.arange(1, len(run.train) + 1)
        style = _style(name)
        axes[0].plot(steps, run.train, color=style["color"], **_RAW)
        axes[0].plot(steps, run.smoothed, label=name, **style)
        valid = list(run.valid.values())
        axes[0].plot(list(run.valid), valid, "o", mfc="none", ms=7, color=style["color"])
    axes[0].set_ylabel("loss")
    note = f"lines: mean of the last {window} steps\nfaint: each step\ncircles: validation"
    _finish(axes, note)
    figure.savefig(path, dpi=90)


def plot_differences(runs: Mapping[str, Run], window: int, title: str, path: Path) -> None:
    """Draw differences from the reference, and their size on a logarithmic axis."""
    figure, (signed, size) = _figure(title, rows=2)
    reference = runs[REFERENCE]
    for name, run in runs.items():
        if name == REFERENCE:
            continue
        label = f"{name} (noise)" if without_seed(name) == REFERENCE else name
        steps = np.arange(1, len(run.train) + 1)
        raw, smoothed = run.train - reference.train, run.smoothed - reference.smoothed
        style = _style(name)
        for axes, shown in ((signed, np.asarray), (size, np.abs)):
            axes.plot(steps, shown(raw), color=style["color"], **_RAW)
            axes.plot(steps, shown(smoothed), label=label, **style)
            both = [step for step in run.valid if step in reference.valid]
            valid = np.array([run.valid[step] - reference.valid[step] for step in both])
            axes.plot(both, shown(valid), "o", mfc="none", ms=7, color=style["color"])
    signed.axhline(0, color="black", linewidth=0.8)
    signed.set_ylabel(f"Δ loss from {REFERENCE}")
    size.set_yscale("symlog", linthresh=_RESOLUTION)
    size.set_ylim(bottom=-_RESOLUTION / 5)
    size.set_ylabel(f"|Δ|, logarithmic above {_RESOLUTION:g}")
    skipped = steps_skipped(len(reference.train))
    for axes in (signed, size):
        axes.axvspan(1, skipped + 1, color="0.93", zorder=0)
    _scale_to([run.train - reference.train for run in runs.values()], skipped, signed)
    note = (
        f"lines: of the means of the last {window} steps; faint: each step; circles: validation\n"
        f"shaded: counts for no difference"
    )
    _finish((signed, size), note)
    figure.savefig(path, dpi=90)


def _style(name: str) -> dict[str, Any]:
    """Return how a run is drawn: all other seeds of a variant look the same."""
    if name in _STYLES:
        return _STYLES[name]
    variant = without_seed(name)
    return _NOISE if variant == REFERENCE else _STYLES[variant] | {"linewidth": 0.9}


def _scale_to(differences: list[np.ndarray], skipped: int, axes: Axes) -> None:
    """Give the height to the steps that count, and leave room for the legend above."""
    shown = np.concatenate([each[skipped:] for each in differences])
    low, high = np.nanmin(shown), np.nanmax(shown)
    margin = (high - low) / 20 or _RESOLUTION
    axes.set_ylim(low - margin, high + 8 * margin)


def _figure(title: str, rows: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(9, 1.5 + 3.6 * rows), layout="constrained")
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    axes[0].set_title(title, fontsize=10)
    return figure, list(axes)


def _finish(axes: tuple[Axes, ...] | list[Axes], note: str) -> None:
    for each in axes:
        each.grid(alpha=0.3)
        each.margins(x=0.01)
    axes[0].legend(title=note, title_fontsize=8, fontsize=9, alignment="left")
    axes[-1].set_xlabel("step")
