"""Which backend a group gets, as its hosts and GPUs are. Nothing here needs a GPU."""

from __future__ import annotations

import socket
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from ep_comm import Buffer, EPArgumentError, EPConfig, EPUnsupportedError, NetworkSettings, _native
from ep_comm._native import header
from ep_comm.backends import NodesBackend, NVLinkBackend, with_nodes
from ep_comm.backends.nodes.memory import NodesMemory
from ep_comm.backends.nvlink.support import Facts
from ep_comm.network.world import World
from ep_comm.topology import Spot

SIZES = dict(num_experts=8, hidden=64, max_tokens_per_rank=16, num_topk=2)
CONFIG = EPConfig(**SIZES)


def spots_of(*hosts: str) -> list[Spot]:
    """The GPUs of a host in order, at any addresses."""
    return [Spot(host, (0, 7 * hosts[:rank].count(host), 0)) for rank, host in enumerate(hosts)]


def facts_of(count: int, **changes) -> list[Facts]:
    return [Facts(f"GPU-{rank}", (), None)._replace(**changes) for rank in range(count)]


def reason(spots: list[Spot], facts: list[Facts] | None = None, **changes) -> str | None:
    config = EPConfig(**SIZES, **changes)
    return NodesBackend.unavailable_reason(facts or facts_of(len(spots)), spots, config)


def test_nodes_serve_equal_hosts():
    assert reason(spots_of(*"aabb")) is None
    assert reason(spots_of(*"aabb"), ranks_per_node=1) is None
    assert reason(spots_of(*"abc")) is None
    assert NVLinkBackend.unavailable_reason(facts_of(4), spots_of(*"aabb"), CONFIG) == (
        "the group spans 2 hosts"
    )


@pytest.mark.parametrize(
    ("hosts", "changes", "text"),
    [
        ("aab", {}, "host a has 2 ranks of the group, host b has 1"),
        ("abab", {}, "ranks 0 and 2 are on host a, and rank 1 between them is on b"),
        ("aabb", dict(ranks_per_node=4), "ranks_per_node 4 does not divide the 2 ranks of a host"),
    ],
)
def test_hosts_that_are_no_nodes_are_refused(hosts, changes, text):
    with pytest.raises(EPArgumentError, match=text):
        reason(spots_of(*hosts), **changes)


def test_gpus_in_another_order_are_refused():
    """By their place on the host: other addresses are none of our business."""
    spots = spots_of(*"aabb")
    spots[2:] = [Spot("b", (1, 3, 0)), Spot("b", (1, 4, 0))]
    assert reason(spots) is None
    spots[2:] = spots[:1:-1]
    with pytest.raises(EPArgumentError, match="rank 2 has GPU 1 of host b, rank 0 has GPU 0"):
        reason(spots)


def test_the_same_gpu_is_refused_within_a_host_only():
    same = facts_of(2, gpu="GPU-a")  # as two containers of a machine see it
    assert reason(spots_of(*"ab"), same) is None
    with pytest.raises(EPArgumentError, match="ranks 0 and 1 have the same GPU"):
        reason(spots_of(*"aa"), same)


def test_gpus_have_to_reach_each_other_within_a_node_only():
    facts = facts_of(4)
    facts[1] = facts[1]._replace(unreached=("GPU-2", "GPU-3"))
    assert reason(spots_of(*"aabb"), facts) is None
    facts[1] = facts[1]._replace(unreached=("GPU-0",))
    assert reason(spots_of(*"aabb"), facts) == (
        "rank 1: its GPU has no peer access to that of rank 0"
    )
    assert reason(spots_of(*"aabb"), facts, ranks_per_node=1) is None


def test_too_many_ranks_are_refused():
    assert reason(spots_of(*"a" * 9)) == f"9 ranks a node, at most {header.EP_MAX_PEERS}"
    most = [spot for n in range(129) for spot in spots_of(*[f"host{n}"] * 8)]
    assert reason(most[:-8]) is None
    assert reason(most) == "129 nodes of 8 ranks, at most 256 nodes and 1024 ranks"


def test_a_reason_of_one_rank_is_told_with_its_number():
    facts = facts_of(4)
    facts[3] = facts[3]._replace(reason="no kernels for its GPU")
    assert reason(spots_of(*"aabb"), facts) == "rank 3: no kernels for its GPU"


def test_sizes_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(dist, "get_backend", lambda group: "cuda:nccl")
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(_native, "unusable_reason", lambda gpu: None)
    monkeypatch.setattr("ep_comm.backends.nvlink.support.gpu_id", lambda gpu: "GPU-0")
    many = EPConfig(**{**SIZES, "num_experts": 2048}, low_latency_tokens=1024)
    assert NodesBackend.facts(None, many).reason == (
        "1024 experts a rank x 2048 low-latency tokens of all ranks, at most 1200000"
    )
    few = EPConfig(**SIZES, low_latency_tokens=8)
    assert NodesBackend.facts(None, few).reason is None
    # More ranks than a host has GPUs are no reason.
    monkeypatch.setattr(dist, "get_world_size", lambda group: 16)
    assert NodesBackend.facts(None, EPConfig(**{**SIZES, "num_experts": 16})).reason is None


@pytest.mark.parametrize(
    ("hosts", "asked", "found"),
    [
        ("aaaa", None, None),
        ("aabb", None, 2),
        ("abcd", None, 1),
        ("aabb", 4, 4),
        ("aab", None, None),
    ],
)
def test_ranks_of_a_node_are_found_where_they_are_not_given(hosts, asked, found):
    """On one host None stays: all are one node. So do hosts that are no nodes."""
    config = with_nodes(EPConfig(**SIZES, ranks_per_node=asked), spots_of(*hosts))
    assert config.ranks_per_node == found


def test_what_a_backend_on_several_hosts_is_made_of(monkeypatch):
    """The world before any memory. The second rank of a host has its second card."""
    made = []

    class FakeWorld:
        def nic(self, place: int) -> str:
            return f"card {place}"

    def join(group, settings, timeout_s):
        made.append(("world", settings, timeout_s))
        return FakeWorld()

    def of_hosts(group, meeting, world, offsets, ranks_per_node, timeout_s, has_low_latency):
        has_memory = offsets.network_total > 0
        made.append(("memory", type(world), has_memory, ranks_per_node, has_low_latency))

    def init(self, memory, config, nic):
        made.append(("backend", config.ranks_per_node, nic))

    monkeypatch.setattr(World, "of_group", join)
    monkeypatch.setattr(NodesMemory, "of_hosts", of_hosts)
    monkeypatch.setattr(NodesBackend, "__init__", init)
    monkeypatch.setattr(dist, "get_rank", lambda group: 3)
    monkeypatch.setattr(torch.cuda, "current_stream", Mock())
    monkeypatch.setenv("NVSHMEM_IB_SL", "4")
    if _native.load() is None:
        pytest.skip(_native.status())
    spots = spots_of(*"aabb")
    NodesBackend.create(None, with_nodes(CONFIG, spots), None, spots)
    settings = NetworkSettings(service_level=4)
    assert made == [
        ("world", settings, 30.0),
        ("memory", FakeWorld, True, 2, False),
        ("backend", 2, "card 1"),
    ]
    made.clear()
    mine = NetworkSettings(ibgda=True)
    config = EPConfig(**SIZES, ranks_per_node=1, network=mine, low_latency_tokens=4)
    NodesBackend.create(None, config, None, spots)
    assert made[0] == ("world", mine, 30.0) and made[1][3:] == (1, True) and made[2][2] == "card 1"


# --- whole groups --------------------------------------------------------------------------------


def on_hosts(patch: pytest.MonkeyPatch, rank: int, has_gpus: bool) -> None:
    patch.setattr(socket, "gethostname", lambda: "ab"[rank])
    if has_gpus:
        facts = Facts(f"GPU-{rank}", (), None)
        patch.setattr(NVLinkBackend, "facts", lambda group, config: facts)
        patch.setattr(NodesBackend, "facts", lambda group, config: facts)


def sums_on_two_hosts(rank: int) -> tuple:
    """The reference backend sums as the nodes do: here with a rounding on each host."""
    topk = torch.tensor([[0, 1, 4, 5]] * 64)
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(rank)).bfloat16()
    sums = []
    with pytest.MonkeyPatch.context() as patch:
        on_hosts(patch, rank, False)
        for ranks_per_node in (None, 1, 2):
            sizes = {**SIZES, "max_tokens_per_rank": 64, "num_topk": 4}
            buffer = Buffer(None, EPConfig(**sizes, ranks_per_node=ranks_per_node))
            out = buffer.dispatch(x, topk)
            scales = torch.arange(1, 1 + out.recv_x.shape[0])[:, None] / 7
            rows = (out.recv_x * scales).bfloat16()
            sums.append(buffer.combine(rows, out.handle).combined_x)
            passed_over = buffer.passed_over
            buffer.destroy()
    return passed_over, torch.equal(sums[0], sums[1]), buffer.describe()


def test_on_cpus_hosts_are_nodes_of_the_reference_backend():
    for passed_over, equal, text in run_ranks(2, sums_on_two_hosts):
        assert passed_over == {"nodes": "the group has no NCCL backend (gloo)"}
        assert equal and text == "reference over gloo"


def without_nvshmem(rank: int) -> list[str]:
    texts = []
    with pytest.MonkeyPatch.context() as patch:
        on_hosts(patch, rank, True)
        missing = "it is not installed: pip install 'ep_comm[nvshmem-cu13]'"
        patch.setattr(_native, "load_nvshmem", lambda: None)
        patch.setattr(_native, "nvshmem_unusable_reason", lambda: missing)
        for backend in ("auto", "nodes"):
            for low_latency_tokens in (None, 8):
                sizes = {**SIZES, "low_latency_tokens": low_latency_tokens}
                with pytest.raises(EPUnsupportedError) as caught:
                    Buffer(None, EPConfig(**sizes, backend=backend))
                texts.append(str(caught.value))
        with pytest.raises(EPArgumentError) as refused:
            Buffer(None, EPConfig(**SIZES, backend="nvlink"))
        texts.append(str(refused.value))
        texts.append(Buffer(None, EPConfig(**SIZES, backend="reference")).describe())
    return texts


def test_gpus_of_several_hosts_without_nvshmem():
    """Refused with what to install: the reference backend there is asked for by name."""
    for texts in run_ranks(2, without_nvshmem):
        for text in texts[:4]:
            assert (
                "the group spans hosts, and rank 0 cannot use NVSHMEM: it is not installed" in text
            )
            assert "ep_comm[nvshmem-cu13]" in text and 'EPConfig(backend="reference")' in text
        assert texts[4] == "no backend for this group: nvlink: the group spans 2 hosts"
        assert texts[5] == "reference over gloo"
