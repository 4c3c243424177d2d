"""Where things stand in the memory of a buffer between nodes. Nothing here needs a GPU."""

from __future__ import annotations

from itertools import pairwise

import pytest

from ep_comm._native import header
from ep_comm.errors import EPArgumentError

SIZES = [
    # max_tokens, row_bytes, num_topk, num_nodes, ranks_per_node
    (1, 16, 1, 1, 1),
    (129, 256, 5, 3, 2),
    (65, 1040, 32, 2, 3),
    (1000, 92000, 4, 4, 1),
    (4096, 14336, 8, 8, 8),
    (4096, 14336, 8, 64, 8),
]
GIB = 2**30


def offsets_of(library, sizes: tuple) -> header.NodesOffsets:
    return library.nodes_offsets(header.NodesLayoutArgs(*sizes))


def parts_of(sizes: tuple) -> tuple[dict[str, int], dict[str, int]]:
    """What ep_comm.h says of every part: of the memory for NVLink, and of the network's."""
    tokens, row_bytes, topk, nodes, locals_ = sizes
    ranks, far, chunks = nodes * locals_, nodes - 1, -(-tokens // header.EP_MIN_CHUNK_TOKENS)
    slots = tokens * (-(-(row_bytes + 4 * (topk + -topk % 4)) // 128) * 128)
    flags = 8 * far * header.EP_MAX_NETWORK_CHUNKS
    plans, weights = 4 * far * (16 + tokens * (locals_ + topk)), 4 * far * tokens * topk
    local = {
        "farewells": 4 * ranks,
        "plan_flags": 4 * ranks,
        "dispatch_credits": 4 * locals_,
        "combine_credits": 4 * locals_,
        "plan_headers": 4 * ranks * 16,
        "dispatch_flags": 2 * 8 * locals_ * chunks,
        "combine_flags": 2 * 4 * locals_ * chunks,
        "plan_idx": 4 * ranks * tokens * topk,
        "combine_weights": 2 * 4 * locals_ * tokens * topk,
        "dispatch_slots": 2 * (locals_ - 1) * slots,
        "combine_rows": 2 * (locals_ - 1) * tokens * row_bytes,
        "zeros": row_bytes,
    }
    network = {
        "network_credits": 2 * 8 * far,
        "network_greetings": 8 * ranks,
        "network_plan_flags": 8 * far,
        "network_dispatch_flags": flags,
        "network_combine_flags": flags,
        "network_weight_flags": flags,
        "plan_to_send": plans,
        "plan_received": plans,
        "dispatch_to_send": far * slots,
        "dispatch_received": far * slots,
        "combine_to_send": far * tokens * row_bytes,
        "combine_received": far * tokens * row_bytes,
        "weights_to_send": weights,
        "weights_received": weights,
    }
    return local, network


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_parts_do_not_overlap_and_waste_little(library, sizes):
    offsets = offsets_of(library, sizes)
    for parts, total in zip(parts_of(sizes), (offsets.total, offsets.network_total), strict=True):
        starts = [getattr(offsets, name) for name in parts] + [total]
        assert starts[0] == 0 and all(start % 256 == 0 for start in starts)
        for (name, size), (start, end) in zip(parts.items(), pairwise(starts), strict=True):
            # Regions of other nodes, and halves, are rounded up one by one.
            assert size <= end - start < size + 256 * max(2, sizes[3]), name
    for half, whole in (
        (offsets.dispatch_slots_half, offsets.combine_rows - offsets.dispatch_slots),
        (offsets.combine_rows_half, offsets.zeros - offsets.combine_rows),
    ):
        assert whole == 2 * half


LOW_LATENCY = [
    # low_latency_tokens, hidden, num_topk, num_nodes, ranks_per_node
    (1, 8, 1, 1, 1),
    (13, 136, 9, 3, 2),
    (128, 7168, 8, 2, 8),
]


@pytest.mark.parametrize("sizes", LOW_LATENCY, ids=str)
def test_low_latency_comes_last(library, sizes):
    room, hidden, topk, nodes, locals_ = sizes
    normal = (16, 16, topk, nodes, locals_)
    offsets = offsets_of(library, (*normal, room, hidden))
    places = 2 * nodes * locals_
    assert offsets.low_latency_credits == offsets_of(library, normal).network_total
    weights, experts = -(-topk // 3), -(-topk // 8)
    sizes_of = [2 * 8 * places, 2 * 8 * places, 3 * 2 * 8 * places]
    starts = [offsets.low_latency_credits, offsets.low_latency_head_flags]
    starts.append(offsets.low_latency_row_flags)
    for kind, entry in enumerate((experts + weights, weights)):
        region = offsets.low_latency_head_region[kind]
        assert 0 <= region - 16 * (1 + room * entry) < 256
        assert 0 <= offsets.low_latency_row_region - 2 * hidden * room < 256
        heads, rows = places * region, places * offsets.low_latency_row_region
        sizes_of += [heads, heads, rows, rows]
        starts += [
            offsets.low_latency_heads_to_send[kind],
            offsets.low_latency_heads_received[kind],
        ]
        starts += [offsets.low_latency_rows_to_send[kind], offsets.low_latency_rows_received[kind]]
    starts.append(offsets.network_total)
    for size, (start, end) in zip(sizes_of, pairwise(starts), strict=True):
        assert start % 256 == 0 and 0 <= end - start - size < 256


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_chunks_on_the_network(library, sizes):
    """At most so many as flags and a queue pair have room for."""
    rows = offsets_of(library, sizes).network_chunk_rows
    assert rows % 32 == 0 and -(-sizes[0] // rows) <= header.EP_MAX_NETWORK_CHUNKS


def test_memory_at_eight_nodes_of_eight(library):
    offsets = offsets_of(library, (4096, 14336, 8, 8, 8))
    assert 1.5 * GIB < offsets.total < 1.6 * GIB
    assert 1.5 * GIB < offsets.network_total < 1.6 * GIB
    # What rows are staged in does not grow with the number of nodes.
    more = offsets_of(library, (4096, 14336, 8, 64, 8))
    assert more.dispatch_slots_half == offsets.dispatch_slots_half
    assert more.total - offsets.total < 4 * 56 * 8 * 4096 * 8 + 2**20


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (dict(ranks_per_node=9), "ranks_per_node = 9 is not in"),
        (dict(num_nodes=0), "0 nodes of 2 ranks"),
        (dict(num_nodes=257, ranks_per_node=1), "257 nodes of 1 ranks: at most 256 nodes"),
        (dict(num_nodes=129, ranks_per_node=8), "129 nodes of 8 ranks: at most 256 nodes and 1024"),
        (dict(row_bytes=24), "row_bytes = 24 is not in"),
        (dict(num_topk=33), "num_topk = 33 is not in"),
        (dict(max_tokens=0), "max_tokens = 0 is not in"),
        (dict(low_latency_tokens=4097), "low_latency_tokens = 4097 is not in"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_sizes_out_of_bounds_are_refused(library, changes, text):
    sizes = dict(max_tokens=8, row_bytes=16, num_topk=2, num_nodes=2, ranks_per_node=2)
    with pytest.raises(EPArgumentError, match=text):
        library.nodes_offsets(header.NodesLayoutArgs(**{**sizes, **changes}))


def test_experts_that_ranks_cannot_share_are_refused(library):
    with pytest.raises(EPArgumentError, match="num_experts = 10 is no multiple of 4 ranks"):
        library.nodes_plan_scratch_bytes(8, 10, 2, 2)
    assert library.nodes_plan_scratch_bytes(8, 12, 2, 2) > 0
