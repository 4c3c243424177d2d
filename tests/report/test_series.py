"""Where a number changes, and how a long series becomes short."""

from __future__ import annotations

import random

import numpy as np
import pytest

from ep_comm.report.series import Series, densest_stretch, even_parts, find_shift


def series(values) -> Series:
    return Series(np.arange(1, len(values) + 1), np.array(values, dtype=float))


@pytest.mark.parametrize(("length", "most"), [(1, 300), (299, 300), (1000, 240), (7, 3), (0, 5)])
def test_parts_cover_all_and_are_alike(length, most):
    parts = even_parts(length, most)
    assert len(parts) == max(1, min(length, most)) or length == 0
    covered = [i for part in parts for i in range(length)[part]]
    assert covered == list(range(length))
    sizes = [part.stop - part.start for part in parts]
    assert not sizes or max(sizes) - min(sizes) <= 1


def test_longer_parts_are_spread_evenly():
    ends = [part.stop for part in even_parts(1000, 240)]
    assert max(abs(end - 1000 * (i + 1) / 240) for i, end in enumerate(ends)) <= 0.5


def test_bins_have_mean_least_and_most():
    bins = series([1, 3, 2, 10, 20, 60]).binned(2)
    assert bins.steps.tolist() == [3, 6]
    assert bins.mean.tolist() == [2, 30]
    assert bins.low.tolist() == [1, 10] and bins.high.tolist() == [3, 60]


def test_a_lasting_rise_is_found_where_it_begins():
    chance = random.Random(3)
    values = [(1.0 if step < 120 else 1.4) * chance.uniform(0.95, 1.05) for step in range(1, 301)]
    values[30] = 50.0  # once is no shift
    shift = find_shift(series(values), 1.15)
    assert shift is not None and abs(shift.step - 120) <= 1
    assert shift.after / shift.before == pytest.approx(1.4, rel=0.03)


@pytest.mark.parametrize("kind", ["even", "falling", "for a while", "scattered", "short", "zero"])
def test_no_rise_is_found_where_there_is_none(kind):
    chance = random.Random(4)
    values = {
        "even": [chance.uniform(0.9, 1.1) for _ in range(200)],
        "falling": [2.0] * 100 + [1.0] * 100,
        "for a while": [1.0] * 200 + [1.5] * 50 + [1.0] * 50,
        "scattered": [chance.choice((1.0, 3.0)) for _ in range(200)],
        "short": [1.0, 1.0, 5.0, 5.0],
        "zero": [0.0] * 100 + [1.0] * 100,
    }[kind]
    assert find_shift(series(values), 1.15) is None


def test_the_densest_stretch_leaves_out_single_hits():
    hits = np.zeros(100, dtype=bool)
    hits[[5, 20, 90]] = True
    hits[40:60] = True
    hits[50] = False
    assert densest_stretch(hits) == (40, 60, 17)
    assert densest_stretch(np.zeros(10, dtype=bool)) is None


def test_half_of_the_steps_are_no_stretch():
    chance = random.Random(5)
    hits = np.array([chance.random() < 0.5 for _ in range(400)])
    _, _, score = densest_stretch(hits)
    assert score < 15
