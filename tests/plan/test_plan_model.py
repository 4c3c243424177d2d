"""Bytes, times, memory and SMs of a plan, against counting, the library, and measurements."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from ep_comm import _native
from ep_comm._native import header
from ep_comm.bench.ops.routing import RoutingSpec, make_routing
from ep_comm.bench.ops.settings import PRESETS, Shape
from ep_comm.job.exits import UserError
from ep_comm.plan import facts
from ep_comm.plan.check import compare, read
from ep_comm.plan.curves import curve, write_plot
from ep_comm.plan.kernels import chunks_of, network_chunk_rows
from ep_comm.plan.memory import formula, memory_of
from ep_comm.plan.model import Plan, fewest_sms, make_plan
from ep_comm.plan.sizes import Cluster, Workload

RESULTS = Path(__file__).parents[2] / "docs" / "results"
V3_GROUPS = RoutingSpec(kind="group-limited", num_groups=8, topk_groups=4)
W1 = Workload(shape=PRESETS["W1"])


def plan_of(num_nodes: int, gpus_per_node: int, workload: Workload = W1, **changes) -> Plan:
    cluster = Cluster(num_nodes=num_nodes, gpus_per_node=gpus_per_node, **changes)
    cluster.check()
    workload.check(cluster)
    return make_plan(cluster, workload)


@pytest.fixture
def library() -> _native.NativeLibrary:
    loaded = _native.load()
    if loaded is None:
        pytest.skip(f"layouts of the library NOT compared: {_native.status()}")
    return loaded


# ---- Bytes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("nodes", "local"), [(1, 4), (3, 4), (4, 1), (2, 2)])
@pytest.mark.parametrize("fp8", [False, True])
def test_bytes_as_counted_token_by_token(nodes, local, fp8):
    """One copy to the rail peer of each other node; from there, or the owner, to other ranks."""
    shape = Shape(tokens=2000, hidden=512, experts=24, topk=3)
    per_rank = 24 // (nodes * local)
    over_network = over_nvlink = 0
    for owner in range(nodes * local):
        topk_idx, _ = make_routing(RoutingSpec(), 2000, 24, 3, seed=owner)
        for experts in topk_idx.tolist():
            ranks = {expert // per_rank for expert in experts}
            for node in {rank // local for rank in ranks}:
                over_network += node != owner // local
                entry = node * local + owner % local  # the owner itself, or its rail peer
                over_nvlink += len({r for r in ranks if r // local == node and r != entry})
    row_bytes = 512 + 16 if fp8 else 1024
    operation = plan_of(nodes, local, Workload(shape=shape, fp8=fp8)).operation("dispatch, cached")
    for found, rows in (
        (operation.traffic.network, over_network),
        (operation.traffic.nvlink, over_nvlink),
    ):
        counted = rows * row_bytes / (nodes * local)
        assert found == pytest.approx(counted, rel=0.02)
    assert (operation.traffic.network == 0) == (nodes == 1)
    assert (operation.traffic.nvlink == 0) == (local == 1)
    assert operation.traffic.to_experts == 2000 * 3 * row_bytes


def test_combine_is_in_bf16():
    plan = plan_of(2, 8, dataclasses.replace(W1, fp8=True))
    dispatch, combine = plan.operation("dispatch, cached"), plan.operation("combine")
    ratio = 2 * 7168 / (7168 + 7168 // 128 * 4)
    assert combine.traffic.network == pytest.approx(ratio * dispatch.traffic.network)


BENCHES = [
    path.stem
    for path in sorted(RESULTS.glob("h200-*.json"))
    if "limit" in json.loads(path.read_text())
]


@pytest.mark.parametrize("name", BENCHES)
def test_bytes_of_the_benchmarks_are_the_models(name):
    """Theirs are the busiest GPU's, the model's the mean."""
    document = read(RESULTS / f"{name}.json")
    settings, ranks = document["settings"], document["num_ranks"]
    workload = Workload(
        shape=Shape(**settings["shape"]), routing=RoutingSpec.of_json(settings["routing"])
    )
    floor_us = next(r["floor_us"] for r in document["results"] if r["case"] == "dispatch, cached")
    measured = floor_us * document["limit"]["gb_per_s"] * 1e3
    found = plan_of(1, ranks, workload).operation("dispatch, cached").traffic.nvlink
    assert 0.985 < found / measured < 1.005


# ---- Times ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BENCHES)
def test_times_with_all_sms_are_close_to_those_measured(name):
    """A known routing in BF16; docs/plan.md has how far off the others are."""
    for found in compare(read(RESULTS / f"{name}.json")):
        if found.num_sms == 0 and found.name in ("dispatch, cached", "combine"):
            assert abs(found.deviation) < 0.12, found


def test_published_rates_are_close_where_the_network_limits():
    found = compare(read(RESULTS / "deepep-published.json"))
    assert len(found) == 10
    for each in found:
        assert each.limit == "NVLink" or abs(each.deviation) < 0.1, each
    others = {each.setting for each in found if each.limit == "NVLink"}
    assert others == {"V1, 2 × 8"}


def test_what_limits_follows_the_rates():
    assert plan_of(2, 8).operation("combine").limit == "network"
    assert plan_of(2, 8, nic_gb_per_s=400).operation("combine").limit == "NVLink"
    assert plan_of(1, 8).operation("combine").limit == "NVLink"
    assert plan_of(1, 8, num_sms=8).operation("combine").limit == "SMs"
    assert plan_of(1, 4, num_sms=16).operation("dispatch, cached").limit == "expand SMs"
    assert plan_of(1, 4, num_sms=4).operation("dispatch, cached").limit == "push SMs"
    fast = plan_of(1, 2, nvlink_gb_per_s=4500)
    assert fast.operation("combine").limit == "memory"


def test_the_time_is_the_longest_and_a_chunk_of_the_shorter_hop():
    operation = plan_of(2, 8, nvlink_latency_us=2, nic_latency_us=7).operation("combine")
    share = facts.NIC_SHARE.value * 50e3
    longest = operation.traffic.network / share
    shorter = operation.traffic.nvlink / (facts.NVLINK_SHARE.value * 450e3)
    messages = operation.traffic.network / 14336 / 128
    expected = longest + shorter / messages + facts.COMBINE_US.value + 2 + 7
    assert operation.us == pytest.approx(expected)
    assert operation.gb_per_s(operation.us * 1e3) == pytest.approx(1)
    new = plan_of(2, 8).operation("dispatch, fresh").us
    known = plan_of(2, 8).operation("dispatch, cached").us
    assert new - known == pytest.approx(facts.NEW_ROUTING_US.value)
    # Where expanding limits, it begins later.
    new, known = (
        plan_of(1, 4, num_sms=16).operation(f"dispatch, {name}").us for name in ("fresh", "cached")
    )
    later_us = facts.NEW_ROUTING_US.value + facts.EXPAND_WAIT_US.value
    assert new - known == pytest.approx(later_us)


def test_rows_between_parts_of_one_host_go_over_nvlink_too():
    apart, together = (
        plan_of(2, 2, nvlink_is_network=flag).operation("combine") for flag in (False, True)
    )
    share = facts.NVLINK_SHARE.value * 450e3
    more = together.busy_us["NVLink"] - apart.busy_us["NVLink"]
    assert more == pytest.approx(apart.traffic.network / share)


@pytest.mark.parametrize("nodes", [1, 8])
def test_fewest_sms(nodes):
    plan = plan_of(nodes, 8)
    for name in ("dispatch, cached", "combine"):
        fewest = fewest_sms(plan, name)
        assert fewest is not None and 4 <= fewest < 32
        assert "SMs" not in plan_of(nodes, 8, num_sms=fewest).operation(name).limit
        if fewest > 4:
            assert "SMs" in plan_of(nodes, 8, num_sms=fewest - 1).operation(name).limit
    assert fewest_sms(plan_of(1, 8, num_sms=8), "combine") is None


# ---- Memory, chunks ------------------------------------------------------------------------------


@pytest.mark.parametrize(("nodes", "local"), [(1, 4), (1, 8), (2, 2), (4, 8), (64, 8)])
@pytest.mark.parametrize("shape", [*PRESETS.values(), Shape(1000, 2048, 512, 3)], ids=str)
def test_memory_is_the_formulas_and_the_librarys(library, nodes, local, shape):
    cluster = Cluster(num_nodes=nodes, gpus_per_node=local)
    found, stated = (how(cluster, Workload(shape=shape)) for how in (memory_of, formula))
    assert found.is_exact and not stated.is_exact
    assert stated.nvlink == pytest.approx(found.nvlink, rel=0.002)
    assert stated.network == pytest.approx(found.network, rel=0.002)
    assert (found.network == 0) == (nodes == 1)


def test_memory_without_the_library(monkeypatch):
    monkeypatch.setattr(_native, "load", lambda: None)
    plan = plan_of(8, 8)
    assert not plan.memory.is_exact and 3 < plan.memory.total / 2**30 < 3.2
    more = dataclasses.replace(W1, shape=W1.shape._replace(experts=1024))
    assert not plan_of(128, 8, more).memory.is_exact


@pytest.mark.parametrize("tokens", [1, 1000, 4096, 8192, 100000])
def test_messages_are_the_librarys(library, tokens):
    offsets = library.nodes_offsets(header.NodesLayoutArgs(tokens, 1024, 8, 2, 8))
    assert network_chunk_rows(tokens) == offsets.network_chunk_rows


def test_chunks():
    assert chunks_of(Cluster(num_nodes=2), W1) == (4, 4, 128)
    assert chunks_of(Cluster(), Workload(shape=PRESETS["W2"], fp8=True)) == (23, 8, 0)


# ---- Refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_nodes=0), "--nodes 0 must be positive"),
        (dict(gpus_per_node=9), "--gpus-per-node 9 is not in 1 to 8"),
        (dict(num_nodes=1, gpus_per_node=1), "are 1 GPUs: a plan is for 2 to 1024"),
        (dict(num_nodes=129), "are 1032 GPUs"),
        (dict(nvlink_gb_per_s=0), "--nvlink-gb-per-s 0 must be positive"),
        (dict(nic_gb_per_s=float("inf")), "--nic-gb-per-s inf must be positive"),
        (dict(nic_gb_per_s=float("nan")), "--nic-gb-per-s nan must be positive"),
        (dict(nic_latency_us=-1), "--nic-latency-us -1 must be at least 0"),
        (dict(num_sms=3), "--sms 3 is too few: at least 4"),
    ],
)
def test_what_is_no_cluster_is_named(changes, message):
    with pytest.raises(UserError, match=message):
        Cluster(**changes).check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(shape=Shape(4096, 7168, 250, 8)), "--experts 250 is not divisible by the 16 GPUs"),
        (dict(shape=Shape(4096, 7168, 8192, 8)), "--experts 8192 is more than 4096"),
        (dict(shape=Shape(0, 7168, 256, 8)), "--tokens 0 must be positive"),
        (dict(shape=Shape(4096, 640, 256, 8), fp8=True), "--hidden 640 is not a multiple of 512"),
        (dict(routing=RoutingSpec(kind="zipf")), "zipf: a plan is for uniform and group-limited"),
        (dict(routing=dataclasses.replace(V3_GROUPS, num_groups=7)), "--num-groups 7 does not"),
        (dict(layout="token"), "--layout 'token' is none of"),
    ],
)
def test_what_no_cluster_can_have_is_named(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(W1, **changes).check(Cluster(num_nodes=2))


# ---- Curves --------------------------------------------------------------------------------------


def test_a_curve_goes_to_1024_gpus():
    plans = curve(Cluster(), W1, V3_GROUPS)
    assert [plan.cluster.num_gpus for plan in plans] == [8 * 2**i for i in range(8)]
    assert [plan.workload.shape.experts for plan in plans] == [256] * 6 + [512, 1024]
    nodes = [plan.copies.nodes for plan in plans]
    assert nodes == sorted(nodes) and nodes[0] == 1
    assert all(plan.workload.routing == V3_GROUPS for plan in plans)


def test_nodes_that_cannot_share_the_experts_are_left_out(tmp_path):
    few = dataclasses.replace(W1, shape=W1.shape._replace(experts=160))
    plans = curve(Cluster(), few, RoutingSpec())
    assert [plan.cluster.num_gpus for plan in plans] == [8, 16, 32, 256, 512, 1024]
    none = dataclasses.replace(W1, shape=W1.shape._replace(experts=2049))
    with pytest.raises(UserError, match="--plot: no 1, 2, 4, ... nodes of --gpus-per-node 1"):
        write_plot(plan_of(3, 1, none), tmp_path / "plan.png")


@pytest.mark.parametrize("routing", [RoutingSpec(), V3_GROUPS], ids=lambda spec: spec.kind)
def test_a_picture_is_written(routing, tmp_path):
    path = tmp_path / "plan.png"
    write_plot(plan_of(2, 8, dataclasses.replace(W1, routing=routing)), path)
    assert path.read_bytes().startswith(b"\x89PNG")


# ---- Captured routing ----------------------------------------------------------------------------

CAPTURE = Path(__file__).parents[1] / "data" / "routing-capture"


@pytest.mark.parametrize(("nodes", "local"), [(1, 2), (2, 2), (1, 8)])
def test_a_capture_is_planned_for_the_fullest_rank(nodes, local):
    """Against the tokens themselves: what the fullest rank of each layer receives of the others."""
    spec = RoutingSpec.of_flags(None, None, None, replay=CAPTURE)
    shape = Shape(tokens=1024, hidden=128, experts=8, topk=2)
    found = plan_of(nodes, local, Workload(shape=shape, routing=spec))
    per_rank = 8 // (nodes * local)
    ratios = []
    for of_layer in spec.captured.topk_idx:
        goes = [0] * (nodes * local)
        for experts in (token for rows in of_layer for token in rows.tolist()):
            for rank in {expert // per_rank for expert in experts}:
                goes[rank] += 1
        ratios.append(max(goes) * len(goes) / sum(goes))
    even = plan_of(nodes, local, Workload(shape=shape))
    skew = sum(ratios) / len(ratios)
    assert skew > 1.05 and found.copies.fullest_rank == pytest.approx(skew)
    of_copies = found.copies.ranks / even.copies.ranks
    for ours, others in zip(found.operations, even.operations, strict=True):
        nvlink = others.traffic.nvlink * of_copies * skew
        assert ours.traffic.nvlink == pytest.approx(nvlink)
        assert ours.us > 0 and ours.busy_us["memory"] != others.busy_us["memory"]


def test_a_picture_of_a_capture_ends_where_its_experts_do(tmp_path):
    spec = RoutingSpec.of_flags(None, None, None, replay=CAPTURE)
    workload = Workload(shape=Shape(tokens=64, hidden=128, experts=8, topk=2), routing=spec)
    plans = curve(Cluster(gpus_per_node=4), workload, spec)
    assert [plan.cluster.num_gpus for plan in plans] == [4, 8]
    write_plot(plan_of(1, 4, workload), tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 10_000
