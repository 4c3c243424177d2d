"""ep_comm/compare/statistics.py at its bounds. Verdicts over whole runs are in test_compare.py."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ep_comm.compare.statistics import (
    FIRST_STEP_TOLERANCE,
    Check,
    Difference,
    Noise,
    _relative,
    _within_noise,
    read_run,
    smooth,
    standard_error,
    steps_skipped,
    window_of,
)
from ep_comm.pretrain.log_file import TOKENS_PER_S, TRAIN_LOSS


@pytest.mark.parametrize(
    ("steps", "window"), [(1, 5), (119, 5), (120, 6), (1999, 99), (2000, 100), (4000, 100)]
)
def test_window(steps, window):
    assert window_of(steps) == window


@pytest.mark.parametrize(("steps", "skipped"), [(1, 0), (3, 0), (4, 1), (7, 1), (8, 2)])
def test_beginning_that_does_not_count(steps, skipped):
    assert steps_skipped(steps) == skipped


def test_a_window_longer_than_the_run():
    np.testing.assert_allclose(smooth(np.array([4.0, 2.0, 3.0]), 5), [4.0, 3.0, 3.0])


@pytest.mark.parametrize(
    ("value", "passed", "unclear"),
    [
        (1.0, True, False),  # the limit itself
        (np.nextafter(1, 2), False, True),
        (2.0, False, True),  # what chance does, itself
        (np.nextafter(2, 3), False, False),
        (math.nan, False, False),
    ],
)
def test_limit_and_chance(value, passed, unclear):
    check = Check(what="it", value=value, limit=1.0, chance=2.0)
    assert (check.passed, check.is_unclear) == (passed, unclear)


def test_without_chance_nothing_is_unclear():
    assert not Check(what="it", value=1.1, limit=1.0).is_unclear


@pytest.mark.parametrize(("noise_valid", "noise_mean", "limit"), [(0.3, 0.2, 0.6), (0.1, 0.2, 0.4)])
def test_limits_follow_from_the_noise(noise_valid, noise_mean, limit):
    """That of the validation from the larger of two: seeds may happen to end close together."""
    found = Difference(
        first=0.0, largest=0.1, largest_step=50, mean=0.1, final_train=0.1, final_valid=0.1
    )
    noise = Noise(largest=0.5, mean=noise_mean, final_valid=noise_valid)
    limits = [check.limit for check in _within_noise(found, noise, 2.0)]
    assert limits == pytest.approx([FIRST_STEP_TOLERANCE, 1.0, 2 * noise_mean, limit])


@pytest.mark.parametrize(("steps", "rate"), [(1, 1), (3, 3), (5, 5), (6, 6), (8, 7)])
def test_throughput_is_that_after_the_warm_up(steps, rate):
    """The first five steps do not count, if there are others: the last one always counts."""
    records = [
        {"type": "train", "iteration": step, TRAIN_LOSS: 1.0, TOKENS_PER_S: step}
        for step in range(1, steps + 1)
    ]
    assert read_run(records, steps).tokens_per_s == rate


def test_errors_of_few_values():
    assert standard_error([1.0]) is None
    assert standard_error([1.0, 3.0]) == pytest.approx(1.0)
    assert _relative(1.0, 0.0) == math.inf
