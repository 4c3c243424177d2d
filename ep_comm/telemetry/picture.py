"""A picture of a trace: a lane for each rank, waits in the colour of the rank waited for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ep_comm.telemetry.beside import group_rank, later_us, operations
from ep_comm.telemetry.profiles import Profile, gemms
from ep_comm.telemetry.trace import WAITS

_GREYS = {"plan": "0.86", "dispatch": "0.55", "combine": "0.74"}


def draw_trace(
    trace: dict[str, Any],
    path: Path,
    profiles: Sequence[Profile] = (),
    window_ms: tuple[float, float] | None = None,
) -> None:
    """Draw the operations of all ranks, one under the other.

    An operation is grey. Its longest wait has the colour of the rank that it waited for, which is
    that of the rank's name. When it waited within the operation is not on record: the wait is drawn
    from its begin.

    Args:
        trace: As `ep_comm.telemetry.trace.read_trace` gives it.
        path: PNG file to write.
        profiles: Of some of its ranks: their matrix products are drawn under the operations.
        window_ms: Begin and end of what is drawn; None: all of it.
    """
    from matplotlib import colormaps  # slow to import, and seldom needed
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    ranks = sorted({event["pid"] for event in trace["traceEvents"]})
    palette = colormaps["tab10" if len(ranks) <= 10 else "tab20"]
    figure = Figure(figsize=(12, 1.4 + 0.55 * len(ranks)), layout="constrained")
    axes = figure.subplots()
    for lane, rank in enumerate(ranks):
        for event in operations(trace, rank):
            begin, length = event["ts"] / 1e3, event["dur"] / 1e3
            axes.broken_barh([(begin, length)], (lane - 0.35, 0.7), facecolors=_grey(event["name"]))
            waits = event["args"][WAITS]
            if waits and max(waits) > 0:
                late = max(range(len(waits)), key=waits.__getitem__)
                wait = [(begin, min(waits[late] / 1e3, length))]
                axes.broken_barh(wait, (lane - 0.35, 0.7), facecolors=palette(late % palette.N))
    for profile in profiles:
        lane, later = ranks.index(group_rank(trace, profile)), later_us(trace, profile)
        spans = [((a + later) / 1e3, (b - a) / 1e3) for a, b in gemms(profile.events)]
        axes.broken_barh(spans, (lane + 0.37, 0.1), facecolors="black")
    axes.set_yticks(range(len(ranks)), [f"rank {rank}" for rank in ranks])
    for label, rank in zip(axes.get_yticklabels(), ranks, strict=True):
        label.set_color(palette(rank % palette.N))
        label.set_fontweight("bold")
    axes.invert_yaxis()
    if window_ms is not None:
        axes.set_xlim(*window_ms)
    axes.set_xlabel("ms")
    axes.grid(axis="x", alpha=0.3)
    patches = [Patch(color=grey, label=name) for name, grey in _GREYS.items()]
    patches += [Patch(color=palette(r % palette.N), label=f"waits for rank {r}") for r in ranks]
    patches += [Patch(color="black", label="matrix products")] if profiles else []
    figure.legend(handles=patches, loc="outside lower center", ncols=8, fontsize=8)
    figure.savefig(path, dpi=150)


def _grey(name: str) -> str:
    return next((grey for kind, grey in _GREYS.items() if kind in name), "0.9")
