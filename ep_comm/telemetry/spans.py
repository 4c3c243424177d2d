"""Lengths of unions of intervals: what ran at all, and what ran with nothing beside it."""

from __future__ import annotations

from collections.abc import Iterable

Span = tuple[float, float]  # start and end, in one unit of one clock


def covered(spans: Iterable[Span]) -> float:
    """Return the length of the union."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def exposed(spans: Iterable[Span], beside: Iterable[Span]) -> float:
    """Return the length of the part of the union of `spans` that no span of `beside` covers."""
    beside = list(beside)
    return covered([*spans, *beside]) - covered(beside)
