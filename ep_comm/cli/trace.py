"""``ep-comm trace``: what a trace says in figures, beside torch's profiler, and as a picture."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ep_comm.bench.tables import screen_table
from ep_comm.job.exits import UserError
from ep_comm.job.files import write_bytes
from ep_comm.telemetry.beside import Beside, beside, merge, operations
from ep_comm.telemetry.picture import draw_trace
from ep_comm.telemetry.profiles import ProfileError, read_profile, span_of
from ep_comm.telemetry.spans import covered
from ep_comm.telemetry.trace import WAITS, TraceError, read_trace


def trace(
    file: Path,
    profiles: list[Path],
    out: Path | None,
    picture: Path | None,
    window_ms: tuple[float, float] | None,
    console: Console,
) -> None:
    """Print tables of the ranks; write one trace of all files, and a picture, where asked for.

    Raises:
        UserError: A file cannot be read or written, or they do not belong together.
    """
    try:
        document = read_trace(file)
        read = [read_profile(path) for path in profiles]
        merged = merge(document, read)  # refuses two of one rank
        found = {each.rank: each for each in (beside(document, profile) for profile in read)}
        console.print(_table(document))
        if found:
            console.print(_beside_table(found.values()))
        if out is not None:
            text = json.dumps(merged).encode()
            write_bytes(out, gzip.compress(text) if out.suffix == ".gz" else text)
            console.print(f"written to {out}", highlight=False)
        if picture is not None:
            draw_trace(document, picture, read, window_ms)
            console.print(f"written to {picture}", highlight=False)
    except (TraceError, ProfileError, OSError) as error:
        raise UserError(str(error)) from None


def _table(document: dict[str, Any]) -> Table:
    errors = document["otherData"]["clock error, us"]
    names = ("rank", "operations", "ms", "ms waited", "most for rank", "clock error, us")
    table = screen_table("operations", names)
    for rank in range(len(errors)):
        events = operations(document, rank)
        waits = [event["args"][WAITS] for event in events if event["args"][WAITS]]
        by_rank = [sum(column) for column in zip(*waits, strict=True)]
        table.add_row(
            str(rank),
            str(len(events)),
            _ms(covered(map(span_of, events))),
            _ms(sum(map(max, waits))),
            str(max(range(len(by_rank)), key=by_rank.__getitem__)) if any(by_rank) else "",
            f"{errors[f'rank {rank}']:g}",
        )
    between = document["otherData"]["clock error between hosts"]
    table.caption = f"clock error between hosts: {between}"
    return table


def _beside_table(found: Iterable[Beside]) -> Table:
    names = ("rank", "operations", "ms", "ms exposed", "exposed", "apart, us", "furthest")
    table = screen_table("beside torch's profiler", names)
    for each in found:
        table.add_row(
            str(each.rank),
            str(each.num_operations),
            _ms(each.communication_us),
            _ms(each.exposed_us),
            f"{each.exposed_share:.1%}",
            *(("", "") if each.apart_us is None else (f"{us:+.1f}" for us in each.apart_us)),
        )
    table.caption = (
        "exposed: no matrix product ran on that rank meanwhile. apart: how much later our combines "
        "are than those that the profiler saw, median and furthest: the error of the common axis."
    )
    return table


def _ms(us: float) -> str:
    return f"{us / 1e3:.3f}"
