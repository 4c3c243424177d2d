"""``ep-comm bench``: routings, the alltoall baseline, a run on the CPU, and what it writes."""

from __future__ import annotations

import dataclasses
import io
import json
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from made_up_operations import LIMIT, SETTINGS, SLOW, made_up_run
from ranks import run_ranks

from ep_comm import Buffer, EPConfig
from ep_comm.bench import timing
from ep_comm.bench.ops.alltoall import AllToAll
from ep_comm.bench.ops.report import headline, render, write_json, write_plot
from ep_comm.bench.ops.routing import (
    RoutingSpec,
    make_routing,
    tokens_per_expert,
    tokens_per_rank,
)
from ep_comm.bench.ops.run import Run, run
from ep_comm.bench.ops.settings import PRESETS, Settings, Shape, parse_numbers
from ep_comm.bench.timing import Samples, Stopwatch, summarize
from ep_comm.cli.common import wide_console
from ep_comm.job.exits import UserError
from ep_comm.telemetry.stats import max_over_mean

SPECS = [
    RoutingSpec(),
    RoutingSpec(kind="group-limited", num_groups=8, topk_groups=2),
    RoutingSpec(kind="zipf", skew=1.2),
]


# ---- Routing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
def test_routing_is_valid_and_follows_from_the_seed(spec):
    topk_idx, weights = make_routing(spec, 500, 64, 6, seed=3)
    assert topk_idx.shape == weights.shape == (500, 6)
    assert topk_idx.dtype == torch.int64 and weights.dtype == torch.float32
    assert topk_idx.min() >= 0 and topk_idx.max() < 64
    ascending = topk_idx.sort(dim=1).values
    assert (ascending.diff(dim=1) > 0).all(), "an expert comes twice in a token"
    assert torch.allclose(weights.sum(dim=1), torch.ones(500))
    again = make_routing(spec, 500, 64, 6, seed=3)
    assert torch.equal(again[0], topk_idx) and torch.equal(again[1], weights)
    assert not torch.equal(make_routing(spec, 500, 64, 6, seed=4)[0], topk_idx)


def test_uniform_routing_is_even():
    topk_idx, _ = make_routing(RoutingSpec(), 20000, 32, 4, seed=0)
    assert max_over_mean(tokens_per_expert(topk_idx, 32).tolist()) < 1.1


def test_group_limited_routing_takes_the_best_groups():
    spec = RoutingSpec(kind="group-limited", num_groups=4, topk_groups=2)
    topk_idx, _ = make_routing(spec, 300, 32, 5, seed=9)
    scores = torch.rand(300, 32, generator=torch.Generator().manual_seed(9))
    for token, chosen in zip(scores.tolist(), topk_idx.tolist(), strict=True):
        groups = [token[g * 8 : g * 8 + 8] for g in range(4)]
        best = sorted(range(4), key=lambda g: sum(sorted(groups[g])[-2:]))[-2:]  # noqa: B023
        allowed = [e for e in range(32) if e // 8 in best]
        assert sorted(chosen) == sorted(sorted(allowed, key=token.__getitem__)[-5:])


def test_zipf_routing_draws_in_proportion_to_the_weights():
    topk_idx, _ = make_routing(RoutingSpec(kind="zipf", skew=1.0), 50000, 16, 1, seed=1)
    share = tokens_per_expert(topk_idx, 16).sort(descending=True).values / 50000
    weights = 1 / torch.arange(1, 17)
    assert torch.allclose(share, weights / weights.sum(), atol=0.01)


def test_zipf_makes_the_same_experts_hot_for_every_seed():
    spec = RoutingSpec(kind="zipf", skew=1.5)
    hottest = {
        int(tokens_per_expert(make_routing(spec, 2000, 64, 2, seed)[0], 64).argmax())
        for seed in range(4)
    }
    assert len(hottest) == 1


def test_tokens_count_once_a_rank():
    topk_idx = torch.tensor([[0, 1], [1, 2], [2, 3]])
    assert tokens_per_rank(topk_idx, 4, 2).tolist() == [2, 2]
    assert tokens_per_expert(topk_idx, 4).tolist() == [1, 2, 2, 1]
    assert max_over_mean([1, 2, 2, 1]) == pytest.approx(4 / 3)


@pytest.mark.parametrize(
    ("flags", "spec"),
    [
        ((None, None, None), RoutingSpec()),
        ((None, 4, 2), RoutingSpec(kind="group-limited", num_groups=4, topk_groups=2)),
        (("group-limited", None, None), RoutingSpec(kind="group-limited")),
        (("zipf", None, None, 1.5), RoutingSpec(kind="zipf", skew=1.5)),
    ],
)
def test_routing_of_flags(flags, spec):
    assert RoutingSpec.of_flags(*flags) == spec


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((None, 4, None), "--num-groups and --topk-groups: pass both"),
        (("group-limited", None, 2), "--num-groups and --topk-groups: pass both"),
        (("uniform", 4, 2), "--num-groups 4 has no effect with --routing uniform"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        RoutingSpec.of_flags(*flags)


def test_routing_of_files_old_and_new():
    spec = RoutingSpec(kind="group-limited", num_groups=4, topk_groups=2)
    assert RoutingSpec.of_json(dataclasses.asdict(spec)) == spec
    old = {"kind": "group-limited", "num_groups": 4, "group_topk": 2}
    assert RoutingSpec.of_json(old) == spec


# ---- Settings ------------------------------------------------------------------------------------


def test_presets_can_be_measured():
    for shape in PRESETS.values():
        settings = dataclasses.replace(SETTINGS, shape=shape, iters=20)
        settings.check()
        settings.check_job(num_ranks=4, available_sms=132)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(shape=Shape(0, 512, 8, 2)), "--tokens 0 must be positive"),
        (dict(shape=Shape(16, 512, 8, 9)), "--topk 9 is more than 8"),
        (dict(shape=Shape(16, 640, 8, 2)), "--hidden 640 is not a multiple of 512"),
        (dict(shape=Shape(16, 12, 8, 2), fp8=False), "--hidden 12 is not a multiple of 8"),
        (dict(layout="token"), "--layout 'token'"),
        (dict(iters=5), "--iters 5 is too few"),
        (dict(routing=RoutingSpec(kind="best")), "--routing 'best'"),
        (dict(routing=RoutingSpec(kind="zipf", skew=-1)), "--skew -1"),
        (dict(routing=RoutingSpec(kind="group-limited", num_groups=3)), "--num-groups 3"),
        (dict(routing=RoutingSpec(kind="group-limited", topk_groups=9)), "--topk-groups 9"),
        (
            dict(routing=RoutingSpec(kind="group-limited", topk_groups=1)),
            "leaves a token 1 experts, fewer than --topk 2",
        ),
    ],
)
def test_what_cannot_be_measured_is_named(changes, message):
    good = dataclasses.replace(SETTINGS, shape=Shape(16, 512, 8, 2), iters=20)
    good.check()
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        dataclasses.replace(good, **changes).check()


@pytest.mark.parametrize(
    ("changes", "num_ranks", "message"),
    [
        (dict(), 1, "1 rank"),
        (dict(shape=Shape(16, 512, 6, 2)), 4, "--experts 6 is not divisible by the 4 ranks"),
        (dict(sms=(0, 133)), 4, "--sms 133 is neither 0"),
        (dict(sms=(1,)), 4, "--sms 1 is neither 0"),
    ],
)
def test_what_a_job_cannot_measure_is_named(changes, num_ranks, message):
    settings = dataclasses.replace(SETTINGS, shape=Shape(16, 512, 8, 2), iters=20)
    settings.check_job(num_ranks=4, available_sms=132)
    with pytest.raises(UserError, match=message):
        dataclasses.replace(settings, **changes).check_job(num_ranks, available_sms=132)


def test_numbers_are_a_list():
    assert parse_numbers("--sms", "0,24,16,24") == (0, 24, 16)
    with pytest.raises(UserError, match="--sms '0;24' must be comma-separated"):
        parse_numbers("--sms", "0;24")


# ---- The alltoall baseline -----------------------------------------------------------------------


def alltoall_equals_buffer(rank: int, num_topk: int) -> None:
    num_tokens, num_experts, hidden = 40, 12, 16
    topk_idx, weights = make_routing(RoutingSpec(), num_tokens, num_experts, num_topk, rank)
    # Small integers: every order of summation gives the same.
    x = torch.randint(-8, 9, (num_tokens, hidden)).float()
    config = EPConfig(
        num_experts=num_experts,
        hidden=hidden,
        max_tokens_per_rank=num_tokens,
        num_topk=num_topk,
        dtype=torch.float32,
    )
    buffer = Buffer(None, config)
    ours = buffer.dispatch(x, topk_idx, weights, expert_alignment=1)
    routing_map = torch.zeros(num_tokens, num_experts, dtype=torch.bool).scatter_(1, topk_idx, True)
    probs = torch.zeros(num_tokens, num_experts).scatter_(1, topk_idx, weights)
    alltoall = AllToAll(dist.group.WORLD, num_experts, num_topk)
    rows, row_probs, permutation = alltoall.dispatch(x, routing_map, probs)
    assert torch.equal(rows, ours.recv_x)
    assert torch.equal(row_probs, ours.recv_topk_weights)
    y = rows * 3 + 1
    assert torch.equal(alltoall.combine(y, permutation), buffer.combine(y, ours.handle).combined_x)
    sums = torch.zeros_like(x).add_(x * num_topk * 3 + num_topk)
    assert torch.equal(alltoall.combine(y, permutation), sums)


@pytest.mark.parametrize(("num_ranks", "num_topk"), [(2, 1), (3, 4)])
def test_alltoall_gives_the_rows_of_the_buffer(num_ranks, num_topk):
    run_ranks(num_ranks, alltoall_equals_buffer, num_topk)


# ---- One run, on the CPU -------------------------------------------------------------------------


def a_run(rank: int, settings: Settings) -> tuple[Run, list[str]]:
    said: list[str] = []
    with mock.patch.multiple(timing, UNALIGNED_CALLS=2, _UNALIGNED_REPEATS=2):
        found = run(settings, torch.device("cpu"), said.append, measure_limit=lambda watch: LIMIT)
    return found, said


@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_run_measures_every_case(layout):
    settings = dataclasses.replace(SETTINGS, layout=layout)
    runs = run_ranks(2, a_run, settings)
    found, said = runs[0]
    assert runs[1][0] == found  # each time is the slowest rank's
    ours = [result for result in found.results if result.num_sms is not None]
    assert len(ours) == 10 * 2 and len(found.results) == len(ours) + 2
    assert len(said) == 2 + len(found.results)
    for result in found.results:
        assert len(result.samples.call) == len(result.samples.host) == 3
        assert len(result.samples.host_idle) == 3
        assert len(result.samples.kernel) == (0 if result.num_sms is None else 3)
        assert len(result.samples.idle) == 3 and min(result.samples.idle) > 0
        assert min(result.samples.call) > 0 and min(result.samples.unaligned) > 0
    # 16 tokens; with 3 of 8 experts nearly all go to the other rank, once each.
    bf16, fp8, cached, nccl = (
        next(result for result in found.results if result.case == case)
        for case in (
            "dispatch, fresh",
            "FP8 dispatch, fresh",
            "FP8 dispatch, cached",
            "NCCL alltoall dispatch",
        )
    )
    assert 10 * 256 < bf16.wire_bytes <= 16 * 256
    assert fp8.wire_bytes == cached.wire_bytes == bf16.wire_bytes / 256 * (128 + 4)
    assert nccl.wire_bytes > bf16.wire_bytes and nccl.floor_bytes == bf16.wire_bytes
    assert bf16.logical_bytes == nccl.logical_bytes == 16 * 3 * 256
    assert found.rank_imbalance >= 1 and found.expert_imbalance > 1
    assert headline(found).startswith("2 ranks, 16 tokens x 128, top-3 of 8, uniform")


def a_run_on_gpus(rank: int, settings: Settings) -> Run:
    return run(settings, torch.device("cuda", rank), lambda text: None)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_run_on_gpus(layout):
    shape = Shape(tokens=64, hidden=512, experts=8, topk=3)
    settings = dataclasses.replace(SETTINGS, shape=shape, layout=layout)
    found, other = run_ranks(2, a_run_on_gpus, settings, backend="nccl")
    assert found == other and found.limit.gb_per_s > 0
    graphs = [result for result in found.results if "CUDA graph" in result.case]
    assert [(r.case, r.num_sms) for r in graphs] == [
        (case, num_sms)
        for num_sms in (0, 24)
        for case in ("dispatch, fresh, CUDA graph", "combine, CUDA graph")
    ]
    wire_bytes = {result.case: result.wire_bytes for result in found.results}
    for result in graphs:
        assert result.wire_bytes == wire_bytes[result.case.removesuffix(", CUDA graph")] > 0
        assert len(result.samples.call) == 3 and not result.samples.kernel


def three_calls(rank: int) -> Samples:
    watch = Stopwatch(torch.device("cpu"), iters=3)
    return watch.measure(lambda i: [rank] * i)


def host_times(rank: int) -> tuple[float, ...]:
    watch = Stopwatch(torch.device("cpu"), iters=3)
    return watch.of_slowest([1.0, 9.0, 2.0] if rank == 0 else [4.0, 3.0, 5.0])


def test_the_slowest_host_is_the_one_with_the_largest_median():
    assert run_ranks(2, host_times) == [(4.0, 3.0, 5.0)] * 2


def test_the_host_is_timed_over_calls_in_a_row():
    called: list[int] = []

    def call(i: int) -> None:
        called.append(i)
        time.sleep(0.002)

    watch, start = Stopwatch(torch.device("cpu"), iters=1), time.perf_counter()
    us = watch.host_back_to_back(call, 3)
    assert called == [0, 1, 2]
    assert 2_000 <= us <= 1e6 * (time.perf_counter() - start) / 3  # of one of them


def test_all_ranks_have_the_slowest_times():
    assert len(set(run_ranks(2, three_calls))) == 1


def test_summary():
    summary = summarize(tuple(float(i) for i in range(20, 0, -1)))
    assert (summary.median, summary.min, summary.p90) == (10.5, 1, 18)


# ---- What is written -----------------------------------------------------------------------------


def text_of(found: Run) -> str:
    console = wide_console(io.StringIO())
    with console.capture() as capture:
        console.print(render(found))
    return capture.get()


def test_table():
    text = text_of(made_up_run(LIMIT))
    assert "limit 333 GB/s" in text and "VOID" not in text
    fresh = next(line for line in text.splitlines() if "dispatch, fresh" in line)
    cells = [cell.strip() for cell in fresh.strip("│ ").split("│")]
    assert cells == [
        "dispatch, fresh", "all", "-", "120", "119", "121", "125", "180", "41", "51", "278", "555",
        "1.20",
    ]  # fmt: skip
    assert "1.010 of tokens a rank, 1.200 an expert" in text and "1024 MiB" in text


def test_no_figure_is_cut():
    found = made_up_run(LIMIT)
    result = found.results[-2]
    slow = {name: tuple(99 * us for us in times) for name, times in vars(result.samples).items()}
    result = dataclasses.replace(
        result, case="FP8 dispatch, fresh, no host wait", samples=Samples(**slow)
    )
    text = text_of(dataclasses.replace(found, results=(result,)))
    assert "…" not in text and all(name in text for name in (result.case, "unaligned", "x limit"))


def test_void_run_says_so(tmp_path):
    found = made_up_run(SLOW)
    assert "VOID: the links carried 319.9 GB/s, below the 320" in headline(found)  # not rounded
    assert "VOID" in text_of(found)
    write_json(found, tmp_path / "bench.json")
    assert json.loads((tmp_path / "bench.json").read_text())["void"] is True


def test_json(tmp_path):
    write_json(made_up_run(LIMIT), tmp_path / "bench.json")
    document = json.loads((tmp_path / "bench.json").read_text())
    assert document["void"] is False
    assert document["limit"]["gb_per_s"] == 333
    assert document["settings"]["shape"] == SETTINGS.shape._asdict()
    assert {"date", "command", "commit", "versions", "gpus"} <= document.keys()
    first = document["results"][0]
    assert first["samples_us"]["call"] == [120, 121, 119]
    assert first["ratio"] == pytest.approx(1.2)


def test_plot(tmp_path):
    write_plot(made_up_run(LIMIT), 132, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
