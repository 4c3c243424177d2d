"""``ep-comm bench low-latency``: sizes, times, checks of results, a run on CPU, what it writes."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from ranks import run_ranks
from rich.console import Console

from ep_comm import Buffer
from ep_comm._native import header
from ep_comm.backends.nvlink.low_latency import NVLinkLowLatency
from ep_comm.bench.low_latency import clocks, run, works
from ep_comm.bench.low_latency.clocks import HOST_CALLS, Times
from ep_comm.bench.low_latency.floors import Floors, WireBytes, measure_one_way
from ep_comm.bench.low_latency.inputs import make_inputs
from ep_comm.bench.low_latency.report import headline, render, write_json, write_plot
from ep_comm.bench.low_latency.run import HostResult, Result, Run
from ep_comm.bench.low_latency.settings import (
    ALL_HIDDEN,
    QUICK_TOKENS,
    TOKENS,
    Settings,
    parse_numbers,
    sizes,
)
from ep_comm.bench.low_latency.works import BUSY_NS, REPEATS, Dispatches, Pairs, SplitPairs
from ep_comm.bench.ops.probe import Limit
from ep_comm.bench.ops.routing import RoutingSpec
from ep_comm.bench.timing import Stopwatch
from ep_comm.job.exits import UserError

SETTINGS = Settings(tokens=(3,), hidden=(256,), topk=2, experts=5, replays=10, backend="reference")
GPU_SETTINGS = dataclasses.replace(SETTINGS, backend="nvlink", tokens=(1, 9))
OPERATIONS = [
    "dispatch",
    "dispatch of a pair",
    "combine",
    "dispatch + combine",
    "dispatch of a pair, own weights",
    "combine, own weights",
    "dispatch + combine, own weights",
    "dispatch of a pair, general kernel",
    "combine, general kernel",
    "dispatch + combine, general kernel",
    "send of dispatch",
    "receive of dispatch",
    "send of combine",
    "receive of combine",
    "four phases",
]


# ---- Settings ------------------------------------------------------------------------------------


def groups(num_groups: int, topk_groups: int) -> RoutingSpec:
    return RoutingSpec(kind="group-limited", num_groups=num_groups, topk_groups=topk_groups)


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


def test_numbers_are_a_list():
    assert parse_numbers("--tokens", "1,8,1") == (1, 8)
    with pytest.raises(UserError, match="--tokens '1;8' must be comma-separated"):
        parse_numbers("--tokens", "1;8")


# ---- Times ---------------------------------------------------------------------------------------


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


# ---- Floors --------------------------------------------------------------------------------------

FLOORS = Floors(limit=Limit(gb_per_s_by_sms={16: 331.0, 32: 340.0}), one_way_us=0.7)
SLOW = Floors(limit=Limit(gb_per_s_by_sms={16: 300.0}), one_way_us=0.7)


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
    for given in make_inputs(
        rank=0, num_ranks=3, num_experts=12, topk=3, routing=groups(3, 1),
        hidden=128, tokens=20, room=20, fp8=False, device=torch.device("cpu"),
    ):  # fmt: skip
        assert all(len(set(token)) == 1 for token in (given.topk_idx // 4).tolist())
        assert given.copies_to_rank.sum(dim=1).max() <= 20


def test_inputs_say_who_sends_what():
    of_ranks = [
        make_inputs(
            rank=rank, num_ranks=2, num_experts=4, topk=1, routing=RoutingSpec(),
            hidden=128, tokens=6, room=9, fp8=True, device=torch.device("cpu"),
        )
        for rank in range(2)
    ]  # fmt: skip
    for first, second in zip(*of_ranks, strict=True):
        assert torch.equal(first.copies_to_rank, second.copies_to_rank)
        goes = first.topk_idx.flatten() // 2  # rank 0's tokens, to which rank
        assert first.copies_to_rank[0].tolist() == [0, int(goes.sum())]
        assert len(first.rows) + len(second.rows) == 12  # one expert a token
        assert int(first.counts.sum()) == len(first.rows)
    xs = [given.x for inputs in of_ranks for given in inputs]
    assert not any(torch.equal(xs[i], xs[j]) for i in range(len(xs)) for j in range(i))


# ---- A run on CPU --------------------------------------------------------------------------------


FEW = 4  # instead of REPEATS


def a_run(rank: int, settings: Settings, fault: str = "") -> tuple[Run, list[str], int]:
    said: list[str] = []
    saved: list[int] = []
    with contextlib.ExitStack() as patches:
        for module in (works, clocks, run):
            patches.enter_context(mock.patch.object(module, "REPEATS", FEW))
        if fault:
            patches.enter_context(PLANTED[fault]())
        found = run.run(
            settings, torch.device("cpu"), said.append, lambda found: saved.append(len(found.host))
        )
    return found, said, len(saved)


def test_run_measures_every_size():
    settings = dataclasses.replace(SETTINGS, tokens=(3, 130), hidden=(128, 256))
    (found, said, num_saved), (other, *_) = run_ranks(2, a_run, settings)
    assert found == other  # each time is the slowest rank's
    assert found.num_experts == 6 and "6 experts: the 5 asked for" in said[0]
    rows = [(r.hidden, r.tokens, r.room, r.operation) for r in found.results]
    ours = ("dispatch", "dispatch + combine", "dispatch + combine, own weights")
    assert rows == [
        row
        for hidden in (128, 256)
        for row in [
            *((hidden, 3, room, name) for room in (3, 128) for name in ours),
            *((hidden, 130, 130, name) for name in ours),
            *((hidden, tokens, None, "gloo alltoall") for tokens in (3, 130)),
        ]
    ]
    assert num_saved == 2 * (3 + 2)
    for result in found.results:
        assert result.wrong == 0 and result.graph is None and result.floor_us is None
        assert result.eager is not None and 0 < result.eager.p50 <= result.eager.max
    assert [(h.point.hidden, h.point.room) for h in found.host] == [
        (hidden, room) for hidden in (128, 256) for room in (3, 128, 130)
    ]
    for host in found.host:
        assert list(host.times) == list(HOST_CALLS)
        assert all(0 < times.p50 <= times.p99 <= times.max for times in host.times.values())


def test_bf16_rows_are_right_too():
    found, *_ = run_ranks(2, a_run, dataclasses.replace(SETTINGS, fp8=False))[0]
    assert found.num_wrong == 0


def spoiled(method: str, spoil):
    """A `Buffer` of which one method's result is not what it should be, on rank 1."""
    good = getattr(Buffer, method)

    def bad(buffer, *args, **kwargs):
        out = good(buffer, *args, **kwargs)
        if torch.distributed.get_rank() == 1 and out.hook is None:  # or nothing has come yet
            spoil(out)
        return out

    return mock.patch.object(Buffer, method, bad)


def first_expert(out) -> int:
    return int(out.recv_count.nonzero()[0])


def flip_a_byte(out) -> None:
    out.recv_x[0].view(torch.uint8)[first_expert(out), 0, 5] ^= 1


def change_a_scale(out) -> None:
    out.recv_x[1][first_expert(out), 0, 1] *= 2


def change_a_source(out) -> None:
    out.handle.recv_src_info[first_expert(out), 0] += 1


def lose_a_row(out) -> None:
    out.recv_count[first_expert(out)] -= 1


def change_a_sum(out) -> None:
    out.combined_x[1, 3] = 100.0


def lose_the_results(out) -> None:
    out.combined_x.fill_(0)


# Faults, by name.
PLANTED = {
    "byte": lambda: spoiled("low_latency_dispatch", flip_a_byte),
    "scale": lambda: spoiled("low_latency_dispatch", change_a_scale),
    "source": lambda: spoiled("low_latency_dispatch", change_a_source),
    "count": lambda: spoiled("low_latency_dispatch", lose_a_row),
    "sum": lambda: spoiled("low_latency_combine", change_a_sum),
    "nothing": lambda: spoiled("low_latency_combine", lose_the_results),
}


@pytest.mark.parametrize("fault", ["byte", "scale", "source", "count"])
def test_a_wrong_row_is_found(fault):
    (found, *_), (other, *_) = run_ranks(2, a_run, SETTINGS, fault)
    assert found.num_wrong == other.num_wrong
    wrong = {result.operation: result.wrong for result in found.results if result.room == 3}
    assert wrong["dispatch"] == 1  # the last dispatch is looked at
    assert wrong["dispatch + combine"] == 1


@pytest.mark.parametrize(("fault", "num_rows"), [("sum", 1), ("nothing", 3)])
def test_a_wrong_sum_is_found(fault, num_rows):
    found, *_ = run_ranks(2, a_run, SETTINGS, fault)[0]
    wrong = {result.operation: result.wrong for result in found.results if result.room == 3}
    assert wrong["dispatch"] == 0
    assert wrong["dispatch + combine"] == FEW * num_rows  # all combines are looked at
    assert wrong["dispatch + combine, own weights"] == FEW * num_rows


# ---- On GPUs -------------------------------------------------------------------------------------


def a_run_on_gpus(rank: int, settings: Settings) -> Run:
    return run.run(settings, torch.device("cuda", rank), lambda text: None)


@pytest.mark.multi_gpu
def test_run_between_nodes_on_gpus():
    settings = dataclasses.replace(GPU_SETTINGS, backend="nodes")
    found, other = run_ranks(2, a_run_on_gpus, settings, backend="nccl", fresh=True)
    assert found == other and found.num_wrong == 0
    assert found.backend.startswith("nodes (2 of 1 GPUs over stores")


@pytest.mark.multi_gpu
@pytest.mark.parametrize("fp8", [True, False], ids=["fp8", "bf16"])
def test_run_on_gpus(fp8):
    settings = dataclasses.replace(GPU_SETTINGS, fp8=fp8, num_sms=(0, 16))
    found, other = run_ranks(2, a_run_on_gpus, settings, backend="nccl")
    assert found == other and found.num_wrong == 0
    assert found.step_ns and 0 < found.step_ns <= 2000
    assert found.floors is not None and 0.2 < found.floors.one_way_us < 20
    of_point = [result.operation for result in found.results if result.room is not None]
    assert of_point == OPERATIONS * 8  # 2 token counts, 2 rooms, 2 SM counts
    for result in found.results:
        assert result.graph is not None and 0 < result.graph.p50 <= result.graph.p99
        if result.floor_us is not None:
            assert result.graph.p50 > result.floor_us / 2
        if result.mean_us is not None:  # two ways to the same time
            assert result.mean_us == pytest.approx(result.graph.p50, rel=1)
    assert len(found.host) == 8


def one_way_on_gpus(rank: int) -> float:
    return measure_one_way(Stopwatch(torch.device("cuda", rank), iters=1))


@pytest.mark.multi_gpu
def test_a_word_takes_about_a_microsecond():
    first, second = run_ranks(2, one_way_on_gpus, backend="nccl")
    assert first == second and 0.2 < first < 20


# ---- What is written -----------------------------------------------------------------------------


def made_up_run(floors: Floors | None = FLOORS, wrong: int = 0) -> Run:
    """Operations take 10 µs times their place, hosts 20."""
    settings = Settings(tokens=(8, 128), hidden=(7168,))
    results, host = [], []
    for point in settings.points(7168):
        for i, name in enumerate(OPERATIONS):
            p50 = 10.0 * (1 + i)
            times = Times(p50=p50, p99=1.5 * p50, max=3 * p50, samples=9500)
            results.append(
                Result(
                    operation=name,
                    hidden=7168,
                    tokens=point.tokens,
                    room=point.room,
                    num_sms=0,
                    graph=times if floors else None,
                    eager=dataclasses.replace(times, p50=p50 + 1),
                    kernel=times if name == "combine" else None,
                    mean_us=p50 - 1 if name == "dispatch + combine" else None,
                    floor_us=4.0 if name == "dispatch + combine" and floors else None,
                    wrong=wrong,
                )
            )
        fast = Times(p50=20, p99=24, max=99, samples=200)
        host.append(HostResult(point=point, times=dict.fromkeys(HOST_CALLS, fast)))
    for tokens in settings.tokens:
        alltoall = Times(p50=33, p99=35, max=44, samples=500)
        results.append(
            Result(
                operation="NCCL alltoall", hidden=7168, tokens=tokens, room=None, num_sms=None,
                graph=alltoall if floors else None, eager=alltoall, wrong=0,
            )
        )  # fmt: skip
    return Run(
        settings=settings, num_ranks=2, num_experts=288, backend="nvlink (2 GPUs)", floors=floors,
        step_ns=32, results=results, host=host,
    )  # fmt: skip


def text_of(found: Run) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(render(found))
    return console.file.getvalue()  # type: ignore[attr-defined]


def cells_of(text: str, begin: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.strip("│ ").startswith(begin))
    return [cell.strip() for cell in line.strip("│ ").split("│")]


def test_table():
    text = text_of(made_up_run())
    assert "340 GB/s, one way 0.70 µs" in text and "VOID" not in text
    assert cells_of(text, "dispatch + combine ") == [
        *("dispatch + combine", "40.0", "60.0", "120.0", "1.50", "39.0", "-", "4.0", "10.0"),
        *("41.0", "60.0", "120.0", "0"),
    ]
    assert cells_of(text, "NCCL alltoall")[1:4] == ["33.0", "35.0", "44.0"]
    sections = [line.strip("│ ") for line in text.splitlines() if line.startswith("│ 8 tokens")]
    assert [line.split("  ")[0] for line in sections] == [
        *("8 tokens, room for 8", "8 tokens, room for 128", "8 tokens")
    ]
    name = "hidden 7168: 128 tokens, room for 128"
    assert cells_of(text, name) == [name, *["20.0 / 24.0"] * 4]
    assert "one value in 32 ns" in " ".join(text.split()) and "…" not in text


def test_no_figure_is_cut():
    found = made_up_run()
    slow = Times(p50=12345.6, p99=23456.7, max=345678.9, samples=9)
    found.results = [
        dataclasses.replace(
            result, graph=slow, eager=slow, kernel=slow, mean_us=12345.6, wrong=123456
        )
        for result in found.results
    ]
    text = text_of(found)
    assert "…" not in text and "345679" in text and "123456" in text


def test_void_run_says_so(tmp_path):
    found = made_up_run(SLOW)
    assert "VOID: the links carried 300.0 GB/s, below the 320" in headline(found)
    assert "VOID" in text_of(found)
    write_json(found, tmp_path / "run.json")
    assert json.loads((tmp_path / "run.json").read_text())["void"] is True


def test_a_run_without_gpus_has_eager_times_alone():
    text = text_of(made_up_run(None))
    assert cells_of(text, "combine ")[1:] == [*"-----", "30.0", *"--", "31.0", "45.0", "90.0", "0"]
    assert "by the host's clock" in text and "alltoall: all tokens" not in text


def test_json(tmp_path):
    write_json(made_up_run(wrong=2), tmp_path / "run.json")
    document = json.loads((tmp_path / "run.json").read_text())
    assert {"date", "command", "commit", "versions", "gpus"} <= document.keys()
    assert document["floors"]["one_way_us"] == 0.7 and document["void"] is False
    assert document["num_experts"] == 288 and document["settings"]["tokens"] == [8, 128]
    first = document["low_latency"][0]
    assert first["operation"] == "dispatch" and first["graph"]["p99"] == 15
    assert first["wrong"] == 2 and document["num_wrong"] == 2 * 3 * len(OPERATIONS)
    assert document["host"][0]["room"] == 8
    assert document["host"][0]["times"]["hook of combine"]["max"] == 99


@pytest.mark.parametrize("floors", [FLOORS, None], ids=["gpus", "cpu"])
def test_plot(floors, tmp_path):
    found = made_up_run(floors)
    write_plot(found, tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_plot_shows_lines_bands_and_floors():
    from ep_comm.bench.low_latency.report import _plot_line

    axes = mock.Mock()
    line = mock.Mock()
    axes.plot.return_value = (line,)
    results = [r for r in made_up_run().results if r.operation == "dispatch + combine"]
    _plot_line(axes, "dispatch + combine", results)
    lines, floors = axes.plot.call_args_list
    assert lines.args[1] == [40.0] * 3 and floors.args[1] == [4.0] * 3
    assert axes.fill_between.call_args.args[2] == [60.0] * 3
