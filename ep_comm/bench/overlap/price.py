"""The price of an operation: what GEMMs lose that run beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple


class Span(NamedTuple):
    """When something ran, in µs since the GEMMs might begin."""

    begin: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Beside:
    """One run of GEMMs with operations beside them.

    Attributes:
        gemms: From the first GEMM's begin to the last one's end.
        operations: In order, one after the other.
    """

    gemms: Span
    operations: tuple[Span, ...]

    @property
    def operations_within(self) -> float:
        """Operations that ran while the GEMMs did; of one that was cut off, its part within."""
        return sum(_share_within(span, self.gemms) for span in self.operations)

    @property
    def time_beside(self) -> float:
        """Median time of the operations that ran beside GEMMs from begin to end, in µs.

        Where there is none it is that of the first.
        """
        first, last = self.gemms
        whole = [
            span.end - span.begin
            for span in self.operations
            if span.begin >= first and span.end <= last
        ]
        return median(whole) if whole else self.operations[0].end - self.operations[0].begin

    def lost(self, gemms_alone: float) -> float:
        """Return the µs of GEMM time that one operation took.

        Args:
            gemms_alone: The same GEMMs with nothing beside them, in µs.

        Raises:
            ValueError: No operation ran beside the GEMMs.
        """
        within = self.operations_within
        if within == 0:
            raise ValueError("no operation ran beside the GEMMs")
        return (self.gemms.end - self.gemms.begin - gemms_alone) / within


def serial_price(together: float, gemms_alone: float, num_operations: int) -> float:
    """Return the µs of one operation between GEMMs, on the stream of these.

    Args:
        together: GEMMs and operations in turn.
        gemms_alone: The same GEMMs.
        num_operations: As they say.
    """
    return (together - gemms_alone) / num_operations


def gemms_of_run(gemm_us: float, window_us: float) -> int:
    """Return how many GEMMs take about `window_us`; at least 8."""
    return max(8, round(window_us / gemm_us))


def operations_of_run(alone_us: float, gemms_us: float) -> int:
    """Return how many operations to start beside GEMMs, so that these have some all along.

    An operation takes longer there, and so do the GEMMs: neither by much more than a half of what
    both would take one after the other. Those behind the last GEMM are not counted.
    """
    return max(4, math.ceil(1.5 * gemms_us / alone_us))


def best(prices: Sequence[tuple[int, float]]) -> int:
    """Return the SM count of the lowest price; of equal ones the first."""
    return min(prices, key=lambda price: price[1])[0]


def _share_within(span: Span, window: Span) -> float:
    inside = min(span.end, window.end) - max(span.begin, window.begin)
    return max(0.0, inside) / (span.end - span.begin)
