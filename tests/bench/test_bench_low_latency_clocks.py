"""``ep-comm bench low-latency``: times from stamps, floors, inputs."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from made_up_low_latency import FLOORS, OPERATIONS, groups
from ranks import run_ranks

from ep_comm._native import header
from ep_comm.backends.nvlink.low_latency import NVLinkLowLatency
from ep_comm.bench.low_latency import clocks, run, works
from ep_comm.bench.low_latency.clocks import HOST_CALLS, Times
from ep_comm.bench.low_latency.floors import WireBytes
from ep_comm.bench.low_latency.inputs import make_inputs
from ep_comm.bench.low_latency.settings import Point, Settings
from ep_comm.bench.low_latency.works import BUSY_NS, REPEATS, Dispatches, Pairs, SplitPairs
from ep_comm.bench.timing import Stopwatch


def test_times_of_samples():
    found = Times.of(list(range(1, 201)))
    assert (found.p50, found.p99, found.max, found.samples) == (100, 198, 200, 200)


@dataclasses.dataclass
class NoCalls:
    """As much of `Calls` as counting needs."""

    def given(self, i: int):
        return mock.Mock(x=torch.zeros(1, 8))


def test_operations_last_from_end_to_end():
    """Begins tell nothing of it: kernels may begin early. The first round has no end before it."""
    ends = torch.tensor([100, 110, 130, 140, 165])
    ends = torch.cat([ends, 165 + 10 * torch.arange(1, REPEATS - 4)])
    lengths = 5 + torch.arange(REPEATS) % 3
    stamps = torch.stack([ends - lengths, ends], dim=1).unsqueeze(0)
    found = Dispatches(NoCalls())
    assert stamps.shape == (1, found.num_stamps, 2)
    expected = [10, 20, 10, 25] + [10] * (REPEATS - 5)
    assert found.durations(stamps)["dispatch"].tolist() == expected
    assert found.kernels(stamps)["dispatch"].tolist() == lengths[1:].tolist()


def test_pairs_add_up():
    """Two replays; in each a dispatch takes 3, and the n-th combine 10 n."""
    lengths = torch.tensor([[3, 10 * n] for n in range(REPEATS)]).flatten()
    ends = torch.stack([5000 + lengths.cumsum(0), 9000 + lengths.cumsum(0)])
    stamps = torch.stack([ends - 2, ends], dim=2)
    found = Pairs(NoCalls(), own_weights=True).durations(stamps)
    assert found["dispatch of a pair, own weights"].tolist() == [3] * 2 * (REPEATS - 1)
    combines = [10 * n for n in range(1, REPEATS)]
    assert found["combine, own weights"].tolist() == combines * 2
    assert found["dispatch + combine, own weights"].tolist() == [3 + n for n in combines] * 2


def test_phases_stand_between_other_work():
    """A phase is what two works are apart, but for what they are apart with nothing between."""
    found = SplitPairs(NoCalls(), mock.Mock(), torch.device("cpu"))
    apart = torch.tensor([4, 14, 24, 34, 44]).repeat(REPEATS)
    begins = torch.cat([torch.zeros(1, dtype=torch.int64), (apart + BUSY_NS).cumsum(0)])
    stamps = torch.stack([begins, begins + BUSY_NS], dim=1).unsqueeze(0)
    assert stamps.shape[1] == found.num_stamps
    durations = {name: set(ns.tolist()) for name, ns in found.durations(stamps).items()}
    assert durations == {
        "send of dispatch": {10},
        "receive of dispatch": {20},
        "send of combine": {30},
        "receive of combine": {40},
        "four phases": {100},
    }


def test_the_general_kernel_is_taken_for_a_while():
    low_latency = object.__new__(NVLinkLowLatency)
    all_args = header.LowLatencyDispatchArgs(), header.LowLatencyCombineArgs()
    low_latency.calls = tuple(SimpleNamespace(common=args.common) for args in all_args)
    buffer = mock.Mock()
    buffer._session.backend.low_latency = low_latency

    def taken() -> list[int]:
        return [args.common.is_general for args in all_args]

    with pytest.raises(ZeroDivisionError), works.general_kernels(buffer):
        assert taken() == [1, 1]
        1 / 0  # noqa: B018
    assert taken() == [0, 0]


def three_ranks_times(rank: int) -> dict[str, Times]:
    """Of two calls of each kind; rank 1 has the slowest hooks, rank 2 the slowest combines."""
    watch = Stopwatch(torch.device("cpu"), iters=1)
    one = [1.0, 9.0 if rank == 1 else 2.0, 9.0 if rank == 2 else 3.0, 4.0]
    return clocks.host_times(watch, [[one, one]])


def test_host_times_are_the_slowest_hosts():
    for found in run_ranks(3, three_ranks_times):
        assert [found[name].p50 for name in HOST_CALLS] == [1, 9, 9, 4]
        assert found["dispatch"].samples == 2


def test_a_floor_has_bytes_and_hops():
    assert FLOORS.us(340e3) == pytest.approx(0.7 + 1)
    assert FLOORS.us(680e3, hops=2) == pytest.approx(1.4 + 2)


def test_bytes_of_the_busiest_link():
    """All tokens go to rank 0: it receives two ranks' tokens, and sends nothing."""
    given = mock.Mock(copies_to_rank=torch.tensor([[0, 0, 0], [5, 0, 0], [5, 0, 0]]))
    assert WireBytes.of_inputs([given], 256, fp8=True) == WireBytes(
        dispatch=10 * (256 + 8), combine=10 * 512
    )
    assert WireBytes.of_inputs([given], 256, fp8=False).dispatch == 10 * 512


def test_weights_of_their_own_are_a_hop_more():
    found = run._floors_of(WireBytes(dispatch=340e3, combine=680e3), FLOORS)
    assert found["dispatch + combine"] == pytest.approx(1.7 + 2.7)
    assert found["combine, own weights"] == pytest.approx(1.4 + 2)
    assert found["dispatch + combine, general kernel"] == found["dispatch + combine"]
    assert found.keys() < set(OPERATIONS)
    assert run._floors_of(WireBytes(dispatch=1, combine=1), None) == {}


def test_tokens_of_low_latency_keep_to_their_groups():
    """Each rank is a group: no token goes to two ranks."""
    settings = Settings(topk=3, experts=12, routing=groups(3, 1), fp8=False)
    point = Point(hidden=128, tokens=20, room=20, num_sms=0)
    for given in make_inputs(settings, point, 0, 3, torch.device("cpu")):
        assert all(len(set(token)) == 1 for token in (given.topk_idx // 4).tolist())
        assert given.copies_to_rank.sum(dim=1).max() <= 20


def test_inputs_say_who_sends_what():
    settings = Settings(topk=1, experts=4, fp8=True)
    point = Point(hidden=128, tokens=6, room=9, num_sms=0)
    of_ranks = [make_inputs(settings, point, rank, 2, torch.device("cpu")) for rank in range(2)]
    for first, second in zip(*of_ranks, strict=True):
        assert torch.equal(first.copies_to_rank, second.copies_to_rank)
        goes = first.topk_idx.flatten() // 2  # rank 0's tokens, to which rank
        assert first.copies_to_rank[0].tolist() == [0, int(goes.sum())]
        assert len(first.rows) + len(second.rows) == 12  # one expert a token
        assert int(first.counts.sum()) == len(first.rows)
    xs = [given.x for inputs in of_ranks for given in inputs]
    assert not any(torch.equal(xs[i], xs[j]) for i in range(len(xs)) for j in range(i))
