"""`Buffer.stats`: times, waits, who is slow and since when."""

from __future__ import annotations

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ranks import run_ranks

from ep_comm import Buffer, EPArgumentError, EPConfig, EPStateError
from ep_comm.telemetry.records import Interval, OpRecord
from ep_comm.telemetry.stats import JobStats, Quantiles, find_slowest, summarize

SIZES = dict(num_experts=12, hidden=16, max_tokens_per_rank=8, num_topk=2, dtype=torch.float32)
TOPK = torch.tensor([[0, 11], [4, 5], [1, -1], [8, 2], [3, 7]])
KINDS = ("plan", "dispatch", "combine", "combine of backward", "dispatch of backward")
SLEEP_S = 0.2  # far more than what other programs take of the machine


def record(place: int, waits=(0.0, 0.0, 0.0), seconds=1.0, **more) -> OpRecord:
    return OpRecord(
        op="dispatch", epoch=place, place=place, wait_s_by_rank=waits, called_s=10.0 + place,
        span=Interval(seconds), **more,
    )  # fmt: skip


def test_quantiles_are_those_of_numpy():
    values = np.random.default_rng(0).exponential(size=999).tolist()
    got = Quantiles.of(values)
    assert got[:3] == pytest.approx(np.percentile(values, (50, 90, 99)))
    assert (got.max, got.num) == (max(values), 999)
    assert Quantiles.of([]).num == 0 and np.isnan(Quantiles.of([]).p50)


def test_the_slowest_rank_and_since_when():
    """Before #41 now one, now the other; from then on rank 2 in all but a few."""
    records = [record(i, (0.0, 0.5, 0.0) if i % 3 else (0.0, 0.0, 0.5)) for i in range(1, 41)]
    records += [record(i, (0.0, 0.0, 0.5) if i % 5 else (0.0, 0.9, 0.0)) for i in range(41, 101)]
    slowest = find_slowest(records)
    assert slowest.rank == 2
    assert slowest.share == pytest.approx((40 // 3 + 48) / 100)
    assert slowest.wait_s == pytest.approx(0.5 * (40 // 3 + 48))
    # Counted from the end most have waited for it for a while before #41, too.
    assert int(slowest.since_op.removeprefix("dispatch #")) <= 41
    assert slowest.since_s == 10.0 + int(slowest.since_op.removeprefix("dispatch #"))


def test_a_rank_that_was_slow_long_ago_is_not_slow_now():
    records = [record(i, (0.0, 0.5, 0.0)) for i in range(1, 20)] + [
        record(i) for i in range(20, 90)
    ]
    assert find_slowest(records) is None


def test_short_waits_at_the_beginning_are_not_when_it_began():
    records = [record(i, (0.0, 2e-4, 0.0), 1e-3) for i in range(1, 30)]
    records += [record(i, (0.0, 0.5, 0.0)) for i in range(30, 60)]
    assert find_slowest(records).since_op == "dispatch #30"


def test_short_waits_all_along_are_not_when_it_began():
    """Only the first operation of a step waits long; and there are others, for another rank."""
    short = [(0.0, 4e-5, 0.0), (0.0, 0.0, 5e-5), (0.0, 3e-5, 0.0)]
    records = [record(i, short[i % 3], 1e-4) for i in range(1, 200)]
    for i in range(80, 199, 4):
        records[i - 1] = record(i, (0.0, 1e-2, 0.0), 1e-2)
    slowest = find_slowest(records)
    assert (slowest.rank, slowest.since_op) == (1, "dispatch #80")


def test_it_began_behind_the_last_time_that_it_was_on_time_for_long():
    records = [
        record(i, (0.0, 0.5, 0.0) if i == 1 or i > 40 else (0.0, 0.0, 0.0)) for i in range(1, 60)
    ]
    assert find_slowest(records).since_op == "dispatch #41"


def test_what_is_hardly_waited_for_is_not_slow():
    assert find_slowest([record(i, (0.0, 0.05, 0.0)) for i in range(1, 9)]) is None


def test_kinds_rows_and_bytes_are_kept_apart():
    records = [
        record(1, rows_to_rank=(1, 2, 3), wire_bytes_to_rank=(0, 20, 30)),
        record(2, rows_to_rank=(3, 2, 1), wire_bytes_to_rank=(0, 20, 10), seconds=3.0),
        record(3, rows_to_rank=(9, 0, 0), is_backward=True, wire_bytes_to_rank=(0, 0, 0)),
    ]
    stats = summarize(records, 0, 3)
    assert list(stats.operations) == ["dispatch", "dispatch of backward"]
    forward, backward = stats.operations.values()
    assert forward.rows_by_rank == (2.0, 2.0, 2.0) and forward.imbalance == 1.0
    assert (forward.seconds.p50, forward.seconds.max, forward.wire_bytes) == (2.0, 3.0, 40.0)
    assert backward.imbalance == 3.0 and backward.seconds.num == 1
    assert stats.wait_share == 0.0


def test_rows_of_experts_of_all_ranks():
    def of_rank(rank: int, *rows: tuple[int, ...]):
        return summarize([record(i, rows_of_experts=each) for i, each in enumerate(rows)], rank, 2)

    job = JobStats(ranks=(of_rank(0, (2, 4), (4, 0), ()), of_rank(1, (1, 0), (1, 2))))
    assert job.ranks[0].operations["dispatch"].rows_by_expert == (3, 2)
    assert job.ranks[0].operations["dispatch"].expert_imbalance == pytest.approx(1.2)
    assert (job.rows_by_expert, job.rows_by_rank) == ((3, 2, 1, 1), (5, 2))
    assert (job.expert_imbalance, job.rank_imbalance) == (pytest.approx(12 / 7), 10 / 7)
    unknown = JobStats(ranks=(job.ranks[0], of_rank(1, ())))
    assert unknown.rows_by_expert == unknown.rows_by_rank == () and unknown.expert_imbalance == 1


def a_slow_rank(rank: int) -> SimpleNamespace:
    """Rank 1 sleeps before each dispatch, from the sixth step on."""
    buffer = Buffer(None, EPConfig(**SIZES, backend="reference"))
    x = torch.ones(5, 16, requires_grad=True)
    for step in range(16):
        if rank == 1 and step >= 5:
            time.sleep(SLEEP_S)
        out = buffer.dispatch(x, TOPK)
        buffer.combine(out.recv_x, out.handle).combined_x.sum().backward()
    mine, last = buffer.stats(), buffer.stats(num_operations=4)
    of_all = buffer.stats_of_all_ranks()
    num_records = len(list(buffer.records))
    with pytest.raises(EPArgumentError, match="num_operations must be a positive integer, got 0"):
        buffer.stats(num_operations=0)
    buffer.destroy()
    with pytest.raises(EPStateError, match="destroyed"):
        buffer.stats()
    return SimpleNamespace(mine=mine, last=last, of_all=of_all, num_records=num_records)


def test_a_slow_rank_is_named_by_all():
    results = run_ranks(3, a_slow_rank)
    for rank, got in enumerate(results):
        of_kinds = {kind: stats.seconds.num for kind, stats in got.mine.operations.items()}
        assert of_kinds == {
            kind: 16
            for kind in (
                "plan",
                "dispatch",
                "combine",
                "combine of backward",
                "dispatch of backward",
            )
        }
        assert sum(stats.seconds.num for stats in got.last.operations.values()) in (4, 5)
        assert got.of_all.ranks[rank] == got.mine and len(got.of_all.ranks) == 3
        rows = torch.bincount(TOPK[TOPK >= 0], minlength=12) * 3  # of three ranks
        assert got.of_all.rows_by_expert == tuple(rows.tolist())
        of_backward = got.mine.operations["dispatch of backward"]
        assert of_backward.rows_by_expert == tuple(rows.tolist()[4 * rank : 4 * rank + 4])
        slowest = got.of_all.slowest
        # Each step has a dispatch in its backward, too: the sixth step begins with the 11th. Other
        # programs may have made the rank late before.
        assert slowest.rank == 1 and int(slowest.since_op.rpartition("#")[2]) <= 13
        assert slowest.wait_s > 2 * 0.5 * 11 * SLEEP_S  # of two ranks
        if rank != 1:
            plan = got.mine.operations["plan"]
            assert plan.wait_s_by_rank[1].p50 > 0.5 * SLEEP_S > plan.wait_s_by_rank[2 - rank].p50
