"""The maps of a page: which rank was late, which experts are hot.

Cells are drawn in one colour, or two, of which the background shines through: so they look right
on a light page and on a dark one.
"""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ep_comm.numeric import ceil_div
from ep_comm.report.document import Picture
from ep_comm.report.run import Load, Run
from ep_comm.report.series import even_parts
from ep_comm.report.svg import (
    COLOURS,
    MOST_ROWS,
    integer_ticks,
    new_figure,
    steps_axis,
    styled,
    to_svg,
)

_HOT, _COLD = (0.85, 0.33, 0.1), (0.12, 0.47, 0.71)
_MOST_COLUMNS = 240
_MOST_EXPERTS = 16  # of a layer, in tables
_FULL_WAIT = 0.5  # of operations' time at which a cell has its full colour
_FULL = 4.0  # tokens over the mean, likewise


@styled
def slowest_ranks(name: str, run: Run, *, is_wide: bool) -> Picture | None:
    """Draw whom the others waited for, step by step; None where that is not on record."""
    slowest, waits = run.series("ep/slowest-rank"), run.series("ep/wait-share")
    if not slowest or len(slowest.steps) != len(waits.steps):
        return None
    num_ranks = max(run.processes or 0, int(slowest.values.max()) + 1)
    parts = even_parts(len(slowest.steps), _MOST_COLUMNS)
    shares = np.zeros((num_ranks, len(parts)))
    for column, part in enumerate(parts):
        for place in range(part.start, part.stop):
            if slowest.values[place] >= 0:
                shares[int(slowest.values[place]), column] += waits.values[place] / (
                    part.stop - part.start
                )
    height = min(3.5, 0.4 + 0.2 * num_ranks)
    figure, (axes,) = new_figure(1, row_height_in=height, is_wide=is_wide)
    _cells(axes, _alpha(_HOT, shares / _FULL_WAIT), slowest.steps)
    _names_axis(axes, "rank", range(num_ranks))
    counts = np.array([(slowest.values == rank).sum() for rank in range(num_ranks)])
    order = np.argsort(-counts, kind="stable")
    said = ", ".join(
        f"rank {rank} in {counts[rank] / len(slowest.steps):.0%}"
        for rank in order[:3]
        if counts[rank]
    )
    rows = [
        [
            str(rank),
            str(counts[rank]),
            f"{counts[rank] / len(slowest.steps):.1%}",
            f"{waits.values[slowest.values == rank].mean():.1%}" if counts[rank] else "",
        ]
        for rank in order[:MOST_ROWS]
    ]
    columns = ["rank", "steps in which it was waited for most", "of all", "wait share then, mean"]
    caption = (
        f"Waited for most: {said or 'nobody'} of the steps. The stronger the colour, the more of "
        f"the operations' time was waiting; full colour from {_FULL_WAIT:.0%} on."
    )
    label = f"Map of ranks over steps: whom the others waited for. {said or 'Nobody'} of the steps."
    return Picture(to_svg(figure, name, label), caption, columns, rows)


@styled
def imbalance(name: str, load: Load, *, is_wide: bool) -> Picture:
    """Draw the fullest expert of each layer over the steps."""
    values = _binned(load.imbalance)  # (columns, layers)
    strength = np.log(np.maximum(np.nan_to_num(values.T, nan=1.0), 1.0)) / np.log(_FULL)
    figure, axes = _layers_figure(load, is_wide=is_wide)
    _cells(axes, _alpha(_HOT, strength), load.steps)
    _names_axis(axes, "layer", load.layers)
    late = load.imbalance[-max(1, len(load.steps) // 4) :].mean(axis=0)
    worst = int(np.nanargmax(late))
    rows = [
        [str(layer), f"{first:.2f}", f"{mean:.2f}", f"{last:.2f}"]
        for layer, first, mean, last in zip(
            load.layers,
            load.imbalance[: max(1, len(load.steps) // 4)].mean(axis=0),
            load.imbalance.mean(axis=0),
            late,
            strict=True,
        )
    ]
    columns = ["layer", "first quarter", "all steps", "last quarter"]
    said = (
        f"the fullest expert gets up to {np.nanmax(load.imbalance):.2f} times the mean; in the "
        f"last quarter layer {load.layers[worst]} is worst with {late[worst]:.2f}"
    )
    caption = (
        f"Fullest expert of each layer: {said}. No colour: even; full colour: {_FULL:g} times the "
        "mean or more."
    )
    return Picture(
        to_svg(figure, name, f"Heat map of layers over steps: {said}."), caption, columns, rows
    )


@styled
def experts(name: str, load: Load, num_ranks: int, *, is_wide: bool) -> Picture:
    """Draw the tokens of all experts in the last quarter of the steps."""
    late = load.late()
    num_experts = late.shape[1]
    figure, axes = _layers_figure(load, is_wide=is_wide)
    axes.imshow(
        _around_one(late),
        aspect="auto",
        interpolation="none",
        extent=(-0.5, num_experts - 0.5, len(load.layers) - 0.5, -0.5),
    )
    axes.grid(False)
    for rank in range(1, num_ranks):
        axes.axvline(num_experts * rank / num_ranks - 0.5, color=COLOURS["line"], linewidth=0.8)
    axes.set_xlabel("expert (lines: ranks)" if num_ranks > 1 else "expert")
    axes.xaxis.set_major_locator(integer_ticks())
    _names_axis(axes, "layer", load.layers)
    rows = [
        [str(layer), *(f"{expert} ({row[expert]:.2f})" for expert in _extremes(row))]
        for layer, row in zip(load.layers, late, strict=True)
        if not np.isnan(row).any()
    ]
    columns = ["layer", "fullest", "second", "third", "emptiest"]
    layer, expert = np.unravel_index(np.nanargmax(late), late.shape)
    said = f"expert {expert} of layer {load.layers[layer]} has most, {late[layer, expert]:.2f}"
    caption = (
        f"Tokens of each expert over the mean, last quarter of the steps: {said}. Orange: more "
        f"than the mean; blue: less; full colour from {_FULL:g} times, or a quarter, on."
    )
    label = f"Heat map of layers and experts, tokens over the mean: {said} times the mean."
    return Picture(to_svg(figure, name, label), caption, columns[: 1 + min(num_experts, 4)], rows)


@styled
def one_layer(name: str, load: Load, *, is_wide: bool) -> Picture:
    """Draw the experts of the least even layer over the steps."""
    late = load.late()
    worst = int(np.nanargmax(late.max(axis=1)))
    values = _binned(load.relative[:, worst])  # (columns, experts)
    num_experts = values.shape[1]
    height = min(3.5, 0.5 + 0.035 * num_experts)
    figure, (axes,) = new_figure(1, row_height_in=height, is_wide=is_wide)
    _cells(axes, _around_one(values.T), load.steps)
    axes.set_title("expert")
    axes.yaxis.set_major_locator(integer_ticks())
    fullest = np.argsort(-late[worst], kind="stable")[:_MOST_EXPERTS]
    quarters = np.array_split(load.relative[:, worst], min(4, len(load.steps)))
    rows = [
        [str(expert), *(f"{quarter[:, expert].mean():.2f}" for quarter in quarters)]
        for expert in fullest
    ]
    columns = ["expert", *(f"part {i} of {len(quarters)}" for i in range(1, len(quarters) + 1))]
    layer = load.layers[worst]
    label = (
        f"Heat map of the experts of layer {layer} over steps, tokens over the mean; the fullest "
        f"at the end are {', '.join(map(str, fullest[:3]))}."
    )
    caption = f"Layer {layer}, the least even one, over the steps; colours as before."
    return Picture(to_svg(figure, name, label), caption, columns, rows)


def _layers_figure(load: Load, *, is_wide: bool) -> tuple[Figure, Axes]:
    height = min(4.0, 0.4 + 0.15 * len(load.layers))
    figure, (axes,) = new_figure(1, row_height_in=height, is_wide=is_wide)
    return figure, axes


def _cells(axes: Axes, colours: np.ndarray, steps: np.ndarray) -> None:
    """Draw cells (rows, columns, RGBA) whose columns are steps."""
    first, last = float(steps[0]) - 0.5, float(steps[-1]) + 0.5
    extent = (first, last, len(colours) - 0.5, -0.5)
    axes.imshow(colours, aspect="auto", interpolation="none", extent=extent)
    axes.grid(False)
    steps_axis(axes)


def _names_axis(axes: Axes, what: str, names: range | list[int]) -> None:
    every = ceil_div(len(names), 16)
    axes.set_title(what)
    axes.set_yticks(range(0, len(names), every), [str(name) for name in names[::every]])


def _binned(values: np.ndarray) -> np.ndarray:
    """Return the means of at most `_MOST_COLUMNS` parts of the first axis."""
    return np.array([values[part].mean(axis=0) for part in even_parts(len(values), _MOST_COLUMNS)])


def _alpha(colour: tuple[float, float, float], strength: np.ndarray) -> np.ndarray:
    """Return cells of one colour; NaN is no colour."""
    cells = np.empty((*strength.shape, 4))
    cells[..., :3] = colour
    cells[..., 3] = np.clip(np.nan_to_num(strength), 0, 1)
    return cells


def _around_one(relative: np.ndarray) -> np.ndarray:
    """Return cells for ratios: one colour above 1, another one below."""
    least = 1 / _FULL
    logs = np.log(np.clip(np.nan_to_num(relative, nan=1.0), least, None)) / np.log(_FULL)
    hot, cold = _alpha(_HOT, logs), _alpha(_COLD, -logs)
    return np.where((logs > 0)[..., None], hot, cold)


def _extremes(row: np.ndarray) -> list[int]:
    order = np.argsort(-row, kind="stable")
    return [*map(int, order[:3]), int(order[-1])] if len(order) >= 4 else list(map(int, order))
