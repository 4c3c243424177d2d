"""`Stats` in the text format that Prometheus scrapes, for servers that have a page of metrics."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ep_comm.telemetry.stats import Quantiles, Stats

_QUANTILES = (("0.5", "p50"), ("0.9", "p90"), ("0.99", "p99"), ("1", "max"))


def prometheus_text(stats: Stats) -> str:
    """Return the metrics of one rank, each with its help and type.

    They are those of the operations that `stats` covers, and no counters: a scraper that comes more
    often than operations sees the same again.
    """
    return "\n".join(_lines(stats)) + "\n"


def _lines(stats: Stats) -> Iterator[str]:
    rank = f'rank="{stats.rank}"'
    yield from _head("operation_seconds", "Time of one operation, waits included.")
    for kind, of_kind in stats.operations.items():
        yield from _quantiles("operation_seconds", f'{rank},kind="{kind}"', of_kind.seconds)
    yield from _head("wait_seconds", "How long one operation waited for another rank.")
    for kind, of_kind in stats.operations.items():
        for late, waits in enumerate(of_kind.wait_s_by_rank):
            labels = f'{rank},kind="{kind}",late_rank="{late}"'
            yield from _quantiles("wait_seconds", labels, waits)
    yield from _head("operations", "Operations that these figures cover.")
    for kind, of_kind in stats.operations.items():
        yield f'ep_comm_operations{{{rank},kind="{kind}"}} {of_kind.seconds.num}'
    yield from _head("wire_bytes", "Mean bytes that left the rank in one operation.")
    for kind, of_kind in stats.operations.items():
        yield f'ep_comm_wire_bytes{{{rank},kind="{kind}"}} {of_kind.wire_bytes:.9g}'
    yield from _head("row_imbalance", "Rows of the fullest rank over the mean; 1 is even.")
    for kind, of_kind in stats.operations.items():
        yield f'ep_comm_row_imbalance{{{rank},kind="{kind}"}} {of_kind.imbalance:.9g}'
    yield from _head("expert_imbalance", "Rows of the rank's fullest expert over its mean.")
    for kind, of_kind in stats.operations.items():
        if of_kind.rows_by_expert:
            yield f'ep_comm_expert_imbalance{{{rank},kind="{kind}"}} {of_kind.expert_imbalance:.9g}'
    yield from _head("wait_share", "Part of all operations' time that was waiting.")
    yield f"ep_comm_wait_share{{{rank}}} {stats.wait_share:.9g}"
    yield from _head("slowest_rank", "The rank that this one waits for; -1: none.")
    yield f"ep_comm_slowest_rank{{{rank}}} {-1 if stats.slowest is None else stats.slowest.rank}"


def _head(name: str, text: str) -> tuple[str, str]:
    return f"# HELP ep_comm_{name} {text}", f"# TYPE ep_comm_{name} gauge"


def _quantiles(name: str, labels: str, of: Quantiles) -> Iterator[str]:
    for quantile, field in _QUANTILES:
        value = getattr(of, field)
        if math.isfinite(value):
            yield f'ep_comm_{name}{{{labels},quantile="{quantile}"}} {value:.9g}'
