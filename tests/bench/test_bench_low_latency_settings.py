"""``ep-comm bench low-latency``: sizes, and what cannot be measured."""

from __future__ import annotations

import dataclasses

import pytest
from made_up_low_latency import GPU_SETTINGS, SETTINGS, groups

from ep_comm.bench.low_latency.settings import (
    ALL_HIDDEN,
    QUICK_TOKENS,
    TOKENS,
    Settings,
    sizes,
)
from ep_comm.bench.ops.routing import RoutingSpec
from ep_comm.job.exits import UserError


def no_sizes(**changes) -> Settings:
    given = dict(tokens=None, hidden=None, replays=None, full=False, quick=False, topk=8)
    given |= dict(experts=None, routing=RoutingSpec())
    return sizes(**{**given, **changes})


def test_sizes_that_nobody_gave():
    assert no_sizes().tokens == TOKENS and no_sizes().hidden == (7168,)
    assert no_sizes(full=True).hidden == ALL_HIDDEN
    quick = no_sizes(quick=True)
    assert quick.tokens == QUICK_TOKENS and quick.replays < no_sizes().replays
    mine = no_sizes(quick=True, tokens=(4,), replays=700)
    assert mine.tokens == (4,) and mine.replays == 700
    with pytest.raises(UserError, match="--full and --hidden"):
        no_sizes(full=True, hidden=(2048,))


def test_every_size_has_room_for_itself_and_for_many():
    points = Settings(tokens=(8, 128, 256), num_sms=(0, 32)).points(7168)
    assert [(point.tokens, point.room) for point in points[:4]] == [
        *((8, 8), (8, 128), (128, 128), (256, 256))
    ]
    assert [point.num_sms for point in points] == [0] * 4 + [32] * 4
    assert Settings(tokens=(8,)).most_tokens == 128 and Settings().most_tokens == 256


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(tokens=(8, 0)), "--tokens 0 must be positive"),
        (dict(hidden=(-128,)), "--hidden -128 must be positive"),
        (dict(topk=0), "--topk 0 must be positive"),
        (dict(tokens=(4097,)), "--tokens 4097 is more than 4096"),
        (dict(topk=6), "--topk 6 is more than 5"),
        (dict(topk=33, experts=64), "--topk 33 is more than 32"),
        (dict(experts=4097), "--experts 4097 is more than 4096"),
        (dict(hidden=(7168, 200)), "--hidden 200 is not a multiple of 128"),
        (dict(hidden=(204,), fp8=False), "--hidden 204 is not a multiple of 8"),
        (dict(replays=9), "--replays 9 is too few"),
        (dict(routing=groups(2, 1)), "--num-groups 2 does not divide --experts 5"),
        (dict(routing=groups(5, 1)), "leaves a token 1 experts, fewer than --topk"),
        (dict(backend="nccl"), "--backend 'nccl' is none of nvlink, nodes, reference"),
    ],
)
def test_what_cannot_be_measured_is_named(changes, message):
    SETTINGS.check()
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SETTINGS, **changes).check()


@pytest.mark.parametrize(
    ("changes", "num_ranks", "sms", "message"),
    [
        (dict(), 2, None, "needs CUDA GPUs"),
        (dict(backend="reference"), 2, 132, "hide the GPUs"),
        (dict(), 1, 132, "1 rank"),
        (dict(), 9, 132, "9 rank"),
        (dict(num_sms=(0, 133)), 2, 132, "--num-sms 133 is neither 0"),
        (dict(num_sms=(1,)), 2, 132, "--num-sms 1 is neither 0"),
        (dict(num_sms=(3,), backend="nodes"), 2, 132, "neither 0 \\(all\\) nor 4 to 132"),
        (dict(backend="nodes"), 2, None, "needs CUDA GPUs"),
        (dict(num_sms=(16,), backend="reference"), 2, None, "--num-sms 16 has no effect"),
        (
            dict(experts=7, routing=groups(7, 7)),
            2,
            132,
            "--num-groups 7 does not divide --experts 8",
        ),
        (dict(experts=4095), 8, 132, None),  # 4096
        (dict(experts=4093), 6, 132, "--experts 4098 is more than 4096"),
        (dict(experts=1024, tokens=(2048,)), 2, 132, "--experts 1024 x 2048 tokens"),
    ],
)
def test_what_a_job_cannot_measure_is_named(changes, num_ranks, sms, message):
    settings = dataclasses.replace(GPU_SETTINGS, **changes)
    settings.check()
    if message is None:
        settings.check_job(num_ranks, sms)
        return
    with pytest.raises(UserError, match=message):
        settings.check_job(num_ranks, sms)
