"""Every fault of `table`, by force: real processes, the expected culprit, within the time."""

from __future__ import annotations

import contextlib

import pytest
import torch
from acts import Found, play
from forked import run_forked
from ranks import run_ranks
from shared_gpu import in_turns
from softnic import build, hosts
from table import FAULTS, VICTIM, Fault

_NUM_RANKS, _NUM_HOSTS = 3, 2
_BOUND_S = 40.0


def of(over: str) -> list:
    """The faults of one transport; what is not one of its kind is part of the matrix."""

    def marks(fault: Fault) -> list[pytest.MarkDecorator]:
        return [pytest.mark.e2e] if over == "gloo" and not fault.in_ci else []

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


def dying(fault: Fault) -> tuple[int, ...]:
    return (VICTIM,) if fault.what == "is killed" else ()


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
    # Under MPS an error of the GPU would end all ranks.
    with in_turns() if fault.what == "breaks its GPU" else contextlib.nullcontext():
        outcomes = run_ranks(num_ranks, play, fault, fresh=True, dying=dying(fault), backend="nccl")
    keep(fault, check(fault, outcomes))


@pytest.fixture(scope="session")
def card(tmp_path_factory: pytest.TempPathFactory) -> hosts.Card:
    return hosts.Card(path="proxy", libraries=build.build(tmp_path_factory.mktemp("softnic")))


@pytest.mark.gpu
@pytest.mark.own_gpus
@pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))
@pytest.mark.parametrize("fault", of("network"))
def test_between_hosts(fault, card, keep):
    num_gpus = torch.cuda.device_count()
    if reason := hosts.missing_for(_NUM_HOSTS, 1, num_gpus):
        pytest.skip(reason)
    outcomes = hosts.run_hosts(
        _NUM_HOSTS, play, fault, card=card, num_gpus=num_gpus, dying=dying(fault)
    )
    keep(fault, check(fault, outcomes))
