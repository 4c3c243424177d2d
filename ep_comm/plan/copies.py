"""To how many ranks and nodes a token goes, on average: exactly, by combinatorics.

A part is a rank or a node: so many consecutive experts. A token misses a part with probability
``C(E - e, K) / C(E, K)``, where e of all E experts are there and a token has K, all sets of K being
as likely.

Group-limited: a group counts as much as its best expert, and only experts of the M best groups are
taken. With random scores that is the same as drawing experts one by one, without repetition: from
all experts until M groups have been drawn from, and from those groups thereafter. So the
probability to miss a part follows draw by draw. DeepSeek-V3 takes the *two* best experts of a group
together, as `ep_comm.bench.ops.routing` does; in the cases that the tests draw that changes the
averages by less than 1.5 %.

A captured routing is counted instead, on as many ranks and nodes as the plan has: experts are dealt
out anew, tokens are as they were.
"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np

from ep_comm.bench.ops.routing import REPLAY, RoutingSpec
from ep_comm.routing.capture import Capture


class Copies(NamedTuple):
    """Means over all tokens, their own rank and node included.

    Attributes:
        ranks: Distinct ranks of a token.
        nodes: Distinct nodes of a token.
        fullest_rank: Copies that the fullest rank gets, over the mean; 1 where all experts are as
            likely.
        fullest_node: The same of nodes.
    """

    ranks: float
    nodes: float
    fullest_rank: float = 1.0
    fullest_node: float = 1.0


def copies_of(
    routing: RoutingSpec, num_experts: int, num_topk: int, num_nodes: int, gpus_per_node: int
) -> Copies:
    """Return the copies of a token whose experts are spread over nodes.

    Args:
        routing: "uniform", "group-limited", or a replay.
        num_experts: A multiple of the ranks.
        num_topk: Experts of a token.
        num_nodes: Nodes.
        gpus_per_node: Ranks of a node.
    """
    if routing.kind == REPLAY:
        ranks, fullest_rank = captured_parts(routing.captured, num_nodes * gpus_per_node)
        nodes, fullest_node = captured_parts(routing.captured, num_nodes)
        return Copies(ranks, nodes, fullest_rank, fullest_node)
    num_groups, topk_groups = 1, 1
    if routing.kind == "group-limited":
        num_groups, topk_groups = routing.num_groups, routing.topk_groups

    def parts_hit(num_parts: int) -> float:
        return expected_parts(num_experts, num_parts, num_groups, topk_groups, num_topk)

    return Copies(ranks=parts_hit(num_nodes * gpus_per_node), nodes=parts_hit(num_nodes))


@functools.lru_cache(maxsize=64)
def captured_parts(capture: Capture, num_parts: int) -> tuple[float, float]:
    """Count the parts that captured tokens have experts in.

    Args:
        capture: One step.
        num_parts: Equal parts of consecutive experts.

    Returns:
        The mean number of parts of a token, and the tokens of the fullest part over the mean: the
        mean of all layers.
    """
    in_part = capture.sizes.num_experts // num_parts
    means, ratios = [], []
    for of_layer in capture.topk_idx:
        topk_idx_TK = np.concatenate(of_layer).astype(np.int64)
        goes_TP = np.zeros((len(topk_idx_TK), num_parts + 1), dtype=bool)
        # No expert, -1, is in the last column, which does not count.
        np.put_along_axis(goes_TP, topk_idx_TK // in_part, True, axis=1)
        tokens_P = goes_TP[:, :num_parts].sum(axis=0)
        means.append(tokens_P.sum() / len(topk_idx_TK))
        ratios.append(tokens_P.max() / tokens_P.mean())
    return float(np.mean(means)), float(np.mean(ratios))


@functools.cache
def expected_parts(
    num_experts: int, num_parts: int, num_groups: int, topk_groups: int, num_topk: int
) -> float:
    """Return the mean number of parts that a token has an expert in.

    Args:
        num_experts: A multiple of parts and groups.
        num_parts: Equal parts of consecutive experts.
        num_groups: Equal groups of consecutive experts; 1 is uniform routing.
        topk_groups: Groups that a token's experts come from.
        num_topk: Experts of a token.
    """
    in_part, in_group = num_experts // num_parts, num_experts // num_groups
    # A part shares experts with few groups. Parts that do so alike are missed alike.
    kinds: Counter[tuple[tuple[int, int], ...]] = Counter()
    for first in range(0, num_experts, in_part):
        end = first + in_part
        shared = Counter(
            min(end, (group + 1) * in_group) - max(first, group * in_group)
            for group in range(first // in_group, (end - 1) // in_group + 1)
        )
        kinds[tuple(sorted(shared.items()))] += 1
    return sum(
        count * (1 - miss_probability(dict(shared), in_group, num_groups, topk_groups, num_topk))
        for shared, count in kinds.items()
    )


def miss_probability(
    shared: dict[int, int], in_group: int, num_groups: int, topk_groups: int, num_topk: int
) -> float:
    """Return the probability that a token has no expert in a part.

    Args:
        shared: Of experts that a group shares with the part: how many groups share so many. Groups
            that share none need not be there.
        in_group: Experts of a group.
        num_groups: Groups in all.
        topk_groups: M.
        num_topk: K.
    """
    groups_sharing = {**shared, 0: num_groups - sum(shared.values())}
    sizes = list(groups_sharing)
    # Probability of each number of open groups of each kind, while the part is missed.
    states: dict[tuple[int, ...], float] = {(0,) * len(sizes): 1.0}
    for drawn in range(num_topk):
        after: dict[tuple[int, ...], float] = defaultdict(float)
        for opened, probability in states.items():
            is_closed = sum(opened) == topk_groups  # to further groups
            pool = (topk_groups if is_closed else num_groups) * in_group - drawn
            outside = sum(n * (in_group - k) for k, n in zip(sizes, opened, strict=True)) - drawn
            after[opened] += probability * outside / pool
            if is_closed:
                continue
            for i, k in enumerate(sizes):
                fresh = (groups_sharing[k] - opened[i]) * (in_group - k)
                if fresh:
                    one_more = (*opened[:i], opened[i] + 1, *opened[i + 1 :])
                    after[one_more] += probability * fresh / pool
        states = after
    return sum(states.values())
