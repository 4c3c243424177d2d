"""The last operations of all ranks on one time axis, as Perfetto and Chrome show them."""

from __future__ import annotations

import json
import math
import socket
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ep_comm.telemetry.clocks import Clock
from ep_comm.telemetry.records import OpRecord

FORMAT = "ep_comm trace 1"
WAITS = "waited for rank, us"
_ROWS = ("forward", "backward", "low latency", "plan")


class TraceError(ValueError):
    """A file is no trace that `ep_comm.Buffer.write_trace` wrote; names it."""


class RankTrace(NamedTuple):
    """The operations of one rank.

    Attributes:
        rank: In the buffer's group.
        job_rank: In the job, as torch's profiler calls it.
        host: Its host's name.
        unix_s: Seconds that the host's wall clock is ahead of its `time.monotonic`.
        clock_error_s: By how much begins may be wrong, against the host's clock.
        operations: See `TracedOperation`.
    """

    rank: int
    job_rank: int
    host: str
    unix_s: float
    clock_error_s: float
    operations: list[TracedOperation]


class TracedOperation(NamedTuple):
    """An operation; begin by the host's `time.monotonic`."""

    begin_s: float
    seconds: float
    name: str
    row: str
    details: dict[str, Any]


def rank_trace(
    records: Iterable[OpRecord], rank: int, clock: Clock, job_rank: int | None = None
) -> RankTrace:
    """Return the trace of a rank's records, which were timed by `clock`.

    Args:
        records: Oldest first.
        rank: In the buffer's group.
        clock: That of `OpRecord.began_s`.
        job_rank: In the job; None: `rank`.
    """
    spans = [
        TracedOperation(
            _begin_s(record) - clock.ahead_s,
            record.seconds,
            f"{record.op} #{record.epoch}",
            _row_of(record),
            {
                "number": record.place,
                "wire bytes": record.wire_bytes,
                "rows to rank": list(record.rows_to_rank),
                "rows from rank": list(record.rows_from_rank),
                WAITS: [round(1e6 * wait, 1) for wait in record.wait_s_by_rank],
            },
        )
        for record in records
    ]
    ahead_s = time.time() - time.monotonic()
    job_rank = rank if job_rank is None else job_rank
    return RankTrace(rank, job_rank, socket.gethostname(), ahead_s, clock.error_s, spans)


def chrome_trace(ranks: Sequence[RankTrace]) -> dict[str, Any]:
    """Return the traces of all ranks as one document of Chrome's trace format.

    Time begins with the first operation: at ``baseTimeNanoseconds`` of the first rank's wall clock,
    as in the traces of torch's profiler. Ranks of one host share its clock; those of several are
    put together by their hosts' wall clocks.
    """
    hosts = {trace.host for trace in ranks}
    ahead_s = {trace.rank: trace.unix_s if len(hosts) > 1 else 0.0 for trace in ranks}
    begins = [ahead_s[trace.rank] + span.begin_s for trace in ranks for span in trace.operations]
    first_s = min(begins, default=0.0)
    base_s = first_s if len(hosts) > 1 else first_s + ranks[0].unix_s
    events: list[dict[str, Any]] = []
    for trace in ranks:
        events.append(_named("process", trace.rank, 0, f"rank {trace.rank} on {trace.host}"))
        events += [_named("thread", trace.rank, i, row) for i, row in enumerate(_ROWS)]
        events += [
            {
                "ph": "X",
                "cat": "ep_comm",
                "name": span.name,
                "pid": trace.rank,
                "tid": _ROWS.index(span.row),
                "ts": 1e6 * (ahead_s[trace.rank] + span.begin_s - first_s),
                "dur": 1e6 * span.seconds,
                "args": span.details,
            }
            for span in trace.operations
        ]
    errors = {f"rank {trace.rank}": round(1e6 * trace.clock_error_s, 1) for trace in ranks}
    between = "not known: their wall clocks" if len(hosts) > 1 else "none: one host"
    return {
        "displayTimeUnit": "ns",
        "baseTimeNanoseconds": round(1e9 * base_s),
        "otherData": {
            "format": FORMAT,
            "rank in the job": {f"rank {trace.rank}": trace.job_rank for trace in ranks},
            "clock error, us": errors,
            "clock error between hosts": between,
        },
        "traceEvents": events,
    }


def read_trace(path: Path) -> dict[str, Any]:
    """Read a trace that `ep_comm.Buffer.write_trace` wrote.

    Raises:
        OSError: It cannot be read.
        TraceError: It is none.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        is_ours = document["otherData"]["format"] == FORMAT
    except (ValueError, KeyError, TypeError):
        is_ours = False
    if not is_ours:
        raise TraceError(f"{path} is no trace that Buffer.write_trace wrote")
    return document


def _begin_s(record: OpRecord) -> float:
    """Return when an operation began: where nobody knows, when it was called."""
    return record.called_s if math.isnan(record.began_s) else record.began_s


def _row_of(record: OpRecord) -> str:
    if record.op.startswith("low_latency"):
        return "low latency"
    if record.op == "plan":
        return "plan"
    return "backward" if record.is_backward else "forward"


def _named(what: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": f"{what}_name", "pid": pid, "tid": tid, "args": {"name": name}}
