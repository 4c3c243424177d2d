"""Matplotlib's figures as SVG that lives inside of a page.

Colours are the page's: a figure is drawn in the stand-ins of `COLOURS`, and the page's CSS
variables take their places. Text stays text, in the page's font.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, StrMethodFormatter

from ep_comm.numeric import ceil_div

_NAMES = ("ink", "muted", "line", "first", "second", "dispatch", "combine", "expert", "rest")
COLOURS = {name: f"#0000{number:02x}" for number, name in enumerate(_NAMES, 1)}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ep_comm",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": COLOURS["ink"],
    "text.parse_math": False,  # names of runs may have a dollar
    "axes.edgecolor": COLOURS["line"],
    "axes.labelcolor": COLOURS["ink"],
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
    "axes.titlelocation": "left",
    "axes.titlepad": 4.0,
    "grid.color": COLOURS["line"],
    "grid.linewidth": 0.6,
    "xtick.color": COLOURS["line"],
    "ytick.color": COLOURS["line"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["muted"],
    "axes.axisbelow": True,
    "legend.frameon": False,
}
_WIDTH_IN = {True: 11.0, False: 5.4}
_LEFT_IN, _RIGHT_IN, _BOTTOM_IN = 0.7, 0.25, 0.45
_BETWEEN_IN = 0.3  # above each row
_LEGEND_IN, _LEGEND_LINE_IN = 0.1, 0.2  # above all of them, and more for each line of names
_LEGEND_COLUMNS = 4
MOST_POINTS = 300  # of a line
MOST_ROWS = 40  # of the table behind a picture

styled = matplotlib.rc_context(_STYLE)
"""Decorates the functions that draw; `new_figure` and `to_svg` are for them."""


def new_figure(
    rows: int, *, row_height_in: float, is_wide: bool, num_named: int = 0
) -> tuple[Figure, list[Axes]]:
    """Return a figure of so many rows, over the page's width or half of it.

    Args:
        rows: Axes below each other.
        row_height_in: Height of each, in inches.
        is_wide: Whether it has the page's width.
        num_named: Entries of its legend, for which it leaves room.
    """
    # Fixed margins: finding them by layout takes as long as all of the drawing.
    lines = ceil_div(num_named, _LEGEND_COLUMNS)
    width, legend = _WIDTH_IN[is_wide], lines and _LEGEND_IN + _LEGEND_LINE_IN * lines
    height = legend + rows * (row_height_in + _BETWEEN_IN) + _BOTTOM_IN
    figure = Figure(figsize=(width, height))
    axes = figure.subplots(rows, 1, squeeze=False, sharex=True)
    figure.subplots_adjust(
        left=_LEFT_IN / width,
        right=1 - _RIGHT_IN / width,
        bottom=_BOTTOM_IN / height,
        top=1 - (legend + _BETWEEN_IN) / height,
        hspace=_BETWEEN_IN / row_height_in,
    )
    return figure, list(axes[:, 0])


def add_legend(figure: Figure, handles: Iterable[Any], names: Iterable[str]) -> None:
    """Name what is drawn, above all of it."""
    width = figure.get_size_inches()[0]
    figure.legend(
        handles,
        names,
        loc="upper left",
        bbox_to_anchor=((_LEFT_IN - 0.1) / width, 1.0),
        ncols=_LEGEND_COLUMNS,
        borderpad=0,
        borderaxespad=0.5,
        handlelength=1.6,
        columnspacing=1.5,
    )


def log_scale(axes: Axes, linear_below: float | None = None) -> None:
    """Make the vertical axis logarithmic, with plain numbers beside it.

    Args:
        axes: Whose axis.
        linear_below: Linear below that size, for values that may be 0.
    """
    if linear_below is None:
        axes.set_yscale("log")
    else:
        axes.set_yscale("symlog", linthresh=linear_below)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def integer_ticks() -> MaxNLocator:
    """Return what places the ticks of an axis of steps or experts: at round whole numbers."""
    return MaxNLocator(integer=True, steps=[1, 2, 5, 10])


def steps_axis(axes: Axes) -> None:
    """Make the horizontal axis one of steps."""
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(integer_ticks())


def to_svg(figure: Figure, name: str, label: str) -> str:
    """Return the ``svg`` element of a figure.

    Args:
        figure: From `new_figure`.
        name: Unique on the page: identifiers begin with it.
        label: What a screen reader says.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r' id="', f' id="{name}-', text)
    text = text.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    for each, stand_in in COLOURS.items():
        text = text.replace(stand_in, f"var(--{each})")
    head = re.match(r'<svg.*?viewBox="([^"]*)".*?>', text, flags=re.DOTALL)
    assert head is not None  # matplotlib writes it
    opening = f'<svg role="img" aria-label="{escape(label)}" viewBox="{head[1]}">'
    return re.sub(r"\n+", "\n", opening + text[head.end() :])
