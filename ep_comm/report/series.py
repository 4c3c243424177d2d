"""A number over the steps of a run, and where it changes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

_LEAST_PART = 20  # of a series: either side of a shift has at least one in so many of its steps
_LEAST_STEPS = 5
_LASTING = 0.8  # of the steps on either side of it are on its side of the middle
_CLEAR = 2.0  # a shift is so many times the scatter on either side of it


class Bins(NamedTuple):
    """A series in so few parts that they can be drawn: arrays with an entry for each part.

    Attributes:
        steps: The last step of each.
        mean, low, high: Of its values; NaN where it has none.
    """

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


class Series(NamedTuple):
    """A number at some steps.

    Attributes:
        steps: Ascending.
        values: As many; all of them finite.
    """

    steps: np.ndarray
    values: np.ndarray

    def __bool__(self) -> bool:
        """Return whether it has any."""
        return len(self.steps) > 0

    @property
    def median(self) -> float:
        """Median of the values; NaN without any."""
        return float(np.median(self.values)) if self else float("nan")

    def last(self, share: float) -> Series:
        """Return the last part, at least one value."""
        first = min(len(self.steps) - 1, round(len(self.steps) * (1 - share))) if self else 0
        return Series(self.steps[first:], self.values[first:])

    def without(self, steps: frozenset[int]) -> Series:
        """Return all but those steps."""
        kept = ~np.isin(self.steps, list(steps))
        return Series(self.steps[kept], self.values[kept])

    def binned(self, most: int) -> Bins:
        """Return it in at most so many parts of equally many values."""
        parts = even_parts(len(self.steps), most)
        values = [self.values[part] for part in parts]
        return Bins(
            np.array([self.steps[part.stop - 1] for part in parts], dtype=np.int64),
            np.array([part.mean() for part in values]),
            np.array([part.min() for part in values]),
            np.array([part.max() for part in values]),
        )


def even_parts(length: int, most: int) -> list[slice]:
    """Return at most so many parts of a sequence, the longer ones spread evenly over it."""
    ends = np.linspace(0, length, min(length, most) + 1).round().astype(int)
    return [slice(int(a), int(b)) for a, b in zip(ends[:-1], ends[1:], strict=True)]


class Shift(NamedTuple):
    """A lasting change.

    Attributes:
        step: The first with the new value.
        before, after: Medians of the two parts.
    """

    step: int
    before: float
    after: float


def find_shift(series: Series, least_ratio: float) -> Shift | None:
    """Return where a positive number rises for good; None where it does not, or not clearly.

    Args:
        series: The number.
        least_ratio: Of the medians after and before.
    """
    num = len(series.steps)
    least = max(_LEAST_STEPS, num // _LEAST_PART)
    if num < 2 * least or np.any(series.values <= 0):
        return None
    logs = np.log(series.values)
    logs = np.clip(logs, *np.percentile(logs, (2, 98)))  # single outliers are no shift
    sums = np.cumsum(logs)
    places = np.arange(least, num - least + 1)  # first place of the second part
    left, right = sums[places - 1] / places, (sums[-1] - sums[places - 1]) / (num - places)
    # The two means that leave the least squares are those that are furthest apart, weighted.
    place = int(places[np.argmax(places * (num - places) * (right - left) ** 2)])
    parts = logs[:place], logs[place:]
    before, after = (float(np.median(part)) for part in parts)
    scatter = max(float(np.median(np.abs(part - np.median(part)))) for part in parts) * 1.4826
    if after - before < max(np.log(least_ratio), _CLEAR * scatter):
        return None
    between = (before + after) / 2
    if min(np.mean(parts[0] < between), np.mean(parts[1] > between)) < _LASTING:
        return None
    return Shift(int(series.steps[place]), float(np.exp(before)), float(np.exp(after)))


def densest_stretch(hits: np.ndarray) -> tuple[int, int, int] | None:
    """Return the stretch with most hits, each miss in it taking two of them away.

    So at least two thirds of it are hits: of two ranks, each is the slower one in half of the steps
    by chance.

    Returns:
        Its begin, its end (exclusive) and its hits less two for each miss; None without a hit.
    """
    best, found = 0, None
    score, begin = 0, 0
    for place, hit in enumerate(hits):
        if score <= 0:
            score, begin = 0, place
        score += 1 if hit else -2
        if score > best:
            best, found = score, (begin, place + 1, score)
    return found
