"""Which ranks are a node, and which groups have none."""

from __future__ import annotations

import pytest

from ep_comm.errors import EPArgumentError
from ep_comm.topology import find_ranks_per_node


def hosts(*counts: int) -> list[str]:
    return [name for name, count in zip("abcd", counts, strict=False) for _ in range(count)]


@pytest.mark.parametrize(
    ("counts", "asked", "found"),
    [((4,), None, 4), ((4,), 2, 2), ((1, 1, 1), None, 1), ((3, 3), None, 3), ((4, 4), 1, 1)],
)
def test_ranks_of_a_node(counts, asked, found):
    gpus = [gpu for count in counts for gpu in reversed(range(count))]  # any order, everywhere
    assert find_ranks_per_node(hosts(*counts), gpus, asked) == found


@pytest.mark.parametrize(
    ("names", "gpus", "asked", "text"),
    [
        (
            "abab",
            (0, 0, 1, 1),
            None,
            "ranks 0 and 2 are on host a, and rank 1 between them is on b",
        ),
        ("aabba", (0, 1, 0, 1, 2), None, "ranks 0 and 4 are on host a, and rank 3 .* is on b"),
        ("aab", (0, 1, 0), None, "host a has 2 ranks of the group, host b has 1"),
        ("aaabbb", (0, 1, 2, 0, 1, 2), 2, "ranks_per_node 2 does not divide the 3 ranks of a host"),
        ("aabb", (0, 1, 0, 1), 4, "ranks_per_node 4 does not divide the 2 ranks of a host"),
        ("aabb", (0, 1, 1, 0), None, "rank 2 has GPU 1 of host b, rank 0 has GPU 0 of host a"),
    ],
)
def test_groups_without_nodes_are_refused(names, gpus, asked, text):
    with pytest.raises(EPArgumentError, match=text):
        find_ranks_per_node(names, gpus, asked)
