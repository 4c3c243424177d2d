"""A picture of what the GPU did, stream by stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ep_comm.bench.train.profile import Bar
from ep_comm.telemetry.profiles import KINDS, kernel_kind

_COLOURS = dict(
    zip(KINDS, ("tab:red", "tab:orange", "tab:purple", "tab:blue", "tab:gray"), strict=True)
)


def draw_timelines(timelines: Mapping[str, Sequence[Bar]], title: str, path: Path) -> None:
    """Draw one timeline above the other, with one scale, a row for each stream.

    Args:
        timelines: By name.
        title: Of the picture.
        path: PNG file to write.
    """
    from matplotlib.figure import Figure  # slow to import, and seldom needed
    from matplotlib.patches import Patch

    figure = Figure(figsize=(12, 1.2 + 2.2 * len(timelines)), layout="constrained")
    rows = figure.subplots(len(timelines), sharex=True, squeeze=False)[:, 0]
    for axes, (name, timeline) in zip(rows, timelines.items(), strict=True):
        streams = list(dict.fromkeys(bar.stream for bar in timeline))
        for kind, colour in _COLOURS.items():
            for row, stream in enumerate(streams):
                spans = [
                    (bar.start_us / 1e3, bar.duration_us / 1e3)
                    for bar in timeline
                    if bar.stream == stream and kernel_kind(bar.name) == kind
                ]
                axes.broken_barh(spans, (row - 0.4, 0.8), facecolors=colour)
        axes.set_yticks(range(len(streams)), [f"stream {stream}" for stream in streams])
        axes.invert_yaxis()
        axes.set_title(name, loc="left", fontsize=10)
        axes.grid(axis="x", alpha=0.3)
    rows[-1].set_xlabel("ms since the first kernel")
    figure.suptitle(title, fontsize=10)
    figure.legend(
        handles=[Patch(color=colour, label=kind) for kind, colour in _COLOURS.items()],
        loc="outside lower center",
        ncols=len(_COLOURS),
        fontsize=8,
    )
    figure.savefig(path, dpi=150)
