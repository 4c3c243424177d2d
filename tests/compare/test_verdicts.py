"""Verdicts of a comparison over whole runs, on made-up curves."""

from __future__ import annotations

import numpy as np
import pytest
from made_up_comparison import SEED2, STEPS, losses, run_of

from ep_comm.compare.statistics import (
    Tolerances,
    difference,
    judge,
    noise_of,
    offsets,
    pairs_of,
    standard_error,
    steps_skipped,
    window_of,
)


@pytest.mark.parametrize(
    ("ep_comm", "valid", "failing"),
    [
        (losses(at_the_end=0.01), 4.0, []),
        (losses(at_the_end=0.05), 4.0, ["largest |Δ|"]),
        (losses(at_the_end=-0.09), 4.0, ["largest |Δ|", "mean |Δ|"]),
        (losses(), 4.06, ["final validation |Δ|"]),
        (losses(), 4.03, []),  # the second seed ended at 4.01, but was 0.04 off on the whole way
        (losses(0.03), 4.0, ["relative |Δ| of step 1"]),
        (np.append(losses()[:-1], np.nan), 4.0, ["largest |Δ|", "mean |Δ|"]),
    ],
    ids=["close", "largest", "mean", "valid", "noisy-valid", "first-step", "nan"],
)
def test_ep_comm_is_judged_by_the_noise(ep_comm, valid, failing):
    runs = {"alltoall": run_of(losses(), 4.0), "alltoall-seed2": run_of(SEED2, 4.01)}
    runs["ep_comm"] = run_of(ep_comm, valid)
    checks = judge(runs, Tolerances())["ep_comm"]
    assert [check.what for check in checks if not check.passed] == failing
    assert len(checks) == 4


def test_tolerance_in_units_of_the_noise():
    runs = {"alltoall": run_of(losses()), "alltoall-seed2": run_of(SEED2)}
    runs["ep_comm"] = run_of(losses(at_the_end=0.05))
    for tolerance, passed in ((1.0, False), (1.3, True)):
        checks = judge(runs, Tolerances(noise=tolerance))["ep_comm"]
        assert all(check.passed for check in checks) == passed


def test_the_noise_of_more_seeds_is_the_largest_between_any_two():
    runs = {"alltoall": run_of(losses(), 4.0), "alltoall-seed2": run_of(SEED2, 4.02)}
    two, only = noise_of(runs), difference(runs["alltoall-seed2"], runs["alltoall"])
    assert (two.largest, two.mean, two.final_valid) == (only.largest, only.mean, only.final_valid)
    runs["alltoall-seed10"] = run_of(losses(-0.03), 4.01)
    noise = noise_of(runs)
    assert noise.mean == pytest.approx(0.07) and noise.largest == pytest.approx(0.07)
    assert noise.final_valid == pytest.approx(0.02)
    runs["ep_comm"] = run_of(losses(at_the_end=0.05), 4.0)  # outside of what seed 2 alone allows
    assert noise_of(runs) == noise  # which ep_comm is no part of
    assert all(check.passed for check in judge(runs, Tolerances())["ep_comm"])
    runs["alltoall-seed3"] = run_of(np.append(losses()[:-1], np.nan), 4.0)
    assert not all(check.passed for check in judge(runs, Tolerances())["ep_comm"])


def test_offsets_show_which_run_is_the_odd_one():
    runs = {"alltoall": run_of(losses(0.09)), "alltoall-seed2": run_of(losses(0.01))}
    runs["ep_comm"] = run_of(losses(0.02))
    assert offsets(runs) == {}  # either of two may be the odd one
    runs["alltoall-seed3"] = run_of(losses(-0.01))
    found = offsets(runs)
    seeds = {"alltoall": 0.06, "alltoall-seed2": -0.02, "alltoall-seed3": -0.04}
    assert found == pytest.approx({**seeds, "ep_comm": -0.01})
    runs["ep_comm"].train[: steps_skipped(STEPS) - window_of(STEPS)] += 100
    assert offsets(runs) == found  # smoothed losses count, and no beginning


@pytest.mark.parametrize(
    ("train", "valid", "passed"),
    [
        (losses(at_the_end=0.01), 4.01, True),
        (losses(at_the_end=-0.03), 4.01, False),
        (losses(), 4.03, False),
    ],
    ids=["close", "train", "valid"],
)
def test_fp8_is_judged_by_the_final_losses_without_it(train, valid, passed):
    runs = {"alltoall": run_of(losses(1.0), 5.0), "ep_comm": run_of(losses(), 4.0)}
    runs["ep_comm-fp8"] = run_of(train, valid)
    checks = judge(runs, Tolerances())["ep_comm-fp8"]
    assert all(check.passed for check in checks) == passed
    assert len(checks) == 2


@pytest.mark.parametrize(("apart", "unclear"), [(0.04, True), (0.07, False)])
def test_one_pair_that_is_no_further_apart_than_seeds_is_unclear(apart, unclear):
    runs = {"alltoall": run_of(losses(), 4.0), "alltoall-seed2": run_of(losses(0.05), 4.001)}
    runs |= {"ep_comm": run_of(losses(), 4.0), "ep_comm-fp8": run_of(losses(apart), 4 + apart)}
    checks = judge(runs, Tolerances())["ep_comm-fp8"]
    assert [check.passed for check in checks] == [False, False]
    assert [check.is_unclear for check in checks] == [unclear, unclear]
    runs |= {"ep_comm-seed2": run_of(losses(), 4.0)}
    runs |= {"ep_comm-fp8-seed2": run_of(losses(apart), 4 + apart)}
    checks = judge(runs, Tolerances())["ep_comm-fp8"]  # two pairs are not chance
    assert not any(check.passed or check.is_unclear for check in checks)


def test_fp8_wire_of_fp8_experts_is_judged_by_their_bf16_wire():
    runs = {"alltoall": run_of(losses(), 4.0), "ep_comm": run_of(losses(), 4.0)}
    runs["ep_comm-fp8-all"] = run_of(losses(1.01), 5.01)
    assert "ep_comm-fp8-all" not in judge(runs, Tolerances())
    runs["ep_comm-fp8-experts"] = run_of(losses(1.0), 5.0)
    checks = judge(runs, Tolerances())
    assert list(checks) == ["ep_comm-fp8-all"]  # what FP8 experts do to the loss is shown only
    assert all(check.passed for check in checks["ep_comm-fp8-all"])
    runs["ep_comm-fp8-all"] = run_of(losses(), 4.0)
    assert not any(check.passed for check in judge(runs, Tolerances())["ep_comm-fp8-all"])


def test_pairs_of_the_same_seed_are_judged_by_their_mean():
    runs = {"alltoall": run_of(losses(), 4.0)}
    for seed, level, more in (("", 0.0, 0.04), ("-seed2", 1.0, -0.02), ("-seed3", 2.0, 0.0)):
        runs[f"ep_comm-fp8-experts{seed}"] = run_of(np.full(STEPS, 1 + level), 2 + level)
        if not seed.endswith("3"):  # a seed of one of them alone is no pair
            runs[f"ep_comm-fp8-all{seed}"] = run_of(np.full(STEPS, 1 + level + more), 2 + level)
    (pairs,) = pairs_of(runs).values()
    assert pairs.counterpart == "ep_comm-fp8-experts" and pairs.seeds == (1, 2)
    assert pairs.final_train == pytest.approx((0.04, -0.01)) and pairs.final_valid == (0, 0)
    assert standard_error(pairs.final_train) == pytest.approx(0.025)
    assert standard_error(pairs.final_train[:1]) is None
    assert np.isnan(standard_error((0.1, float("nan"))))
    for tolerance, passed in ((0.0149, False), (0.0151, True)):
        (checks,) = judge(runs, Tolerances(fp8=tolerance)).values()
        assert [check.passed for check in checks] == [passed, True]
    assert checks[0].what == "final train loss, relative |Δ|, mean of 2 seeds"
    assert list(judge(runs, Tolerances())) == ["ep_comm-fp8-all"]
    del runs["ep_comm-fp8-all"]
    assert list(judge(runs, Tolerances())) == ["ep_comm-fp8-all-seed2"]
    del runs["ep_comm-fp8-experts-seed2"]
    assert judge(runs, Tolerances()) == {} and pairs_of(runs) == {}
