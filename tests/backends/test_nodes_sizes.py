"""What a buffer between nodes takes of memory, by the formula. Nothing here needs a GPU."""

from __future__ import annotations

import dataclasses

import pytest

from ep_comm import EPConfig, NetworkSettings, _native
from ep_comm.backends.nodes.routing import arena_places
from ep_comm.backends.nodes.sizes import nodes_sizes

GIB, MIB = 2**30, 2**20
# W1: 4096 tokens of hidden 7168 in BF16, top-8 of 256 experts.
W1 = EPConfig(num_experts=256, hidden=7168, max_tokens_per_rank=4096, num_topk=8)
IBGDA = NetworkSettings(ibgda=True, granularity=64 * MIB)


@pytest.fixture(scope="module")
def native():
    library = _native.load()
    if library is None:
        pytest.skip(_native.status())
    return library


def handle_bytes(num_nodes: int, ranks: int, tokens: int, received: int, relayed: int) -> int:
    """The index arrays of one dispatch, with the entries of what came."""
    _, num_ints = arena_places(
        num_tokens=tokens,
        num_topk=W1.num_topk,
        num_entries=received,
        num_relay_entries=relayed,
        max_tokens=W1.max_tokens_per_rank,
        ranks_per_node=ranks,
        num_nodes=num_nodes,
        num_local_experts=W1.num_experts // (num_nodes * ranks),
    )
    return 4 * num_ints


def test_eight_nodes_of_eight(native):
    """All that a GPU holds, with the handle of tokens that go to all nodes and to eight ranks."""
    sizes = nodes_sizes(native, W1, 8, 8, IBGDA)
    handle = handle_bytes(8, 8, tokens=4096, received=8 * 4096, relayed=7 * 4096)
    assert sizes.network % (64 * MIB) == 0
    assert sizes.queue_pairs == 64 * 2 * 4096 * 128
    assert sizes.total + handle <= 3.5 * GIB
    assert handle < 6 * MIB
    # 512 MiB, which NVSHMEM takes by itself, would be too much.
    coarse = nodes_sizes(native, W1, 8, 8, NetworkSettings(ibgda=True, granularity=512 * MIB))
    assert coarse.total > 3.5 * GIB
    assert sizes.describe() == "1.55 GiB for NVLink, 1.62 for the network, 0.09 besides"


@pytest.mark.parametrize("shape", [(2, 4), (8, 8), (32, 8)])
def test_the_formula_of_the_docs(native, shape):
    num_nodes, ranks = shape
    tokens, topk, row = W1.max_tokens_per_rank, W1.num_topk, 2 * W1.hidden
    slot = -(-(row + 4 * topk) // 128) * 128
    sizes = nodes_sizes(native, W1, num_nodes, ranks, IBGDA)
    nvlink = 2 * (ranks - 1) * tokens * (slot + row) + 8 * ranks * tokens * topk
    nvlink += 4 * num_nodes * ranks * tokens * topk
    assert nvlink <= sizes.nvlink < nvlink + MIB
    network = 2 * (num_nodes - 1) * tokens * (slot + row + 4 * topk + 4 * (ranks + topk))
    assert network <= sizes.network < network + 2 * 64 * MIB + MIB
    plans = 12 * num_nodes * ranks * tokens * topk
    assert plans <= sizes.plans < plans + 16 * MIB


@pytest.mark.parametrize("shape", [(2, 4), (8, 8), (32, 8)])
def test_the_handle_of_the_docs(shape):
    """The buffer has room for more tokens than this rank brings."""
    num_nodes, ranks = shape
    most, topk, tokens, received, relayed = W1.max_tokens_per_rank, W1.num_topk, 1000, 30_000, 7_000
    want = 4 * tokens * (topk + ranks) + 12 * topk * received
    want += 4 * num_nodes * (tokens + most) + 4 * (ranks + topk) * relayed
    assert want <= handle_bytes(num_nodes, ranks, tokens, received, relayed) < want + MIB // 64


@pytest.mark.parametrize("shape", [(2, 4), (2, 8)])
def test_low_latency_adds_to_the_network(native, shape):
    with_it = dataclasses.replace(W1, low_latency_tokens=128)
    without, sizes = (nodes_sizes(native, config, *shape, None) for config in (W1, with_it))
    num_ranks = shape[0] * shape[1]
    rows = 8 * num_ranks * 128 * 2 * W1.hidden
    heads = 16 * (2 + 128 * (1 + 3 + 3))
    added = sizes.network - without.network
    assert rows + 4 * num_ranks * heads <= added < rows + 4 * num_ranks * heads + MIB
    assert sizes.nvlink == without.nvlink and sizes.plans == without.plans


def test_what_is_not_there_is_not_counted(native):
    one_host = nodes_sizes(native, W1, 2, 4, None)
    proxy = nodes_sizes(native, W1, 2, 4, NetworkSettings())
    in_host_memory = nodes_sizes(
        native, W1, 2, 4, NetworkSettings(ibgda=True, nic_buffers="hostmem")
    )
    assert one_host.queue_pairs == proxy.queue_pairs == in_host_memory.queue_pairs == 0
    assert one_host.nvlink == proxy.nvlink and one_host.network < proxy.network
    assert one_host.total == one_host.nvlink + one_host.network + one_host.plans
