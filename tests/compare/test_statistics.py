"""ep_comm/compare/statistics.py at its bounds. Verdicts over whole runs are in test_verdicts.py."""

from __future__ import annotations

import math

import numpy as np
import pytest
from made_up_comparison import STEPS, losses, run_of, write_log

from ep_comm.compare.statistics import (
    FIRST_STEP_TOLERANCE,
    Check,
    Difference,
    Noise,
    _relative,
    _within_noise,
    difference,
    read_run,
    smooth,
    standard_error,
    steps_skipped,
    window_of,
)
from ep_comm.pretrain.log_file import LOG_FILE, TOKENS_PER_S, TRAIN_LOSS


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


def test_smoothing_is_the_mean_of_the_last_steps():
    values = np.random.default_rng(0).normal(size=30)
    expected = [values[max(0, i - 6) : i + 1].mean() for i in range(30)]
    np.testing.assert_allclose(smooth(values, 7), expected, rtol=1e-12)


def test_difference_leaves_out_the_beginning():
    reference, run = losses(), losses()
    run[: steps_skipped(STEPS) - window_of(STEPS) + 1] += 100  # gone from the mean when it counts
    run[49] += 0.5
    found = difference(run_of(run, 3.2), run_of(reference, 3.0))
    assert found.first == pytest.approx(100 / reference[0])
    assert found.largest == pytest.approx(0.5 / window_of(STEPS))
    assert 50 <= found.largest_step < 50 + window_of(STEPS)
    assert found.mean == pytest.approx(0.5 / (STEPS - steps_skipped(STEPS)))
    assert found.final_train == pytest.approx(0, abs=1e-12)
    assert found.final_valid == pytest.approx(0.2)


def test_differences_of_both_signs_do_not_cancel():
    run = losses()
    run[30:50] += 0.1
    run[60:90] -= 0.1
    assert difference(run_of(run), run_of(losses())).mean == pytest.approx(5 / 75)


def test_numbers_of_a_run(tmp_path):
    from ep_comm.pretrain.log_file import read_log

    write_log(tmp_path / "run", losses())
    run = read_run(read_log(tmp_path / "run" / LOG_FILE), STEPS)
    assert run.tokens_per_s == np.median(1000 + np.arange(6, STEPS + 1))
    assert run.final_train == pytest.approx(losses()[-window_of(STEPS) :].mean())
    assert run.final_valid == losses()[-1] + 0.5
    with pytest.raises(ValueError, match="step 101 is missing"):
        read_run(read_log(tmp_path / "run" / LOG_FILE), STEPS + 1)
