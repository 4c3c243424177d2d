"""Ranks and nodes of a token: by combinatorics, by counting all cases, and by drawing tokens."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from itertools import permutations
from math import comb
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
import torch
from torch import Tensor

from ep_comm.bench.ops.routing import RoutingSpec, make_routing
from ep_comm.plan.copies import copies_of, expected_parts
from ep_comm.routing.capture import RankFile, Sizes, write_step


def parts_of_tokens(topk_idx_TK: Tensor, num_experts: int, num_parts: int) -> float:
    """Mean number of parts that the tokens have experts in."""
    hit_TP = torch.zeros(len(topk_idx_TK), num_parts)
    hit_TP.scatter_(1, topk_idx_TK // (num_experts // num_parts), 1)
    return float(hit_TP.sum(dim=1).mean())


@pytest.mark.parametrize("num_parts", [1, 2, 3, 8, 48, 96])
@pytest.mark.parametrize("num_topk", [1, 2, 8])
def test_uniform_routing_has_a_closed_form(num_topk, num_parts):
    missed = Fraction(comb(96 - 96 // num_parts, num_topk), comb(96, num_topk))
    found = expected_parts(96, num_parts, 1, 1, num_topk)
    assert found == pytest.approx(float(num_parts * (1 - missed)), rel=1e-12)


@pytest.mark.parametrize("num_parts", [2, 3, 6])
@pytest.mark.parametrize(("num_groups", "topk_groups"), [(3, 1), (3, 2), (2, 1), (6, 3), (3, 3)])
def test_all_orders_of_few_experts(num_groups, topk_groups, num_parts):
    """Each of 720 orders of six experts is a token; its groups are those of its first experts."""
    num_topk, in_group, in_part = 2, 6 // num_groups, 6 // num_parts
    parts = 0
    for order in permutations(range(6)):
        best = list(dict.fromkeys(expert // in_group for expert in order))[:topk_groups]
        taken = [expert for expert in order if expert // in_group in best][:num_topk]
        parts += len({expert // in_part for expert in taken})
    found = expected_parts(6, num_parts, num_groups, topk_groups, num_topk)
    assert found == pytest.approx(parts / 720, rel=1e-12)


# The last one's ranks and groups have no common borders.
SIMULATED = [(256, 4, 8, 8, 4, 8), (256, 8, 8, 8, 4, 8), (128, 2, 4, 4, 2, 6), (96, 3, 4, 8, 3, 6)]


@pytest.mark.parametrize("sizes", SIMULATED, ids=str)
def test_groups_of_the_best_expert_as_drawn(sizes):
    num_experts, nodes, local, num_groups, topk_groups, topk = sizes
    scores_TGe = torch.rand(60000, num_groups, num_experts // num_groups,
                            generator=torch.Generator().manual_seed(1))  # fmt: skip
    best = scores_TGe.amax(dim=2).topk(topk_groups, dim=1).indices
    outside_TG = torch.ones(60000, num_groups, dtype=torch.bool).scatter_(1, best, False)
    topk_idx = scores_TGe.masked_fill(outside_TG.unsqueeze(2), -1).flatten(1).topk(topk).indices
    routing = RoutingSpec(kind="group-limited", num_groups=num_groups, topk_groups=topk_groups)
    copies = copies_of(routing, num_experts, topk, nodes, local)
    for found, num_parts in ((copies.ranks, nodes * local), (copies.nodes, nodes)):
        drawn = parts_of_tokens(topk_idx, num_experts, num_parts)
        assert found == pytest.approx(drawn, rel=0.003)


@pytest.mark.parametrize("sizes", SIMULATED, ids=str)
def test_the_benchmarks_routing_is_close(sizes):
    """It takes the two best of a group together, as DeepSeek-V3 does: within 1.5 %."""
    num_experts, nodes, local, num_groups, topk_groups, topk = sizes
    for routing, tolerance in (
        (RoutingSpec(), 0.003),
        (
            RoutingSpec(kind="group-limited", num_groups=num_groups, topk_groups=topk_groups),
            0.015,
        ),
    ):
        topk_idx, _ = make_routing(routing, 60000, num_experts, topk, seed=2)
        copies = copies_of(routing, num_experts, topk, nodes, local)
        for found, num_parts in ((copies.ranks, nodes * local), (copies.nodes, nodes)):
            drawn = parts_of_tokens(topk_idx, num_experts, num_parts)
            assert found == pytest.approx(drawn, rel=tolerance)


def test_copies_of_known_workloads():
    """What docs and measurements have: W1 on four ranks, and DeepSeek-V3 on its eight nodes."""
    assert copies_of(RoutingSpec(), 256, 8, 1, 4).ranks == pytest.approx(3.614, abs=1e-3)
    limited = copies_of(RoutingSpec(kind="group-limited"), 256, 8, 8, 8)
    assert 3.9 < limited.nodes < 4  # each node is a group, and a token has four
    assert copies_of(RoutingSpec(), 256, 8, 8, 8).nodes == pytest.approx(5.295, abs=1e-3)
    assert copies_of(RoutingSpec(), 256, 8, 1, 8).nodes == pytest.approx(1)


# ---- Captured routing ----------------------------------------------------------------------------

CAPTURE = Path(__file__).parents[1] / "data" / "routing-capture"


@pytest.mark.parametrize(("nodes", "local"), [(1, 2), (2, 1), (2, 2), (1, 8), (4, 2)])
def test_captured_tokens_are_counted_one_by_one(nodes, local):
    """On as many ranks as asked for, whatever the run had."""
    spec = RoutingSpec.of_flags(None, None, None, replay=CAPTURE)
    means = {nodes: [], nodes * local: []}
    fullest = {nodes: [], nodes * local: []}
    for of_layer in spec.captured.topk_idx:
        for parts in means:
            goes = Counter()
            tokens = [row for rows in of_layer for row in rows.tolist()]
            for token in tokens:
                goes.update({expert // (8 // parts) for expert in token})
            means[parts].append(sum(goes.values()) / len(tokens))
            fullest[parts].append(max(goes.values()) * parts / sum(goes.values()))
    found = copies_of(spec, 8, 2, nodes, local)
    assert found.ranks == pytest.approx(mean(means[nodes * local]))
    assert found.nodes == pytest.approx(mean(means[nodes]))
    assert found.fullest_rank == pytest.approx(mean(fullest[nodes * local]))
    assert found.fullest_node == pytest.approx(mean(fullest[nodes]))


def test_dropped_tokens_go_nowhere(tmp_path):
    rows = {1: np.array([[0, 3], [2, -1], [-1, -1], [0, 1]], dtype=np.int16)}
    write_step(tmp_path, 0, RankFile(1, Sizes(4, 2, 8, 1), 0, rows))
    spec = RoutingSpec.of_flags(None, None, None, replay=tmp_path)
    # Two parts: experts 0 and 1, 2 and 3. Tokens in them: 2 and 2.
    assert copies_of(spec, 4, 2, 1, 2)[:3] == (1.0, 0.75, 1.0)


def test_a_captured_uniform_routing_has_the_copies_of_a_uniform_one(tmp_path):
    topk_idx, _ = make_routing(RoutingSpec(), 20000, 64, 4, seed=0)
    rows = {1: topk_idx.sort(dim=1).values.numpy().astype(np.int16)}
    write_step(tmp_path, 0, RankFile(1, Sizes(64, 4, 8, 1), 0, rows))
    spec = RoutingSpec.of_flags(None, None, None, replay=tmp_path)
    found, uniform = (copies_of(each, 64, 4, 2, 4) for each in (spec, RoutingSpec()))
    assert found.ranks == pytest.approx(uniform.ranks, rel=0.01)
    assert found.nodes == pytest.approx(uniform.nodes, rel=0.01)
    assert 1 < found.fullest_rank < 1.03
