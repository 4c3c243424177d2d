"""Every fault of `table`, by force: real processes, the expected culprit, within the time."""

from __future__ import annotations

import pytest
import torch
from acts import Found, play
from forked import run_forked
from ranks import run_ranks
from table import FAULTS, VICTIM, Fault

_NUM_RANKS = 3
_BOUND_S = 40.0


def of(over: str) -> list:
    """The faults of one transport; what is not one of its kind is part of the matrix."""

    def marks(fault: Fault) -> list[pytest.MarkDecorator]:
        if over == "gloo":
            return [] if fault.in_ci else [pytest.mark.e2e]
        return [pytest.mark.own_gpus] if fault.what == "breaks its GPU" else []

    return [
        pytest.param(each, marks=marks(each), id=str(each)) for each in FAULTS if each.over == over
    ]


def check(fault: Fault, outcomes: list[Found | str | None]) -> float:
    """All others name the culprit; the first of them nobody else, with the expected error.

    Whoever waits for one that has given up before runs into the timeout, and names that one too.
    Returns the longest time from the fault to an error.
    """
    others = [found for rank, found in enumerate(outcomes) if rank != VICTIM]
    assert all(isinstance(found, Found) for found in others), outcomes
    assert (outcomes[VICTIM] is None) == (fault.what == "is killed")
    if fault.culprit is None:
        assert all(found.steps == 2 for found in others), outcomes
        return 0.0
    first = min(others, key=lambda found: found.seconds)
    assert first.error == fault.error and first.late_ranks in ((), (fault.culprit,)), first
    for found in others:
        assert found.error in (fault.error, "EPTimeoutError"), found
        assert fault.culprit in found.late_ranks or not found.late_ranks
        assert f"rank {fault.culprit}" in found.text or f", {fault.culprit} " in found.text
        assert found.seconds < fault.within_s, found
    return max(found.seconds for found in others)


@pytest.mark.parametrize("fault", of("gloo"))
def test_over_gloo(fault, keep):
    outcomes = run_forked(_NUM_RANKS, play, fault, timeout_s=_BOUND_S)
    for rank, outcome in enumerate(outcomes):
        want = "signal 9" if rank == VICTIM and fault.what == "is killed" else "done"
        assert outcome.how == want, outcome.value
    keep(fault, check(fault, [outcome.value for outcome in outcomes]))


@pytest.mark.multi_gpu
@pytest.mark.parametrize("fault", of("NVLink"))
def test_over_nvlink(fault, keep):
    num_ranks = min(_NUM_RANKS, torch.cuda.device_count())
    dying = (VICTIM,) if fault.what == "is killed" else ()
    outcomes = run_ranks(num_ranks, play, fault, "cuda", fresh=True, dying=dying, backend="nccl")
    keep(fault, check(fault, outcomes))
